"""Strides of tensors, in elements: torch's two memory formats, and tensors of any rank as if of three dimensions."""

from __future__ import annotations

from collections.abc import Sequence

Strides = tuple[int, int, int, int, int]


def five(strides: Sequence[int]) -> Strides:
    """Strides of an `(N, C, *size)` tensor of rank 1 to 3, with 0 for the missing dimensions."""
    n, c, *spatial = strides
    d, h, w = (0,) * (3 - len(spatial)) + tuple(spatial)
    return n, c, d, h, w


def of_rank(rank: int, strides: Strides) -> tuple[int, ...]:
    """Of five strides those of a tensor of that rank: what `five` was given."""
    return (*strides[:2], *strides[5 - rank :])


def channels_last_like(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether torch would call these strides channels_last (2-D) or channels_last_3d; never for one dimension."""
    rank = len(shape) - 2
    if rank < 2:
        return False
    order = (1, *range(rank + 1, 1, -1), 0)
    least = 0
    if strides[1] == 0:
        return False
    for dim in order:
        if shape[dim] == 0 or strides[dim] < least:
            return False
        # N111 tensors are ambiguous; torch takes them for contiguous.
        if dim == 0 and least == strides[1]:
            return False
        least = strides[dim] * max(shape[dim], 1)
    return True


def dense_strides(shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """Strides of a dense tensor in one of torch's two memory formats."""
    order = (0, *range(2, len(shape)), 1) if channels_last else tuple(range(len(shape)))
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def same_places(shape: Sequence[int], first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether strides put every element at the same place; a dimension of size 1 steps nowhere."""
    return all(size <= 1 or a == b for size, a, b in zip(shape, first, second, strict=True))


def one_run(size: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the pixels of an image's channel are one run, by the sizes and strides of (D, H, W)."""
    return same_places(size, strides, (size[1] * size[2], size[2], 1))


def dense_like(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor in the memory format that these strides have."""
    return dense_strides(shape, channels_last_like(shape, strides))


def span(strides: Sequence[int], sizes: Sequence[int]) -> int:
    """Elements from a tensor's first place to the end of its last step, at least one step a dimension."""
    return sum(abs(stride) * max(size, 1) for stride, size in zip(strides, sizes, strict=True))
