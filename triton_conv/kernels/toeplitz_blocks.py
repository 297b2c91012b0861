"""A depthwise filter's rows as Toeplitz blocks, as wide as a row of the image: what the forms that multiply whole rows
share, and the kernel that lays such blocks out; no kernel of a problem of its own.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ..problem import Problem
from .common import wide, within

_WIDEST = 64
"""Columns of a row: wider ones, of a filter as wide, are rare, and their blocks outgrow images."""
_MOST_COLUMNS = 8
"""Columns for each tap of a filter's row: beyond, most products are with zeros."""
# Rows of so many columns: 16 elements a thread, two vectors, of rows of 32.
BLOCK_ELEMENTS = 2048


@triton.jit
def toeplitz_blocks_kernel(
    w_ptr, blocks_ptr, w_in,
    stride_wo, stride_wh, stride_ww,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_W: tl.constexpr, PAD_W: tl.constexpr, DIL_W: tl.constexpr,
    WIDTH_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """blocks[c, j, r, t] = w[c, r, tap] with tap = (j - t STRIDE_W + PAD_W) / DIL_W, zero where there is no such tap.

    What one filter row adds to columns t of an output row is the input row's columns j times such a block.

    Grid: one axis of cdiv(w_in KH, BLOCK_R) x channels programs. Blocks are written in vectors, a filter is read from
    L1.
    """
    row_blocks = tl.cdiv(w_in * KH, BLOCK_R)
    c = (tl.program_id(0) // row_blocks).to(tl.int64)
    row = tl.program_id(0) % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.arange(0, WIDTH_OUT)
    live = (row < w_in * KH)[:, None]
    position = (row // KH)[:, None] - (t * STRIDE_W)[None, :] + PAD_W
    tap = position // DIL_W
    filled = within(position, KW * DIL_W) & (position % DIL_W == 0) & live
    w_offset = (row % KH * stride_wh)[:, None] + tap * stride_ww
    block = tl.load(w_ptr + c * wide(stride_wo) + w_offset, mask=filled, other=0.0)
    tl.store(blocks_ptr + c * (w_in * KH * WIDTH_OUT) + (row[:, None] * WIDTH_OUT + t[None, :]), block, mask=live)


def width_in(problem: Problem) -> int:
    """Columns that an input row takes in a tile."""
    width: int = triton.next_power_of_2(problem.geometry.in_size[2])
    return width


def width_out(problem: Problem) -> int:
    """Columns that an output row takes in a tile, and that the blocks have: whole vectors."""
    width: int = triton.next_power_of_2(problem.geometry.out_size[2])
    return max(width, 8)


def hops(problem: Problem) -> tuple[int, int]:
    """How far apart the output rows of a tile are, so that all read input rows a dilation apart; and by how many rows
    of the filter what one of them reads of an input row lags behind what the one before reads.
    """
    stride, dilation = problem.geometry.stride[1], problem.geometry.dilation[1]
    common = math.gcd(stride, dilation)
    return dilation // common, stride // common


def unsuited_rows(problem: Problem) -> str | None:
    """Why a problem's rows are not multiplied whole, or None."""
    g = problem.geometry
    if problem.itemsize != 2:
        return "only 16-bit numbers are multiplied by whole rows"
    if g.rank == 3:
        return "it has three dimensions"
    if not g.M:
        return "it has no pixel"
    if (widest := max(g.in_size[2], g.out_size[2])) > _WIDEST:
        return f"a row of {widest} columns is wider than {_WIDEST}"
    if g.kernel[2] * _MOST_COLUMNS < g.in_size[2]:
        return f"of {g.in_size[2]} columns of a row a filter reads {g.kernel[2]}"
    return None
