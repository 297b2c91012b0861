"""Rows of pixels that lie side by side: vectors are loaded once, and handed out to the taps of a filter row."""

from __future__ import annotations

import triton
import triton.language as tl

from ..layout import one_run
from ..problem import Problem, WeightGradientProblem, vector_of
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


# Each part of a filter row is compiled for itself.
MOST_PARTS = 4
_MOST_TAPS = 16


def vector(problem: Problem) -> int:
    """Elements of an input row that are loaded at once: those of whole outputs, in rows of whole vectors; or 1."""
    g = problem.geometry
    for width in (8, 4, 2):
        outputs = width // g.stride[2]
        if width % g.stride[2] == 0 and problem.x_run(width) == width and g.out_size[2] % outputs == 0:
            return width
    return 1


def one_vector(problem: Problem, width: int) -> bool:
    """Whether a row of the input is one vector, and one of the output what that serves: nothing lies beside it."""
    g = problem.geometry
    return g.in_size[2] == width and g.out_size[2] * g.stride[2] == width


def y_vector(problem: Problem) -> int:
    """Pixels of the output, or of its gradient, that lie side by side at an aligned place, an image being one run."""
    return vector_of(*problem.y_strides[:2], problem.geometry.out_pixels)


def shifts(problem: Problem, taps: int, width: int) -> int:
    """Vectors that so many taps of a row, or a part of them, read at most for those of one."""
    if one_vector(problem, width):
        return 1
    g = problem.geometry
    row, fixed = g.kernel[2], (g.stride[2], g.pad_before[2], g.dilation[2], width)
    return max(len(vectors_read.fn(first, min(taps, row - first), *fixed)) for first in range(0, row, taps))


def no_pixel_gradient(problem: Problem) -> str | None:
    """Why a problem is no weight gradient with pixels innermost, None if it is."""
    if not isinstance(problem, WeightGradientProblem):
        return "it is no weight gradient"
    g = problem.geometry
    if not g.M:
        return "it has no pixel"
    if problem.itemsize != 2:
        return "only 16-bit numbers are multiplied with pixels innermost"
    if g.padding_mode != "zeros":
        return f"its border is {g.padding_mode}, not zero"
    if problem.x_strides[4] != 1:
        return "neighbouring pixels of the input are not contiguous"
    if not one_run(g.out_size, problem.y_strides[2:]):
        return "an image of the output's gradient is not one run of pixels"
    return None


def no_row_gradient(problem: Problem) -> str | None:
    """Why a problem is no weight gradient of rows of pixels, None if it is."""
    if reason := no_pixel_gradient(problem):
        return reason
    taps = problem.geometry.kernel[2]
    return f"{taps} taps of a filter row are more than {_MOST_TAPS}" if taps > _MOST_TAPS else None
