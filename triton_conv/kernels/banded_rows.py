"""Rows of the input as the banded kernels read them: from an aligned column on, in whole vectors.

The device code that loads them, and how many columns a block reads and how images share tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..problem import Problem
from .common import aligned, within
from .kernel import cdiv


@triton.jit
def inside_row(first, offs_j, w_in, LEFT: tl.constexpr, X_VECTOR: tl.constexpr):
    """Whether column `offs_j` of each m's row is in the image: [m, j], the row beginning LEFT before column `first`.

    A row's columns begin at a multiple of X_VECTOR and so does whatever is added to them: whole vectors are loaded, and
    one truth holds for a vector. They are counted from LEFT before the image, where quotients are not negative.
    """
    vector = (first // X_VECTOR)[:, None] + (offs_j // X_VECTOR)[None, :]
    return (vector >= LEFT // X_VECTOR) & (vector < (LEFT + w_in) // X_VECTOR)


@triton.jit
def load_row(
    base, offset, depth_offset, h0, dh, stride_xh, h_in, inside_w, live,
    RANK: tl.constexpr, X_VECTOR: tl.constexpr,
):  # fmt: skip
    """One input row of each m, `dh` rows below its first: [m, j], zero outside the image."""
    base += aligned(depth_offset + dh * stride_xh, X_VECTOR)
    if RANK >= 2:
        live = live & within(h0 + dh, h_in)
    return tl.load(base + offset, mask=inside_w & live[:, None], other=0.0)


def run_read(problem: Problem) -> int:
    """Input pixels that a banded kernel reads at once."""
    return problem.x_run(16 // problem.itemsize)


def columns_left(problem: Problem) -> int:
    """Columns before a block's own at which its input begins: the padding, up to a whole vector."""
    vector = run_read(problem)
    return cdiv(problem.geometry.pad_before[2], vector) * vector


def columns_read(problem: Problem, block_t: int) -> int:
    """Input columns that `block_t` outputs of a row read, from an aligned one on."""
    g = problem.geometry
    return (block_t - 1) * g.stride[2] + g.extent[2] + columns_left(problem) - g.pad_before[2]


def row_left(problem: Problem, block_t: int) -> int:
    """Columns before a block's own at which its input row begins: a block of a whole row needs none outside the image,
    where all is zero.
    """
    return columns_left(problem) if block_t < problem.geometry.out_size[2] else 0


def row_columns(problem: Problem, block_t: int) -> int:
    """Input columns that a block of `block_t` outputs of a row reads: of a whole row no more than the image has."""
    g = problem.geometry
    if block_t < g.out_size[2]:
        return columns_read(problem, block_t)
    return min((g.out_size[2] - 1) * g.stride[2] + g.extent[2] - g.pad_before[2], g.in_size[2])


def image_group(batch: int, blocks: int, block_m: int) -> int:
    """How many images of `blocks` blocks each share tiles of `block_m` of them: the power of two that leaves the fewest
    blocks of tiles empty.
    """
    sizes = [1 << i for i in range(max(batch, 1).bit_length()) if 1 << i <= block_m]
    return min(sizes, key=lambda n: cdiv(batch, n) * cdiv(n * blocks, block_m))


def no_rows_of_pixels(problem: Problem) -> str | None:
    """Why a problem is no depthwise convolution whose rows of pixels are contiguous, None if it is."""
    g = problem.geometry
    if g.transposed:
        return "it is transposed"
    if g.c_in_group != 1:
        return f"a group has {g.c_in_group} input channels, not 1"
    if g.padding_mode != "zeros":
        return f"its border is {g.padding_mode}, not zero"
    if problem.x_strides[4] != 1:
        return "neighbouring pixels are not contiguous"
    return None
