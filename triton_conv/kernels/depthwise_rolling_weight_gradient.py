"""Weight gradient of a depthwise convolution, channels-last images: rows of the gradient roll past the input."""

# Device code grows tuples, whose every length is another type.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ..problem import Problem, WeightGradientProblem
from ..target import Target
from .common import below, wide, widen, within
from .kernel import Kernel, cdiv
from .strips import (
    RollingTile,
    arguments,
    load_rows,
    not_rolling,
    place,
    rows_alive,
    take_strips,
    width,
)


@triton.jit
def depthwise_rolling_weight_gradient_kernel(
    x_ptr, dy_ptr, dw_ptr,
    batch, c_out, h_in, w_in, h_out, w_out,
    stride_xn, stride_xh, stride_yn, stride_yc, stride_yh,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_W: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr, X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    STRIDE_XW: tl.constexpr, STRIDE_YW: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dw[split, c, tap] = sum over the split's pixels m of dy[m, c] x_tap[m, c], the input's channels contiguous.

    Of rank 2. Partial sums are float32 (float64), added up by the caller in a fixed order.

    A strip is COLS columns of an image's outputs. A thread goes down one: each step loads STRIDE_H input rows and one
    row of the output's gradient, each element once, and multiplies them with the ALIVE rows of the gradient that they
    belong to, which stay in registers beside the sums of all taps. Input rows count for their steps alone, so that
    segments of ROWS steps share no products; each begins with the rows of the gradient that are alive before it.

    A patch, in `depthwise_patch_weight_gradient`, reads the gradient once for each filter row, or the input: 7 x 7 in
    bfloat16 takes 112 instructions an output there and 68 here (sm_90), of which 49 are products and 6 move rows on.

    Grid: one axis of SPLITS x cdiv(c_out, BLOCK_C) programs, channels fastest: together they read whole runs of memory.
    A program takes every SPLITS-th of the segments of BLOCK_P strips.
    Depthwise convolution: Sifre 2014; Chollet, arXiv:1610.02357.
    """
    ALIVE: tl.constexpr = (KH + STRIDE_H - 1) // STRIDE_H
    tiles_c = tl.cdiv(c_out, BLOCK_C)
    pid = tl.program_id(0)
    split = pid // tiles_c
    c_first = tl.cast(pid % tiles_c * BLOCK_C, tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    if INDEX_INT64:
        offs_c = offs_c.to(tl.int64)
        stride_xh, stride_yh = wide(stride_xh), wide(stride_yh)
    mask_c = below(offs_c, c_out - c_first, X_VECTOR)

    sums = ()
    for _ in tl.static_range(KH * KW):
        sums += (tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC_DTYPE),)
    # Steps whose input rows meet the image and an output.
    begin = PAD_H // STRIDE_H
    end = tl.minimum(h_out + ALIVE - 1, tl.cdiv(h_in + PAD_H, STRIDE_H))
    segments = tl.cdiv(tl.maximum(end - begin, 0), ROWS)
    items = tl.cdiv(batch * tl.cdiv(w_out, COLS), BLOCK_P) * segments
    for turn in range(tl.cdiv(tl.maximum(items - split, 0), SPLITS)):
        item = split + turn * SPLITS
        x_strip, y_strip, w0, x_inside, y_inside = take_strips(
            item // segments, x_ptr + c_first, dy_ptr + c_first * stride_yc, offs_c, offs_c * stride_yc, mask_c,
            batch, w_in, w_out, stride_xn, stride_yn,
            STRIDE_XW, STRIDE_YW, STRIDE_W, PAD_W, X_VECTOR, Y_VECTOR, INDEX_INT64, COLS, BLOCK_P,
        )  # fmt: skip
        first = begin + item % segments * ROWS
        older = ()
        for age in tl.static_range(1, ALIVE):
            older += load_gradients(y_strip, first - age, h_out, y_inside, stride_yh, STRIDE_YW, ACC_DTYPE, COLS)
        for step in range(first, tl.minimum(first + ROWS, end)):
            x_rows = load_rows(
                x_strip, step * STRIDE_H - PAD_H, h_in, w0, x_inside, stride_xh, STRIDE_XW,
                KW, STRIDE_H, STRIDE_W, PAD_W, DIL_W, COLS,
            )  # fmt: skip
            alive = load_gradients(y_strip, step, h_out, y_inside, stride_yh, STRIDE_YW, ACC_DTYPE, COLS) + older
            sums = accumulate_taps(sums, x_rows, alive, KH, KW, STRIDE_H, STRIDE_W, DIL_W, COLS)
            older = alive[: (ALIVE - 1) * COLS]

    dw_base = dw_ptr + (tl.cast(split, tl.int64) * c_out + c_first) * (KH * KW) + tl.arange(0, BLOCK_C) * (KH * KW)
    for tap in tl.static_range(KH * KW):
        tl.store(dw_base + tap, tl.sum(sums[tap], axis=0), mask=mask_c)


@triton.jit
def load_gradients(
    y_strip, h, h_out, y_inside, stride_yh,
    STRIDE_YW: tl.constexpr, ACC_DTYPE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Row `h` of the output's gradient, column by column, zero outside."""
    inside = tl.where(within(h, h_out), y_inside, 0)
    tiles = ()
    for j in tl.static_range(COLS):
        dy_tile = tl.load(y_strip + h * stride_yh + j * STRIDE_YW, mask=j < inside, other=0.0)
        tiles += (widen(dy_tile, ACC_DTYPE),)
    return tiles


@triton.jit
def accumulate_taps(
    sums, x_rows, alive,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DIL_W: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """The sums of all taps with what the input rows of a step and the rows of the gradient that are alive add."""
    x_tiles = ()
    for n in tl.static_range(STRIDE_H * width(COLS, STRIDE_W, KW, DIL_W)):
        x_tiles += (widen(x_rows[n], sums[0].dtype),)
    new = ()
    for tap in tl.static_range(KH * KW):
        total = sums[tap]
        for j in tl.static_range(COLS):
            x_tile = x_tiles[place(tap, j, KW, STRIDE_H, STRIDE_W, DIL_W, COLS)]
            total += x_tile * alive[tap // KW // STRIDE_H * COLS + j]
        new += (total,)
    return new


@dataclass(frozen=True)
class DepthwiseRollingWeightGradientTile(RollingTile):
    """BLOCK_P strips of COLS columns by BLOCK_C channels, in segments of ROWS steps."""

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages", "ROWS", "COLS", "SPLITS"})

    SPLITS: int = 1

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        # A sum over strips crosses warps, and then turns into the layout of the store.
        return self.BLOCK_C * max(self.num_warps, 2) * problem.accumulator_bytes

    def on_the_way(self, problem: Problem) -> int:
        return super().on_the_way(problem) + self.COLS


def steps(problem: Problem) -> int:
    """Steps down an image, each of a stride's input rows."""
    g = problem.geometry
    end = min(g.out_size[1] + rows_alive(problem) - 1, cdiv(g.in_size[1] + g.pad_before[1], g.stride[1]))
    return max(end - g.pad_before[1] // g.stride[1], 0)


def _grid(problem: Problem, tile: DepthwiseRollingWeightGradientTile) -> int:
    return cdiv(problem.geometry.c_out, tile.BLOCK_C) * tile.SPLITS


def _unsuited(problem: Problem) -> str | None:
    if not isinstance(problem, WeightGradientProblem):
        return "it is no weight gradient"
    return not_rolling(problem)


KERNEL = Kernel(
    name="depthwise_rolling_weight_gradient",
    function=depthwise_rolling_weight_gradient_kernel,
    tile_type=DepthwiseRollingWeightGradientTile,
    grid=_grid,
    arguments=arguments,
    unsuited=_unsuited,
    safe_tile=DepthwiseRollingWeightGradientTile(num_warps=4, num_stages=1, ROWS=16, COLS=1, BLOCK_P=4, BLOCK_C=32),
    pointers=("x_ptr", "dy_ptr", "dw_ptr"),
)
