"""Convolution's ops: `conv`, forward and transposed of every rank, and `conv_weight_gradient`, of either kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import ops
from . import target as targets
from .dispatch import Plan, plan
from .geometry import ConvGeometry
from .layout import dense_strides, five
from .ops import cached, conv_precision, out_strides, pairs
from .problem import Problem, WeightGradientProblem
from .tensors import TensorMeta, check_bias, check_grad_output, check_tensors, meta

ops.library.define(
    "conv(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt groups, bool transposed, SymInt[] output_padding, str padding_mode, str activation) -> Tensor",
    tags=ops.TAGS,
)
ops.library.define(
    "conv_weight_gradient(Tensor input, Tensor grad_output, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, SymInt groups, str padding_mode, bool channels_last=False, bool transposed=False) -> Tensor",
    tags=ops.TAGS,
)


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


def run_conv(made: Plan, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Launches the plan of a convolution, or that of a form in its place, which may read the weight otherwise."""
    made = ops.settled(made, input.device) if made.pending else made
    return ops.run(made, input, made.arranged(weight), bias)


def _conv(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *arguments: Any) -> torch.Tensor:
    return run_conv(plan_conv(input, weight, bias, *arguments), input, weight, bias)


def _conv_weight_gradient(input: torch.Tensor, grad_output: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return ops.run_partial(plan_conv_weight_gradient(input, grad_output, *arguments), input, grad_output)


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


conv = ops.register(
    "conv", _conv, fake_conv,
    lambda x, w, b, s, p, d, g, transposed, *rest, out_shape: ops.flops_at(x if transposed else out_shape, w),
)  # fmt: skip
conv_weight_gradient = ops.register(
    "conv_weight_gradient", _conv_weight_gradient, _fake_conv_weight_gradient,
    lambda x, dy, *rest, out_shape: ops.flops_at(dy, out_shape),
)  # fmt: skip
