"""The `torch.library` ops of deformable convolution: the forward pass, and gradients of what is sampled and of weights.

The numbers of weight and offset groups follow from the shapes, as in torchvision. `padding` is flat, as in `ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import ops
from . import target as targets
from .deform_geometry import forward_geometry, input_gradient_geometry, weight_gradient_geometry
from .dispatch import Plan, plan
from .layout import dense_like, five
from .ops import cached, conv_precision
from .problem_deform import DeformInputGradientProblem, DeformProblem, DeformWeightGradientProblem
from .tensors import TensorMeta, meta

ops.library.define(
    "deform_conv(Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation) -> Tensor",
    tags=ops.TAGS,
)
ops.library.define(
    "deform_conv_input_gradient(Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor grad_output, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool[] needed, bool deterministic) "
    "-> (Tensor, Tensor, Tensor)",
    tags=ops.TAGS,
)
ops.library.define(
    "deform_conv_weight_gradient(Tensor input, Tensor offset, Tensor? mask, Tensor grad_output, SymInt[] kernel_size, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups) -> Tensor",
    tags=ops.TAGS,
)


def plan_deform_conv(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Plan:
    """Validates the tensors and plans the call; a call seen before costs a look-up."""
    return plan_deform_conv_of(
        TensorMeta.of("input", input),
        TensorMeta.of("offset", offset),
        meta("mask", mask),
        TensorMeta.of("weight", weight),
        meta("bias", bias),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        conv_precision(input.dtype),
    )


@cached
def plan_deform_conv_of(
    input: TensorMeta,
    offset: TensorMeta,
    mask: TensorMeta | None,
    weight: TensorMeta,
    bias: TensorMeta | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    precision: str,
) -> Plan:
    """`plan_deform_conv` by what planning sees of the tensors."""
    geometry, fields = forward_geometry(input, offset, mask, weight, bias, stride, padding, dilation)
    problem = DeformProblem(
        geometry,
        input.dtype,
        five(input.strides),
        five(weight.strides),
        five(ops.out_strides(geometry.out_shape, input, weight)),
        has_bias=bias is not None,
        stride_b=1 if bias is None else bias.strides[0],
        precision=precision,
        **fields,
    )
    return plan(problem, targets.of_device(input.device))


def plan_deform_conv_input_gradient(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    grad_output: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needed: Sequence[bool],
    deterministic: bool,
) -> Plan:
    """Plans the gradients of input, offset and mask, those that are `needed`, from the output's gradient."""
    return _plan_input_gradient(
        TensorMeta.of("input", input),
        TensorMeta.of("offset", offset),
        meta("mask", mask),
        TensorMeta.of("weight", weight),
        TensorMeta.of("grad_output", grad_output),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        tuple(needed),
        deterministic,
        conv_precision(input.dtype),
    )


@cached
def _plan_input_gradient(
    input: TensorMeta,
    offset: TensorMeta,
    mask: TensorMeta | None,
    weight: TensorMeta,
    grad_output: TensorMeta,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    needed: tuple[bool, ...],
    deterministic: bool,
    precision: str,
) -> Plan:
    geometry, fields = input_gradient_geometry(
        input, offset, mask, weight, grad_output, stride, padding, dilation, needed
    )
    need_input, need_offset, need_mask = needed
    problem = DeformInputGradientProblem(
        geometry,
        input.dtype,
        five(input.strides),
        five(weight.strides),
        five(grad_output.strides),
        need_input=need_input,
        need_offset=need_offset,
        need_mask=need_mask,
        fixed_point=deterministic and need_input,
        precision=precision,
        **fields,
    )
    return plan(problem, targets.of_device(input.device))


def plan_deform_conv_weight_gradient(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    grad_output: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Plan:
    """Plans the weight gradient from what is sampled and the output's gradient."""
    return _plan_weight_gradient(
        TensorMeta.of("input", input),
        TensorMeta.of("offset", offset),
        meta("mask", mask),
        TensorMeta.of("grad_output", grad_output),
        tuple(kernel_size),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        conv_precision(input.dtype),
    )


@cached
def _plan_weight_gradient(
    input: TensorMeta,
    offset: TensorMeta,
    mask: TensorMeta | None,
    grad_output: TensorMeta,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    precision: str,
) -> Plan:
    geometry, fields = weight_gradient_geometry(
        input, offset, mask, grad_output, kernel_size, stride, padding, dilation, groups
    )
    strides = five(input.strides), (0, 0, 0, 0, 0), five(grad_output.strides)
    problem = DeformWeightGradientProblem(geometry, input.dtype, *strides, precision=precision, **fields)
    return plan(problem, targets.of_device(input.device))


def _scale(grad_output: torch.Tensor, mask: torch.Tensor | None, weight: torch.Tensor, made: Plan) -> torch.Tensor:
    """How many units one is, in the fixed point of a deterministic input gradient: a power of two, or zero.

    An element of the gradient sums |dy| |w| |mask| over at most all pixels, taps and output channels of its image and
    group, each corner's weight being at most one. With B that sum's upper bound over all elements, 2^62 / B units leave
    a factor of two for rounding, and are B / 2^62 each: of a convolution over 10^7 products as large as each other, a
    unit is 2^-39 of one product. Every term is cut by less than a unit. Zero stands for a bound that is not finite.
    """
    groups = made.problem.geometry.groups
    pixels = torch.linalg.vector_norm(grad_output, 1, (2, 3), dtype=torch.float64)  # [images, c_out]
    taps = torch.linalg.vector_norm(weight, 1, (2, 3), dtype=torch.float64).amax(1)  # [c_out]
    bound = (pixels * taps).unflatten(1, (groups, -1)).sum(2).amax()
    if mask is not None:
        bound = bound * torch.linalg.vector_norm(mask, float("inf"), dtype=torch.float64)
    # A float32 scale is a normal number; finer units would be finer than the least float32.
    limit = 1022 if made.problem.accumulator == torch.float64 else 126
    exponent = (62 - torch.frexp(bound).exponent).clamp(-limit, limit)
    return torch.where(bound.isfinite(), torch.ldexp(torch.ones_like(bound), exponent), 0.0)


def _deform_conv(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *arguments: Any,
) -> torch.Tensor:
    made = plan_deform_conv(input, offset, mask, weight, bias, *arguments)
    return ops.run(made, input, offset, mask, weight, bias)


def run_input_gradient(
    made: Plan,
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    grad_output: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Launches the plan of the gradients of input, offset and mask; None for those that are not of it."""
    problem = made.problem
    assert isinstance(problem, DeformInputGradientProblem)
    sums = scale = grad_offset = grad_mask = None
    dtype = problem.operand("dx_ptr")
    if dtype is not None:
        elements = input.numel()
        sums = torch.zeros(elements, dtype=dtype, device=input.device).as_strided(made.out_shape, made.out_strides)
        if problem.fixed_point and made.grid and elements:
            scale = _scale(grad_output, mask, weight, made)
    if problem.need_offset:
        grad_offset = ops.allocate(problem.offset_shape, problem.offset_gradient_strides, offset)
    if problem.need_mask and mask is not None:
        grad_mask = ops.allocate(problem.mask_shape, problem.mask_gradient_strides, mask)
    if made.grid:
        units = None if scale is None else scale.to(problem.accumulator)
        made.launch(input, offset, mask, weight, grad_output, units, sums, grad_offset, grad_mask)
    if scale is not None:
        assert sums is not None
        sums = sums * torch.where(scale > 0, 1 / scale, float("nan"))
    if sums is not None and dtype != input.dtype:
        sums = ops.allocate(made.out_shape, made.out_strides, input).copy_(sums)
    return sums, grad_offset, grad_mask


def _input_gradient(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    grad_output: torch.Tensor,
    *arguments: Any,
) -> tuple[torch.Tensor, ...]:
    made = plan_deform_conv_input_gradient(input, offset, mask, weight, grad_output, *arguments)
    results = run_input_gradient(made, input, offset, mask, weight, grad_output)
    return tuple(input.new_empty(0) if result is None else result for result in results)


def _weight_gradient(
    input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None, grad_output: torch.Tensor, *arguments: Any
) -> torch.Tensor:
    made = plan_deform_conv_weight_gradient(input, offset, mask, grad_output, *arguments)
    return ops.run_partial(made, input, offset, mask, grad_output)


def _fake_deform_conv(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *arguments: Any,
) -> torch.Tensor:
    x, w = TensorMeta.of("input", input), TensorMeta.of("weight", weight)
    coordinates = TensorMeta.of("offset", offset), meta("mask", mask)
    shape = forward_geometry(x, *coordinates, w, meta("bias", bias), *arguments)[0].out_shape
    return input.new_empty_strided(shape, ops.out_strides(shape, x, w))


def _fake_input_gradient(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    grad_output: torch.Tensor,
    *arguments: Any,
) -> tuple[torch.Tensor, ...]:
    needed = arguments[3]
    sampled = TensorMeta.of("input", input), TensorMeta.of("offset", offset), meta("mask", mask)
    product = TensorMeta.of("weight", weight), TensorMeta.of("grad_output", grad_output)
    input_gradient_geometry(*sampled, *product, *arguments[:-1])
    return tuple(
        like.new_empty_strided(found.shape, dense_like(found.shape, found.strides))
        if need and like is not None and found is not None
        else input.new_empty(0)
        for need, like, found in zip(needed, (input, offset, mask), sampled, strict=True)
    )


def _fake_weight_gradient(
    input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None, grad_output: torch.Tensor, *arguments: Any
) -> torch.Tensor:
    sampled = TensorMeta.of("input", input), TensorMeta.of("offset", offset), meta("mask", mask)
    geometry, _ = weight_gradient_geometry(*sampled, TensorMeta.of("grad_output", grad_output), *arguments)
    return input.new_empty((geometry.c_out, geometry.c_in_group, *arguments[0]))


# What is counted of these are the products; sampling is none.
deform_conv = ops.register(
    "deform_conv", _deform_conv, _fake_deform_conv,
    lambda x, offset, mask, w, *rest, out_shape: ops.flops_at(out_shape, w),
)  # fmt: skip
deform_conv_input_gradient = ops.register(
    "deform_conv_input_gradient", _input_gradient, _fake_input_gradient,
    lambda x, offset, mask, w, dy, *rest, out_shape: ops.flops_at(dy, w),
)  # fmt: skip
deform_conv_weight_gradient = ops.register(
    "deform_conv_weight_gradient", _weight_gradient, _fake_weight_gradient,
    lambda x, offset, mask, dy, *rest, out_shape: ops.flops_at(dy, out_shape),
)  # fmt: skip
