"""Boxes that cover an image with hardly any pixel outside, some of them turned; and the taps that they need."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from ..problem import Problem
from .boxes import box_shapes, named_sides
from .kernel import cdiv


@triton.jit
def oriented(turned, along_h, along_w):
    """What lies along the rows and along the columns of a box: of a turned box they change places."""
    return tl.where(turned, along_w, along_h), tl.where(turned, along_h, along_w)


@triton.jit
def covering(
    turned, batch, d_out, h_out, w_out, seam, tiles_n,
    BOX_N: tl.constexpr, BOX_D: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
):  # fmt: skip
    """Boxes before the seam, or the turned ones from there on: (first row, boxes along rows, columns, depth, tiles)."""
    first = tl.where(turned, seam, 0)
    rows = tl.cdiv(tl.where(turned, w_out - seam, h_out), BOX_H)
    columns = tl.cdiv(tl.where(turned, h_out, seam), BOX_W)
    planes = tl.cdiv(d_out, BOX_D)
    return first, rows, columns, planes, tl.cdiv(batch, BOX_N) * planes * rows * columns * tiles_n


@triton.jit
def corner(
    tile, tiles_n, first, rows, columns, planes,
    BOX_N: tl.constexpr, BOX_D: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
):  # fmt: skip
    """Where a tile begins: (block of channels, image, depth, row, column)."""
    at = tile // tiles_n
    v = at % columns * BOX_W
    u = at // columns % rows * BOX_H + first
    d = at // columns // rows % planes * BOX_D
    return tile % tiles_n, at // columns // rows // planes * BOX_N, d, u, v


@triton.jit
def taps_inside(at, end, size_in, K: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The taps along one axis with which outputs `at` to `end - 1` read the input: (first, how many).

    Where there is none it is one of those that read zeros.
    """
    if TRANSPOSED:
        # Output j reads input j + PAD - k * DIL, else j + k * DIL - PAD.
        first = tl.cdiv(tl.maximum(at + PAD - (size_in - 1), 0), DIL)
        last = (end - 1 + PAD) // DIL
    else:
        first = tl.cdiv(tl.maximum(PAD - (end - 1), 0), DIL)
        last = (size_in - 1 + PAD - at) // DIL
    first = tl.minimum(first, K - 1)
    return first, tl.maximum(tl.minimum(last, K - 1) - first + 1, 1)


@triton.jit
def store_box(
    descriptor, n, d, u, v, channel, tile,
    RANK: tl.constexpr, BOX_N: tl.constexpr, BOX_D: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes a [pixels, BLOCK_C] tile to the box at a pixel, but for what lies outside the tensor."""
    if RANK == 1:
        descriptor.store([n, v, channel], tl.reshape(tile, (BOX_N, BOX_W, BLOCK_C)))
    elif RANK == 2:
        descriptor.store([n, u, v, channel], tl.reshape(tile, (BOX_N, BOX_H, BOX_W, BLOCK_C)))
    else:
        descriptor.store([n, d, u, v, channel], tl.reshape(tile, (BOX_N, BOX_D, BOX_H, BOX_W, BLOCK_C)))


@functools.lru_cache(maxsize=1024)
def turned_box(problem: Problem, pixels: int) -> tuple[dict[str, int], int, tuple[int, int]]:
    """The box of so many pixels with which the fewest cover the output, if from some column on, the seam, they may lie
    turned: their rows along its columns. (Its sides, the seam, boxes before and behind it); without one the seam is the
    width. Of 65 x 65 pixels boxes of 256 cover 16% too much, and with a seam less than 1%.
    """
    g = problem.geometry
    batch, (depth, height, width) = max(g.batch, 1), g.out_size
    found = []
    for shape in box_shapes((batch, *g.out_size), pixels):
        n, d, h, w = shape
        seams = [width] if g.rank == 1 or width < w or width % w == 0 else [width, width // w * w]
        for seam in seams:
            upright = cdiv(batch, n) * cdiv(depth, d) * cdiv(height, h) * cdiv(seam, w)
            turned = cdiv(batch, n) * cdiv(depth, d) * cdiv(width - seam, h) * cdiv(height, w)
            found.append((upright + turned, -seam, -w, (shape, (upright, turned))))
    _, seam, _, (shape, counts) = min(found)
    return named_sides(shape), -seam, counts


def mean_taps(problem: Problem, axis: int, side: int, first: int, end: int) -> float:
    """Taps along one axis that read the input for some of a box, the mean over boxes of that side from `first` on."""
    g = problem.geometry
    size, kernel, pad, dilation = g.in_size[axis], g.kernel[axis], g.pad_before[axis], g.dilation[axis]
    offsets = [(pad - k * dilation) if g.transposed else (k * dilation - pad) for k in range(kernel)]
    boxes = [(at, min(at + side, g.out_size[axis])) for at in range(first, end, side)]
    counts = [sum(at + offset < size and stop + offset > 0 for offset in offsets) for at, stop in boxes]
    return sum(max(count, 1) for count in counts) / max(len(counts), 1)
