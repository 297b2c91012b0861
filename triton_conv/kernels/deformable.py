"""Deformable convolution v1 and v2 (with mask), 2-D: sampling and product in one kernel, no column buffer."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from ..problem_deform import DeformProblem
from ..target import Target
from .arguments import geometry_arguments
from .common import aligned, below, dot, epilogue, narrow, store_pixels, tile_pixels, wide
from .kernel import Kernel, Tile, cdiv
from .sampling import bilinear, corner_rows, interpolate, sampling_arguments, tap_group
from .staging import Operand, sampled_operands, staged_bytes


@triton.jit
def deformable_kernel(
    x_ptr, offset_ptr, mask_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_in_group, c_out_group, h_in, w_in, h_out, w_out, segment, segments, channels_per_offset,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_on, stride_oc, stride_oh, stride_ow, stride_mn, stride_mc, stride_mh, stride_mw,
    stride_wo, stride_wi, stride_wh, stride_ww,
    stride_yn, stride_yc, stride_yh, stride_yw, stride_b,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr, PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr,
    X_VECTOR: tl.constexpr, W_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_{k, c} mask[m, k] G(x[c], p(m, k)) w[n, c, k] + b[n].

    p(m, k) = m STRIDE - PAD + k DIL + offset[m, k], and G is bilinear interpolation, zero outside of the input:
    G(x, p) = sum_q max(0, 1 - |q_y - p_y|) max(0, 1 - |q_x - p_x|) x[q].

    Grid: one axis of cdiv(N, BLOCK_N) x cdiv(M, BLOCK_M) x groups programs. Coordinates and blending are in the
    accumulator's precision: half-precision offsets of 8 pixels are already 1/128 apart. Addresses are clamped and
    weights zeroed in place of masked loads. The sampled tile is the right operand of the product (wgmma takes it from
    shared memory, where a computed left operand would go through registers): the accumulator is [BLOCK_N, BLOCK_M].

    Channels of one segment share a weight group and an offset group. Dai et al., arXiv:1703.06211 (v1); Zhu et al.,
    arXiv:1811.11168 (v2).
    """
    tiles_n = tl.cdiv(c_out_group, BLOCK_N)
    tiles_m = tl.cdiv(tl.cast(batch, tl.int64) * h_out * w_out, BLOCK_M).to(tl.int32)
    pid = tl.program_id(0)
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n % tiles_m
    pid_g = pid // tiles_n // tiles_m
    first, image, _, h_o, w_o, mask_m = tile_pixels(pid_m, batch, 1, h_out, w_out, 2, INDEX_INT64, BLOCK_M)
    image = tl.where(mask_m, image, 0)
    h0 = (h_o * STRIDE_H - PAD_H).to(ACC_DTYPE)
    w0 = (w_o * STRIDE_W - PAD_W).to(ACC_DTYPE)

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if INDEX_INT64:
        offs_n = offs_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
        # A tap's offset is a product of scalars.
        stride_wi, stride_wh, stride_ww = wide(stride_wi), wide(stride_wh), wide(stride_ww)
    mask_n = below(offs_n, c_out_group, Y_VECTOR)
    c_first = tl.cast(pid_g * c_in_group, tl.int64)
    n_first = tl.cast(pid_g * c_out_group, tl.int64)
    offset_pixel = offset_ptr + first * stride_on + image * stride_on + h_o * stride_oh + w_o * stride_ow
    if HAS_MASK:
        mask_pixel = mask_ptr + first * stride_mn + image * stride_mn + h_o * stride_mh + w_o * stride_mw
    w_base = w_ptr + aligned(n_first * stride_wo, W_VECTOR)
    w_row = tl.multiple_of(offs_n * stride_wo, W_VECTOR)

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC_DTYPE)
    for tap in range(KH * KW):
        kh = tap // KW
        kw = tap % KW
        for part in range(segments):
            group = (c_first + part * segment) // channels_per_offset * (KH * KW) + tap
            y = tap_group(offset_pixel, 2 * group, stride_oc, mask_m, ACC_DTYPE) + (h0 + kh * DIL_H)
            x = tap_group(offset_pixel, 2 * group + 1, stride_oc, mask_m, ACC_DTYPE) + (w0 + kw * DIL_W)
            y0, y1, up, down, _up_inside, _down_inside = interpolate(y, h_in, INDEX_INT64)
            x0, x1, left, right, _left_inside, _right_inside = interpolate(x, w_in, INDEX_INT64)
            if HAS_MASK:
                scale = tap_group(mask_pixel, group, stride_mc, mask_m, ACC_DTYPE)
                up *= scale
                down *= scale
            row00, row01, row10, row11 = corner_rows(image * stride_xn, y0, y1, x0, x1, stride_xh, stride_xw, X_VECTOR)
            channel_offset = aligned((c_first + part * segment) * stride_xc, X_VECTOR)
            x_base = x_ptr + first * stride_xn + channel_offset
            w_tap = w_base + aligned((part * segment) * stride_wi + kh * stride_wh + kw * stride_ww, W_VECTOR)
            for step in range(tl.maximum(tl.cdiv(segment, BLOCK_K), 1)):
                channel = step * BLOCK_K + offs_k
                mask_k = below(channel, segment, X_VECTOR)
                column = channel * stride_xc
                tile = bilinear(x_base, row00, row01, row10, row11, column, up, down, left, right, mask_k, PIXELS_LAST)
                sample = narrow(tile, x_ptr.dtype.element_ty)
                if not PIXELS_LAST:
                    sample = tl.trans(sample)  # [BLOCK_K, BLOCK_M]
                w_tile = tl.load(
                    w_tap + w_row[:, None] + (channel * stride_wi)[None, :],
                    mask=mask_n[:, None] & mask_k[None, :],
                    other=0.0,
                )  # [BLOCK_N, BLOCK_K]
                acc = dot(w_tile, sample, acc, PRECISION)

    acc = epilogue(tl.trans(acc), b_ptr, stride_b, n_first + offs_n, mask_n, HAS_BIAS, ACTIVATION)
    y_base = y_ptr + first * stride_yn + aligned(n_first * stride_yc, Y_VECTOR)
    y_row = tl.multiple_of(image * stride_yn + h_o * stride_yh + w_o * stride_yw, Y_VECTOR)
    store_pixels(y_base, y_row, offs_n * stride_yc, acc, mask_m, mask_n, Y_PIXELS_LAST)


@dataclass(frozen=True)
class DeformableTile(Tile):
    """BLOCK_M output pixels by BLOCK_N output channels, BLOCK_K sampled channels a step."""

    BLOCK_M: int = 64
    BLOCK_N: int = 64
    BLOCK_K: int = 32

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        operands = [
            *sampled_operands(self.BLOCK_M * self.BLOCK_K, problem),
            Operand(self.BLOCK_N * self.BLOCK_K * problem.itemsize),
        ]
        sums = self.BLOCK_M * self.BLOCK_N, problem.itemsize
        return staged_bytes(operands, self.BLOCK_N, self.num_warps, self.num_stages, sums, target)

    def accumulator_values(self) -> int:
        # The blended tile and two corners of it are alive beside the accumulator.
        return self.BLOCK_M * self.BLOCK_N + 3 * self.BLOCK_M * self.BLOCK_K


def _grid(problem: DeformProblem, tile: DeformableTile) -> int:
    g = problem.geometry
    return cdiv(g.N, tile.BLOCK_N) * cdiv(g.M, tile.BLOCK_M) * g.groups


def _arguments(problem: DeformProblem, tile: DeformableTile) -> dict[str, object]:
    return (
        geometry_arguments(problem, tile.BLOCK_M)
        | sampling_arguments(problem)
        | tile.sizes()
        | dict(
            X_VECTOR=problem.x_vector(problem.segment),
            W_VECTOR=problem.w_vector(problem.segment),
            Y_VECTOR=problem.y_vector(problem.geometry.c_out_group),
        )
    )


def _unsuited(problem: Problem) -> str | None:
    if not isinstance(problem, DeformProblem):
        return "it has no offsets"
    return None if type(problem) is DeformProblem else "it is a gradient"


KERNEL = Kernel(
    name="deformable",
    function=deformable_kernel,
    tile_type=DeformableTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=DeformableTile(num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16),
    pointers=("x_ptr", "offset_ptr", "mask_ptr", "w_ptr", "b_ptr", "y_ptr"),
)
