"""Arguments as the ops take them: torch's ints and tuples normalised, tensors checked, an unbatched input batched.

Each error names its argument and is of the class that torch raises.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import autocast
from .deform_geometry import forward_geometry
from .eager import traced
from .errors import ArgumentError, ArgumentTypeError, ArgumentValueError
from .geometry import ACTIVATIONS
from .tensors import TensorMeta, meta

_PLAIN = functools.partial(operator.is_, int)

Size = int | Sequence[int]
Padding = str | int | Sequence[int] | Sequence[tuple[int, int]]


def _int(value: Any) -> int | None:
    """The value as an int where torch takes it for one (so do numpy's integers), else None."""
    if type(value) is int:
        return value
    # torch.compile of torch 2.11 computes the index of a constant by itself: its TypeError would come from there.
    if value is None or isinstance(value, (bool, float, str, tuple, list)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _ints(value: Any) -> tuple[int, ...] | None:
    """A sequence of ints as a tuple, else None."""
    if not isinstance(value, (tuple, list)):
        return None
    ints = [_int(v) for v in value]
    return None if None in ints else tuple(ints)  # type: ignore[arg-type]


def per_dimension(name: str, value: Any, rank: int) -> tuple[int, ...]:
    """An int, or a sequence of one or `rank` ints, as `rank` ints."""
    # What most calls of a function hand over, and what a module does.
    if type(value) is int:
        return (value,) * rank
    if type(value) is tuple and len(value) == rank and all(map(_PLAIN, map(type, value))):
        return value
    single = _int(value)
    if single is not None:
        return (single,) * rank
    ints = _ints(value)
    if ints is None:
        raise ArgumentTypeError(f"{name}: expected an int or a sequence of {rank} ints, got {value!r}")
    if len(ints) not in (1, rank):
        raise ArgumentError(
            f"{name}: expected {name} to be a single integer value or a list of {rank} values to match the convolution "
            f"dimensions, but got {name}={list(value)}"
        )
    return ints if len(ints) == rank else ints * rank


def group_count(value: Any, name: str = "groups") -> int:
    groups = _int(value)
    if groups is None:
        raise ArgumentTypeError(f"{name}: expected an int, got {value!r}")
    return groups


def flat_padding(value: Any, rank: int, stride: tuple[int, ...], weight: Tensor, dilation: tuple[int, ...]) -> Any:
    """Padding as before, after, before, after, ...: from "same", "valid", an int, ints, or (before, after) pairs."""
    if type(value) is int:
        return (value,) * (2 * rank)
    if isinstance(value, str):
        if value == "valid":
            return (0,) * (2 * rank)
        if value != "same":
            raise ArgumentError(f"padding: Invalid padding string: {value!r}; expected 'same' or 'valid'")
        if any(s != 1 for s in stride):
            raise ArgumentError(
                f"padding: padding='same' is not supported for strided convolutions, got stride={list(stride)}"
            )
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        return tuple(half for total in totals for half in (total // 2, total - total // 2))
    if isinstance(value, (tuple, list)) and any(isinstance(v, (tuple, list)) for v in value):
        pairs = [_ints(v) for v in value]
        if len(pairs) != rank or not all(pair is not None and len(pair) == 2 for pair in pairs):
            raise ArgumentError(f"padding: expected {rank} pairs of (before, after), got {value!r}")
        return tuple(p for pair in pairs if pair for p in pair)
    if isinstance(value, (tuple, list)) and len(value) == 2 * rank:
        raise ArgumentError(
            f"padding: expected padding to be a single integer value or a list of {rank} values to match the "
            f"convolution dimensions, or {rank} pairs of (before, after) such as {((1, 0),) * rank}, but got {value!r}"
        )
    return tuple(p for p in per_dimension("padding", value, rank) for _ in range(2))


def batched(function: str, input: Any, rank: int, of: str = "weight", **others: Any) -> Tensor:
    """Checks that the arguments are tensors, and the ranks of the input and of the weight, which is the argument `of`
    that name; returns the input with a batch dimension.
    """
    for name, tensor in (("input", input), *others.items()):
        if not isinstance(tensor, Tensor) and not (tensor is None and name in ("bias", "mask")):
            raise ArgumentTypeError(f"{name}: {function}() expects a Tensor, got {type(tensor).__name__}")
        if tensor is not None and (tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized):
            kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
            raise ArgumentError(f"{name}: expected a strided tensor of numbers, got one that is {kind}")
    dims, weight = input.dim(), others[of]
    if weight.dim() != rank + 2:
        # torch has one phrase for a weight without a kernel dimension and another for any other rank.
        phrase = (
            "weight should have at least three dimensions"
            if weight.dim() < 3
            else f"Expected {weight.dim()}-dimensional input for {weight.dim()}-dimensional weight {list(weight.shape)}"
        )
        raise ArgumentError(
            f"{of}: {phrase}; {function} takes a {of} of {rank + 2} dimensions, got {of} {list(weight.shape)} and "
            f"input {list(input.shape)}"
        )
    if dims == rank + 2:
        return input  # type: ignore[no-any-return]
    if dims != rank + 1:
        raise ArgumentError(
            f"input: Expected {rank + 1}D (unbatched) or {rank + 2}D (batched) input to {function}, but got input of "
            f"size: {list(input.shape)}, weight of size: {list(weight.shape)}"
        )
    return input.unsqueeze(0)  # type: ignore[no-any-return]


def activation_name(value: str | None, name: str = "activation") -> str:
    if value is None:
        return "none"
    if value not in ACTIVATIONS:
        raise ArgumentValueError(f"{name}: {value!r} is not known; choose None or one of {', '.join(ACTIVATIONS[1:])}")
    return value


def conv_arguments(
    rank: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int,
    padding_mode: str, activation: str | None,
) -> tuple[Any, ...]:  # fmt: skip
    input = batched(f"conv{rank}d", input, rank, weight=weight, bias=bias)
    stride = per_dimension("stride", stride, rank)
    dilation = per_dimension("dilation", dilation, rank)
    padding = flat_padding(padding, rank, stride, weight, dilation)
    if not isinstance(padding_mode, str):
        raise ArgumentTypeError(f"padding_mode: expected a str such as 'zeros', got {padding_mode!r}")
    input, weight, bias = autocast.operands(input, weight, bias)
    return (
        input, weight, bias, stride, padding, dilation, group_count(groups), False, (0,) * rank, padding_mode,
        activation_name(activation),
    )  # fmt: skip


def conv_transpose_arguments(
    rank: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, output_padding: Any, groups: int,
    dilation: Any, activation: str | None,
) -> tuple[Any, ...]:  # fmt: skip
    input = batched(f"conv_transpose{rank}d", input, rank, weight=weight, bias=bias)
    flat = tuple(p for p in per_dimension("padding", padding, rank) for _ in range(2))
    input, weight, bias = autocast.operands(input, weight, bias)
    return (
        input, weight, bias, per_dimension("stride", stride, rank), flat, per_dimension("dilation", dilation, rank),
        group_count(groups), True, per_dimension("output_padding", output_padding, rank), "zeros",
        activation_name(activation),
    )  # fmt: skip


def deform_arguments(
    rank: int, input: Any, offset: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, mask: Any
) -> tuple[Any, ...]:
    batched(f"deform_conv{rank}d", input, rank, weight=weight, offset=offset, bias=bias, mask=mask)
    if input.dim() != rank + 2:
        raise ArgumentError(f"input: deform_conv{rank}d needs a batched input, got size {list(input.shape)}")
    flat = tuple(p for p in per_dimension("padding", padding, rank) for _ in range(2))
    window = per_dimension("stride", stride, rank), flat, per_dimension("dilation", dilation, rank)
    arguments = *autocast.deform_operands(input, offset, mask, weight, bias), *window
    return arguments if rank == 2 else _as_image_of_one_row(*arguments)


def _as_image_of_one_row(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any,
    dilation: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of a deformable convolution of a signal for the op of images: no tap leaves the row.

    The offsets are copied, with zeros between them: two numbers a tap, at which every channel is sampled.
    """
    if not traced():
        # Wrong shapes are told of as they were given.
        sampled = TensorMeta.of("input", input), TensorMeta.of("offset", offset), meta("mask", mask)
        forward_geometry(*sampled, TensorMeta.of("weight", weight), meta("bias", bias), stride, padding, dilation)
    both = torch.stack((torch.zeros_like(offset), offset), 2).flatten(1, 2)
    rows = [None if tensor is None else tensor.unsqueeze(2) for tensor in (input, both, mask, weight)]
    return *rows, bias, (1, *stride), (0, 0, *padding), (1, *dilation)
