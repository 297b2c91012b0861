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
def elements(vectors, ROWS: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr):
    """The elements of [ROWS, COLS, VECTOR] vectors, a tensor [ROWS, COLS] each: a thread's registers, renamed."""
    if VECTOR == 1:
        return (tl.reshape(vectors, (ROWS, COLS)),)
    elif VECTOR == 2:
        even, odd = tl.split(vectors)
        return (even, odd)
    elif VECTOR == 4:
        even, odd = tl.split(tl.reshape(vectors, (ROWS, COLS, 2, 2)))
        e0, e2 = tl.split(even)
        e1, e3 = tl.split(odd)
        return (e0, e1, e2, e3)
    else:
        even, odd = tl.split(tl.reshape(vectors, (ROWS, COLS, 2, 2, 2)))
        even0, even2 = tl.split(even)
        odd1, odd3 = tl.split(odd)
        e0, e4 = tl.split(even0)
        e2, e6 = tl.split(even2)
        e1, e5 = tl.split(odd1)
        e3, e7 = tl.split(odd3)
        return (e0, e1, e2, e3, e4, e5, e6, e7)


@triton.jit
def side_by_side(parts, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tensors of a tuple, every STEP-th from FIRST on, along new last dimensions of two."""
    if COUNT == 1:
        return parts[FIRST]
    else:
        return tl.join(
            side_by_side(parts, FIRST, 2 * STEP, COUNT // 2), side_by_side(parts, FIRST + STEP, 2 * STEP, COUNT // 2)
        )


@triton.jit
def chosen(columns, A: tl.constexpr, B: tl.constexpr, AT: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Every STEP-th column from AT on, COUNT of them side by side, as an [A, B COUNT] tile."""
    return tl.reshape(side_by_side(columns, AT, STEP, COUNT), (A, B * COUNT))
