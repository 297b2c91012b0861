"""Gradients of what deformable convolution v1 and v2 samples, 2-D: of the input, the offset and the mask."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..problem import Problem
from ..problem_deform import DeformInputGradientProblem
from ..target import Target
from .arguments import geometry_arguments
from .common import aligned, below, dot, load_pixels, narrow, tile_pixels, wide
from .kernel import Kernel, Tile, cdiv
from .sampling import along_pixels, corner_tile, interpolate, sampling_arguments, tap_group
from .staging import Operand, staged_bytes, staging_of


@triton.jit
def scatter(dx_base, row, column, dcol, weight, mask_channel, unit, FIXED_POINT: tl.constexpr,
            PIXELS_LAST: tl.constexpr):  # fmt: skip
    """Adds weight times dcol to the gradient at one corner; nothing where the weight is zero.

    In fixed point the numbers are cut to whole units: their sum is exact, whatever its order.
    """
    value = dcol * along_pixels(weight, PIXELS_LAST)
    mask = along_pixels(weight != 0, PIXELS_LAST)
    if FIXED_POINT:
        value = (value * unit).to(tl.int64)
    if PIXELS_LAST:
        tl.atomic_add(dx_base + column[:, None] + row[None, :], value, mask=mask & mask_channel[:, None], sem="relaxed")
    else:
        tl.atomic_add(dx_base + row[:, None] + column[None, :], value, mask=mask & mask_channel[None, :], sem="relaxed")


@triton.jit
def deformable_input_gradient_kernel(
    x_ptr, offset_ptr, mask_ptr, w_ptr, dy_ptr, scale_ptr, dx_ptr, doffset_ptr, dmask_ptr,
    batch, c_in_group, c_out_group, h_in, w_in, h_out, w_out, segment, channels_per_offset, offset_groups,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_on, stride_oc, stride_oh, stride_ow, stride_mn, stride_mc, stride_mh, stride_mw,
    stride_wo, stride_wi, stride_wh, stride_ww,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_dxn, stride_dxc, stride_dxh, stride_dxw,
    stride_don, stride_doc, stride_doh, stride_dow, stride_dmn, stride_dmc, stride_dmh, stride_dmw,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_MASK: tl.constexpr, NEED_INPUT: tl.constexpr, NEED_OFFSET: tl.constexpr, NEED_MASK: tl.constexpr,
    FIXED_POINT: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr,
    X_VECTOR: tl.constexpr, W_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, DX_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dcol[m, c, k] = sum_o dy[m, o] w[o, c, k], the gradient of the sample mask[m, k] G(x[c], p(m, k)); from it

    dx[c, q]      = sum_{m, k} dcol[m, c, k] mask[m, k] max(0, 1 - |q_y - p_y|) max(0, 1 - |q_x - p_x|),
    doffset[m, k] = sum_c dcol[m, c, k] mask[m, k] dG(x[c], p(m, k)) / dp,
    dmask[m, k]   = sum_c dcol[m, c, k] G(x[c], p(m, k)), with G and p as in the forward kernel.

    A sample is a sum over four corners of a weight, which depends on the pixel alone, times the input: offset and mask
    need no more of the channels than four sums of dcol times the input, one a corner. A program sees all channels of
    an offset group, so these gradients are written once, without atomics. dx is added up by atomics: in float32
    (float64), or in 64-bit integers, units of 1 / scale, for the same bits every time.

    Of the product, M runs over pixels, N over the input channels of a segment, K over the output channels of its group.

    Grid: one axis of cdiv(pixels, BLOCK_M) x offset groups x taps, taps fastest: they share dy and most of x in L2.
    Slopes at whole pixels are those to the right, and zero outside (-1, size), as in torchvision. Dai et al.,
    arXiv:1703.06211; Zhu et al., arXiv:1811.11168.
    """
    TAPS: tl.constexpr = KH * KW
    pid = tl.program_id(0)
    tap = pid % TAPS
    offset_group = pid // TAPS % offset_groups
    first, image, _, h_o, w_o, mask_m = tile_pixels(
        pid // TAPS // offset_groups, batch, 1, h_out, w_out, 2, INDEX_INT64, BLOCK_M
    )
    image = tl.where(mask_m, image, 0)
    kh = tap // KW
    kw = tap % KW
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if INDEX_INT64:
        offs_n = offs_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
        # A tap's offset is a product of scalars.
        stride_wi, stride_wh, stride_ww = wide(stride_wi), wide(stride_wh), wide(stride_ww)

    group = tl.cast(offset_group, tl.int64) * TAPS + tap
    offset_pixel = offset_ptr + first * stride_on + image * stride_on + h_o * stride_oh + w_o * stride_ow
    y = tap_group(offset_pixel, 2 * group, stride_oc, mask_m, ACC_DTYPE) + (h_o * STRIDE_H - PAD_H + kh * DIL_H)
    x = tap_group(offset_pixel, 2 * group + 1, stride_oc, mask_m, ACC_DTYPE) + (w_o * STRIDE_W - PAD_W + kw * DIL_W)
    y0, y1, up, down, up_inside, down_inside = interpolate(y, h_in, INDEX_INT64)
    x0, x1, left, right, left_inside, right_inside = interpolate(x, w_in, INDEX_INT64)
    if HAS_MASK:
        mask_pixel = mask_ptr + first * stride_mn + image * stride_mn + h_o * stride_mh + w_o * stride_mw
        scale = tap_group(mask_pixel, group, stride_mc, mask_m, ACC_DTYPE)
    else:
        scale = mask_m.to(ACC_DTYPE)
    y_row = tl.multiple_of(image * stride_yn + h_o * stride_yh + w_o * stride_yw, Y_VECTOR)
    unit = 1.0
    if NEED_INPUT and FIXED_POINT:
        unit = tl.load(scale_ptr, mask=batch > 0, other=0.0)
    doffset_y = tl.zeros((BLOCK_M,), dtype=ACC_DTYPE)
    doffset_x = tl.zeros((BLOCK_M,), dtype=ACC_DTYPE)
    dmask = tl.zeros((BLOCK_M,), dtype=ACC_DTYPE)

    for part in range(channels_per_offset // segment):
        c_first = tl.cast(offset_group, tl.int64) * channels_per_offset + part * segment
        n_first = c_first // c_in_group * c_out_group
        x_base = x_ptr + first * stride_xn + aligned(c_first * stride_xc, X_VECTOR)
        y_base = dy_ptr + first * stride_yn + aligned(n_first * stride_yc, Y_VECTOR)
        w_base = w_ptr + aligned(
            n_first * stride_wo + c_first % c_in_group * stride_wi + kh * stride_wh + kw * stride_ww, W_VECTOR
        )
        for step in range(tl.maximum(tl.cdiv(segment, BLOCK_N), 1)):
            channel = step * BLOCK_N + offs_n
            mask_w = below(channel, segment, W_VECTOR)
            w_column = channel * stride_wi
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
            for out_step in range(tl.maximum(tl.cdiv(c_out_group, BLOCK_K), 1)):
                out = out_step * BLOCK_K + offs_k
                mask_k = below(out, c_out_group, Y_VECTOR)
                dy_tile = load_pixels(y_base, y_row, out * stride_yc, mask_m, mask_k, Y_PIXELS_LAST)
                w_tile = tl.load(
                    w_base + tl.multiple_of(out * stride_wo, W_VECTOR)[:, None] + w_column[None, :],
                    mask=(out < c_out_group)[:, None] & mask_w[None, :],
                    other=0.0,
                )  # [BLOCK_K, BLOCK_N]
                acc = dot(dy_tile, w_tile, acc, PRECISION)
            dcol = tl.trans(acc) if PIXELS_LAST else acc
            mask_x = below(channel, segment, X_VECTOR)
            mask_dx = below(channel, segment, DX_VECTOR)
            # One corner after the other: all four at once would take more registers than there are.
            for corner in range(4):
                y_corner = tl.where(corner < 2, y0, y1)
                x_corner = tl.where(corner % 2 == 0, x0, x1)
                weight_y = tl.where(corner < 2, up, down)
                weight_x = tl.where(corner % 2 == 0, left, right)
                if NEED_OFFSET or NEED_MASK:
                    row = tl.multiple_of(image * stride_xn + y_corner * stride_xh + x_corner * stride_xw, X_VECTOR)
                    tile = corner_tile(x_base, row, channel * stride_xc, mask_x, PIXELS_LAST).to(ACC_DTYPE)
                    total = tl.sum(tile * dcol, axis=0 if PIXELS_LAST else 1)
                    doffset_y += tl.where(corner < 2, -up_inside, down_inside) * weight_x * total
                    doffset_x += tl.where(corner % 2 == 0, -left_inside, right_inside) * weight_y * total
                    dmask += weight_y * weight_x * total
                if NEED_INPUT:
                    row = tl.multiple_of(image * stride_dxn + y_corner * stride_dxh + x_corner * stride_dxw, DX_VECTOR)
                    dx_base = dx_ptr + first * stride_dxn + aligned(c_first * stride_dxc, DX_VECTOR)
                    scatter(
                        dx_base, row, channel * stride_dxc, dcol, scale * weight_y * weight_x, mask_dx, unit,
                        FIXED_POINT, PIXELS_LAST,
                    )  # fmt: skip

    if NEED_OFFSET:
        doffset_pixel = doffset_ptr + first * stride_don + image * stride_don + h_o * stride_doh + w_o * stride_dow
        storage = doffset_ptr.dtype.element_ty
        tl.store(doffset_pixel + 2 * group * stride_doc, narrow(scale * doffset_y, storage), mask=mask_m)
        tl.store(doffset_pixel + (2 * group + 1) * stride_doc, narrow(scale * doffset_x, storage), mask=mask_m)
    if NEED_MASK:
        dmask_pixel = dmask_ptr + first * stride_dmn + image * stride_dmn + h_o * stride_dmh + w_o * stride_dmw
        tl.store(dmask_pixel + group * stride_dmc, narrow(dmask, dmask_ptr.dtype.element_ty), mask=mask_m)


@dataclass(frozen=True)
class DeformableInputGradientTile(Tile):
    """BLOCK_M pixels by BLOCK_N input channels, BLOCK_K output channels a step."""

    BLOCK_M: int = 64
    BLOCK_N: int = 64
    BLOCK_K: int = 32

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        factors = [Operand(size * self.BLOCK_K * problem.itemsize) for size in (self.BLOCK_M, self.BLOCK_N)]
        # The product changes its layout for the gather and, in the dtype of the atomics, for the scatter.
        sums = self.BLOCK_M * self.BLOCK_N, 8 if problem.operand("dx_ptr") == torch.int64 else problem.accumulator_bytes
        staged = staged_bytes(factors, self.BLOCK_M, self.num_warps, self.num_stages, (0, 0), target)
        # Atomics are of the sums' own dtype, also where stores are turned in a narrower one. gfx942 turns half of them
        # at a time where there are more than 16 a lane.
        turns = 2 if staging_of(target).turns and sums[0] > 1024 * self.num_warps else 1
        return max(staged, math.prod(sums) // turns)

    def accumulator_values(self) -> int:
        # Beside the product two tiles of corners are alive.
        return 3 * self.BLOCK_M * self.BLOCK_N


def _grid(problem: DeformInputGradientProblem, tile: DeformableInputGradientTile) -> int:
    g = problem.geometry
    return cdiv(g.M, tile.BLOCK_M) * problem.offset_groups * g.taps


def _arguments(problem: DeformInputGradientProblem, tile: DeformableInputGradientTile) -> dict[str, object]:
    arguments = geometry_arguments(problem, tile.BLOCK_M) | sampling_arguments(problem) | tile.sizes()
    for prefix, strides in (
        ("dx", problem.result_strides),
        ("do", problem.offset_gradient_strides),
        ("dm", problem.mask_gradient_strides),
    ):
        arguments |= {f"stride_{prefix}{axis}": s for axis, s in zip("nchw", strides, strict=True)}
    segment = problem.segment
    return arguments | dict(
        NEED_INPUT=problem.need_input,
        NEED_OFFSET=problem.need_offset,
        NEED_MASK=problem.need_mask,
        FIXED_POINT=problem.fixed_point,
        X_VECTOR=problem.x_vector(segment),
        W_VECTOR=problem.w_vector(segment),
        Y_VECTOR=problem.y_vector(problem.geometry.c_out_group),
        DX_VECTOR=problem.dx_vector(segment),
    )


def _unsuited(problem: Problem) -> str | None:
    return None if isinstance(problem, DeformInputGradientProblem) else "it is no gradient of what is sampled"


KERNEL = Kernel(
    name="deformable_input_gradient",
    function=deformable_input_gradient_kernel,
    tile_type=DeformableInputGradientTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=DeformableInputGradientTile(num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_N=16, BLOCK_K=16),
    pointers=(
        "x_ptr",
        "offset_ptr",
        "mask_ptr",
        "w_ptr",
        "dy_ptr",
        "scale_ptr",
        "dx_ptr",
        "doffset_ptr",
        "dmask_ptr",
    ),
)
