"""Weight gradient of a convolution in NCHW, rank 1 to 3: the taps of a filter row share what they read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ..problem import Problem
from ..target import Target
from .arguments import geometry_arguments
from .common import (
    aligned,
    dot,
    next_tile,
    tile_digits,
    tile_pixels,
    wide,
    within,
)
from .kernel import Kernel, ProductTile, cdiv
from .row_vectors import (
    MOST_PARTS,
    gathered_operand,
    no_row_gradient,
    one_vector,
    row_operand,
    shifts,
    vector,
    y_vector,
)
from .staging import Operand, partial_bytes, staged_bytes, staging_of


@triton.jit
def row_sums(
    x_group, y_group, dw_row, split, group, row_tap, first_m, first_n, dd, dh,
    batch, c_in_group, c_out_group, d_in, h_in, w_in, d_out, h_out, w_out, groups,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, stride_yn, stride_yc, FIRST: tl.constexpr,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_W: tl.constexpr,
    PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    VECTOR: tl.constexpr, ONE_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, TAPS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The taps of a filter row from FIRST on: one program's loop over its pixels, and its store."""
    OUTPUTS: tl.constexpr = VECTOR // STRIDE_W if VECTOR > 1 else 1
    offs_m = first_m + tl.arange(0, BLOCK_M)
    channel = first_n + tl.arange(0, BLOCK_N)
    mask_m = offs_m < c_out_group
    mask_c = channel < c_in_group
    if INDEX_INT64:
        offs_m = offs_m.to(tl.int64)
        channel = channel.to(tl.int64)
    channel_offset = tl.multiple_of(channel * stride_xc, VECTOR)
    filter_offset = tl.multiple_of(offs_m * stride_yc, Y_VECTOR)

    in_row = w_out // OUTPUTS
    in_image = d_out * h_out * w_out
    blocks = tl.cdiv(tl.cast(batch, tl.int64) * in_image, SPLITS * BLOCK_K).to(tl.int32)
    block = split * blocks
    x_first, x_image, d, h, w, live = tile_pixels(
        block, batch, d_out, h_out, in_row, RANK, INDEX_INT64, BLOCK_K // OUTPUTS
    )
    x_rest = (tl.cast(block, tl.int64) * (BLOCK_K // OUTPUTS) - x_first * d_out * h_out * in_row).to(w.dtype)
    x_digits = tile_digits(d_out, h_out, in_row, RANK, BLOCK_K // OUTPUTS)
    # Images of the output's gradient are one run of pixels each.
    y_first, y_image, y_d, y_h, pixel, _ = tile_pixels(block, batch, 1, 1, in_image, 1, INDEX_INT64, BLOCK_K)
    y_rest = (tl.cast(block, tl.int64) * BLOCK_K - y_first * in_image).to(pixel.dtype)
    y_digits = tile_digits(1, 1, in_image, 1, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N * TAPS), dtype=ACC_DTYPE)
    for _ in range(tl.maximum(blocks, 1)):
        y_place = tl.max_contiguous(tl.multiple_of(y_image * stride_yn + pixel, Y_VECTOR), Y_VECTOR)
        y_tile = tl.load(
            y_group + y_first * stride_yn + filter_offset[:, None] + y_place[None, :],
            # Said anew, since of what a loop carries the compiler knows nothing.
            mask=mask_m[:, None] & tl.max_constancy(y_first + y_image < batch, Y_VECTOR)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        row = x_image * stride_xn
        inside = live
        if RANK >= 2:
            h_tap = h * STRIDE_H + (dh - PAD_H)
            row += h_tap * stride_xh
            inside = inside & within(h_tap, h_in)
        if RANK >= 3:
            d_tap = d * STRIDE_D + (dd - PAD_D)
            row += d_tap * stride_xd
            inside = inside & within(d_tap, d_in)
        x_base = x_group + x_first * stride_xn
        if VECTOR == 1:
            x_tile = gathered_operand(
                x_base, channel_offset, mask_c, row, inside, w, w_in, stride_xw,
                FIRST, KW, TAPS, STRIDE_W, PAD_W, DIL_W, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            x_tile = row_operand(
                x_base, channel_offset, mask_c, row, inside, w, w_in,
                FIRST, KW, TAPS, STRIDE_W, PAD_W, DIL_W, VECTOR, ONE_VECTOR, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        acc = dot(y_tile, x_tile, acc, PRECISION)
        x_first, x_rest, x_image, d, h, w, live = next_tile(
            x_digits, x_first, x_rest, x_image, d, h, w, batch, d_out, h_out, in_row, RANK
        )
        y_first, y_rest, y_image, y_d, y_h, pixel, _ = next_tile(
            y_digits, y_first, y_rest, y_image, y_d, y_h, pixel, batch, 1, 1, in_image, 1
        )

    tap = FIRST + tl.arange(0, BLOCK_N * TAPS) % TAPS
    column = first_n + tl.arange(0, BLOCK_N * TAPS) // TAPS
    place = (column * (KD * KH) + row_tap) * KW + tap
    if KW % TAPS == 0:
        place = tl.max_contiguous(tl.multiple_of(place, TAPS), TAPS)
    out_row = (tl.cast(split, tl.int64) * groups + group) * c_out_group + offs_m
    tl.store(
        dw_row + out_row[:, None] * (c_in_group * KD * KH * KW) + place[None, :],
        acc,
        mask=mask_m[:, None] & ((column < c_in_group) & (tap < KW))[None, :],
    )


@triton.jit
def weight_gradient_rows_kernel(
    x_ptr, dy_ptr, dw_ptr,
    batch, c_in_group, c_out_group, d_in, h_in, w_in, d_out, h_out, w_out, groups,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, stride_yn, stride_yc,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    VECTOR: tl.constexpr, ONE_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, TAPS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[split, o, c, row, tap] = sum over the split's pixels m of dy[o, m] x_row_tap[c, m].

    M runs over the output channels of a group, N over its input channels times TAPS taps of one filter row, K over
    pixels, which lie side by side in both operands. What the taps of a row read of an output pixel are neighbours in
    memory, a stride or a dilation apart: a thread loads whole vectors of VECTOR elements, those of VECTOR / STRIDE_W
    outputs, and which element goes to which tap and output is known when the kernel is compiled: registers renamed, and
    16-bit halves put together. Vectors that only a shift past a vector's end reads are loaded once more, from L1 or L2.

    Partial sums are float32; the caller adds them up in a fixed order. Grid: one axis of SPLITS x groups x
    cdiv(c_out_group, BLOCK_M) x tiles of N, N fastest: those share dy. The backward filter convolution of cuDNN
    (Chetlur et al. 2014, arXiv:1410.0759).
    """
    PARTS: tl.constexpr = (KW + TAPS - 1) // TAPS
    tiles_c = tl.cdiv(c_in_group, BLOCK_N)
    tiles_n = tiles_c * (KD * KH * PARTS)
    tiles_m = tl.cdiv(c_out_group, BLOCK_M)
    pid = tl.program_id(0)
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n % tiles_m
    group = pid // tiles_n // tiles_m % groups
    split = pid // tiles_n // tiles_m // groups
    row_tap = pid_n // PARTS % (KD * KH)
    if INDEX_INT64:
        # A tap's offset is a product of scalars.
        stride_xd, stride_xh, stride_xw = wide(stride_xd), wide(stride_xh), wide(stride_xw)
    x_group = x_ptr + aligned(tl.cast(group * c_in_group, tl.int64) * stride_xc, VECTOR)
    y_group = dy_ptr + aligned(tl.cast(group * c_out_group, tl.int64) * stride_yc, Y_VECTOR)
    # Which elements a tap reads must be known when it is compiled: a loop for each part of a row.
    for part in tl.static_range(PARTS):
        if pid_n % PARTS == part:
            row_sums(
                x_group, y_group, dw_ptr, split, group, row_tap, pid_m * BLOCK_M, pid_n // (KD * KH * PARTS) * BLOCK_N,
                row_tap // KH * DIL_D, row_tap % KH * DIL_H,
                batch, c_in_group, c_out_group, d_in, h_in, w_in, d_out, h_out, w_out, groups,
                stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, stride_yn, stride_yc, part * TAPS,
                RANK, KD, KH, KW, STRIDE_D, STRIDE_H, STRIDE_W, PAD_D, PAD_H, PAD_W, DIL_W,
                PRECISION, ACC_DTYPE, INDEX_INT64, VECTOR, ONE_VECTOR, Y_VECTOR, TAPS,
                SPLITS, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@dataclass(frozen=True)
class WeightGradientRowsTile(ProductTile):
    """BLOCK_M output by BLOCK_N input channels times TAPS taps of a filter row, BLOCK_K pixels a step, SPLITS partial
    sums."""

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages", "SPLITS"})

    BLOCK_K: int = 64
    TAPS: int = 4
    SPLITS: int = 1

    def accumulator_values(self) -> int:
        return self.BLOCK_M * self.BLOCK_N * self.TAPS

    def mismatch(self, problem: Problem) -> str | None:
        taps = problem.geometry.kernel[2]
        if cdiv(taps, self.TAPS) > MOST_PARTS:
            return f"{self.TAPS} taps at a time leave more than {MOST_PARTS} parts of a row of {taps}"
        outputs = vector(problem) // problem.geometry.stride[2]
        if outputs > self.BLOCK_K:
            return f"a vector serves {outputs} pixels"
        return None

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        itemsize, width = problem.itemsize, vector(problem)
        columns = self.BLOCK_N * self.TAPS
        operands = [
            Operand(self.BLOCK_M * self.BLOCK_K * itemsize, y_vector(problem) * itemsize),
            # Put together in registers.
            Operand(columns * self.BLOCK_K * itemsize, 0),
        ]
        if width > 1 and not staging_of(target).turns:
            # gfx942 copies no vectors that are taken apart.
            read = self.BLOCK_N * self.BLOCK_K * problem.geometry.stride[2] * itemsize
            operands += [Operand(read, width * itemsize, corner=True)] * shifts(problem, self.TAPS, width)
        sums = self.BLOCK_M * columns, partial_bytes(problem, target)
        return staged_bytes(operands, self.BLOCK_M, self.num_warps, self.num_stages, sums, target)


def _grid(problem: Problem, tile: WeightGradientRowsTile) -> int:
    g = problem.geometry
    tiles_n = cdiv(g.c_in_group, tile.BLOCK_N) * g.kernel[0] * g.kernel[1] * cdiv(g.kernel[2], tile.TAPS)
    return tiles_n * cdiv(g.c_out_group, tile.BLOCK_M) * g.groups * tile.SPLITS


def _arguments(problem: Problem, tile: WeightGradientRowsTile) -> dict[str, object]:
    g = problem.geometry
    width = vector(problem)
    return (
        geometry_arguments(problem, tile.BLOCK_K)
        | tile.sizes()
        | dict(
            c_in_group=g.c_in_group,
            c_out_group=g.c_out_group,
            groups=g.groups,
            VECTOR=width,
            ONE_VECTOR=one_vector(problem, width),
            Y_VECTOR=y_vector(problem),
        )
    )


KERNEL = Kernel(
    name="weight_gradient_rows",
    function=weight_gradient_rows_kernel,
    tile_type=WeightGradientRowsTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=no_row_gradient,
    safe_tile=WeightGradientRowsTile(num_warps=4, num_stages=1, BLOCK_M=64, BLOCK_N=16, BLOCK_K=32, TAPS=4),
    pointers=("x_ptr", "dy_ptr", "dw_ptr"),
)
