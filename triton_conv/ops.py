"""The `torch.library` ops: plan, allocate, launch. Arguments arrive normalised from `functional`.

`conv` serves forward and transposed convolution of every rank, `conv_weight_gradient` the weight gradient of either
kind; those of deformable convolution are in `ops_deform`. Each op has a fake kernel made from the same geometry: shapes
and strides are known without running or planning anything, also of symbolic sizes (torch.compile with dynamic shapes).
`padding` is flat: before and after for each dimension.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import register_flop_formula

from . import eager, first_use, verdicts
from . import target as targets
from .dispatch import Plan, plan
from .errors import ArgumentError, CaptureError
from .geometry import ConvGeometry
from .kernels.sum_partials import sum_partials
from .layout import channels_last_like, dense_strides, five
from .problem import Problem, WeightGradientProblem
from .tensors import TensorMeta, check_bias, check_grad_output, check_tensors, meta

# As `torch.backends.cudnn.conv.fp32_precision` asks for it, in a quarter of the time.
_fp32_precision: Any = functools.partial(torch._C._get_fp32_precision_getter, "cuda", "conv")
# Each op has a fake kernel with symbolic sizes, autograd and torch's own checks: what torch.compile asks for.
TAGS = (torch.Tag.pt2_compliant_tag,)
library = torch.library.Library("triton_conv", "DEF")
library.define(
    "conv(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt groups, bool transposed, SymInt[] output_padding, str padding_mode, str activation) -> Tensor",
    tags=TAGS,
)
library.define(
    "conv_weight_gradient(Tensor input, Tensor grad_output, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, SymInt groups, str padding_mode, bool channels_last=False, bool transposed=False) -> Tensor",
    tags=TAGS,
)


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


def plan_conv(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
    padding_mode: str,
    activation: str,
) -> Plan:
    """Validates the tensors and plans the call; a call seen before costs a look-up."""
    return plan_conv_of(
        TensorMeta.of("input", input),
        TensorMeta.of("weight", weight),
        meta("bias", bias),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        transposed,
        tuple(output_padding),
        padding_mode,
        activation,
        conv_precision(input.dtype),
    )


def _conv_geometry(
    input: TensorMeta,
    weight: TensorMeta,
    bias: TensorMeta | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
    padding_mode: str,
) -> ConvGeometry:
    check_tensors(input, {"weight": weight, "bias": bias})
    geometry = ConvGeometry.of(
        input.shape,
        weight.shape,
        stride,
        pairs(padding),
        dilation,
        groups,
        transposed=transposed,
        output_padding=output_padding,
        padding_mode=padding_mode,
    )
    check_bias(bias, weight.shape, geometry.c_out)
    return geometry


@cached
def plan_conv_of(
    input: TensorMeta,
    weight: TensorMeta,
    bias: TensorMeta | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    transposed: bool,
    output_padding: tuple[int, ...],
    padding_mode: str,
    activation: str,
    precision: str,
) -> Plan:
    """`plan_conv` by what planning sees of the tensors."""
    geometry = _conv_geometry(
        input, weight, bias, stride, padding, dilation, groups, transposed, output_padding, padding_mode
    )
    problem = Problem(
        geometry,
        input.dtype,
        five(input.strides),
        five(weight.strides),
        five(out_strides(geometry.out_shape, input, weight)),
        has_bias=bias is not None,
        stride_b=1 if bias is None else bias.strides[0],
        activation=activation,
        precision=precision,
        aligned=input.aligned and weight.aligned,
    )
    return plan(problem.rearranged(), targets.of_device(input.device))


def plan_conv_weight_gradient(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
    channels_last: bool = False,
    transposed: bool = False,
) -> Plan:
    """Plans the weight gradient of a forward convolution from its input and its output's gradient, in the memory format
    asked for; of a `transposed` one these two have changed places.
    """
    return _plan_conv_weight_gradient(
        TensorMeta.of("input", input),
        TensorMeta.of("grad_output", grad_output),
        tuple(kernel_size),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        padding_mode,
        channels_last,
        transposed,
        conv_precision(input.dtype),
    )


def _weight_gradient_geometry(
    input: TensorMeta,
    grad_output: TensorMeta,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
) -> ConvGeometry:
    check_tensors(input, {"grad_output": grad_output})
    weight_shape = (grad_output.shape[1], input.shape[1] // groups, *kernel_size)
    geometry = ConvGeometry.of(
        input.shape, weight_shape, stride, pairs(padding), dilation, groups, padding_mode=padding_mode
    )
    check_grad_output(grad_output, geometry.out_shape, input.shape)
    return geometry


@cached
def _plan_conv_weight_gradient(
    input: TensorMeta,
    grad_output: TensorMeta,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    padding_mode: str,
    channels_last: bool,
    transposed: bool,
    precision: str,
) -> Plan:
    geometry = _weight_gradient_geometry(
        input, grad_output, kernel_size, stride, padding, dilation, groups, padding_mode
    )
    problem = WeightGradientProblem(
        geometry,
        input.dtype,
        five(input.strides),
        (0, 0, 0, 0, 0),
        five(grad_output.strides),
        precision=precision,
        aligned=input.aligned,
        channels_last=channels_last,
        transposed=transposed,
    )
    return plan(problem, targets.of_device(input.device))


# By this name: tests put a function in its place that writes NaN.
allocate = eager.allocate


def _settled(made: Plan, device: torch.device) -> Plan:
    """The plan whose form was never used on this architecture, or a plainer one if that turns out wrong."""
    chosen = first_use.settle(made, device)
    if chosen is not made:
        # Every plan of the wrong form, and every choice made because of one.
        _forget()
    return chosen


def run(made: Plan, input: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
    """Allocates the output of a plan and launches it."""
    made = _settled(made, input.device) if made.pending else made
    output = allocate(made.out_shape, made.out_strides, input)
    if made.grid:
        made.launch(input, *tensors, output)
    return output


def run_conv(made: Plan, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Launches the plan of a convolution, or that of a form in its place, which may read the weight otherwise."""
    made = _settled(made, input.device) if made.pending else made
    return run(made, input, made.arranged(weight), bias)


def _conv(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *arguments: Any) -> torch.Tensor:
    return run_conv(plan_conv(input, weight, bias, *arguments), input, weight, bias)


def run_partial(made: Plan, input: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
    """Launches a plan whose kernel may write partial sums, and adds them up."""
    made = _settled(made, input.device) if made.pending else made
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


def _conv_weight_gradient(input: torch.Tensor, grad_output: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return run_partial(plan_conv_weight_gradient(input, grad_output, *arguments), input, grad_output)


def fake_conv(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *arguments: Any) -> torch.Tensor:
    """What `conv` of these arguments returns, without its values."""
    x, w = TensorMeta.of("input", input), TensorMeta.of("weight", weight)
    shape = _conv_geometry(x, w, meta("bias", bias), *arguments[:-1]).out_shape
    return input.new_empty_strided(shape, out_strides(shape, x, w))


def _fake_conv_weight_gradient(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
    channels_last: bool = False,
    transposed: bool = False,
) -> torch.Tensor:
    x, dy = TensorMeta.of("input", input), TensorMeta.of("grad_output", grad_output)
    geometry = _weight_gradient_geometry(x, dy, kernel_size, stride, padding, dilation, groups, padding_mode)
    shape = (geometry.c_out, geometry.c_in_group, *kernel_size)
    return input.new_empty_strided(shape, dense_strides(shape, channels_last))


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


conv = register(
    "conv", _conv, fake_conv,
    lambda x, w, b, s, p, d, g, transposed, *rest, out_shape: flops_at(x if transposed else out_shape, w),
)  # fmt: skip
conv_weight_gradient = register(
    "conv_weight_gradient", _conv_weight_gradient, _fake_conv_weight_gradient,
    lambda x, dy, *rest, out_shape: flops_at(dy, out_shape),
)  # fmt: skip
