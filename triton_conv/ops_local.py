"""The `torch.library` ops of locally connected layers: forward and both gradients; `padding` is flat, as in `ops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import ops
from . import target as targets
from .dispatch import Plan, plan
from .errors import ArgumentError
from .geometry import ConvGeometry, triple
from .layout import Strides, channels_last_like, dense_strides, five, of_rank
from .ops import cached, conv_precision, pairs
from .problem_lectures import (
    LocalInputGradientProblem,
    LocalProblem,
    LocalWeightGradientProblem,
    dense_local_input,
    is_channels_last,
    local_weight_strides,
)
from .tensors import TensorMeta, check_grad_output, check_tensors, meta

ops.library.define(
    "local_conv(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt groups) -> Tensor",
    tags=ops.TAGS,
)
ops.library.define(
    "local_conv_input_gradient(Tensor grad_output, Tensor weight, SymInt[] size, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, SymInt groups, bool channels_last) -> Tensor",
    tags=ops.TAGS,
)
ops.library.define(
    "local_conv_weight_gradient(Tensor input, Tensor grad_output, SymInt[] kernel_size, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, SymInt groups, bool channels_last) -> Tensor",
    tags=ops.TAGS,
)

# From so many images on, a copy of the input with its images innermost is read in whole lines; weights are far more
# bytes than both together (of 3 x 3: 9 c_out for each image of the batch).
_IMAGES_WORTH_A_COPY = 8


def _as_read(tensor: TensorMeta, channels_innermost: bool) -> tuple[int, ...]:
    """Strides of an input, or of its copy if one is worth making: as it is where channels lie side by side in the
    filters and in it, or there are few images; else with its images innermost.
    """
    kept = channels_innermost and is_channels_last(tensor.shape, tensor.strides)
    if kept or tensor.shape[0] < _IMAGES_WORTH_A_COPY:
        return tensor.strides
    return dense_local_input(tensor.shape)


def _arranged(tensor: torch.Tensor, read: Strides) -> torch.Tensor:
    """The tensor, or a copy of it, with the strides that the plan reads."""
    strides = of_rank(tensor.dim() - 2, read)
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _filters(weight: TensorMeta, rank: int) -> dict[str, Any]:
    """What a problem takes of a weight's layout."""
    d, h, w = triple(weight.strides[:rank], 0)
    return dict(w_strides=five(weight.strides[rank:]), place_strides=(d, h, w))


def _flat(weight: TensorMeta, rank: int, geometry: ConvGeometry) -> bool:
    layout = LocalProblem(geometry, weight.dtype, (0,) * 5, y_strides=(0,) * 5, **_filters(weight, rank))
    return layout.flat


def _local_geometry(
    input: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> ConvGeometry:  # fmt: skip
    rank = len(input) - 2
    geometry = ConvGeometry.of(input, weight[rank:], stride, pairs(padding), dilation, groups)
    out = geometry.spatial(geometry.out_size)
    if tuple(weight[:rank]) != out:
        raise ArgumentError(
            f"weight: expected a filter for each of {list(out)} outputs of input {list(input)}, "
            f"got weight {list(weight)}"
        )
    return geometry


def plan_local_conv(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Plan:
    """Plans a locally connected layer."""
    return _plan_local_conv(
        TensorMeta.of("input", input), TensorMeta.of("weight", weight), meta("bias", bias), tuple(stride),
        tuple(padding), tuple(dilation), groups, conv_precision(input.dtype),
    )  # fmt: skip


def _forward_geometry(
    input: TensorMeta, weight: TensorMeta, bias: TensorMeta | None, *window: Any
) -> tuple[ConvGeometry, tuple[int, ...]]:
    """The geometry of a forward call, after checking its tensors, and the strides of its result."""
    check_tensors(input, {"weight": weight, "bias": bias})
    geometry = _local_geometry(input.shape, weight.shape, *window)
    spatial = geometry.spatial(geometry.out_size)
    if bias is not None and tuple(bias.shape) != (geometry.c_out, *spatial):
        raise ArgumentError(
            f"bias: expected {[geometry.c_out, *spatial]} for weight {list(weight.shape)}, got bias {list(bias.shape)}"
        )
    return geometry, dense_strides(geometry.out_shape, channels_last_like(input.shape, input.strides))


@cached
def _plan_local_conv(
    input: TensorMeta,
    weight: TensorMeta,
    bias: TensorMeta | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    precision: str,
) -> Plan:
    geometry, out_strides = _forward_geometry(input, weight, bias, stride, padding, dilation, groups)
    rank = len(stride)
    d, h, w = triple(() if bias is None else bias.strides[1:], 0)
    problem = LocalProblem(
        geometry,
        input.dtype,
        five(_as_read(input, not _flat(weight, rank, geometry))),
        y_strides=five(out_strides),
        has_bias=bias is not None,
        precision=precision,
        bias_strides=(0 if bias is None else bias.strides[0], d, h, w),
        **_filters(weight, rank),
    )
    return plan(problem, targets.of_device(input.device))


def plan_local_conv_input_gradient(
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Plan:
    """Plans the input gradient of a locally connected layer whose input has spatial `size`."""
    return _plan_local_conv_input_gradient(
        TensorMeta.of("grad_output", grad_output), TensorMeta.of("weight", weight), tuple(size), tuple(stride),
        tuple(padding), tuple(dilation), groups, channels_last, conv_precision(weight.dtype),
    )  # fmt: skip


def _input_gradient_geometry(
    grad_output: TensorMeta, weight: TensorMeta, size: Sequence[int], *window: Any
) -> tuple[ConvGeometry, tuple[int, ...]]:
    """The geometry of an input gradient, after checking its tensors, and the shape of the input."""
    check_tensors(grad_output, {"weight": weight})
    *_, groups = window
    shape = (grad_output.shape[0], weight.shape[len(size) + 1] * groups, *size)
    geometry = _local_geometry(shape, weight.shape, *window)
    check_grad_output(grad_output, geometry.out_shape, shape)
    return geometry, shape


@cached
def _plan_local_conv_input_gradient(
    grad_output: TensorMeta,
    weight: TensorMeta,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    channels_last: bool,
    precision: str,
) -> Plan:
    geometry, shape = _input_gradient_geometry(grad_output, weight, size, stride, padding, dilation, groups)
    problem = LocalInputGradientProblem(
        geometry,
        weight.dtype,
        five(dense_strides(shape, channels_last)),
        y_strides=five(_as_read(grad_output, not _flat(weight, len(stride), geometry))),
        precision=precision,
        aligned=weight.aligned,
        **_filters(weight, len(stride)),
    )
    return plan(problem, targets.of_device(grad_output.device))


def plan_local_conv_weight_gradient(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Plan:
    """Plans the weight gradient of a locally connected layer, in the order that the weight has."""
    return _plan_local_conv_weight_gradient(
        TensorMeta.of("input", input), TensorMeta.of("grad_output", grad_output), tuple(kernel_size), tuple(stride),
        tuple(padding), tuple(dilation), groups, channels_last, conv_precision(input.dtype),
    )  # fmt: skip


def _weight_gradient_geometry(
    input: TensorMeta, grad_output: TensorMeta, kernel_size: Sequence[int], *window: Any
) -> tuple[ConvGeometry, tuple[int, ...]]:
    """The geometry of a weight gradient, after checking its tensors, and the shape of the weight."""
    check_tensors(input, {"grad_output": grad_output})
    *_, groups = window
    shape = (*grad_output.shape[2:], grad_output.shape[1], input.shape[1] // groups, *kernel_size)
    geometry = _local_geometry(input.shape, shape, *window)
    check_grad_output(grad_output, geometry.out_shape, input.shape)
    return geometry, shape


@cached
def _plan_local_conv_weight_gradient(
    input: TensorMeta,
    grad_output: TensorMeta,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    channels_last: bool,
    precision: str,
) -> Plan:
    rank = len(stride)
    geometry, shape = _weight_gradient_geometry(input, grad_output, kernel_size, stride, padding, dilation, groups)
    weight = TensorMeta(shape, local_weight_strides(shape, channels_last), input.dtype, input.device)
    innermost = not _flat(weight, rank, geometry)
    problem = LocalWeightGradientProblem(
        geometry,
        input.dtype,
        five(_as_read(input, innermost)),
        y_strides=five(_as_read(grad_output, innermost)),
        precision=precision,
        **_filters(weight, rank),
    )
    return plan(problem, targets.of_device(input.device))


def _local_conv(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> torch.Tensor:
    made = plan_local_conv(input, weight, bias, *rest)
    return ops.run(made, _arranged(input, made.problem.x_strides), weight, bias)


def _local_conv_input_gradient(grad_output: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    made = plan_local_conv_input_gradient(grad_output, weight, *rest)
    return ops.run(made, _arranged(grad_output, made.problem.y_strides), weight)


def _local_conv_weight_gradient(input: torch.Tensor, grad_output: torch.Tensor, *rest: Any) -> torch.Tensor:
    made = plan_local_conv_weight_gradient(input, grad_output, *rest)
    x, dy = _arranged(input, made.problem.x_strides), _arranged(grad_output, made.problem.y_strides)
    return ops.run(made, x, dy)


def _fake_local_conv(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> torch.Tensor:
    tensors = TensorMeta.of("input", input), TensorMeta.of("weight", weight), meta("bias", bias)
    geometry, strides = _forward_geometry(*tensors, *rest)
    return input.new_empty_strided(geometry.out_shape, strides)


def _fake_input_gradient(grad_output: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    *window, channels_last = rest
    tensors = TensorMeta.of("grad_output", grad_output), TensorMeta.of("weight", weight)
    _, shape = _input_gradient_geometry(*tensors, *window)
    return grad_output.new_empty_strided(shape, dense_strides(shape, channels_last))


def _fake_weight_gradient(input: torch.Tensor, grad_output: torch.Tensor, *rest: Any) -> torch.Tensor:
    *window, channels_last = rest
    tensors = TensorMeta.of("input", input), TensorMeta.of("grad_output", grad_output)
    _, shape = _weight_gradient_geometry(*tensors, *window)
    return input.new_empty_strided(shape, local_weight_strides(shape, channels_last))


# A weight has a filter for every pixel already.
local_conv = ops.register(
    "local_conv", _local_conv, _fake_local_conv, lambda x, w, *rest, out_shape: ops.flops_at(x[:1], w)
)
local_conv_input_gradient = ops.register(
    "local_conv_input_gradient", _local_conv_input_gradient, _fake_input_gradient,
    lambda dy, w, *rest, out_shape: ops.flops_at(dy[:1], w),
)  # fmt: skip
local_conv_weight_gradient = ops.register(
    "local_conv_weight_gradient", _local_conv_weight_gradient, _fake_weight_gradient,
    lambda x, dy, *rest, out_shape: ops.flops_at(x[:1], out_shape),
)  # fmt: skip

PLANNERS: dict[Any, Callable[..., Plan]] = {
    local_conv: plan_local_conv,
    local_conv_input_gradient: plan_local_conv_input_gradient,
    local_conv_weight_gradient: plan_local_conv_weight_gradient,
}
"""What plans each op, by op."""
