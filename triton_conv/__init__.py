"""Hand-written Triton kernels for grouped, depthwise, dilated, transposed and deformable convolution in PyTorch.

>>> import triton_conv as tc
>>> y = tc.conv2d(x, weight, bias, padding=1, groups=64, activation="relu")
>>> print(tc.plan(tc.conv2d, x, weight, bias, padding=1, groups=64))
"""

from . import distributed, errors, nn
from .acceleration import accelerate
from .conversion import convert, plan, revert
from .functional import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    deform_conv2d,
)
from .policy import set_backend
from .trial import warmup

__version__ = "0.1.0"

__all__ = [
    "accelerate",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convert",
    "deform_conv2d",
    "distributed",
    "errors",
    "nn",
    "plan",
    "revert",
    "set_backend",
    "warmup",
]
