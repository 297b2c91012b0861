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


def _cast(input: Any, tensors: tuple[Tensor | None, ...], kept: tuple[torch.dtype, ...]) -> tuple[Tensor | None, ...]:
    device = input.device.type
    if device not in _DEVICES or not torch.is_autocast_enabled(device):
        return tensors
    lower, kept = torch.get_autocast_dtype(device), (*kept, torch.float64)
    return tuple(
        t if t is None or t.dtype in kept or not t.is_floating_point() or t.device.type != device else t.to(lower)
        for t in tensors
    )
