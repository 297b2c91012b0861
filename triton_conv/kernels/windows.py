"""Windows of rows of pixels: columns of an input row, read as whole vectors, of which every tap's tile is put together.

Shared by the kernels that walk over taps of phases, and those whose rows lie contiguous in memory (NCHW).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LAST_IS_FASTEST


@triton.jit
def first_tap(phase, K: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr):
    """The smallest k < K for which (phase + PAD - k DIL) is a multiple of STRIDE, or K where there is none."""
    PERIOD: tl.constexpr = K if K < STRIDE else STRIDE
    k0 = phase * 0 + K
    for i in tl.static_range(PERIOD):
        k = PERIOD - 1 - i
        k0 = tl.where((phase + PAD - k * DIL) % STRIDE == 0, k, k0)
    return k0


@triton.jit
def load_segments(base, channel, row, lanes, mask_channel, inside):
    """A vector of columns of every segment: [channels, segments, lanes], where neighbouring threads read neighbouring
    segments, which lie side by side in memory, and write them into shared memory so. `inside`: [segments, lanes].
    """
    if LAST_IS_FASTEST:
        return tl.load(
            base + channel[:, None, None] + row[None, :, None] + lanes[None, None, :],
            mask=mask_channel[:, None, None] & inside[None, :, :],
            other=0.0,
        )
    else:
        tile = tl.load(
            base + row[:, None, None] + channel[None, :, None] + lanes[None, None, :],
            mask=inside[:, None, :] & mask_channel[None, :, None],
            other=0.0,
        )
        return tl.permute(tile, (1, 0, 2))


@triton.jit
def halves(tile, A: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr):
    """The even and the odd columns of an [A, B, WIDTH] tile: each thread parts what it has loaded itself."""
    even, odd = tl.split(tl.reshape(tile, (A, B, WIDTH // 2, 2)))
    return even, odd


@triton.jit
def columns_of(tile, A: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr):
    """The columns of an [A, B, WIDTH] tile as a tuple of [A, B] tiles, for a width of at most eight."""
    if WIDTH == 1:
        return (tl.reshape(tile, (A, B)),)
    elif WIDTH == 2:
        c0, c1 = tl.split(tile)
        return (c0, c1)
    elif WIDTH == 4:
        even, odd = halves(tile, A, B, 4)
        c0, c2 = tl.split(even)
        c1, c3 = tl.split(odd)
        return (c0, c1, c2, c3)
    else:
        even, odd = halves(tile, A, B, 8)
        c04, c26 = halves(even, A, B, 4)
        c15, c37 = halves(odd, A, B, 4)
        c0, c4 = tl.split(c04)
        c2, c6 = tl.split(c26)
        c1, c5 = tl.split(c15)
        c3, c7 = tl.split(c37)
        return (c0, c1, c2, c3, c4, c5, c6, c7)


@triton.jit
def quartet(columns, A: tl.constexpr, B: tl.constexpr, AT: tl.constexpr, STEP: tl.constexpr):
    """Four columns from AT on, STEP apart, side by side: [A, B, 4]."""
    even = tl.join(columns[AT], columns[AT + 2 * STEP])
    odd = tl.join(columns[AT + STEP], columns[AT + 3 * STEP])
    return tl.reshape(tl.join(even, odd), (A, B, 4))


@triton.jit
def chosen(columns, A: tl.constexpr, B: tl.constexpr, AT: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Every STEP-th column from AT on, COUNT of them (at most eight) side by side, as an [A, B COUNT] tile."""
    if COUNT == 1:
        return columns[AT]
    elif COUNT == 2:
        return tl.reshape(tl.join(columns[AT], columns[AT + STEP]), (A, 2 * B))
    elif COUNT == 4:
        return tl.reshape(quartet(columns, A, B, AT, STEP), (A, 4 * B))
    else:
        even = quartet(columns, A, B, AT, 2 * STEP)
        odd = quartet(columns, A, B, AT + STEP, 2 * STEP)
        return tl.reshape(tl.join(even, odd), (A, 8 * B))
