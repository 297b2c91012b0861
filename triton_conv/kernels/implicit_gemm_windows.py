"""Implicit GEMM where rows of pixels are contiguous (NCHW), rank 1 and 2: taps innermost, as torch makes the weight."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..layout import one_run
from ..problem import VECTOR_LIMIT, Problem, vector_of
from ..target import Target
from .arguments import geometry_arguments
from .common import aligned, decode_pixel, dot, epilogue, narrow, tile_pixels, wide, within
from .kernel import Kernel, ProductTile, cdiv
from .row_vectors import one_vector, shifts, y_vector
from .row_windows import vector, window_parts, x_vector
from .staging import Operand, staged_bytes, staging_of


@triton.jit
def implicit_gemm_windows_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_in_group, c_out_group, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xh, stride_yn, stride_yc, stride_b,
    RANK: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr,
    INDEX_INT64: tl.constexpr, VECTOR: tl.constexpr, ONE_VECTOR: tl.constexpr,
    X_VECTOR: tl.constexpr, W_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[o, m] = activation(sum_{c, row, tap} w[o, c, row, tap] x_row_tap[c, m] + b[o]), m = (image, pixel).

    K runs over channels and all taps of each, which is how a filter lies in memory: it is neither packed nor read in
    pieces. A thread loads vectors of VECTOR elements, those of VECTOR / STRIDE_W outputs, of every filter row that
    reads them, and hands the elements out to the taps in registers: 2-byte loads, and a copy of the weight, are what
    other forms pay. The product is computed as w x^T: a right operand may come from registers.

    Grid: one axis of cdiv(N, BLOCK_N) x tiles of pixels x groups programs, N fastest, so that programs which read the
    same pixels run together. The columns of Caffe (Jia et al. 2014, arXiv:1408.5093), which never leave the program.
    """
    TAPS: tl.constexpr = KH * KW
    OUTPUTS: tl.constexpr = VECTOR // STRIDE_W
    SEGMENTS: tl.constexpr = BLOCK_M // OUTPUTS
    CHANNELS: tl.constexpr = BLOCK_K // TAPS
    in_row = w_out // OUTPUTS
    in_image = d_out * h_out * w_out
    tiles_n = tl.cdiv(c_out_group, BLOCK_N)
    tiles_m = tl.cdiv(tl.cast(batch, tl.int64) * in_image, BLOCK_M).to(tl.int32)
    pid = tl.program_id(0)
    offs_n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pid_m = pid // tiles_n % tiles_m
    group = pid // tiles_n // tiles_m

    # One long list of rows of the input, (pair of segments, channel, segment of the pair, filter row): neighbouring
    # threads write taps that lie side by side, and two rows of outputs read most of their rows together.
    PAIR: tl.constexpr = 2 if KH > 1 and SEGMENTS > 1 else 1
    place = tl.arange(0, SEGMENTS * CHANNELS * KH)
    channel = place // (PAIR * KH) % CHANNELS
    segment = place // (PAIR * KH * CHANNELS) * PAIR + place // KH % PAIR
    first_segment = pid_m * SEGMENTS
    if INDEX_INT64:
        offs_n = offs_n.to(tl.int64)
        channel = channel.to(tl.int64)
        first_segment = first_segment.to(tl.int64)
        stride_xh = wide(stride_xh)
    image, _, h, w = decode_pixel(first_segment + segment, d_out, h_out, in_row, RANK)
    first = first_segment // (d_out * h_out * in_row)
    live = image < batch
    offset = (image - first) * stride_xn + channel * stride_xc
    if RANK >= 2:
        row = h * STRIDE_H + (place % KH * DIL_H - PAD_H)
        offset += row * stride_xh
        live = live & within(row, h_in)
    offset = tl.multiple_of(offset, X_VECTOR)

    x_group = x_ptr + aligned(tl.cast(group * c_in_group, tl.int64) * stride_xc, X_VECTOR)
    x_base = x_group + first.to(tl.int64) * stride_xn
    w_base = w_ptr + aligned(tl.cast(group * c_out_group, tl.int64) * (c_in_group * TAPS), W_VECTOR)
    mask_n = offs_n < c_out_group
    filter_offset = tl.multiple_of(offs_n * (c_in_group * TAPS), W_VECTOR)
    offs_k = tl.arange(0, BLOCK_K)

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC_DTYPE)
    # At least one step, masked off where there is no channel: a loop that may not run costs every wgmma its overlap.
    for step in range(tl.maximum(tl.cdiv(c_in_group, CHANNELS), 1)):
        first_c = step * CHANNELS
        k = first_c * TAPS + offs_k
        w_tile = tl.load(
            w_base + (filter_offset[:, None] + k[None, :]),
            mask=mask_n[:, None] & tl.max_constancy(k < c_in_group * TAPS, W_VECTOR)[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_K]
        parts = window_parts(
            x_base + aligned(tl.cast(first_c, tl.int64) * stride_xc, X_VECTOR), offset,
            live & (channel < c_in_group - first_c), w, w_in, 0, KW, KW, STRIDE_W, PAD_W, DIL_W,
            VECTOR, ONE_VECTOR, X_VECTOR, SEGMENTS * CHANNELS * KH, True,
        )  # fmt: skip
        parts = tl.reshape(parts, (SEGMENTS // PAIR, CHANNELS, PAIR, KH, OUTPUTS, KW))
        x_tile = tl.reshape(tl.permute(parts, (0, 2, 4, 1, 3, 5)), (BLOCK_M, BLOCK_K))
        acc = dot(w_tile, tl.trans(x_tile), acc, PRECISION)

    channel_out = group * c_out_group + offs_n
    result = tl.trans(epilogue(tl.trans(acc), b_ptr, stride_b, channel_out, mask_n, HAS_BIAS, ACTIVATION))
    # Images of the output are one run of pixels each.
    y_first, y_image, _, _, pixel, _ = tile_pixels(pid_m, batch, 1, 1, in_image, 1, INDEX_INT64, BLOCK_M)
    y_base = y_ptr + y_first * stride_yn + aligned(tl.cast(group * c_out_group, tl.int64) * stride_yc, Y_VECTOR)
    y_place = tl.max_contiguous(tl.multiple_of(y_image * stride_yn + pixel, Y_VECTOR), Y_VECTOR)
    tl.store(
        y_base + (tl.multiple_of(offs_n * stride_yc, Y_VECTOR)[:, None] + y_place[None, :]),
        narrow(result, y_ptr.dtype.element_ty),
        mask=mask_n[:, None] & tl.max_constancy(y_first + y_image < batch, Y_VECTOR)[None, :],
    )


@dataclass(frozen=True)
class ImplicitGemmWindowsTile(ProductTile):
    """BLOCK_M output pixels by BLOCK_N output channels, BLOCK_K taps of whole channels a step."""

    def rows(self) -> int:
        return self.BLOCK_N

    def mismatch(self, problem: Problem) -> str | None:
        g = problem.geometry
        if g.taps > self.BLOCK_K:
            return f"{g.taps} taps do not fit in a step of {self.BLOCK_K}"
        if (outputs := vector(problem) // g.stride[2]) > self.BLOCK_M:
            return f"a vector serves {outputs} pixels"
        return None

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        g, size = problem.geometry, problem.itemsize
        operands = [
            Operand(self.BLOCK_N * self.BLOCK_K * size, w_vector(problem) * size),
            # Put together in registers.
            Operand(self.BLOCK_M * self.BLOCK_K * size, 0),
        ]
        if not staging_of(target).turns:
            # gfx942 copies no vectors that are taken apart.
            read = self.BLOCK_M * self.BLOCK_K // g.kernel[2] * g.stride[2] * size
            operands += [Operand(read, x_vector(problem) * size, corner=True)] * shifts(
                problem, g.kernel[2], vector(problem)
            )
        sums = self.BLOCK_M * self.BLOCK_N, size
        return staged_bytes(operands, self.rows(), self.num_warps, self.num_stages, sums, target)


_MOST_TAPS = 64


def w_vector(problem: Problem) -> int:
    """Elements of a filter that lie side by side at an aligned place."""
    return vector_of(problem.geometry.c_in_group * problem.geometry.taps, VECTOR_LIMIT)


def _grid(problem: Problem, tile: ImplicitGemmWindowsTile) -> int:
    g = problem.geometry
    return cdiv(g.c_out_group, tile.BLOCK_N) * cdiv(g.M, tile.BLOCK_M) * g.groups


def _arguments(problem: Problem, tile: ImplicitGemmWindowsTile) -> dict[str, object]:
    g = problem.geometry
    return (
        geometry_arguments(problem, tile.BLOCK_M)
        | tile.sizes()
        | dict(
            c_in_group=g.c_in_group,
            c_out_group=g.c_out_group,
            VECTOR=vector(problem),
            ONE_VECTOR=one_vector(problem, vector(problem)),
            X_VECTOR=x_vector(problem),
            W_VECTOR=w_vector(problem),
            Y_VECTOR=y_vector(problem),
        )
    )


def _unsuited(problem: Problem) -> str | None:
    g = problem.geometry
    if g.transposed:
        return "it is transposed"
    if not g.M:
        return "it has no pixel"
    if problem.itemsize != 2:
        return "only 16-bit numbers are multiplied with pixels innermost"
    if g.padding_mode != "zeros":
        return f"its border is {g.padding_mode}, not zero"
    if min(g.c_in_group, g.c_out_group) < 16:
        return "a group has fewer than 16 channels"
    if g.rank == 3:
        return "it has three dimensions"
    if g.taps == 1 or g.taps > _MOST_TAPS or any(taps & (taps - 1) for taps in g.kernel):
        return f"{g.kernel[1]} x {g.kernel[2]} taps are not few powers of two"
    if problem.x_strides[4] != 1:
        return "neighbouring pixels of the input are not contiguous"
    if vector(problem) == 1:
        return "rows of the input are no aligned vectors, each of whole outputs"
    if not one_run(g.out_size, problem.y_strides[2:]):
        return "an image of the output is not one run of pixels"
    return None


KERNEL = Kernel(
    name="implicit_gemm_windows",
    function=implicit_gemm_windows_kernel,
    tile_type=ImplicitGemmWindowsTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=ImplicitGemmWindowsTile(num_warps=4, num_stages=1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
    contiguous_weight=True,
)
