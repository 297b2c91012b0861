"""Hand-written Triton kernels for grouped, depthwise, dilated, transposed and deformable convolution in PyTorch.

>>> import triton_conv as tc
>>> y = tc.conv2d(x, weight, bias, padding=1, groups=64, activation="relu")
>>> print(tc.plan(tc.conv2d, x, weight, bias, padding=1, groups=64))
"""

from . import cost, distributed, errors, nn
from .acceleration import accelerate
from .conversion import convert, plan, revert
from .first_use import set_first_use_check
from .functional import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    deform_conv1d,
    deform_conv2d,
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
from .ops_fused import set_separable_fusion
from .policy import set_backend
from .trial import warmup

__version__ = "0.1.0"

__all__ = [
    "accelerate",
    "channel_shuffle",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convert",
    "cost",
    "deform_conv1d",
    "deform_conv2d",
    "distributed",
    "errors",
    "locally_connected1d",
    "locally_connected2d",
    "locally_connected3d",
    "nn",
    "plan",
    "revert",
    "separable_conv1d",
    "separable_conv2d",
    "separable_conv3d",
    "set_backend",
    "set_first_use_check",
    "set_separable_fusion",
    "shuffle_conv2d",
    "warmup",
]
