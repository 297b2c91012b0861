"""Depthwise convolution of channels-last images on CUDA cores: the sums of several output rows roll down the image."""

# Device code grows tuples, whose every length is another type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from ..target import Target
from .common import activate, below, narrow, wide, widen
from .kernel import Kernel, cdiv
from .patches import load_taps
from .strips import (
    RollingTile,
    arguments,
    load_rows,
    not_rolling,
    place,
    strip_blocks,
    take_strips,
    width,
)


@triton.jit
def depthwise_rolling_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_out, h_in, w_in, h_out, w_out,
    stride_xn, stride_xh,
    stride_wo, stride_wh, stride_ww,
    stride_yn, stride_yc, stride_yh, stride_b,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, STRIDE_XW: tl.constexpr, STRIDE_YW: tl.constexpr,
    AHEAD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[m, c] = activation(sum_tap x_tap[m, c] w[c, tap] + b[c]), the input's channels contiguous, rank 2.

    A strip is COLS columns of an image's outputs. A thread goes down one: each step loads STRIDE_H input rows, each
    element once, and adds them to the sums of the ALIVE output rows that they belong to; the oldest of these is done
    then and stored, the others are one step older. Nothing moves for that: the first product of a step adds to a sum of
    the last one, and may leave the result in another register. The weights of all taps stay in registers.

    A patch, in `depthwise_patch`, reads an input row once for each filter row and converts it anew each time: 7 x 7 in
    bfloat16 takes 78 instructions an output there and 57 here (sm_90), of which 49 are products.

    With AHEAD a step loads the rows of the next one: two warps of 7 x 7 fit in a quarter of a multiprocessor, each of
    which waits for memory once a step.

    Grid: one axis of cdiv(c_out, BLOCK_C) x cdiv(h_out, ROWS) x cdiv(strips, BLOCK_P) programs, channels fastest:
    together they read whole runs of memory. A program stores ROWS rows; it begins and ends at the rows that these read,
    and where the image does. Strides of a column are constants, so that its loads differ in an offset written into the
    instruction; the price is a compilation for each number of channels.
    Depthwise convolution: Sifre 2014; Chollet, arXiv:1610.02357.
    """
    ALIVE: tl.constexpr = (KH + STRIDE_H - 1) // STRIDE_H
    tiles_c = tl.cdiv(c_out, BLOCK_C)
    segments = tl.cdiv(h_out, ROWS)
    pid = tl.program_id(0)
    pid_c = pid % tiles_c
    h_o = pid // tiles_c % segments * ROWS
    h0 = h_o * STRIDE_H - PAD_H

    # Offsets of channels start from the tile's first, whose 64-bit base the pointer carries.
    c_first = tl.cast(pid_c * BLOCK_C, tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    if INDEX_INT64:
        offs_c = offs_c.to(tl.int64)
        stride_xh, stride_yh = wide(stride_xh), wide(stride_yh)
        stride_wh, stride_ww = wide(stride_wh), wide(stride_ww)
    mask_c = below(offs_c, c_out - c_first, X_VECTOR)
    x_strip, y_strip, w0, x_inside, y_inside = take_strips(
        pid // tiles_c // segments, x_ptr + c_first, y_ptr + c_first * stride_yc, offs_c, offs_c * stride_yc, mask_c,
        batch, w_in, w_out, stride_xn, stride_yn,
        STRIDE_XW, STRIDE_YW, STRIDE_W, PAD_W, X_VECTOR, Y_VECTOR, INDEX_INT64, COLS, BLOCK_P,
    )  # fmt: skip
    w_base = w_ptr + c_first * stride_wo + offs_c * stride_wo
    weights = load_taps(w_base, stride_wh, stride_ww, mask_c, ACC_DTYPE, KH, KW, BLOCK_C)

    start = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC_DTYPE)
    if HAS_BIAS:
        start += tl.load(b_ptr + (c_first + offs_c) * stride_b, mask=mask_c, other=0.0).to(ACC_DTYPE)[None, :]
    fresh = ()
    for _ in tl.static_range(COLS):
        fresh += (start,)
    older = ()
    for _ in tl.static_range(ALIVE - 1):
        older += fresh

    # Rows outside the image add nothing: steps of these alone are left out, but for those that the last sums take.
    rows = tl.minimum(ROWS, h_out - h_o)
    begin = tl.minimum(tl.maximum(-h0, 0) // STRIDE_H, ALIVE - 1)
    end = tl.maximum(tl.minimum(rows + ALIVE - 1, tl.cdiv(h_in - h0, STRIDE_H)), rows)
    ahead = ()
    if AHEAD:
        ahead = load_rows(
            x_strip, h0 + begin * STRIDE_H, h_in, w0, x_inside, stride_xh, STRIDE_XW,
            KW, STRIDE_H, STRIDE_W, PAD_W, DIL_W, COLS,
        )  # fmt: skip
    for step in range(begin, end):
        x_rows = ahead
        following = load_rows(
            x_strip, h0 + (step + AHEAD) * STRIDE_H, h_in, w0, x_inside, stride_xh, STRIDE_XW,
            KW, STRIDE_H, STRIDE_W, PAD_W, DIL_W, COLS,
        )  # fmt: skip
        if AHEAD:
            ahead = following
        else:
            x_rows = following
        sums = accumulate_rows(fresh + older, x_rows, weights, KH, KW, STRIDE_H, STRIDE_W, DIL_W, COLS)
        done = step - (ALIVE - 1)
        store_row(y_strip + (h_o + done) * stride_yh, sums, done >= 0, y_inside, ACTIVATION, STRIDE_YW, ALIVE - 1, COLS)
        older = sums[: (ALIVE - 1) * COLS]
    for i in tl.static_range(ALIVE - 1):
        done = end + i - (ALIVE - 1)
        live = (done >= 0) & (done < rows)
        store_row(y_strip + (h_o + done) * stride_yh, older, live, y_inside, ACTIVATION, STRIDE_YW, ALIVE - 2 - i, COLS)


@triton.jit
def accumulate_rows(
    sums, x_rows, weights,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DIL_W: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """The sums with what the input rows of a step are worth to each: COLS of each age in steps, the youngest first."""
    x_tiles = ()
    for n in tl.static_range(STRIDE_H * width(COLS, STRIDE_W, KW, DIL_W)):
        x_tiles += (widen(x_rows[n], sums[0].dtype),)
    new = ()
    for n in tl.static_range((KH + STRIDE_H - 1) // STRIDE_H * COLS):
        total = sums[n]
        for tap in tl.static_range(n // COLS * STRIDE_H * KW, min((n // COLS + 1) * STRIDE_H, KH) * KW):
            total += x_tiles[place(tap, n % COLS, KW, STRIDE_H, STRIDE_W, DIL_W, COLS)] * weights[tap]
        new += (total,)
    return new


@triton.jit
def store_row(
    y_row, sums, live, y_inside,
    ACTIVATION: tl.constexpr, STRIDE_YW: tl.constexpr, AGE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Writes the sums of an age, if that row of outputs is `live`."""
    inside = tl.where(live, y_inside, 0)
    for j in tl.static_range(COLS):
        tile = narrow(activate(sums[AGE * COLS + j], ACTIVATION), y_row.dtype.element_ty)
        tl.store(y_row + j * STRIDE_YW, tile, mask=j < inside)


@dataclass(frozen=True)
class DepthwiseRollingTile(RollingTile):
    """BLOCK_P strips of COLS columns by BLOCK_C channels, ROWS rows of each; AHEAD as the kernel explains."""

    AHEAD: bool = False

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        # The exchange of the weights.
        return self.BLOCK_C * problem.itemsize << (problem.geometry.taps - 1).bit_length()

    def on_the_way(self, problem: Problem) -> int:
        return super().on_the_way(problem) * (2 if self.AHEAD else 1)


def _grid(problem: Problem, tile: DepthwiseRollingTile) -> int:
    g = problem.geometry
    return cdiv(g.c_out, tile.BLOCK_C) * cdiv(g.out_size[1], tile.ROWS) * strip_blocks(problem, tile.COLS, tile.BLOCK_P)


def _unsuited(problem: Problem) -> str | None:
    if problem.geometry.transposed:
        return "it is transposed"
    return not_rolling(problem)


KERNEL = Kernel(
    name="depthwise_rolling",
    function=depthwise_rolling_kernel,
    tile_type=DepthwiseRollingTile,
    grid=_grid,
    arguments=arguments,
    unsuited=_unsuited,
    safe_tile=DepthwiseRollingTile(num_warps=4, num_stages=1, ROWS=16, COLS=1, BLOCK_P=4, BLOCK_C=32),
)
