"""Rows of pixels that lie side by side: vectors are loaded once, and handed out to the taps of a filter row."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_pixels, within
from .windows import elements, side_by_side


@triton.constexpr_function
def vectors_read(first, taps, STRIDE, PAD, DIL, VECTOR):
    """The vectors that so many taps read, from the `first` one on."""
    return sorted(
        {
            (output * STRIDE - PAD + tap * DIL) // VECTOR
            for tap in range(first, first + taps)
            for output in range(VECTOR // STRIDE)
        }
    )


@triton.constexpr_function
def vector_count(first, taps, STRIDE, PAD, DIL, VECTOR):
    """How many they are."""
    return len(vectors_read(first, taps, STRIDE, PAD, DIL, VECTOR))


@triton.constexpr_function
def vector_at(i, first, taps, STRIDE, PAD, DIL, VECTOR):
    """The i-th of them."""
    return vectors_read(first, taps, STRIDE, PAD, DIL, VECTOR)[i]


@triton.constexpr_function
def place_read(tap, output, first, taps, STRIDE, PAD, DIL, VECTOR):
    """Where among all elements of those vectors, one vector after the other, a tap of an output reads."""
    vector, element = divmod(output * STRIDE - PAD + tap * DIL, VECTOR)
    return vectors_read(first, taps, STRIDE, PAD, DIL, VECTOR).index(vector) * VECTOR + element


@triton.jit
def load_elements(
    x_base, channel_offset, mask_c, row, inside, w, w_in, SHIFT: tl.constexpr, VECTOR: tl.constexpr,
    ONE_VECTOR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The elements of the vectors that lie SHIFT further on than the `w`-th of their rows; zeros outside the image."""
    if ONE_VECTOR and SHIFT != 0:
        none = tl.zeros((ROWS, COLS, VECTOR), dtype=x_base.dtype.element_ty)
        return elements(none, ROWS, COLS, VECTOR)
    else:
        column = tl.multiple_of(row + (w + SHIFT) * VECTOR, VECTOR)
        read = inside & within(w + SHIFT, w_in // VECTOR)
        vectors = tl.load(
            x_base + channel_offset[:, None, None] + column[None, :, None] + tl.arange(0, VECTOR)[None, None, :],
            mask=mask_c[:, None, None] & read[None, :, None],
            other=0.0,
        )
        return elements(vectors, ROWS, COLS, VECTOR)


@triton.jit
def row_operand(
    x_base, channel_offset, mask_c, row, inside, w, w_in, FIRST: tl.constexpr, KW: tl.constexpr, TAPS: tl.constexpr,
    STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr, VECTOR: tl.constexpr, ONE_VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What TAPS taps of a filter row, from FIRST on, read of a step's pixels: [BLOCK_K, BLOCK_N x TAPS].

    Of vectors: each is loaded once for all taps, and its elements are handed out in registers. A tap past the filter's
    last reads zeros.
    """
    LAST: tl.constexpr = KW if KW < FIRST + TAPS else FIRST + TAPS
    READ: tl.constexpr = LAST - FIRST
    OUTPUTS: tl.constexpr = VECTOR // STRIDE
    COLS: tl.constexpr = BLOCK_K // OUTPUTS
    found = ()
    for i in tl.static_range(vector_count(FIRST, READ, STRIDE, PAD, DIL, VECTOR)):
        found = found + load_elements(
            x_base, channel_offset, mask_c, row, inside, w, w_in,
            vector_at(i, FIRST, READ, STRIDE, PAD, DIL, VECTOR), VECTOR, ONE_VECTOR, BLOCK_N, COLS,
        )  # fmt: skip
    none = tl.zeros((BLOCK_N, COLS), dtype=x_base.dtype.element_ty)
    picked = ()
    for output in tl.static_range(OUTPUTS):
        for tap in tl.static_range(FIRST, FIRST + TAPS):
            if tap < KW:
                picked = picked + (found[place_read(tap, output, FIRST, READ, STRIDE, PAD, DIL, VECTOR)],)  # type: ignore[assignment]
            else:
                picked = picked + (none,)  # type: ignore[assignment]
    tile = tl.reshape(side_by_side(picked, 0, 1, OUTPUTS * TAPS), (BLOCK_N, COLS, OUTPUTS, TAPS))
    return tl.trans(tl.reshape(tl.permute(tile, (0, 3, 1, 2)), (BLOCK_N * TAPS, BLOCK_K)))


@triton.jit
def gathered_operand(
    x_base, channel_offset, mask_c, row, inside, w, w_in, stride_xw, FIRST: tl.constexpr, KW: tl.constexpr,
    TAPS: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same where rows do not divide into vectors: each tap reads its own elements."""
    none = tl.zeros((BLOCK_N, BLOCK_K), dtype=x_base.dtype.element_ty)
    picked = ()
    for tap in tl.static_range(FIRST, FIRST + TAPS):
        if tap < KW:
            column = w * STRIDE + (tap * DIL - PAD)
            read = inside & within(column, w_in)
            tile = load_pixels(x_base, row + column * stride_xw, channel_offset, read, mask_c, True)
            picked = picked + (tl.trans(tile),)  # type: ignore[assignment]
        else:
            picked = picked + (none,)  # type: ignore[assignment]
    tile = tl.reshape(side_by_side(picked, 0, 1, TAPS), (BLOCK_N, BLOCK_K, TAPS))
    return tl.trans(tl.reshape(tl.permute(tile, (0, 2, 1)), (BLOCK_N * TAPS, BLOCK_K)))
