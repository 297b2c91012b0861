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

from . import autograd, policy, reference
from .ops import TAGS, library, on_forgetting, pairs

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

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
}


class Call:
    """A layer's call, by what a measurement's choice of a library for it depends on: asked again, torch's own layer
    answers at once. Normalised arguments and a choice take 7 us, this 1.5.

    Nothing but the choice is remembered: a layer that was changed computes what it should, if not where it would.
    """

    __slots__ = ("_key", "_layer")

    def __init__(self, layer: nn.Module, input: Tensor, weight: Tensor) -> None:
        self._layer = layer
        training = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        self._key = (input.shape, input.stride(), input.dtype, weight.dtype, input.device, training)

    @property
    def torchs(self) -> bool:
        """Whether torch's kernel was chosen for a call like this one."""
        return self._key in _torchs.get(self._layer, ())

    def stays(self) -> None:
        """Remembers that it was."""
        known = _torchs.setdefault(self._layer, set())
        if len(known) >= _SHAPES:
            known.clear()
        known.add(self._key)


_torchs: weakref.WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = weakref.WeakKeyDictionary()
# Of one layer: beyond them its sizes hardly ever repeat.
_SHAPES = 64
on_forgetting.append(_torchs.clear)


def conv(arguments: tuple[Any, ...], backend: str, call: Call | None = None) -> Tensor:
    """A forward or transposed convolution, by the arguments of the op `conv`, of a layer's `call` if of one."""
    if torch.compiler.is_compiling():
        return _traced_conv(*arguments, backend)  # type: ignore[no-any-return]
    return _conv(arguments, backend, call)


def deform_conv(arguments: tuple[Any, ...], backend: str) -> Tensor:
    """A deformable convolution, by the arguments of the op `deform_conv`."""
    if torch.compiler.is_compiling():
        return _traced_deform_conv(*arguments, backend)  # type: ignore[no-any-return]
    return _deform_conv(arguments, backend)


def _conv(arguments: tuple[Any, ...], backend: str, call: Call | None = None) -> Tensor:
    if backend != policy.TORCH:
        choice = policy.choose("conv", backend, arguments[:3], arguments[3:])
        if choice.ours:
            return autograd.conv(*arguments)  # type: ignore[no-any-return]
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
    return result if activation == "none" else _ACTIVATIONS[activation](result)


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
