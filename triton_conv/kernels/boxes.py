"""Boxes of pixels of channels-last tensors, which the bulk copy engine brings into shared memory (TMA on NVIDIA)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import triton
import triton.language as tl

from ..layout import of_rank, span
from ..problem import INT32_LIMIT, VECTOR_LIMIT, Problem
from .kernel import cdiv


@triton.jit
def boxes(
    ptr, batch, d, h, w, channels, stride_n, stride_d, stride_h, stride_w,
    RANK: tl.constexpr, BOX_N: tl.constexpr, BOX_D: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A descriptor of a channels-last tensor, from which boxes of BOX_N x BOX_D x BOX_H x BOX_W pixels are loaded."""
    if RANK == 1:
        return tl.make_tensor_descriptor(ptr, [batch, w, channels], [stride_n, stride_w, 1], [BOX_N, BOX_W, BLOCK_C])
    elif RANK == 2:
        return tl.make_tensor_descriptor(
            ptr, [batch, h, w, channels], [stride_n, stride_h, stride_w, 1], [BOX_N, BOX_H, BOX_W, BLOCK_C]
        )
    else:
        return tl.make_tensor_descriptor(
            ptr, [batch, d, h, w, channels], [stride_n, stride_d, stride_h, stride_w, 1],
            [BOX_N, BOX_D, BOX_H, BOX_W, BLOCK_C],
        )  # fmt: skip


@triton.jit
def load_box(descriptor, n, d, h, w, channel, RANK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """A [BLOCK_K, BLOCK_C] tile of the box at a pixel; zero outside the tensor."""
    if RANK == 1:
        box = descriptor.load([n, w, channel])
    elif RANK == 2:
        box = descriptor.load([n, h, w, channel])
    else:
        box = descriptor.load([n, d, h, w, channel])
    return tl.reshape(box, (BLOCK_K, BLOCK_C))


@triton.jit
def tap_phase(k, size_in, size_out, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr):
    """What tap `k` reads along one axis: every STRIDE-th element from `phase` on, output j reading the (j + shift)-th.

    (phase, shift, length): of these elements the last that an output reads is number length - 1. Elements beyond would
    meet gradients of outputs that do not exist, whose zero times infinity is NaN.
    """
    UP: tl.constexpr = (PAD + STRIDE - 1) // STRIDE
    position = k * DIL + (UP * STRIDE - PAD)
    phase = position % STRIDE
    shift = position // STRIDE - UP
    # A descriptor has at least one element: a tap that lies in the padding for every output reads one, times zero.
    return phase, shift, tl.maximum(tl.minimum(tl.cdiv(size_in - phase, STRIDE), size_out + shift), 1)


def box_shapes(sizes: Sequence[int], pixels: int) -> Iterator[tuple[int, int, int, int]]:
    """Images, depth, height and width of the boxes of so many pixels, powers of two: no side but the last twice as long
    as `sizes` need.
    """
    powers = [1 << i for i in range(pixels.bit_length())]
    ranges = [[p for p in powers if p < 2 * max(size, 1)] for size in sizes[:3]]
    for n, d, h in itertools.product(*ranges):
        if n * d * h <= pixels:
            yield n, d, h, pixels // (n * d * h)


def named_sides(shape: Sequence[int]) -> dict[str, int]:
    """The sides of a box as kernels call them."""
    return dict(zip(("BOX_N", "BOX_D", "BOX_H", "BOX_W"), shape, strict=True))


def box(problem: Problem, pixels: int) -> dict[str, int]:
    """The box of so many pixels that covers a problem's output."""
    g = problem.geometry
    return covering_box((g.batch, *g.out_size), pixels)


def covering_box(sizes: Sequence[int], pixels: int) -> dict[str, int]:
    """Images, depth, height and width of the box of so many pixels of which the fewest lie outside of so many images
    of such a depth, height and width; the widest.
    """

    def taken(shape: Sequence[int]) -> tuple[int, int]:
        return math.prod(cdiv(size, side) * side for size, side in zip(sizes, shape, strict=True)), -shape[3]

    return named_sides(min(box_shapes(sizes, pixels), key=taken))


def pixels_spanned(problem: Problem, sides: Mapping[str, int]) -> int:
    """Pixels from the first to the last of a box: of every image that it takes a part of, all."""
    return sides["BOX_N"] * problem.geometry.out_pixels


def unboxable(problem: Problem) -> str | None:
    """Why input and output, or its gradient, cannot be copied in boxes and multiplied, or None."""
    g = problem.geometry
    if not g.M:
        return "it has no pixel"
    if g.padding_mode != "zeros":
        return f"its border is {g.padding_mode}, not zero"
    if problem.itemsize != 2:
        return "only 16-bit numbers are multiplied with channels innermost"
    if not problem.aligned:
        return "the input or the weight does not begin at a multiple of 16 bytes"
    for name, strides, channels in (("input", problem.x_strides, g.c_in), ("output", problem.y_strides, g.c_out)):
        n, c, *spatial = of_rank(g.rank, strides)
        if c != 1 or channels < 16:
            return f"the channels of the {name} are not contiguous, or fewer than 16"
        if min(n, *spatial) <= 0 or math.gcd(VECTOR_LIMIT, n, *spatial) * problem.itemsize % 16:
            return f"the pixels of the {name} are not a multiple of 16 bytes apart"
    if g.groups > 1 and math.gcd(VECTOR_LIMIT, g.c_in_group) * problem.itemsize % 16:
        return f"groups of {g.c_in_group} channels do not begin at a multiple of 16 bytes"
    # The copy engine counts in 64 bits, pointers beside it in 32.
    weight = (g.c_in if g.transposed else g.c_out, max(g.c_in_group, g.c_out_group), *g.kernel)
    if max(span(problem.w_strides, weight), span((problem.stride_b,), (g.c_out,))) > INT32_LIMIT:
        return "its weight or bias reaches beyond 2^31 elements"
    return None
