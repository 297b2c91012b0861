"""Hand-written Triton kernels for grouped, depthwise, dilated, transposed and deformable convolution in PyTorch.

>>> import triton_conv as tc
>>> y = tc.conv2d(x, weight, bias, padding=1, groups=64, activation="relu")
>>> print(tc.plan(tc.conv2d, x, weight, bias, padding=1, groups=64))
"""

from . import cost, errors
from .functional import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    deform_conv2d,
    plan,
)
from .lectures import (
    channel_shuffle,
    locally_connected1d,
    locally_connected2d,
    locally_connected3d,
    separable_conv1d,
    separable_conv2d,
    separable_conv3d,
    shuffle_conv2d,
)

__version__ = "0.1.0"

__all__ = [
    "channel_shuffle",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "cost",
    "deform_conv2d",
    "errors",
    "locally_connected1d",
    "locally_connected2d",
    "locally_connected3d",
    "plan",
    "separable_conv1d",
    "separable_conv2d",
    "separable_conv3d",
    "shuffle_conv2d",
]
