"""Convolutions over several devices: large images in slices, groups apart, and how DTensors shard.

`conv1d`, `conv2d` and `conv3d` take one slice of an input along a spatial dimension on each rank and exchange the
rows that lie in reach of a filter with the neighbours: the halo. `by_groups` takes DTensors sharded by channels, and
runs each rank's groups there: nothing is communicated, in either direction. `register_sharding` teaches DTensor how
the plain functions of triton_conv shard by batch and by channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import functional, ops
from .arguments import Padding, Size, conv_arguments
from .errors import ArgumentError
from .ops import pairs


@dataclass(frozen=True)
class _Slice:
    """What one rank computes of the split dimension: outputs, the input rows that they need, and zeros beyond the ends.

    Half-open ranges of global rows.
    """

    owned: tuple[int, int]
    needed: tuple[int, int]
    padding: tuple[int, int]
    outputs: tuple[int, int]


def _slices(sizes: Sequence[int], extent: int, stride: int, padding: tuple[int, int]) -> list[_Slice]:
    """The slice of every rank. An output belongs to the rank that owns the row of its first tap, padding aside."""
    total, (before, after) = sum(sizes), padding
    out_total = (total + before + after - extent) // stride + 1
    made, start = [], 0
    for rank, size in enumerate(sizes):
        end = start + size
        first = -(-start // stride)
        last = out_total if rank == len(sizes) - 1 else min(-(-end // stride), out_total)
        low, high = first * stride - before, (last - 1) * stride - before + extent
        needed = max(low, 0), min(high, total)
        made.append(_Slice((start, end), needed, (max(-low, 0), max(high - total, 0)), (first, last)))
        start = end
    return made


class _Exchange(torch.autograd.Function):
    """Rows of the neighbours, before and after one's own; backward sends their gradients back to be added."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, dim: int, slices: list[_Slice], rank: int, group: Any) -> Tensor:
        ctx.dim, ctx.slices, ctx.rank, ctx.group = dim, slices, rank, group
        own = slices[rank]
        parts, work = [], []
        for other in (rank - 1, rank + 1):
            halo = None
            if 0 <= other < len(slices):
                theirs = slices[other]
                outgoing = _rows(input, dim, own.owned, _common(own.owned, theirs.needed))
                # What falls into the neighbour's reach of mine, and of its own what falls into mine.
                count = _common(theirs.owned, own.needed)
                halo = _empty(input, dim, count[1] - count[0])
                work += _swap(outgoing, halo, other, group)
            parts.append(halo)
        _finish(work)
        middle = _rows(input, dim, own.owned, _common(own.owned, own.needed))
        return torch.cat([part for part in (parts[0], middle, parts[1]) if part is not None], dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dim, slices, rank = ctx.dim, ctx.slices, ctx.rank
        own = slices[rank]
        start, end = own.owned
        result = grad.new_zeros([end - start if i == dim else size for i, size in enumerate(grad.shape)])
        kept = _common(own.owned, own.needed)
        _rows(result, dim, own.owned, kept).add_(_rows(grad, dim, own.needed, kept))
        received, work = [], []
        for other in (rank - 1, rank + 1):
            if 0 <= other < len(slices):
                theirs = slices[other]
                mine, wanted = _common(theirs.owned, own.needed), _common(own.owned, theirs.needed)
                outgoing = _rows(grad, dim, own.needed, mine)
                back = _empty(grad, dim, wanted[1] - wanted[0])
                work += _swap(outgoing, back, other, ctx.group)
                received.append((wanted, back))
        _finish(work)
        for wanted, back in received:
            _rows(result, dim, own.owned, wanted).add_(back)
        return result, None, None, None, None


def _common(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    low = max(a[0], b[0])
    return low, max(low, min(a[1], b[1]))


def _rows(tensor: Tensor, dim: int, held: tuple[int, int], rows: tuple[int, int]) -> Tensor:
    """A view of some global rows, of a tensor that holds the rows `held`."""
    low, high = rows
    return tensor.narrow(dim, low - held[0] if high > low else 0, high - low)


def _empty(like: Tensor, dim: int, size: int) -> Tensor:
    return like.new_empty([size if i == dim else n for i, n in enumerate(like.shape)])


def _swap(outgoing: Tensor, incoming: Tensor, other: int, group: Any) -> list[dist.P2POp]:
    """One send and one receive, of which empty ones are left out, as the other side leaves them out."""
    peer = other if group is None else dist.get_global_rank(group, other)
    operations = []
    if outgoing.numel():
        operations.append(dist.P2POp(dist.isend, outgoing.contiguous(), peer, group))
    if incoming.numel():
        operations.append(dist.P2POp(dist.irecv, incoming, peer, group))
    return operations


def _finish(operations: list[dist.P2POp]) -> None:
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()


def _split_conv(
    rank_of_conv: int, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    groups: int, activation: str | None, dim: int, sizes: Sequence[int] | None, group: Any,
) -> Tensor:  # fmt: skip
    arguments = conv_arguments(
        rank_of_conv, input, weight, bias, stride, padding, dilation, groups, "zeros", activation
    )
    if input.dim() != rank_of_conv + 2 or not 2 <= dim < input.dim():
        raise ArgumentError(
            f"dim: expected a batched input and a spatial dimension of it, got dim={dim} and input {list(input.shape)}"
        )
    steps, flat, spacing = arguments[3:6]
    here, at = dist.get_rank(group), dim - 2
    sizes = [input.shape[dim]] * dist.get_world_size(group) if sizes is None else list(sizes)
    if len(sizes) != dist.get_world_size(group) or sizes[here] != input.shape[dim]:
        raise ArgumentError(
            f"sizes: expected the size of dimension {dim} on each of {dist.get_world_size(group)} ranks, of this one "
            f"{input.shape[dim]}, got {sizes}"
        )
    extent = spacing[at] * (weight.shape[dim] - 1) + 1
    pads = pairs(flat)
    slices = _slices(sizes, extent, steps[at], pads[at])
    for number, one in enumerate(slices):
        reach = (slices[max(number - 1, 0)].owned[0], slices[min(number + 1, len(slices) - 1)].owned[1])
        if one.outputs[0] >= one.outputs[1] or one.needed[0] < reach[0] or one.needed[1] > reach[1]:
            raise ArgumentError(
                f"input: slices of {sizes} rows along dimension {dim} are too thin for a filter that spans {extent}: "
                f"rank {number} computes outputs {one.outputs} from rows {one.needed}, and has those of its neighbours "
                f"alone, {reach}"
            )
    pads[at] = slices[here].padding
    whole: Tensor = _Exchange.apply(input, dim, slices, here, group)
    function = getattr(functional, f"conv{rank_of_conv}d")
    result: Tensor = function(whole, weight, bias, steps, tuple(pads), spacing, groups, activation=activation)
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
    activation: str | None = None,
    dim: int = 2,
    sizes: Sequence[int] | None = None,
    group: Any = None,
) -> Tensor:
    """`triton_conv.conv1d` of a signal of which each rank has a stretch. See `conv2d`."""
    options = (activation, dim, sizes, group)
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
        weight, bias, stride, padding, dilation, groups, activation: as `triton_conv.conv2d`; zeros lie beyond the ends.
        dim: the dimension that is split: 2, height, or 3.
        sizes: its size on each rank; None if all have as many as this one.
        group: the process group, None for the default one.

    Raises:
        ArgumentError (a RuntimeError): a filter reaches beyond the neighbours, on every rank alike, so that none waits
            for another; or sizes do not fit.
    """
    options = (activation, dim, sizes, group)
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
    activation: str | None = None,
    dim: int = 2,
    sizes: Sequence[int] | None = None,
    group: Any = None,
) -> Tensor:
    """`triton_conv.conv3d` of a volume of which each rank has a slice, by default along its depth. See `conv2d`."""
    options = (activation, dim, sizes, group)
    return _split_conv(3, input, weight, bias, stride, padding, dilation, groups, *options)


# ------------------------------------------------------------------------------------------------------------- DTensors


def by_groups(function: Callable[..., Tensor], input: Any, weight: Any, bias: Any = None, **arguments: Any) -> Any:
    """A grouped convolution of DTensors sharded by channels: each rank computes its groups, without communication.

    >>> y = tc.distributed.by_groups(tc.conv2d, x, weight, bias, padding=1, groups=32)      # y is sharded by channels

    Args:
        function: a function of triton_conv or of torch.nn.functional that takes `groups`, forward or transposed.
        input: a DTensor `(N, c_in, ...)` with placement Shard(1), on a mesh of one dimension.
        weight, bias: DTensors with placement Shard(0); bias may be None.
        arguments: further arguments of the function, by keyword; `groups` is that of the whole, and the number of ranks
            divides it.

    Returns:
        A DTensor with placement Shard(1).

    Raises:
        ArgumentError (a RuntimeError): other placements, or groups that the ranks cannot share.
    """
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.experimental import local_map

    mesh, groups = input.device_mesh, arguments.pop("groups", 1)
    for name, tensor, dim in (("input", input, 1), ("weight", weight, 0), ("bias", bias, 0)):
        if tensor is not None and tuple(tensor.placements) != (Shard(dim),):
            raise ArgumentError(
                f"{name}: expected placement Shard({dim}) on one mesh dimension, got {tensor.placements}"
            )
    if groups % mesh.size():
        raise ArgumentError(f"groups: {groups} groups cannot be shared by {mesh.size()} ranks alike")

    def local(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return function(input, weight, bias, groups=groups // mesh.size(), **arguments)

    placements = ([Shard(1)], [Shard(0)], None if bias is None else [Shard(0)])
    return local_map(local, out_placements=[Shard(1)], in_placements=placements, device_mesh=mesh)(input, weight, bias)


@functools.cache
def register_sharding() -> None:
    """Teaches DTensor how convolutions shard, through torch's own registration: call it once, before using DTensors.

    By batch and, in one group, by output channels without communication; in one group by input channels, with partial
    sums. Other placements, groups among them (see `by_groups`), are gathered first, as DTensor does. The weight's
    gradient of a sharded batch is a partial sum, reduced when it is used.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding as register

    def conv(
        input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int, transposed: bool,
        output_padding: Any, padding_mode: str, activation: str,
    ) -> list[Any]:  # fmt: skip
        rest = [None] * 8

        def shardings(output: Any, x: Any, w: Any, b: Any) -> Any:
            return [output], [x, w, None if bias is None else b, *rest]

        # Output channels are the weight's first dimension, or, transposed, its second.
        out, inner = (1, 0) if transposed else (0, 1)
        found = [
            shardings(Replicate(), Replicate(), Replicate(), Replicate()),
            shardings(Shard(0), Shard(0), Replicate(), Replicate()),
        ]
        if groups == 1:
            found.append(shardings(Shard(1), Replicate(), Shard(out), Shard(0)))
            if bias is None and activation == "none":
                found.append(shardings(Partial(), Shard(1), Shard(inner), None))
        return found

    def weight_gradient(
        input: Any, grad_output: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, groups: int,
        *flags: Any,
    ) -> list[Any]:  # fmt: skip
        rest = [None] * (5 + len(flags))
        found: list[Any] = [
            ([Replicate()], [Replicate(), Replicate(), *rest]),
            ([Partial()], [Shard(0), Shard(0), *rest]),
        ]
        if groups == 1:
            found.append(([Shard(0)], [Replicate(), Shard(1), *rest]))
            found.append(([Shard(1)], [Shard(1), Replicate(), *rest]))
        return found

    for op, strategy, tensors in ((ops.conv, conv, 3), (ops.conv_weight_gradient, weight_gradient, 2)):
        register(op)(strategy)
        # It remembers a strategy by the tensors and by what follows the first plain int, `groups`: a second call with
        # another stride would be given the first one's shape.
        propagator = DTensor._op_dispatcher.sharding_propagator
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(tensors, needs_pytree=True)
