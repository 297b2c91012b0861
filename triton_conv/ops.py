"""The `torch.library` ops: plan, allocate, launch. Arguments arrive normalised from `functional`.

`conv` serves forward and transposed convolution of every rank, `deform_conv` the deformable one, and
`conv_weight_gradient` the weight gradient of either kind of `conv`. Each has a fake kernel made from the same plan, so
that shapes and strides are known without running anything. `padding` is flat: before and after for each dimension.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from . import target as targets
from .dispatch import Plan, plan
from .errors import ArgumentError
from .geometry import ConvGeometry, TensorMeta, check_bias, check_tensors
from .kernels.depthwise_weight_gradient import DepthwiseWeightGradientTile
from .kernels.weight_gradient import WeightGradientTile
from .problem import DeformProblem, Problem, WeightGradientProblem, channels_last_like, dense_strides, five

_cudnn: Any = torch.backends.cudnn  # its `conv` is made at run time, unknown to type checkers

_library = torch.library.Library("triton_conv", "DEF")
_library.define(
    "conv(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, "
    "bool transposed, int[] output_padding, str padding_mode, str activation) -> Tensor"
)
_library.define(
    "deform_conv(Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation) -> Tensor"
)
_library.define(
    "conv_weight_gradient(Tensor input, Tensor grad_output, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation, int groups, str padding_mode) -> Tensor"
)


def conv_precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: torch's own setting for convolutions, tf32 or ieee."""
    if dtype is torch.float32 and _cudnn.conv.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def _meta(name: str, tensor: torch.Tensor | None) -> TensorMeta | None:
    return None if tensor is None else TensorMeta.of(name, tensor)


def _pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    return [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]


def _four(strides: tuple[int, ...]) -> tuple[int, int, int, int]:
    n, c, h, w = strides
    return n, c, h, w


def _out_strides(shape: tuple[int, ...], input: TensorMeta, weight: TensorMeta) -> tuple[int, ...]:
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
    return _plan_conv(
        TensorMeta.of("input", input),
        TensorMeta.of("weight", weight),
        _meta("bias", bias),
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


@functools.lru_cache(maxsize=4096)
def _plan_conv(
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
    check_tensors(input, {"weight": weight, "bias": bias})
    geometry = ConvGeometry.of(
        input.shape,
        weight.shape,
        stride,
        _pairs(padding),
        dilation,
        groups,
        transposed=transposed,
        output_padding=output_padding,
        padding_mode=padding_mode,
    )
    check_bias(bias, weight.shape, geometry.c_out)
    problem = Problem(
        geometry,
        input.dtype,
        five(input.strides),
        five(weight.strides),
        five(_out_strides(geometry.out_shape, input, weight)),
        has_bias=bias is not None,
        stride_b=1 if bias is None else bias.strides[0],
        activation=activation,
        precision=precision,
    )
    return plan(problem.rearranged(), targets.of_device(input.device))


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
    """The same for a deformable convolution; the numbers of groups follow from the shapes, as in torchvision."""
    return _plan_deform_conv(
        TensorMeta.of("input", input),
        TensorMeta.of("offset", offset),
        _meta("mask", mask),
        TensorMeta.of("weight", weight),
        _meta("bias", bias),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        conv_precision(input.dtype),
    )


@functools.lru_cache(maxsize=4096)
def _plan_deform_conv(
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
    check_tensors(input, {"weight": weight, "bias": bias}, {"offset": offset, "mask": mask})
    if weight.shape[1] == 0 or input.shape[1] % weight.shape[1]:
        raise ArgumentError(
            f"weight: dimension 1 of weight {list(weight.shape)} must divide the channels of input {list(input.shape)}"
        )
    groups = input.shape[1] // weight.shape[1]
    geometry = ConvGeometry.of(input.shape, weight.shape, stride, _pairs(padding), dilation, groups)
    check_bias(bias, weight.shape, geometry.c_out)
    offset_groups = _offset_groups(geometry, input, offset, mask)
    problem = DeformProblem(
        geometry,
        input.dtype,
        five(input.strides),
        five(weight.strides),
        five(_out_strides(geometry.out_shape, input, weight)),
        has_bias=bias is not None,
        stride_b=1 if bias is None else bias.strides[0],
        precision=precision,
        offset_groups=offset_groups,
        offset_strides=_four(offset.strides),
        mask_strides=None if mask is None else _four(mask.strides),
    )
    return plan(problem, targets.of_device(input.device))


def _offset_groups(geometry: ConvGeometry, input: TensorMeta, offset: TensorMeta, mask: TensorMeta | None) -> int:
    """The number of offset groups, after checking offset and mask against the geometry."""
    taps, spatial = geometry.taps, geometry.out_shape[2:]
    groups = offset.shape[1] // (2 * taps) if len(offset.shape) == 4 else 0
    expected = (geometry.batch, 2 * max(groups, 1) * taps, *spatial)
    if groups == 0 or tuple(offset.shape) != expected:
        raise ArgumentError(
            f"offset: the shape of the offset tensor at dimension 1 is not valid. It should be a multiple of "
            f"2 * kernel height * kernel width = {2 * taps}, and the whole shape {list(expected)} for input "
            f"{list(input.shape)}; got offset {list(offset.shape)}"
        )
    if geometry.c_in % groups:
        raise ArgumentError(
            f"offset: {groups} offset groups (from shape {list(offset.shape)}) do not divide the channels of input "
            f"{list(input.shape)}"
        )
    expected = (geometry.batch, groups * taps, *spatial)
    if mask is not None and tuple(mask.shape) != expected:
        raise ArgumentError(
            f"mask: mask.shape {list(mask.shape)} is not valid: expected {list(expected)} for offset "
            f"{list(offset.shape)}"
        )
    return groups


def plan_conv_weight_gradient(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
) -> Plan:
    """Plans the weight gradient of a forward convolution from its input and its output's gradient."""
    return _plan_conv_weight_gradient(
        TensorMeta.of("input", input),
        TensorMeta.of("grad_output", grad_output),
        tuple(kernel_size),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        padding_mode,
        conv_precision(input.dtype),
    )


@functools.lru_cache(maxsize=4096)
def _plan_conv_weight_gradient(
    input: TensorMeta,
    grad_output: TensorMeta,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    padding_mode: str,
    precision: str,
) -> Plan:
    check_tensors(input, {"grad_output": grad_output})
    weight_shape = (grad_output.shape[1], input.shape[1] // groups, *kernel_size)
    geometry = ConvGeometry.of(
        input.shape, weight_shape, stride, _pairs(padding), dilation, groups, padding_mode=padding_mode
    )
    if tuple(grad_output.shape) != geometry.out_shape:
        raise ArgumentError(
            f"grad_output: expected shape {list(geometry.out_shape)} for input {list(input.shape)} and weight "
            f"{list(weight_shape)}, got grad_output {list(grad_output.shape)}"
        )
    problem = WeightGradientProblem(
        geometry,
        input.dtype,
        five(input.strides),
        (0, 0, 0, 0, 0),
        five(grad_output.strides),
        precision=precision,
    )
    return plan(problem, targets.of_device(input.device))


def forget_plans() -> None:
    """Drops every cached plan, for callers that changed the tile configurations on disk."""
    from . import configs

    for cache in (_plan_conv, _plan_deform_conv, _plan_conv_weight_gradient, plan, configs.entries):
        cache.cache_clear()


def _launch(made: Plan, input: torch.Tensor, *tensors: torch.Tensor | None) -> None:
    # Triton launches on the current device, which need not be the tensors'.
    if input.is_cuda and input.get_device() != torch.cuda.current_device():
        with torch.cuda.device(input.device):
            made.launch(input, *tensors)
    else:
        made.launch(input, *tensors)


def _run(made: Plan, input: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
    output = torch.empty_strided(made.out_shape, made.out_strides, dtype=input.dtype, device=input.device)
    if made.grid:
        _launch(made, input, *tensors, output)
    return output


def _conv(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *arguments: Any) -> torch.Tensor:
    made = plan_conv(input, weight, bias, *arguments)
    return _run(made, input, made.arranged(weight), bias)


def _deform_conv(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *arguments: Any,
) -> torch.Tensor:
    made = plan_deform_conv(input, offset, mask, weight, bias, *arguments)
    return _run(made, input, offset, mask, weight, bias)


def _conv_weight_gradient(input: torch.Tensor, grad_output: torch.Tensor, *arguments: Any) -> torch.Tensor:
    made = plan_conv_weight_gradient(input, grad_output, *arguments)
    assert isinstance(made.tile, (WeightGradientTile, DepthwiseWeightGradientTile))
    splits = made.tile.SPLITS
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    partial = torch.empty_strided(
        (splits, *made.out_shape), (math.prod(made.out_shape), *made.out_strides), dtype=dtype, device=input.device
    )
    if made.grid:
        _launch(made, input, grad_output, partial)
    # Added up in one order, whatever order the programs ran in: the same bits every time.
    return partial[0].to(input.dtype) if splits == 1 else partial.sum(0).to(input.dtype)


def _fake_conv(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *arguments: Any) -> torch.Tensor:
    made = plan_conv(input, weight, bias, *arguments)
    return input.new_empty_strided(made.out_shape, made.out_strides)


def _fake_deform_conv(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *arguments: Any,
) -> torch.Tensor:
    made = plan_deform_conv(input, offset, mask, weight, bias, *arguments)
    return input.new_empty_strided(made.out_shape, made.out_strides)


def _fake_conv_weight_gradient(input: torch.Tensor, grad_output: torch.Tensor, *arguments: Any) -> torch.Tensor:
    made = plan_conv_weight_gradient(input, grad_output, *arguments)
    return input.new_empty_strided(made.out_shape, made.out_strides)


for _name, _implementation, _fake in (
    ("conv", _conv, _fake_conv),
    ("deform_conv", _deform_conv, _fake_deform_conv),
    ("conv_weight_gradient", _conv_weight_gradient, _fake_conv_weight_gradient),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)
    torch.library.register_fake(f"triton_conv::{_name}", _fake, lib=_library)

conv = torch.ops.triton_conv.conv.default
deform_conv = torch.ops.triton_conv.deform_conv.default
conv_weight_gradient = torch.ops.triton_conv.conv_weight_gradient.default
