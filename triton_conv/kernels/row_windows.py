"""Windows of rows of pixels that lie side by side (NCHW), in an order that suits shared memory.

For kernels that take vectors of a row apart and put what taps read of them together as one factor of a product. Vectors
are loaded as one long list of rows: in that order they lie one after the other in shared memory, which takes and gives
them without a conflict. With a dimension for each of channel, filter row and segment the compiler orders them as the
product will want them, and neighbouring threads' vectors are 512 bytes apart: a copy or a load of a warp takes 32
passes through shared memory instead of four.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..problem import Problem
from . import row_vectors
from .common import within
from .row_vectors import place_read, vector_at, vector_count
from .windows import side_by_side

# A row of more elements is several vectors.
_LONGEST = 32


@triton.jit
def columns_of(vectors, COUNT: tl.constexpr, VECTOR: tl.constexpr):
    """The elements of [COUNT, VECTOR] vectors, a tensor [COUNT] each: a thread's registers, renamed."""
    if VECTOR == 1:
        return (tl.reshape(vectors, (COUNT,)),)
    else:
        left, right = tl.split(tl.permute(tl.reshape(vectors, (COUNT, 2, VECTOR // 2)), (0, 2, 1)))
        return columns_of(left, COUNT, VECTOR // 2) + columns_of(right, COUNT, VECTOR // 2)


@triton.constexpr_function
def element_read(i, FIRST, READ, TAPS, STRIDE, PAD, DIL, VECTOR, TAPS_LAST):
    """Which of all elements that were loaded the i-th pair of a tap and an output reads, -1 where there is no tap."""
    outputs = VECTOR // STRIDE
    tap, output = (i % TAPS, i // TAPS) if TAPS_LAST else divmod(i, outputs)
    if tap >= READ:
        return -1
    return place_read(FIRST + tap, output, FIRST, READ, STRIDE, PAD, DIL, VECTOR)


@triton.jit
def window_parts(
    x_base, offset, inside, w, w_in, FIRST: tl.constexpr, KW: tl.constexpr, TAPS: tl.constexpr,
    STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr, VECTOR: tl.constexpr, ONE_VECTOR: tl.constexpr,
    X_VECTOR: tl.constexpr, COUNT: tl.constexpr, TAPS_LAST: tl.constexpr,
):  # fmt: skip
    """What TAPS taps of a filter row, from FIRST on, read of COUNT rows of the input: the pairs of a tap and one of
    VECTOR / STRIDE outputs, along further dimensions of two, taps last or outputs.

    A row's vector number `w` begins at `offset` + `w` VECTOR. A tap past the filter's last reads zeros.
    """
    READ: tl.constexpr = (KW if KW < FIRST + TAPS else FIRST + TAPS) - FIRST
    none = tl.zeros((COUNT,), dtype=x_base.dtype.element_ty)
    found = ()
    for i in tl.static_range(vector_count(FIRST, READ, STRIDE, PAD, DIL, VECTOR)):
        if ONE_VECTOR and vector_at(i, FIRST, READ, STRIDE, PAD, DIL, VECTOR) != 0:
            for _ in tl.static_range(VECTOR):
                found = found + (none,)  # type: ignore[assignment]
        else:
            at = w + vector_at(i, FIRST, READ, STRIDE, PAD, DIL, VECTOR)
            place = tl.multiple_of(offset + at * VECTOR, X_VECTOR)
            vectors = tl.load(
                x_base + (place[:, None] + tl.arange(0, VECTOR)[None, :]),
                mask=(inside & within(at, w_in // VECTOR))[:, None],
                other=0.0,
            )
            found = found + columns_of(vectors, COUNT, VECTOR)
    picked = ()
    for i in tl.static_range(TAPS * (VECTOR // STRIDE)):
        if element_read(i, FIRST, READ, TAPS, STRIDE, PAD, DIL, VECTOR, TAPS_LAST) < 0:
            picked = picked + (none,)  # type: ignore[assignment]
        else:
            picked = picked + (found[element_read(i, FIRST, READ, TAPS, STRIDE, PAD, DIL, VECTOR, TAPS_LAST)],)  # type: ignore[assignment]
    return side_by_side(picked, 0, 1, TAPS * (VECTOR // STRIDE))


def vector(problem: Problem) -> int:
    """Elements of an input row that a thread takes apart: a short row as a whole, or 16 bytes or less of rows that are
    aligned, those of whole outputs; or 1."""
    g = problem.geometry
    row, stride = g.in_size[2], g.stride[2]
    if 8 < row <= _LONGEST and row & (row - 1) == 0 and row == g.out_size[2] * stride and problem.x_run(8) == 8:
        return row
    return row_vectors.vector(problem)


def x_vector(problem: Problem) -> int:
    """Elements that are loaded at once: 16 bytes at most."""
    return min(vector(problem), 8)
