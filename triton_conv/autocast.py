"""torch's autocast, by torch's rules for convolutions: operands go to the lower precision, float64 ones stay.

The cast happens before the op, so that its gradient is part of the graph; gradients are computed outside autocast, in
whatever precision their forward pass had, as torch has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_DEVICES = ("cuda", "cpu")


def operands(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Input, weight and bias as a convolution of torch's would take them here: as they are, outside autocast."""
    return _cast(tensors[0], tensors, ())


def coordinates(input: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Offset and mask likewise; of these float32 is kept, since eight bits of a coordinate are not a pixel."""
    return _cast(input, tensors, (torch.float32,))


def deform_operands(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Any, ...]:
    """Those of a deformable convolution."""
    offset, mask = coordinates(input, offset, mask)
    input, weight, bias = operands(input, weight, bias)
    return input, offset, mask, weight, bias


def lower(input: Tensor) -> torch.dtype | None:
    """The dtype that such an input goes to here; None outside autocast."""
    device = input.device.type if torch._C._is_any_autocast_enabled() else ""
    return torch.get_autocast_dtype(device) if device in _DEVICES and torch.is_autocast_enabled(device) else None


def _cast(input: Any, tensors: tuple[Tensor | None, ...], kept: tuple[torch.dtype, ...]) -> tuple[Tensor | None, ...]:
    to = lower(input)
    if to is None:
        return tensors
    device, kept = input.device.type, (*kept, torch.float64)
    return tuple(
        t if t is None or t.dtype in kept or not t.is_floating_point() or t.device.type != device else t.to(to)
        for t in tensors
    )
