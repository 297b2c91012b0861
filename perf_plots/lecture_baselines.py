"""What separable, shuffled and locally connected convolution are compared with: they have no function in torch.

The two-kernel form is what a user writes today, once in torch's functions and once in ours; a locally connected layer
is the product of an unfolded input, and its standard convolution the same layer with one filter for all pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import triton_conv as tc
from triton_conv.workloads import Workload, differentiated

Forward = Callable[[Mapping[str, Any]], Tensor]


def forms(workload: Workload) -> dict[str, tuple[Forward, bool]]:
    """Forward passes by the name of the baseline, and whether each reads the workload's memory format or the other."""
    own = workload.channels_last
    if workload.kind == "local":
        return {"unfold": (_unfolded, own)}
    two = _separable if workload.kind == "separable" else _shuffled
    found = {
        "cudnn": (lambda tensors: two(F, tensors), own),
        "cudnn other format": (lambda tensors: two(F, tensors), not own),
        "two kernels": (lambda tensors: two(tc, tensors), own),
    }
    # A shuffled convolution is always one.
    return found | ({"one kernel": (_fused, own)} if workload.kind == "separable" else {})


def calls(workload: Workload, tensors: Mapping[str, Any], format: Callable[[Tensor, bool], Tensor]) -> dict[str, Any]:
    """The calls, by name; operands are put in their memory formats beforehand, by `format`."""
    found = {}
    for name, (forward, channels_last) in forms(workload).items():
        operands = {
            key: format(value, channels_last) if isinstance(value, Tensor) and value.dim() == 4 else value
            for key, value in tensors.items()
        }
        found[name] = differentiated(forward, operands, workload.part)
    return found


def _separable(library: Any, tensors: Mapping[str, Any]) -> Tensor:
    """A depthwise convolution and a 1x1, each a function of the library."""
    depthwise, pointwise = tensors["depthwise_weight"], tensors["pointwise_weight"]
    window = {name: tensors[name] for name in ("stride", "padding", "dilation") if name in tensors}
    conv: Callable[..., Tensor] = getattr(library, f"conv{depthwise.dim() - 2}d")
    return conv(conv(tensors["input"], depthwise, groups=tensors["input"].shape[1], **window), pointwise)


def _fused(tensors: Mapping[str, Any]) -> Tensor:
    """The one kernel, also where the library runs two."""
    with tc.set_separable_fusion(True):
        result: Tensor = getattr(tc, f"separable_conv{tensors['input'].dim() - 2}d")(**tensors)
    return result


def _shuffled(library: Any, tensors: Mapping[str, Any]) -> Tensor:
    """A grouped convolution, and a pass over its output that shuffles the channels."""
    shuffle = F.channel_shuffle if library is F else library.channel_shuffle
    shuffled: Tensor = shuffle(library.conv2d(**tensors), tensors["groups"])
    return shuffled


def _unfolded(tensors: Mapping[str, Any]) -> Tensor:
    """A product for every pixel, over a copy of the input in which each pixel is there once for every tap."""
    x, w = tensors["input"], tensors["weight"]
    h, width, c_out, c_in, *kernel = w.shape
    columns = F.unfold(x, kernel, padding=tensors.get("padding", 0), stride=tensors.get("stride", 1))
    # [pixels, c_out, k] by [pixels, k, images]
    filters = w.reshape(h * width, c_out, c_in * math.prod(kernel))
    result = torch.bmm(filters, columns.permute(2, 1, 0))
    return result.permute(2, 1, 0).reshape(len(x), c_out, h, width)
