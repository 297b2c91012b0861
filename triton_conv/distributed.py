"""Convolutions over several devices: large images in slices, groups apart, and how DTensors shard.

`conv1d`, `conv2d` and `conv3d` take one slice of an input along a spatial dimension on each rank and exchange the
rows that lie in reach of a filter with the neighbours: the halo. `register_sharding` teaches DTensor how the plain
functions of triton_conv shard by batch, by channels and by groups. `by_groups` takes any grouped function, torch's too,
and DTensors sharded by channels, and runs each rank's groups there. Nothing is communicated, in either direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import functional
from .arguments import Padding, Size, conv_arguments
from .errors import ArgumentError, ArgumentTypeError
from .geometry import ConvGeometry
from .ops import pairs
from .sharding import by_groups, register_sharding

__all__ = ["by_groups", "conv1d", "conv2d", "conv3d", "register_sharding"]


@dataclass(frozen=True)
class _Slice:
    """What one rank computes of the split dimension: outputs, the rows that they need, and padding beyond the ends.

    Half-open ranges of global rows. A circular border goes on counting: row -1 is the last one.
    """

    owned: tuple[int, int]
    needed: tuple[int, int]
    padding: tuple[int, int]
    outputs: tuple[int, int]


@dataclass(frozen=True)
class _Split:
    """The slices of all ranks, as one of them sees it."""

    slices: tuple[_Slice, ...]
    rank: int
    dim: int
    circular: bool
    group: Any

    @property
    def own(self) -> _Slice:
        return self.slices[self.rank]

    def neighbour(self, step: int, rank: int | None = None) -> tuple[_Slice, int, int] | None:
        """The slice on the right (step 1) or left (-1) of a rank, the rank that has it, and what its rows are moved by
        to be counted on from that rank's own; None beyond an end.
        """
        at = (self.rank if rank is None else rank) + step
        count = len(self.slices)
        if 0 <= at < count:
            return self.slices[at], at, 0
        if not self.circular or count == 1:
            return None
        return self.slices[at % count], at % count, step * self.slices[-1].owned[1]

    def incoming(self, step: int) -> tuple[int, tuple[int, int]] | None:
        """The neighbour's rank and which of its rows this rank needs, in this rank's count."""
        found = self.neighbour(step)
        if found is None:
            return None
        theirs, at, moved = found
        return at, _common(_moved(theirs.owned, moved), self.own.needed)

    def outgoing(self, step: int) -> tuple[int, tuple[int, int]] | None:
        """The neighbour's rank and which of this rank's rows it needs."""
        found = self.neighbour(step)
        if found is None:
            return None
        theirs, at, moved = found
        return at, _common(self.own.owned, _moved(theirs.needed, moved))

    def reach(self, rank: int) -> tuple[int, int]:
        """The rows that a rank and its neighbours have."""
        low, high = self.slices[rank].owned
        if (left := self.neighbour(-1, rank)) is not None:
            low = left[0].owned[0] + left[2]
        if (right := self.neighbour(1, rank)) is not None:
            high = right[0].owned[1] + right[2]
        return low, high


def _slices(
    sizes: Sequence[int], outputs: int, extent: int, stride: int, padding: tuple[int, int], mode: str
) -> tuple[_Slice, ...]:
    """The slice of every rank. An output belongs to the rank that owns the row of its first tap, padding aside."""
    total, (before, _) = sum(sizes), padding
    made, start = [], 0
    for rank, size in enumerate(sizes):
        end = start + size
        first = -(-start // stride)
        last = outputs if rank == len(sizes) - 1 else min(-(-end // stride), outputs)
        low, high = first * stride - before, (last - 1) * stride - before + extent
        beyond = (max(-low, 0), max(high - total, 0))
        if mode == "circular" and len(sizes) > 1:
            needed, beyond = (low, high), (0, 0)
        else:
            needed = max(low, 0), min(high, total)
        made.append(_Slice((start, end), needed, beyond, (first, last)))
        start = end
    return tuple(made)


def _widened(input: Tensor, split: _Split) -> Tensor:
    """This rank's rows with those of the neighbours that it needs, before and after them."""
    halos: dict[int, Tensor] = {}
    work: list[dist.P2POp] = []
    own = split.own
    # To the right first, then to the left, on every rank: two ranks in a circle are both sides of each other.
    for step in (1, -1):
        if (there := split.outgoing(step)) is not None:
            work += _send(_rows(input, split.dim, own.owned, there[1]), there[0], split)
        if (here := split.incoming(-step)) is not None:
            halos[-step] = _empty(input, split.dim, here[1][1] - here[1][0])
            work += _receive(halos[-step], here[0], split)
    _finish(work)
    middle = _rows(input, split.dim, own.owned, _common(own.owned, own.needed))
    parts = (halos.get(-1), middle, halos.get(1))
    return torch.cat([part for part in parts if part is not None], split.dim)


def _returned(grad: Tensor, split: _Split) -> Tensor:
    """The adjoint: what belongs to the neighbours' rows is sent back to them, and added there."""
    own, dim = split.own, split.dim
    start, end = own.owned
    result = grad.new_zeros([end - start if i == dim else size for i, size in enumerate(grad.shape)])
    kept = _common(own.owned, own.needed)
    _rows(result, dim, own.owned, kept).add_(_rows(grad, dim, own.needed, kept))
    received: list[tuple[tuple[int, int], Tensor]] = []
    work: list[dist.P2POp] = []
    for step in (1, -1):
        if (here := split.incoming(-step)) is not None:
            work += _send(_rows(grad, dim, own.needed, here[1]), here[0], split)
        if (there := split.outgoing(step)) is not None:
            received.append((there[1], _empty(grad, dim, there[1][1] - there[1][0])))
            work += _receive(received[-1][1], there[0], split)
    _finish(work)
    for rows, back in received:
        _rows(result, dim, own.owned, rows).add_(back)
    return result


class _Exchange(torch.autograd.Function):
    """`_widened`, whose derivative is `_returned`, and so on."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, split: _Split) -> Tensor:
        ctx.split = split
        return _widened(input, split)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, None]:
        return _Return.apply(grad, ctx.split), None


class _Return(torch.autograd.Function):
    """`_returned`, whose derivative is `_widened`."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, split: _Split) -> Tensor:
        ctx.split = split
        return _returned(grad, split)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, None]:
        return _Exchange.apply(grad, ctx.split), None


def _moved(rows: tuple[int, int], by: int) -> tuple[int, int]:
    return rows[0] + by, rows[1] + by


def _common(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    low = max(a[0], b[0])
    return low, max(low, min(a[1], b[1]))


def _rows(tensor: Tensor, dim: int, held: tuple[int, int], rows: tuple[int, int]) -> Tensor:
    """A view of some global rows, of a tensor that holds the rows `held`."""
    low, high = rows
    return tensor.narrow(dim, low - held[0] if high > low else 0, high - low)


def _empty(like: Tensor, dim: int, size: int) -> Tensor:
    return like.new_empty([size if i == dim else n for i, n in enumerate(like.shape)])


def _peer(other: int, split: _Split) -> int:
    return other if split.group is None else dist.get_global_rank(split.group, other)


def _send(rows: Tensor, other: int, split: _Split) -> list[dist.P2POp]:
    """A message, unless it is empty, as the other side leaves it out too."""
    return [dist.P2POp(dist.isend, rows.contiguous(), _peer(other, split), split.group)] if rows.numel() else []


def _receive(rows: Tensor, other: int, split: _Split) -> list[dist.P2POp]:
    return [dist.P2POp(dist.irecv, rows, _peer(other, split), split.group)] if rows.numel() else []


def _finish(operations: list[dist.P2POp]) -> None:
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()


def _too_thin(split: _Split, total: int, mirrored: bool) -> str | None:
    """Which rank cannot have the rows that it needs from its neighbours, or None."""
    for rank, one in enumerate(split.slices):
        reach = split.reach(rank)
        rows, (before, after) = one.needed, one.padding
        empty = one.outputs[0] >= one.outputs[1] or rows[0] >= rows[1]
        # What a border mirrors has to be among the rows at hand.
        unmirrored = mirrored and (before >= rows[1] or total - 1 - after < rows[0])
        if empty or unmirrored or rows[0] < reach[0] or rows[1] > reach[1]:
            return (
                f"rank {rank} computes outputs {one.outputs} from rows {rows}, and has those of its neighbours alone, "
                f"{reach}"
            )
    return None


def _split_conv(
    rank_of_conv: int, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    groups: int, padding_mode: str, activation: str | None, dim: int, sizes: Sequence[int] | None, group: Any,
) -> Tensor:  # fmt: skip
    arguments = conv_arguments(
        rank_of_conv, input, weight, bias, stride, padding, dilation, groups, padding_mode, activation
    )
    if hasattr(input, "device_mesh"):
        raise ArgumentTypeError("input: expected this rank's slice, a plain tensor, got a DTensor; take its to_local()")
    if input.dim() != rank_of_conv + 2 or dim not in range(2, input.dim()):
        raise ArgumentError(
            f"dim: expected a batched input and a spatial dimension of it, got dim={dim} and input {list(input.shape)}"
        )
    steps, flat, spacing = arguments[3:6]
    here, at, world = dist.get_rank(group), dim - 2, dist.get_world_size(group)
    given = [input.shape[dim]] * world if sizes is None else sizes
    sizes = [size for size in given if type(size) is int] if isinstance(given, (list, tuple)) else []
    if len(sizes) != world or len(given) != world or sizes[here] != input.shape[dim]:
        raise ArgumentError(
            f"sizes: expected the size of dimension {dim} on each of {world} ranks, of this one {input.shape[dim]}, "
            f"got {given}"
        )
    pads = pairs(flat)
    whole_shape = [sum(sizes) if i == dim else size for i, size in enumerate(input.shape)]
    geometry = ConvGeometry.of(whole_shape, weight.shape, steps, pads, spacing, groups, padding_mode=padding_mode)
    extent = spacing[at] * (weight.shape[dim] - 1) + 1
    slices = _slices(sizes, geometry.out_shape[dim], extent, steps[at], pads[at], padding_mode)
    split = _Split(slices, here, dim, padding_mode == "circular", group)
    if (reason := _too_thin(split, sum(sizes), padding_mode == "reflect")) is not None:
        raise ArgumentError(
            f"input: slices of {sizes} rows along dimension {dim} are too thin for a filter that spans {extent} and "
            f"padding {pads[at]}: {reason}. Split the input among fewer ranks, or along another dimension"
        )
    pads[at] = split.own.padding
    wide: Tensor = _Exchange.apply(input, split) if world > 1 else input
    function = getattr(functional, f"conv{rank_of_conv}d")
    options = dict(padding_mode=padding_mode, activation=activation)
    result: Tensor = function(wide, weight, bias, steps, tuple(pads), spacing, groups, **options)
    return result


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
    dim: int = 2,
    sizes: Sequence[int] | None = None,
    group: Any = None,
) -> Tensor:
    """`triton_conv.conv1d` of a signal of which each rank has a stretch. See `conv2d`."""
    options = (padding_mode, activation, dim, sizes, group)
    return _split_conv(1, input, weight, bias, stride, padding, dilation, groups, *options)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
    dim: int = 2,
    sizes: Sequence[int] | None = None,
    group: Any = None,
) -> Tensor:
    """`triton_conv.conv2d` of an image of which each rank has a slice: this rank's slice of the result.

    The slices of the results, put together in the order of ranks, are what one process computes of the slices of the
    input put together; an output lies on the rank that owns the row where its window begins, padding aside. Rows in
    reach of the filter are exchanged with the two neighbours, in backward too. Weight and bias are whole and the same
    on each rank; their gradients are this rank's share, to be summed over ranks, as DistributedDataParallel does.

    Args:
        input: `(N, c_in, H, W)`, this rank's slice along `dim`.
        weight, bias, stride, padding, dilation, groups, padding_mode, activation: as `triton_conv.conv2d`. What lies
            beyond the ends is the first and last rank's to know; with "circular" they exchange rows with each other.
        dim: the dimension that is split: 2, height, or 3.
        sizes: its size on each rank; None if all have as many as this one.
        group: the process group, None for the default one.

    Raises:
        ArgumentError (a RuntimeError): a filter reaches beyond the neighbours, on every rank alike, so that none waits
            for another; or sizes do not fit. As `triton_conv.conv2d` otherwise.
    """
    options = (padding_mode, activation, dim, sizes, group)
    return _split_conv(2, input, weight, bias, stride, padding, dilation, groups, *options)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
    dim: int = 2,
    sizes: Sequence[int] | None = None,
    group: Any = None,
) -> Tensor:
    """`triton_conv.conv3d` of a volume of which each rank has a slice, by default along its depth. See `conv2d`."""
    options = (padding_mode, activation, dim, sizes, group)
    return _split_conv(3, input, weight, bias, stride, padding, dilation, groups, *options)
