"""What a result is compared with: every public function in float64, and how far from it a correct kernel may be.

The references use torch's own convolutions (oneDNN on a CPU, cuDNN on a GPU) and, for deformable convolution, plain
tensor operations. They serve the tuner, the benchmark and the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Problem, WeightGradientProblem
from .problem_deform import DeformProblem
from .problem_lectures import LocalWeightGradientProblem, SeparableProblem

_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "relu6": F.relu6, "gelu": F.gelu, "silu": F.silu}


def activated(result: Tensor, activation: str | None) -> Tensor:
    """A result after its activation; None and "none" are no activation."""
    return result if activation in (None, "none") else _ACTIVATION[activation](result)  # type: ignore[index]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def reference(function: str, arguments: Mapping[str, Any]) -> Tensor:
    """The float64 result of `triton_conv.<function>(**arguments)`, computed by torch."""
    arguments = {name: _double(value) for name, value in arguments.items()}
    activation = arguments.pop("activation", None)
    if function.startswith("deform_conv"):
        result = deform_conv2d(**arguments)
    elif function.startswith("separable_conv"):
        result = _separable(int(function[-2]), **arguments)
    elif function == "shuffle_conv2d":
        ordered = reference("conv2d", arguments | {"activation": activation})
        return F.channel_shuffle(ordered, arguments.get("groups", 1))
    elif function.startswith("locally_connected"):
        result = _locally_connected(int(function[-2]), **arguments)
    else:
        mode = arguments.pop("padding_mode", "zeros")
        arguments = explicit_padding(function, mode, arguments)
        result = getattr(F, function)(**arguments)
    return activated(result, activation)


def _separable(
    rank: int, input: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, bias: Tensor | None = None,
    mid_bias: Tensor | None = None, mid_activation: str | None = None, **window: Any,
) -> Tensor:  # fmt: skip
    function = f"conv{rank}d"
    first = {"weight": depthwise_weight, "bias": mid_bias, "groups": input.shape[1], "activation": mid_activation}
    mid = reference(function, {"input": input, **first, **window})
    return reference(function, {"input": mid, "weight": pointwise_weight, "bias": bias})


def _locally_connected(
    rank: int, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """From the definition: every window of the input times its own filter."""
    strides, dilations = ((v,) * rank if isinstance(v, int) else v for v in (stride, dilation))
    out, (c_out, c_group, *kernel) = weight.shape[:rank], weight.shape[rank:]
    x = F.pad(input, as_pad_takes(_pairs(padding, kernel, dilations)))
    for dim, (k, s, d) in enumerate(zip(kernel, strides, dilations, strict=True), start=2):
        x = x.unfold(dim, (k - 1) * d + 1, s)[..., ::d]
    # [n, groups, c_in/groups, pixels, taps] by [pixels, groups, c_out/groups, c_in/groups, taps]
    taps, pixels = math.prod(kernel), math.prod(out)
    windows = x.reshape(len(input), groups, c_group, pixels, taps)
    filters = weight.reshape(pixels, groups, c_out // groups, c_group, taps)
    result = torch.einsum("ngcpk,pgock->ngop", windows, filters).reshape(len(input), c_out, *out)
    return result if bias is None else result + bias


def explicit_padding(function: str, mode: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Padding that torch's function cannot express, made with `pad` beforehand: modes and (before, after) pairs."""
    padding = arguments.get("padding", 0)
    rank = int(function[-2])
    if mode == "zeros" and (isinstance(padding, (int, str)) or all(isinstance(p, int) for p in padding)):
        return arguments
    dilation = arguments.get("dilation", 1)
    dilations = [dilation] * rank if isinstance(dilation, int) else dilation
    pairs = _pairs(padding, arguments["weight"].shape[2:], dilations)
    padded = F.pad(arguments["input"], as_pad_takes(pairs), mode="constant" if mode == "zeros" else mode)
    return arguments | {"input": padded, "padding": 0}


def _pairs(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, ...]]:
    """(before, after) of each dimension, from any form that a padding is given in."""
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    each = [0 if padding == "valid" else padding] if isinstance(padding, (int, str)) else padding
    pairs = [(p, p) if isinstance(p, int) else tuple(p) for p in each]
    return pairs * len(kernel) if len(pairs) == 1 else pairs


def as_pad_takes(pairs: Sequence[Sequence[int]]) -> list[int]:
    """(before, after) of each dimension as `torch.nn.functional.pad` takes them: the last dimension's first."""
    return [side for pair in reversed(pairs) for side in pair]


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution of Dai et al. and Zhu et al. from its definition, differentiable, with a column buffer."""
    (sh, sw), (ph, pw), (dh, dw) = ((v, v) if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation))
    n, c, h, w = input.shape
    c_out, c_group, kh, kw = weight.shape
    h_out, w_out = offset.shape[2:]
    taps, groups = kh * kw, c // c_group
    offset_groups = offset.shape[1] // (2 * taps)

    def count(n: int) -> Tensor:
        return torch.arange(n, dtype=input.dtype, device=input.device)

    tap = count(taps)
    shift = offset.reshape(n, offset_groups, taps, 2, h_out, w_out)
    y = shift[:, :, :, 0] + (count(h_out) * sh - ph)[:, None] + ((tap // kw) * dh)[:, None, None]
    x = shift[:, :, :, 1] + (count(w_out) * sw - pw) + ((tap % kw) * dw)[:, None, None]
    image = input.reshape(n, offset_groups, c // offset_groups, h * w)
    columns = 0
    # Floors have no derivative, so that at a whole pixel slopes are those to the right, as in torchvision.
    down, right = y - y.floor(), x - x.floor()
    for corner_y, blend_y in ((y.floor(), 1 - down), (y.floor() + 1, down)):
        for corner_x, blend_x in ((x.floor(), 1 - right), (x.floor() + 1, right)):
            inside = (corner_y >= 0) & (corner_y < h) & (corner_x >= 0) & (corner_x < w)
            blend = blend_y * blend_x * inside
            if mask is not None:
                blend = blend * mask.reshape(n, offset_groups, taps, h_out, w_out)
            index = (corner_y.clamp(0, h - 1) * w + corner_x.clamp(0, w - 1)).long()
            index = index.reshape(n, offset_groups, 1, taps * h_out * w_out).expand(-1, -1, image.shape[2], -1)
            samples = image.gather(3, index).view(n, offset_groups, image.shape[2], taps, h_out, w_out)
            columns = columns + samples * blend[:, :, None]
    assert isinstance(columns, Tensor)
    columns = columns.reshape(n, groups, c_group * taps, h_out * w_out)
    result = torch.einsum("ngkp,gok->ngop", columns, weight.reshape(groups, c_out // groups, c_group * taps))
    result = result.reshape(n, c_out, h_out, w_out)
    return result if bias is None else result + bias[:, None, None]


def unit_roundoff(dtype: torch.dtype, precision: str = "ieee") -> float:
    """Half a unit in the last place of one product's operands: tf32 keeps 10 bits of a float32's 23."""
    return 2.0**-11 if dtype == torch.float32 and precision == "tf32" else torch.finfo(dtype).eps / 2


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Largest deviation, each relative to the expected value plus the root mean square of all; infinite for NaN."""
    if result.numel() == 0:
        return 0.0
    scale = expected.abs() + expected.pow(2).mean().sqrt()
    error = ((result.double() - expected).abs() / scale.clamp_min(torch.finfo(torch.float64).tiny)).max().item()
    return error if math.isfinite(error) else math.inf


def tolerance(dtype: torch.dtype, terms: int, precision: str = "ieee", sampled: int = 0) -> float:
    """Bound of `relative_error` for sums of `terms` products.

    Storing a result rounds it once. Accumulation errs like a random walk of `terms` steps; so do products of operands
    that were rounded: to tf32 or, where they are sampled from an image whose longer side is `sampled` pixels, to the
    dtype after interpolation at coordinates that have the accumulator's precision. A walk's end is not met six standard
    deviations away by chance.
    """
    accumulate = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    operands = sampled * accumulate
    if sampled or (dtype == torch.float32 and precision == "tf32"):
        operands += unit_roundoff(dtype, precision)
    return 1.01 * unit_roundoff(dtype) + 6 * (accumulate * (2 + math.sqrt(terms)) + operands)


def rounding(problem: Problem) -> float:
    """What rounding explains of the `relative_error` of a problem's result."""
    g, terms, sampled = problem.geometry, problem.geometry.K, 0
    if isinstance(problem, (WeightGradientProblem, LocalWeightGradientProblem)):
        terms = g.M
    if isinstance(problem, DeformProblem):
        sampled = max(g.in_size)
    if isinstance(problem, SeparableProblem):
        # What lies between its two parts is rounded to the dtype, as a sample is.
        terms, sampled = g.K + g.c_out, 1
    return tolerance(problem.dtype, terms, problem.precision, sampled)
