"""A depthwise filter's rows as Toeplitz blocks, as wide as a row of the image; no kernel of a problem of its own."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import wide, within

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
