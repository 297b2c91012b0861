"""Weight gradient of a convolution in NCHW, rank 1 to 3: all taps of several filter rows in one program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ..problem import Problem
from ..target import Target
from .arguments import geometry_arguments
from .common import aligned, decode_pixel, dot, next_tile, tile_digits, tile_pixels, wide, within
from .kernel import Kernel, ProductTile, cdiv
from .row_vectors import MOST_PARTS, no_row_gradient, one_vector, shifts, y_vector
from .row_windows import vector, window_parts, x_vector
from .staging import Operand, partial_bytes, staged_bytes, staging_of


@triton.jit
def window_sums(
    x_group, y_group, dw_ptr, split, group, tap_d, first_h, first_m, first_n,
    batch, c_in_group, c_out_group, d_in, h_in, w_in, d_out, h_out, w_out, groups,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_yn, stride_yc, FIRST: tl.constexpr,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    VECTOR: tl.constexpr, ONE_VECTOR: tl.constexpr, X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    ROWS: tl.constexpr, TAPS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The taps from FIRST on of ROWS filter rows: one program's loop over its pixels, and its store."""
    OUTPUTS: tl.constexpr = VECTOR // STRIDE_W
    SEGMENTS: tl.constexpr = BLOCK_K // OUTPUTS
    PAIR: tl.constexpr = 2 if ROWS > 1 else 1
    COLUMNS: tl.constexpr = BLOCK_N * ROWS * TAPS
    in_row = w_out // OUTPUTS
    in_image = d_out * h_out * w_out
    in_size = d_out * h_out * in_row
    blocks = tl.cdiv(tl.cast(batch, tl.int64) * in_image, SPLITS * BLOCK_K).to(tl.int32)
    block = split * blocks
    offs_m = first_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < c_out_group

    # One long list of rows of the input: two filter rows side by side make whole sectors, and neighbouring threads
    # write pixels that lie side by side.
    place = tl.arange(0, BLOCK_N * ROWS * SEGMENTS)
    tap_h = first_h + place // (PAIR * SEGMENTS) % (ROWS // PAIR) * PAIR + place % PAIR
    channel = first_n + place // (ROWS * SEGMENTS)
    mask_c = channel < c_in_group
    if KH % ROWS:
        mask_c = mask_c & (tap_h < KH)
    first_segment = block * SEGMENTS
    if INDEX_INT64:
        offs_m = offs_m.to(tl.int64)
        channel = channel.to(tl.int64)
        first_segment = first_segment.to(tl.int64)
    x_image, d, h, w = decode_pixel(first_segment + place // PAIR % SEGMENTS, d_out, h_out, in_row, RANK)
    live = x_image < batch
    x_first = (first_segment // in_size).to(tl.int64)
    x_image -= first_segment // in_size
    x_rest = (tl.cast(first_segment, tl.int64) - x_first * in_size).to(w.dtype)
    x_digits = tile_digits(d_out, h_out, in_row, RANK, SEGMENTS)
    # Images of the output's gradient are one run of pixels each.
    y_first, y_image, y_d, y_h, pixel, _ = tile_pixels(block, batch, 1, 1, in_image, 1, INDEX_INT64, BLOCK_K)
    y_rest = (tl.cast(block, tl.int64) * BLOCK_K - y_first * in_image).to(pixel.dtype)
    y_digits = tile_digits(1, 1, in_image, 1, BLOCK_K)
    channel_offset = tl.multiple_of(channel * stride_xc, X_VECTOR)
    filter_offset = tl.multiple_of(offs_m * stride_yc, Y_VECTOR)

    acc = tl.zeros((BLOCK_M, COLUMNS), dtype=ACC_DTYPE)
    for _ in range(tl.maximum(blocks, 1)):
        y_place = tl.max_contiguous(tl.multiple_of(y_image * stride_yn + pixel, Y_VECTOR), Y_VECTOR)
        y_tile = tl.load(
            y_group + y_first * stride_yn + filter_offset[:, None] + y_place[None, :],
            # Said anew, since of what a loop carries the compiler knows nothing.
            mask=mask_m[:, None] & tl.max_constancy(y_first + y_image < batch, Y_VECTOR)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        offset = channel_offset + x_image * stride_xn
        inside = mask_c & live
        if RANK >= 2:
            row = h * STRIDE_H + (tap_h * DIL_H - PAD_H)
            offset += row * stride_xh
            inside = inside & within(row, h_in)
        if RANK >= 3:
            depth = d * STRIDE_D + (tap_d * DIL_D - PAD_D)
            offset += depth * stride_xd
            inside = inside & within(depth, d_in)
        parts = window_parts(
            x_group + x_first * stride_xn, offset, inside, w, w_in, FIRST, KW, TAPS, STRIDE_W, PAD_W, DIL_W,
            VECTOR, ONE_VECTOR, X_VECTOR, BLOCK_N * ROWS * SEGMENTS, False,
        )  # fmt: skip
        parts = tl.reshape(parts, (BLOCK_N, ROWS // PAIR, SEGMENTS, PAIR, TAPS, OUTPUTS))
        x_tile = tl.reshape(tl.permute(parts, (0, 1, 3, 4, 2, 5)), (COLUMNS, BLOCK_K))
        acc = dot(y_tile, tl.trans(x_tile), acc, PRECISION)
        x_first, x_rest, x_image, d, h, w, live = next_tile(
            x_digits, x_first, x_rest, x_image, d, h, w, batch, d_out, h_out, in_row, RANK
        )
        y_first, y_rest, y_image, y_d, y_h, pixel, _ = next_tile(
            y_digits, y_first, y_rest, y_image, y_d, y_h, pixel, batch, 1, 1, in_image, 1
        )

    entry = tl.arange(0, COLUMNS)
    tap = FIRST + entry % TAPS
    tap_h = first_h + entry // TAPS % ROWS
    column = first_n + entry // (ROWS * TAPS)
    at = ((column * KD + tap_d) * KH + tap_h) * KW + tap
    if KW % TAPS == 0:
        RUN: tl.constexpr = ROWS * TAPS if ROWS == KH and TAPS == KW else TAPS
        at = tl.max_contiguous(tl.multiple_of(at, RUN), RUN)
    out_row = (tl.cast(split, tl.int64) * groups + group) * c_out_group + offs_m
    tl.store(
        dw_ptr + out_row[:, None] * (c_in_group * KD * KH * KW) + at[None, :],
        acc,
        mask=mask_m[:, None] & ((column < c_in_group) & (tap_h < KH) & (tap < KW))[None, :],
    )


@triton.jit
def weight_gradient_windows_kernel(
    x_ptr, dy_ptr, dw_ptr,
    batch, c_in_group, c_out_group, d_in, h_in, w_in, d_out, h_out, w_out, groups,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_yn, stride_yc,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    VECTOR: tl.constexpr, ONE_VECTOR: tl.constexpr, X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    ROWS: tl.constexpr, TAPS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[split, o, c, row, tap] = sum over the split's pixels m of dy[o, m] x_row_tap[c, m].

    M runs over the output channels of a group, N over its input channels times ROWS filter rows times TAPS taps of
    each, K over pixels, which lie side by side in both operands. A thread loads vectors of VECTOR elements, those of
    VECTOR / STRIDE_W outputs, of every filter row that reads them, and hands the elements out to the taps in registers.
    What several filter rows read of one image is read by one program at one time; the output's gradient is read once
    for all of them.

    Partial sums are float32; the caller adds them up in a fixed order. Grid: one axis of SPLITS x groups x
    cdiv(c_out_group, BLOCK_M) x tiles of N, N fastest: those share dy. The backward filter convolution of cuDNN
    (Chetlur et al. 2014, arXiv:1410.0759).
    """
    PARTS: tl.constexpr = (KW + TAPS - 1) // TAPS
    HEIGHTS: tl.constexpr = (KH + ROWS - 1) // ROWS
    tiles_n = tl.cdiv(c_in_group, BLOCK_N) * (KD * HEIGHTS * PARTS)
    tiles_m = tl.cdiv(c_out_group, BLOCK_M)
    pid = tl.program_id(0)
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n % tiles_m
    group = pid // tiles_n // tiles_m % groups
    split = pid // tiles_n // tiles_m // groups
    rows = pid_n // PARTS % (KD * HEIGHTS)
    if INDEX_INT64:
        # A tap's offset is a product of scalars.
        stride_xd, stride_xh = wide(stride_xd), wide(stride_xh)
    x_group = x_ptr + aligned(tl.cast(group * c_in_group, tl.int64) * stride_xc, X_VECTOR)
    y_group = dy_ptr + aligned(tl.cast(group * c_out_group, tl.int64) * stride_yc, Y_VECTOR)
    # Which elements a tap reads must be known when it is compiled: a loop for each part of a row.
    for part in tl.static_range(PARTS):
        if pid_n % PARTS == part:
            window_sums(
                x_group, y_group, dw_ptr, split, group, rows // HEIGHTS, rows % HEIGHTS * ROWS,
                pid_m * BLOCK_M, pid_n // (KD * HEIGHTS * PARTS) * BLOCK_N,
                batch, c_in_group, c_out_group, d_in, h_in, w_in, d_out, h_out, w_out, groups,
                stride_xn, stride_xc, stride_xd, stride_xh, stride_yn, stride_yc, part * TAPS,
                RANK, KD, KH, KW, STRIDE_D, STRIDE_H, STRIDE_W, PAD_D, PAD_H, PAD_W, DIL_D, DIL_H, DIL_W,
                PRECISION, ACC_DTYPE, INDEX_INT64, VECTOR, ONE_VECTOR, X_VECTOR, Y_VECTOR,
                ROWS, TAPS, SPLITS, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@dataclass(frozen=True)
class WeightGradientWindowsTile(ProductTile):
    """BLOCK_M output by BLOCK_N input channels times ROWS filter rows times TAPS taps of each, BLOCK_K pixels a step,
    SPLITS partial sums."""

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages", "SPLITS"})

    BLOCK_K: int = 64
    ROWS: int = 1
    TAPS: int = 4
    SPLITS: int = 1

    def columns(self) -> int:
        """Columns of the product."""
        return self.BLOCK_N * self.ROWS * self.TAPS

    def accumulator_values(self) -> int:
        return self.BLOCK_M * self.columns()

    def mismatch(self, problem: Problem) -> str | None:
        g = problem.geometry
        if cdiv(g.kernel[2], self.TAPS) > MOST_PARTS:
            return f"{self.TAPS} taps at a time leave more than {MOST_PARTS} parts of a row of {g.kernel[2]}"
        if 2 * g.kernel[1] <= self.ROWS:
            return f"{self.ROWS} filter rows are twice as many as there are"
        if self.columns() < 16:
            return f"a product has no {self.columns()} columns"
        if (outputs := vector(problem) // g.stride[2]) > self.BLOCK_K:
            return f"a vector serves {outputs} pixels"
        return None

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        itemsize = problem.itemsize
        operands = [
            Operand(self.BLOCK_M * self.BLOCK_K * itemsize, y_vector(problem) * itemsize),
            # Put together in registers.
            Operand(self.columns() * self.BLOCK_K * itemsize, 0),
        ]
        if not staging_of(target).turns:
            # gfx942 copies no vectors that are taken apart.
            read = self.BLOCK_N * self.ROWS * self.BLOCK_K * problem.geometry.stride[2] * itemsize
            operands += [Operand(read, x_vector(problem) * itemsize, corner=True)] * shifts(
                problem, self.TAPS, vector(problem)
            )
        sums = self.BLOCK_M * self.columns(), partial_bytes(problem, target)
        return staged_bytes(operands, self.BLOCK_M, self.num_warps, self.num_stages, sums, target)


def _grid(problem: Problem, tile: WeightGradientWindowsTile) -> int:
    g = problem.geometry
    rows = g.kernel[0] * cdiv(g.kernel[1], tile.ROWS) * cdiv(g.kernel[2], tile.TAPS)
    return cdiv(g.c_in_group, tile.BLOCK_N) * rows * cdiv(g.c_out_group, tile.BLOCK_M) * g.groups * tile.SPLITS


def _arguments(problem: Problem, tile: WeightGradientWindowsTile) -> dict[str, object]:
    g = problem.geometry
    return (
        geometry_arguments(problem, tile.BLOCK_K)
        | tile.sizes()
        | dict(
            c_in_group=g.c_in_group,
            c_out_group=g.c_out_group,
            groups=g.groups,
            VECTOR=vector(problem),
            ONE_VECTOR=one_vector(problem, vector(problem)),
            X_VECTOR=x_vector(problem),
            Y_VECTOR=y_vector(problem),
        )
    )


def _unsuited(problem: Problem) -> str | None:
    if reason := no_row_gradient(problem):
        return reason
    if vector(problem) == 1:
        return "rows of the input are no aligned vectors, each of whole outputs"
    return None


KERNEL = Kernel(
    name="weight_gradient_windows",
    function=weight_gradient_windows_kernel,
    tile_type=WeightGradientWindowsTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=WeightGradientWindowsTile(num_warps=4, num_stages=1, BLOCK_M=64, BLOCK_N=16, BLOCK_K=32, TAPS=4),
    pointers=("x_ptr", "dy_ptr", "dw_ptr"),
)
