"""Weight gradient of deformable convolution v1 and v2, 2-D: a product over pixels whose samples are computed anew."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from ..problem_deform import DeformWeightGradientProblem
from ..target import Target
from .arguments import geometry_arguments
from .common import aligned, below, dot, load_pixels, narrow, tile_pixels
from .kernel import Kernel, Tile, cdiv
from .sampling import bilinear, corner_rows, interpolate, sampling_arguments, tap_group
from .staging import Operand, partial_bytes, sampled_operands, staged_bytes


@triton.jit
def deformable_weight_gradient_kernel(
    x_ptr, offset_ptr, mask_ptr, dy_ptr, dw_ptr,
    batch, c_in_group, c_out_group, h_in, w_in, h_out, w_out, segment, channels_per_offset, groups,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_on, stride_oc, stride_oh, stride_ow, stride_mn, stride_mc, stride_mh, stride_mw,
    stride_yn, stride_yc, stride_yh, stride_yw,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr, X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[split, o, c, k] = sum over the split's pixels m of dy[m, o] mask[m, k] G(x[c], p(m, k)), G and p as forward.

    M runs over the output channels of a group, N over the input channels of one segment and one tap, K over pixels.
    Partial sums are float32 (float64), in the weight's own order; the caller adds them up in a fixed order, so that the
    result is the same bits every time. The sampled tile is the right operand of the product, as in the forward kernel.

    Grid: one axis of SPLITS x groups x cdiv(c_out_group, BLOCK_M) x tiles of N, N fastest: those share dy. Every block
    of output channels samples anew. Zhu et al., arXiv:1811.11168.
    """
    TAPS: tl.constexpr = KH * KW
    tiles_segment = tl.cdiv(segment, BLOCK_N)
    tiles_n = (c_in_group // segment) * tiles_segment * TAPS
    tiles_m = tl.cdiv(c_out_group, BLOCK_M)
    pid = tl.program_id(0)
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n % tiles_m
    group = pid // tiles_n // tiles_m % groups
    split = pid // tiles_n // tiles_m // groups
    tap = pid_n % TAPS
    part = pid_n // TAPS // tiles_segment

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = pid_n // TAPS % tiles_segment * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = below(offs_m, c_out_group, Y_VECTOR)
    mask_n = below(channel, segment, X_VECTOR)
    if INDEX_INT64:
        offs_m = offs_m.to(tl.int64)
        channel = channel.to(tl.int64)
    c_first = tl.cast(group * c_in_group + part * segment, tl.int64)
    offset_group = c_first // channels_per_offset * TAPS + tap
    tap_h = tap // KW * DIL_H - PAD_H
    tap_w = tap % KW * DIL_W - PAD_W
    x_segment = x_ptr + aligned(c_first * stride_xc, X_VECTOR)
    y_group = dy_ptr + aligned(tl.cast(group * c_out_group, tl.int64) * stride_yc, Y_VECTOR)
    column = channel * stride_xc

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    blocks = tl.cdiv(tl.cast(batch, tl.int64) * h_out * w_out, SPLITS * BLOCK_K).to(tl.int32)
    for step in range(tl.maximum(blocks, 1)):
        first, image, _d_o, h_o, w_o, mask_k = tile_pixels(
            split * blocks + step, batch, 1, h_out, w_out, 2, INDEX_INT64, BLOCK_K
        )
        # What is gathered is not masked by pixel: past the last one, it comes from some image all the same.
        first = tl.minimum(first, batch - 1)
        image = tl.where(mask_k, image, 0)
        offset_pixel = offset_ptr + first * stride_on + image * stride_on + h_o * stride_oh + w_o * stride_ow
        y = tap_group(offset_pixel, 2 * offset_group, stride_oc, mask_k, ACC_DTYPE) + (h_o * STRIDE_H + tap_h)
        x = tap_group(offset_pixel, 2 * offset_group + 1, stride_oc, mask_k, ACC_DTYPE) + (w_o * STRIDE_W + tap_w)
        y0, y1, up, down, _up_inside, _down_inside = interpolate(y, h_in, INDEX_INT64)
        x0, x1, left, right, _left_inside, _right_inside = interpolate(x, w_in, INDEX_INT64)
        if HAS_MASK:
            mask_pixel = mask_ptr + first * stride_mn + image * stride_mn + h_o * stride_mh + w_o * stride_mw
            scale = tap_group(mask_pixel, offset_group, stride_mc, mask_k, ACC_DTYPE)
            up *= scale
            down *= scale
        row00, row01, row10, row11 = corner_rows(image * stride_xn, y0, y1, x0, x1, stride_xh, stride_xw, X_VECTOR)
        tile = bilinear(
            x_segment + first * stride_xn, row00, row01, row10, row11, column, up, down, left, right, mask_n,
            PIXELS_LAST,
        )  # fmt: skip
        sample = narrow(tile, x_ptr.dtype.element_ty)
        if PIXELS_LAST:
            sample = tl.trans(sample)  # [BLOCK_K, BLOCK_N]
        y_row = tl.multiple_of(image * stride_yn + h_o * stride_yh + w_o * stride_yw, Y_VECTOR)
        dy_tile = load_pixels(
            y_group + first * stride_yn, y_row, offs_m * stride_yc, mask_k, mask_m, Y_PIXELS_LAST
        )  # [BLOCK_K, BLOCK_M]
        acc = dot(tl.trans(dy_tile), sample, acc, PRECISION)

    row = (tl.cast(split, tl.int64) * groups + group) * c_out_group + offs_m
    weight_column = (part * segment + channel) * TAPS + tap
    tl.store(
        dw_ptr + row[:, None] * (c_in_group * TAPS) + weight_column[None, :],
        acc,
        mask=mask_m[:, None] & mask_n[None, :],
    )


@dataclass(frozen=True)
class DeformableWeightGradientTile(Tile):
    """BLOCK_M output by BLOCK_N input channels of one segment and tap, BLOCK_K pixels a step, SPLITS partial sums."""

    BLOCK_M: int = 64
    BLOCK_N: int = 64
    BLOCK_K: int = 32
    SPLITS: int = 1

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        factors = [
            *sampled_operands(self.BLOCK_N * self.BLOCK_K, problem),
            Operand(self.BLOCK_M * self.BLOCK_K * problem.itemsize),
        ]
        sums = self.BLOCK_M * self.BLOCK_N, partial_bytes(problem, target)
        return staged_bytes(factors, self.BLOCK_M, self.num_warps, self.num_stages, sums, target)

    def accumulator_values(self) -> int:
        # The blended tile and two corners of it are alive beside the accumulator.
        return self.BLOCK_M * self.BLOCK_N + 3 * self.BLOCK_N * self.BLOCK_K


def _grid(problem: DeformWeightGradientProblem, tile: DeformableWeightGradientTile) -> int:
    g = problem.geometry
    if g.batch == 0:
        return 0  # the gather, which is not masked by pixel, would find no image
    tiles_n = g.c_in_group // problem.segment * cdiv(problem.segment, tile.BLOCK_N) * g.taps
    return tiles_n * cdiv(g.c_out_group, tile.BLOCK_M) * g.groups * tile.SPLITS


def _arguments(problem: DeformWeightGradientProblem, tile: DeformableWeightGradientTile) -> dict[str, object]:
    g = problem.geometry
    return (
        geometry_arguments(problem, tile.BLOCK_K)
        | sampling_arguments(problem)
        | tile.sizes()
        | dict(X_VECTOR=problem.x_vector(problem.segment), Y_VECTOR=problem.y_vector(g.c_out_group))
    )


def _unsuited(problem: Problem) -> str | None:
    return None if isinstance(problem, DeformWeightGradientProblem) else "it is no weight gradient with offsets"


KERNEL = Kernel(
    name="deformable_weight_gradient",
    function=deformable_weight_gradient_kernel,
    tile_type=DeformableWeightGradientTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=DeformableWeightGradientTile(num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_N=16, BLOCK_K=16),
    pointers=("x_ptr", "offset_ptr", "mask_ptr", "dy_ptr", "dw_ptr"),
)
