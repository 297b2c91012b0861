"""torch's autocast, by torch's rules for convolutions: operands go to the lower precision, float64 ones stay.

The cast happens before the op, so that its gradient is part of the graph; gradients are computed outside autocast, in
whatever precision their forward pass had, as torch has it.
"""

from __future__ import annotations

from torch import Tensor, float32, float64, get_autocast_dtype, is_autocast_enabled
from torch import dtype as Dtype

_DEVICES = ("cuda", "cpu")


def lower_precision(device: str) -> Dtype | None:
    """The dtype that convolutions on a device of this type are to run in, or None outside autocast."""
    if device not in _DEVICES or not is_autocast_enabled(device):
        return None
    return get_autocast_dtype(device)


def cast(tensor: Tensor | None, dtype: Dtype, device: str) -> Tensor | None:
    """The tensor in `dtype` if it is one that autocast touches: floating point but not float64, on that device."""
    if tensor is None or tensor.device.type != device or tensor.dtype == float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def cast_coordinates(tensor: Tensor | None, dtype: Dtype, device: str) -> Tensor | None:
    """The same for an offset or a mask, of which float32 is kept: eight bits of a coordinate are not a pixel."""
    return tensor if tensor is not None and tensor.dtype == float32 else cast(tensor, dtype, device)
