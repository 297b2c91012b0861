"""A convolution on whichever of the two libraries `policy` chooses: what the modules and `accelerate` call.

Arguments arrive normalised, as the ops take them. While a graph is traced the choice is made inside an op of its own
that consists of what it calls, so that torch.compile and torch.export need not follow how: a graph decides once, by
the sizes that it is traced with, and is not traced again for others.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import autocast, autograd, calls, ops, policy, reference
from .eager import plain, traced
from .ops import TAGS, library, pairs

library.define(
    "routed_conv(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt groups, bool transposed, SymInt[] output_padding, str padding_mode, str activation, str backend) -> Tensor",
    tags=TAGS,
)
library.define(
    "routed_deform_conv(Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, str backend) -> Tensor",
    tags=TAGS,
)


class Call:
    """A layer's call, by what a choice of a library for it depends on, and by what it computes.

    Asked again, torch's own layer answers at once, and so does our convolution if it is the same in all that matters:
    normalised arguments, a choice and the look-up of a plan take 9 us, this 1.5 and 3.
    """

    __slots__ = ("_key", "_layer", "_lower", "_tensors", "_window")

    def __init__(
        self,
        layer: nn.Module,
        backend: str,
        window: tuple[Any, ...],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> None:
        self._layer, self._window, self._tensors = layer, window, (input, weight, bias)
        training = torch.is_grad_enabled() and torch._C._any_requires_grad(input, weight, bias)
        self._lower = autocast.lower(input)
        tensor = input.shape, input.stride(), input.dtype, input.device
        self._key = (*tensor, weight.dtype, training, self._lower, backend)

    def again(self) -> Tensor | object | None:
        """`TORCHS` if torch's kernel was chosen for a call like this one, the output if ours was; None otherwise.

        The choice of torch is all that is remembered of it: a layer that was changed computes what it should, if not
        where it would.
        """
        known = _known.get(self._layer, _NOTHING).get(self._key)
        if known is None or known is TORCHS:
            return known
        details, convolution = known
        tensors = autocast.operands(*self._tensors) if self._lower else self._tensors
        same = plain(*tensors) and details == self._details(tensors)
        return convolution(*tensors) if same else None

    def _details(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._window, *map(calls.seen, tensors), ops.conv_precision(tensors[0].dtype))

    def stays(self) -> None:
        """Remembers that torch's kernel was chosen."""
        self._remember(TORCHS)

    def moves(self, arguments: tuple[Any, ...]) -> None:
        """Remembers that ours was, and these arguments of the op; not of an input that was without a batch."""
        input, weight, bias, *window = arguments
        if plain(input, weight, bias) and input.dim() == self._tensors[0].dim():
            convolution = calls.like(input, weight, bias, tuple(window))
            self._remember((self._details((input, weight, bias)), convolution))

    def _remember(self, known: Any) -> None:
        kinds = _known.setdefault(self._layer, {})
        if len(kinds) >= _KINDS:
            kinds.clear()
        kinds[self._key] = known


TORCHS = object()
_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Any]] = weakref.WeakKeyDictionary()
_NOTHING: dict[tuple[Any, ...], Any] = {}
# Of one layer: beyond them its sizes hardly ever repeat.
_KINDS = 64
ops.on_forgetting.append(_known.clear)


def conv(arguments: tuple[Any, ...], backend: str, call: Call | None = None) -> Tensor:
    """A forward or transposed convolution, by the arguments of the op `conv`, of a layer's `call` if of one."""
    if traced():
        return _traced_conv(*arguments, backend)  # type: ignore[no-any-return]
    return _conv(arguments, backend, call)


def deform_conv(arguments: tuple[Any, ...], backend: str) -> Tensor:
    """A deformable convolution, by the arguments of the op `deform_conv`."""
    if traced():
        return _traced_deform_conv(*arguments, backend)  # type: ignore[no-any-return]
    return _deform_conv(arguments, backend)


def _conv(arguments: tuple[Any, ...], backend: str, call: Call | None = None) -> Tensor:
    if backend != policy.TORCH:
        choice = policy.choose("conv", backend, arguments[:3], arguments[3:])
        if choice.ours:
            if call is not None:
                call.moves(arguments)
            return calls.conv(*arguments)
        # Not what torch runs for another reason, as while a graph is captured.
        if call is not None and choice.plan is not None:
            call.stays()
    return torch_conv(*arguments)


def _deform_conv(arguments: tuple[Any, ...], backend: str) -> Tensor:
    if choose("deform_conv", arguments, backend).ours:
        return autograd.deform_conv(*arguments)  # type: ignore[no-any-return]
    return torch_deform_conv(*arguments)


def choose(kind: str, arguments: tuple[Any, ...], backend: str) -> policy.Choice:
    """`policy.choose` for the arguments of the op `kind`.

    Where torchvision is not installed, the other way to a deformable convolution is plain tensor operations: no match.
    """
    tensors = 5 if kind == "deform_conv" else 3
    choice = policy.choose(kind, backend, arguments[:tensors], arguments[tensors:])
    slow = kind == "deform_conv" and backend == policy.AUTO and not choice.ours and _torchvision() is None
    if slow and choice.plan is not None:
        return policy.Choice(policy.OURS, "torchvision is not installed", None, choice.plan)
    return choice


def torch_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    transposed: bool,
    output_padding: tuple[int, ...],
    padding_mode: str,
    activation: str,
) -> Tensor:
    """The same convolution by torch's own functions; padding that they do not take becomes a padded copy."""
    rank = len(stride)
    before, after = padding[::2], padding[1::2]
    if transposed:
        function: Callable[..., Tensor] = getattr(F, f"conv_transpose{rank}d")
        result = function(input, weight, bias, stride, before, output_padding, groups, dilation)
    else:
        if padding_mode != "zeros" or before != after:
            flat = [p for pair in reversed(pairs(padding)) for p in pair]
            input = F.pad(input, flat, mode="constant" if padding_mode == "zeros" else padding_mode)
            before = (0,) * rank
        function = getattr(F, f"conv{rank}d")
        result = function(input, weight, bias, stride, before, dilation, groups)
    return reference.activated(result, activation)


@functools.cache
def _torchvision() -> Callable[..., Tensor] | None:
    """torchvision's function, if it is installed and fits this torch."""
    try:
        from torchvision.ops import deform_conv2d
    except Exception:  # a torchvision built for another torch fails in many ways
        return None
    return deform_conv2d  # type: ignore[no-any-return]


def torch_deform_conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """The same deformable convolution by torchvision, else by torch's tensor operations with a column buffer."""
    function = _torchvision()
    if function is not None:
        return function(input, offset, weight, bias, stride, padding[::2], dilation, mask)
    return reference.deform_conv2d(input, offset, weight, bias, stride, padding[::2], dilation, mask)


def _as_op(function: Callable[[tuple[Any, ...], str], Tensor]) -> Callable[..., Tensor]:
    """The same by the op's arguments, which hands its integers on as lists; of what is inside, all is traced."""

    def routed(*arguments: Any) -> Tensor:
        plain = tuple(tuple(value) if isinstance(value, list) else value for value in arguments[:-1])
        return function(plain, arguments[-1])

    return routed


library.impl("routed_conv", _as_op(_conv), "CompositeImplicitAutograd")
library.impl("routed_deform_conv", _as_op(_deform_conv), "CompositeImplicitAutograd")
_traced_conv = torch.ops.triton_conv.routed_conv.default
_traced_deform_conv = torch.ops.triton_conv.routed_deform_conv.default
