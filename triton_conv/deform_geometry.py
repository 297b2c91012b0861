"""The validated geometry of a deformable call and of its gradients, from what is known of the tensors.

Each function returns a geometry and what a problem takes besides: offset groups, and the layouts of offset and mask.
Sizes may be symbols, so that fake kernels and planning validate by the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import ArgumentError
from .geometry import ConvGeometry
from .tensors import TensorMeta, check_bias, check_grad_output, check_tensors


def _geometry(
    input: TensorMeta,
    offset: TensorMeta,
    mask: TensorMeta | None,
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[ConvGeometry, dict[str, Any]]:
    if weight[1] == 0 or input.shape[1] % weight[1]:
        raise ArgumentError(
            f"weight: dimension 1 of weight {list(weight)} must divide the channels of input {list(input.shape)}"
        )
    groups = input.shape[1] // weight[1]
    pairs = list(zip(padding[::2], padding[1::2], strict=True))
    geometry = ConvGeometry.of(input.shape, weight, stride, pairs, dilation, groups)
    fields = dict(
        offset_groups=_offset_groups(geometry, input, offset, mask),
        offset_strides=tuple(offset.strides),
        mask_strides=None if mask is None else tuple(mask.strides),
    )
    return geometry, fields


def _offset_groups(geometry: ConvGeometry, input: TensorMeta, offset: TensorMeta, mask: TensorMeta | None) -> int:
    """The number of offset groups, after checking offset and mask against the geometry: one component a dimension."""
    taps, spatial, rank = geometry.taps, geometry.out_shape[2:], geometry.rank
    groups = offset.shape[1] // (rank * taps) if len(offset.shape) == rank + 2 else 0
    expected = (geometry.batch, rank * max(groups, 1) * taps, *spatial)
    if groups == 0 or tuple(offset.shape) != expected:
        raise ArgumentError(
            f"offset: the shape of the offset tensor at dimension 1 is not valid. It should be a multiple of "
            f"{'2 * kernel height * kernel width' if rank == 2 else 'the kernel size'} = {rank * taps}, and the whole "
            f"shape {list(expected)} for input "
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


def forward_geometry(
    input: TensorMeta,
    offset: TensorMeta,
    mask: TensorMeta | None,
    weight: TensorMeta,
    bias: TensorMeta | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[ConvGeometry, dict[str, Any]]:
    """Of a forward call. The sequences are those of the op: one entry a dimension, padding flat."""
    check_tensors(input, {"weight": weight, "bias": bias}, {"offset": offset, "mask": mask})
    geometry, fields = _geometry(input, offset, mask, weight.shape, stride, padding, dilation)
    check_bias(bias, weight.shape, geometry.c_out)
    return geometry, fields


def input_gradient_geometry(
    input: TensorMeta,
    offset: TensorMeta,
    mask: TensorMeta | None,
    weight: TensorMeta,
    grad_output: TensorMeta,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needed: Sequence[bool],
) -> tuple[ConvGeometry, dict[str, Any]]:
    """Of the gradients of input, offset and mask, as far as they are `needed`."""
    check_tensors(input, {"weight": weight, "grad_output": grad_output}, {"offset": offset, "mask": mask})
    geometry, fields = _geometry(input, offset, mask, weight.shape, stride, padding, dilation)
    check_grad_output(grad_output, geometry.out_shape, input.shape)
    if len(needed) != 3:
        raise ArgumentError(f"needed: expected three flags, for input, offset and mask, got {list(needed)}")
    if needed[2] and mask is None:
        raise ArgumentError("needed: the gradient of a mask that is None was asked for")
    return geometry, fields


def weight_gradient_geometry(
    input: TensorMeta,
    offset: TensorMeta,
    mask: TensorMeta | None,
    grad_output: TensorMeta,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[ConvGeometry, dict[str, Any]]:
    """Of the weight gradient."""
    check_tensors(input, {"grad_output": grad_output}, {"offset": offset, "mask": mask})
    weight = (grad_output.shape[1], input.shape[1] // groups, *kernel_size)
    geometry, fields = _geometry(input, offset, mask, weight, stride, padding, dilation)
    check_grad_output(grad_output, geometry.out_shape, input.shape)
    return geometry, fields
