"""What every `torch.library` op of ours is made of: plans that are remembered, allocation, launch, its registration.

The ops themselves are in `ops_conv`, `ops_deform`, `ops_fused` and `ops_local`. Their arguments arrive normalised from
`functional`; `padding` is flat: before and after for each dimension. Each op has a fake kernel made from the geometry
that its plan is made from: shapes and strides are known without running or planning anything, also of symbolic sizes
(torch.compile with dynamic shapes).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import register_flop_formula

from . import eager, first_use, verdicts
from .dispatch import Plan, plan
from .errors import ArgumentError, CaptureError
from .kernels.sum_partials import sum_partials
from .layout import channels_last_like, dense_strides
from .tensors import TensorMeta

# As `torch.backends.cudnn.conv.fp32_precision` asks for it, in a quarter of the time.
_fp32_precision: Any = functools.partial(torch._C._get_fp32_precision_getter, "cuda", "conv")
# Each op has a fake kernel with symbolic sizes, autograd and torch's own checks: what torch.compile asks for.
TAGS = (torch.Tag.pt2_compliant_tag,)
library = torch.library.Library("triton_conv", "DEF")


T = TypeVar("T")
_caches: list[Any] = [plan]
# What else `forget_plans` calls, for choices that are remembered elsewhere.
on_forgetting: list[Callable[[], object]] = []


def cached(planner: Callable[..., T]) -> Callable[..., T]:
    """Plans a call once; a call seen before costs a look-up, and while a CUDA graph is captured no other is taken."""

    @functools.wraps(planner)
    def plan_cold(*arguments: Any) -> T:
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise CaptureError(
                "a CUDA graph is being captured, and this call was not seen before: its plan would be read from disk "
                "and its kernel compiled. Make the same call once before, or triton_conv.warmup(model, example)"
            )
        return planner(*arguments)

    cache = functools.lru_cache(maxsize=4096)(plan_cold)
    _caches.append(cache)
    return cache


def _forget() -> None:
    for cache in _caches:
        cache.cache_clear()
    for forget in on_forgetting:
        forget()


def forget_plans() -> None:
    """Drops every cached plan and choice, for callers that changed the files of configurations on disk."""
    from . import comparisons, configs

    _forget()
    comparisons.entries.cache_clear()
    configs.forget()
    verdicts.forget()


def conv_precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: torch's own setting for convolutions, tf32 or ieee."""
    if dtype is torch.float32 and _fp32_precision() == "tf32":
        return "tf32"
    return "ieee"


def traced(value: Any) -> Any:
    """Of a symbolic size the one that the graph is traced with: asking for that sets no guard on the graph."""
    if isinstance(value, TensorMeta):
        return value._replace(shape=traced(value.shape), strides=traced(value.strides))
    if isinstance(value, tuple):
        return tuple(map(traced, value))
    if not isinstance(value, torch.SymInt):
        return value
    hint = value.node.hint
    if hint is None:
        raise ArgumentError(f"input: its size {value} is known only when it runs")
    return int(hint)


def pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    """Flat padding as (before, after) a dimension."""
    return [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]


def out_strides(shape: tuple[int, ...], input: TensorMeta, weight: TensorMeta) -> tuple[int, ...]:
    """Strides of an output: channels_last if input or weight is, as torch has it.

    torch makes a 1-D input contiguous first, but looks at a 1-D weight as if it were an image of height 1.
    """
    if len(shape) > 3:
        return dense_strides(shape, any(channels_last_like(meta.shape, meta.strides) for meta in (input, weight)))
    (first, second, k), (outer, inner, step) = weight.shape, weight.strides
    return dense_strides(shape, channels_last_like((first, second, 1, k), (outer, inner, k * step, step)))


# By this name: tests put a function in its place that writes NaN.
allocate = eager.allocate


def settled(made: Plan, device: torch.device) -> Plan:
    """The plan whose form was never used on this architecture, or a plainer one if that turns out wrong."""
    chosen = first_use.settle(made, device)
    if chosen is not made:
        # Every plan of the wrong form, and every choice made because of one.
        _forget()
    return chosen


def run(made: Plan, input: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
    """Allocates the output of a plan and launches it."""
    made = settled(made, input.device) if made.pending else made
    output = allocate(made.out_shape, made.out_strides, input)
    if made.grid:
        made.launch(input, *tensors, output)
    return output


def run_partial(made: Plan, input: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
    """Launches a plan whose kernel may write partial sums, and adds them up."""
    made = settled(made, input.device) if made.pending else made
    result = allocate(made.out_shape, made.result_strides, input)
    if not made.grid:
        return result.zero_()
    if made.partial is None:
        made.launch(input, *tensors, result)
        return result
    partial = allocate(*made.partial, input, made.problem.accumulator)
    made.launch(input, *tensors, partial)
    sum_partials(partial, result)
    return result


def register(name: str, implementation: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int]) -> Any:
    """Gives a defined op its implementation, its fake kernel, and what torch's FlopCounterMode counts of it by shapes;
    returns the op.
    """
    there = eager.on_device(implementation)
    for backend in ("CPU", "CUDA"):
        library.impl(name, there, backend)
    torch.library.register_fake(f"triton_conv::{name}", fake, lib=library)
    packet = getattr(torch.ops.triton_conv, name)
    register_flop_formula(packet)(flops)
    eager.implementations[packet.default] = there
    return packet.default


def flops_at(outputs: Sequence[int], *weights: Sequence[int]) -> int:
    """Those of filters of these shapes at every pixel of a shape, a multiply and an add each, as torch counts them."""
    return 2 * outputs[0] * math.prod(outputs[2:]) * sum(map(math.prod, weights))
