"""How DTensors shard through the ops: by batch, by channels, by groups.

`triton_conv.distributed` has the names for users.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops, ops_conv, ops_deform, ops_fused, ops_local
from .errors import ArgumentError, ArgumentTypeError


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
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.experimental import local_map

    groups = arguments.pop("groups", 1)
    for name, tensor, dim in (("input", input, 1), ("weight", weight, 0), ("bias", bias, 0)):
        if tensor is not None and not isinstance(tensor, DTensor):
            raise ArgumentTypeError(f"{name}: expected a DTensor, got {type(tensor).__name__}")
        if tensor is not None and tuple(tensor.placements) != (Shard(dim),):
            raise ArgumentError(
                f"{name}: expected placement Shard({dim}) on one mesh dimension, got {tensor.placements}"
            )
    mesh = input.device_mesh
    if groups % mesh.size():
        raise ArgumentError(f"groups: {groups} groups cannot be shared by {mesh.size()} ranks alike")

    def local(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return function(input, weight, bias, groups=groups // mesh.size(), **arguments)

    placements = ([Shard(1)], [Shard(0)], None if bias is None else [Shard(0)])
    return local_map(local, out_placements=[Shard(1)], in_placements=placements, device_mesh=mesh)(input, weight, bias)


# How each op shards over one dimension of a mesh, as torch asks for it: ([output placements], [those of arguments])
# for every way. `S[d]` is a shard of dimension d, R a replica, P a partial sum. A width takes the place of `groups`.
_Ways = list[tuple[list[Any], list[Any]]]


class _Placements:
    """Builds the ways of one op, leaving out those of arguments that are None."""

    def __init__(self, tensors: tuple[Any, ...], others: int) -> None:
        from torch.distributed.tensor import Partial, Replicate, Shard

        self.S, self.R, self.P = [Shard(d) for d in range(8)], Replicate(), Partial()
        self._tensors, self._others = tensors, others
        self.ways: _Ways = []

    def add(self, outputs: Any, *tensors: Any) -> None:
        given = [None if t is None else p for t, p in zip(self._tensors, tensors, strict=True)]
        self.ways.append(([*outputs] if isinstance(outputs, tuple) else [outputs], [*given, *[None] * self._others]))


def _shared(groups: int, tensor: Any) -> bool:
    """Whether the ranks can have as many of several groups each."""
    return groups > 1 and groups % tensor.mesh.size() == 0


def _conv(x: Any, w: Any, b: Any, *rest: Any) -> _Ways:
    *_, width, transposed, _, _, activation = rest
    made = _Placements((x, w, b), len(rest))
    S, R, P = made.S, made.R, made.P
    made.add(R, R, R, R)
    made.add(S[0], S[0], R, R)
    groups = x.shape[1] // width
    if groups == 1:
        # Output channels are the weight's first dimension, or, transposed, its second.
        out, inner = (1, 0) if transposed else (0, 1)
        made.add(S[1], R, S[out], S[0])
        if b is None and activation == "none":
            made.add(P, S[1], S[inner], R)
    elif _shared(groups, x):
        made.add(S[1], S[1], S[0], S[0])
    return made.ways


def _weight_gradient(x: Any, dy: Any, *rest: Any) -> _Ways:
    made = _Placements((x, dy), len(rest))
    S, R, P = made.S, made.R, made.P
    made.add(R, R, R)
    made.add(P, S[0], S[0])
    groups = x.shape[1] // rest[4]
    if groups == 1:
        made.add(S[0], R, S[1])
        made.add(S[1], S[1], R)
    elif _shared(groups, x):
        made.add(S[0], S[1], S[1])
    return made.ways


def _offsets(made: _Placements, x: Any, offset: Any, taps: int) -> Any:
    """The placement of offset and mask where input channels are sharded; None where they cannot be."""
    groups = offset.shape[1] // (2 * taps)
    return made.R if groups == 1 else made.S[1] if groups % x.mesh.size() == 0 else None


def _deform_conv(x: Any, offset: Any, mask: Any, w: Any, b: Any, *rest: Any) -> _Ways:
    made = _Placements((x, offset, mask, w, b), len(rest))
    S, R, P = made.S, made.R, made.P
    made.add(R, R, R, R, R, R)
    made.add(S[0], S[0], S[0], S[0], R, R)
    at = _offsets(made, x, offset, math.prod(w.shape[2:]))
    if x.shape[1] == w.shape[1]:
        made.add(S[1], R, R, R, S[0], S[0])
        if b is None and at is not None:
            made.add(P, S[1], at, at, S[1], R)
    elif at is not None and _shared(x.shape[1] // w.shape[1], x):
        made.add(S[1], S[1], at, at, S[0], S[0])
    return made.ways


def _deform_input_gradient(x: Any, offset: Any, mask: Any, w: Any, dy: Any, *rest: Any) -> _Ways:
    made = _Placements((x, offset, mask, w, dy), len(rest))
    S, R, P, needed = made.S, made.R, made.P, rest[3]

    def add(dx: Any, coordinates: Any, *tensors: Any) -> None:
        # What is not needed is empty, and the same everywhere.
        found = tuple(p if need else R for p, need in zip((dx, coordinates, coordinates), needed, strict=True))
        made.add(found, *tensors)

    add(R, R, R, R, R, R, R)
    add(S[0], S[0], S[0], S[0], S[0], R, S[0])
    at = _offsets(made, x, offset, math.prod(w.shape[2:]))
    # Every channel has a share in the gradient of offsets that it has in common with others.
    coordinates = P if at == R else at
    if x.shape[1] == w.shape[1]:
        add(P, P, R, R, R, S[0], S[1])
        if at is not None:
            add(S[1], coordinates, S[1], at, at, S[1], R)
    elif at is not None and _shared(x.shape[1] // w.shape[1], x):
        add(S[1], coordinates, S[1], at, at, S[0], S[1])
    return made.ways


def _deform_weight_gradient(x: Any, offset: Any, mask: Any, dy: Any, *rest: Any) -> _Ways:
    made = _Placements((x, offset, mask, dy), len(rest))
    S, R, P = made.S, made.R, made.P
    made.add(R, R, R, R, R)
    made.add(P, S[0], S[0], S[0], S[0])
    at, groups = _offsets(made, x, offset, math.prod(rest[0])), x.shape[1] // rest[4]
    if groups == 1:
        made.add(S[0], R, R, R, S[1])
        if at is not None:
            made.add(S[1], S[1], at, at, R)
    elif at is not None and _shared(groups, x):
        made.add(S[0], S[1], at, at, S[1])
    return made.ways


def _shuffle_conv(x: Any, w: Any, b: Any, *rest: Any) -> _Ways:
    """By batch: the shuffle puts channels of every group side by side."""
    made = _Placements((x, w, b), len(rest))
    made.add(made.R, made.R, made.R, made.R)
    made.add(made.S[0], made.S[0], made.R, made.R)
    return made.ways


def _separable_conv(x: Any, d: Any, p: Any, mb: Any, b: Any, *rest: Any) -> _Ways:
    made = _Placements((x, d, p, mb, b), len(rest))
    S, R, P = made.S, made.R, made.P
    made.add(R, R, R, R, R, R)
    made.add(S[0], S[0], R, R, R, R)
    made.add(S[1], R, R, S[0], R, S[0])
    if b is None and rest[-1] == "none" and x.shape[1] % x.mesh.size() == 0:
        made.add(P, S[1], S[0], S[1], S[0], R)
    return made.ways


def _local_conv(x: Any, w: Any, b: Any, *rest: Any) -> _Ways:
    made, rank = _Placements((x, w, b), len(rest)), len(x.shape) - 2
    S, R, P = made.S, made.R, made.P
    made.add(R, R, R, R)
    made.add(S[0], S[0], R, R)
    groups = x.shape[1] // rest[3]
    if groups == 1:
        made.add(S[1], R, S[rank], S[0])
        if b is None:
            made.add(P, S[1], S[rank + 1], R)
    elif _shared(groups, x):
        made.add(S[1], S[1], S[rank], S[0])
    return made.ways


def _local_input_gradient(dy: Any, w: Any, *rest: Any) -> _Ways:
    made, rank = _Placements((dy, w), len(rest)), len(dy.shape) - 2
    S, R, P = made.S, made.R, made.P
    made.add(R, R, R)
    made.add(S[0], S[0], R)
    groups = dy.shape[1] // rest[4]
    if groups == 1:
        made.add(P, S[1], S[rank])
        made.add(S[1], R, S[rank + 1])
    elif _shared(groups, dy):
        made.add(S[1], S[1], S[rank])
    return made.ways


def _local_weight_gradient(x: Any, dy: Any, *rest: Any) -> _Ways:
    made, rank = _Placements((x, dy), len(rest)), len(x.shape) - 2
    S, R, P = made.S, made.R, made.P
    made.add(R, R, R)
    made.add(P, S[0], S[0])
    groups = x.shape[1] // rest[4]
    if groups == 1:
        made.add(S[rank], R, S[1])
        made.add(S[rank + 1], S[1], R)
    elif _shared(groups, x):
        made.add(S[rank], S[1], S[1])
    return made.ways


# Op, its strategy, how many tensors it takes.
_STRATEGIES: tuple[tuple[Any, Callable[..., _Ways], int], ...] = (
    (ops_conv.conv, _conv, 3),
    (ops_conv.conv_weight_gradient, _weight_gradient, 2),
    (ops_deform.deform_conv, _deform_conv, 5),
    (ops_deform.deform_conv_input_gradient, _deform_input_gradient, 5),
    (ops_deform.deform_conv_weight_gradient, _deform_weight_gradient, 4),
    (ops_fused.shuffle_conv, _shuffle_conv, 3),
    (ops_fused.separable_conv, _separable_conv, 5),
    (ops_local.local_conv, _local_conv, 3),
    (ops_local.local_conv_input_gradient, _local_input_gradient, 2),
    (ops_local.local_conv_weight_gradient, _local_weight_gradient, 2),
)


def _by_width(op: Any) -> tuple[Any, Callable[..., Any]]:
    """The op with the channels of a group in place of `groups`, and what makes a call of the one a call of the other.

    All ranks call an op with the same numbers, but where they have some of the groups each, they have fewer. The
    channels of a group, of the first tensor, stay as many.
    """
    name, at = op._schema.name.split("::")[1], [a.name for a in op._schema.arguments].index("groups")
    text = str(op._schema).removeprefix("triton_conv::").replace(f"{name}(", f"{name}_by_width(", 1)
    ops.library.define(text.replace("SymInt groups", "SymInt width"), tags=ops.TAGS)

    def local(first: Tensor, *arguments: Any) -> Any:
        # Of one group a rank may have a part of the channels.
        groups = max(first.shape[1] // arguments[at - 1], 1)
        return op(first, *arguments[: at - 1], groups, *arguments[at:])

    ops.library.impl(f"{name}_by_width", local, "CompositeExplicitAutograd")
    made = getattr(torch.ops.triton_conv, f"{name}_by_width").default

    def handler(called: Any, arguments: tuple[Any, ...], named: Any) -> Any:
        width = max(arguments[0].shape[1] // arguments[at], 1)
        return made(*arguments[:at], width, *arguments[at + 1 :])

    return made, handler


@functools.cache
def register_sharding() -> None:
    """Teaches DTensor how convolutions shard, through torch's own registration: call it once, before using DTensors.

    Without communication by batch; by output channels where there is one group; by groups where the ranks can have as
    many each. By input channels of one group with partial sums. Of a deformable convolution offset and mask follow the
    batch, and the channels if those of several offset groups are sharded. Other placements are gathered first, as
    DTensor does. The weight's gradient of a sharded batch is a partial sum, reduced when it is used.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding as register

    dispatcher = DTensor._op_dispatcher
    for op, strategy, tensors in _STRATEGIES:
        if any(argument.name == "groups" for argument in op._schema.arguments) and op != ops_fused.shuffle_conv:
            registered, handler = _by_width(op)
            dispatcher._custom_op_handlers[op] = handler
        else:
            registered = op
        register(registered)(strategy)
        # It remembers a strategy by the tensors and by what follows the first plain int: a second call with another
        # stride would be given the first one's shape.
        info = RuntimeSchemaInfo(tensors, needs_pytree=True)
        dispatcher.sharding_propagator.op_to_schema_info[registered] = info
