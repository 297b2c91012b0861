"""Patches of outputs held in registers: a filter's taps, what a row of the input adds, and patches as one tile; and
which problems have such patches."""

# Device code grows tuples, whose every length is another type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ..problem import Problem
from .common import is_read, tap_at, widen, within


@triton.constexpr_function
def weight_at(row, column, i, j, STRIDE_H, STRIDE_W, DIL_H, DIL_W, KH, KW):
    """Which of the weights at hand joins the input at (row, column) to the patch's output (i, j), or -1.

    Row -1 stands for the row of a loop that is not unrolled: the weights at hand are then KW for each i.
    """
    kh = i if row < 0 else tap_at(row, i, STRIDE_H, DIL_H, KH)
    kw = tap_at(column, j, STRIDE_W, DIL_W, KW)
    return kh * KW + kw if kh >= 0 and kw >= 0 else -1


@triton.jit
def load_taps(
    w_base, stride_wh, stride_ww, mask_c,
    ACC_DTYPE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The weights of KH x KW taps from `w_base` on, a tuple of [1, BLOCK_C] vectors.

    A filter's taps lie side by side, so that a vector of one tap would be loaded two bytes at a time and touch a line
    of L1 for each pair of channels. A tile of all taps is loaded along the lines instead, and split: one exchange
    through shared memory.
    """
    SIZE: tl.constexpr = triton.next_power_of_2(KH * KW)
    tap = tl.arange(0, SIZE)
    offset = tap // KW * stride_wh + tap % KW * stride_ww
    mask = mask_c[:, None] & (tap < KH * KW)[None, :]
    parts = (tl.load(w_base[:, None] + offset[None, :], mask=mask, other=0.0),)  # [BLOCK_C, SIZE]
    for level in tl.static_range(8):
        if 2**level < SIZE:
            even, odd = (), ()
            for i in tl.static_range(2**level):
                pair = tl.split(tl.reshape(parts[i], (BLOCK_C, SIZE // 2 ** (level + 1), 2)))
                even += (pair[0],)
                odd += (pair[1],)
            parts = even + odd
    weights = ()
    for i in tl.static_range(KH * KW):
        weights += (widen(tl.reshape(parts[i], (1, BLOCK_C)), ACC_DTYPE),)
    return weights


@triton.jit
def accumulate_row(
    acc, weights, x_row, mask_row, w0, w_in, stride_xw,
    ROW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Adds what one row of the patch's input is worth to each of its outputs."""
    for k in tl.static_range((COLS - 1) * STRIDE_W + (KW - 1) * DIL_W + 1):
        if is_read(k, COLS, STRIDE_W, DIL_W, KW):
            mask = mask_row & within(w0 + k, w_in)[:, None]
            x_tile = widen(tl.load(x_row + k * stride_xw, mask=mask, other=0.0), acc[0].dtype)
            new = ()
            for i in tl.static_range(ROWS):
                for j in tl.static_range(COLS):
                    if weight_at(ROW, k, i, j, STRIDE_H, STRIDE_W, DIL_H, DIL_W, KH, KW) >= 0:
                        w_tap = weights[weight_at(ROW, k, i, j, STRIDE_H, STRIDE_W, DIL_H, DIL_W, KH, KW)]
                        new += (acc[i * COLS + j] + x_tile * w_tap,)
                    else:
                        new += (acc[i * COLS + j],)
            acc = new
    return acc


@triton.jit
def interleave(tiles, COUNT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """COUNT tiles of [BLOCK_P, BLOCK_C] as one of [BLOCK_P, BLOCK_C, COUNT]."""
    for level in tl.static_range(8):
        if 2**level < COUNT:
            joined = ()
            # The outer half of those that are left are the odd ones of the innermost dimension built so far.
            for i in tl.static_range(COUNT // 2 ** (level + 1)):
                pair = tl.join(tiles[i], tiles[i + COUNT // 2 ** (level + 1)])
                joined += (pair,)
            tiles = joined
    return tl.reshape(tiles[0], (BLOCK_P, BLOCK_C, COUNT))


def no_patches(problem: Problem, widest: int) -> str | None:
    """Why patches of a channels-last depthwise convolution cannot be held in registers, or None."""
    g = problem.geometry
    if g.c_in_group != 1 or g.c_out_group != 1:
        return f"a group has {g.c_in_group} input channels and {g.c_out_group} output channels, not 1 of each"
    if problem.pixels_last:
        return "the channels of its input are not contiguous"
    if g.padding_mode != "zeros":
        return f"its border is {g.padding_mode}, not zero"
    if g.kernel[2] > widest:
        return f"{g.kernel[2]} taps of a filter row do not fit in registers"
    return None
