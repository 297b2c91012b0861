"""A convolution on whichever of the two libraries `policy` chooses: what the modules and `accelerate` call.

Arguments arrive normalised, as the ops take them. While a graph is traced the choice is made inside an op of its own
that consists of what it calls, so that torch.compile and torch.export need not follow how: a graph decides once, by
the sizes that it is traced with, and is not traced again for others.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autocast, calls, calls_deform, ops, policy, reference
from .eager import likeness, ordinary, plain, traced, undisturbed
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


Given = tuple[Any, ...]
"""A call as a layer has it: itself, and its tensors in the order of the op's."""


class Layer(Protocol):
    """What is asked of one."""

    def routed_window(self) -> tuple[Any, ...]:
        """What it computes, of its tensors."""


class _Known(NamedTuple):
    """What a layer's call was like, and became: this convolution, of tensors in this dtype of autocast's if in any, or
    torch's own."""

    alike: Callable[..., bool]
    backend: str
    graded: bool
    call: calls.Call | None
    lower: torch.dtype | None = None
    details: tuple[Any, ...] = ()


TORCHS = object()
_known: weakref.WeakKeyDictionary[Layer, dict[torch.Size, list[_Known]]] = weakref.WeakKeyDictionary()
_NOTHING: dict[torch.Size, list[_Known]] = {}
# Of one layer, and of one size: beyond them calls hardly ever repeat.
_SIZES, _KINDS = 64, 16
ops.on_forgetting.append(_known.clear)


def again(backend: str, layer: Layer, *tensors: Any) -> Tensor | object | None:
    """What is known of a layer's call: the output if ours was chosen for one that is the same in all that matters,
    `TORCHS` if torch's kernel was chosen for one like it; else None.

    Normalised arguments, a choice and the look-up of a plan take 9 us, this 2 and 1. The choice of torch is all that is
    remembered of it: a layer that was changed computes what it should, if not where it would.
    """
    input = tensors[0]
    # In a graph sizes are symbols.
    if backend == policy.TORCH or traced() or type(input) is not Tensor:
        return None
    graded = torch.is_grad_enabled()
    try:
        kinds = _known.get(layer, _NOTHING).get(input.shape, ())
    except RuntimeError:
        # A nested tensor has no shape.
        return None
    for alike, asked, recorded, call, lower, details in kinds:
        if asked == backend and recorded == graded and alike(*tensors):
            if call is None:
                return TORCHS
            # Whether autocast is on belongs to the likeness, its dtype does not.
            if lower:
                if lower != autocast.lower(input):
                    continue
                tensors = call.lowered(*tensors)
            same = undisturbed() and details == (layer.routed_window(), call.details(*tensors))
            return call(*tensors) if same else None
    return None


def remember(kind: str, arguments: tuple[Any, ...], backend: str, given: Given, choice: policy.Choice) -> None:
    """Keeps what was chosen for what a layer was given, by the arguments that the op `kind` has for it."""
    count, call, *_ = _CALLS[kind]
    if choice.ours:
        remember_ours(call, arguments[:count], arguments[count:], backend, given)
    # Not what torch runs for another reason, as while a graph is captured.
    elif choice.plan is not None:
        _add(backend, given, None)


def remember_ours(
    kind: type[calls.Call], tensors: tuple[Any, ...], window: tuple[Any, ...], backend: str, given: Given
) -> None:
    """Keeps that ours runs what a layer was given, which has become these tensors."""
    # An input without a batch is another one here.
    if plain(*tensors) and tensors[0].dim() == given[1].dim():
        call = kind.like(tensors, window)
        _add(backend, given, call, (given[0].routed_window(), call.details(*tensors)))


def _add(backend: str, given: Given, call: calls.Call | None, details: tuple[Any, ...] = ()) -> None:
    layer, *tensors = given
    if ordinary(*tensors):
        input = tensors[0]
        sizes = _known.setdefault(layer, {})
        if len(sizes) >= _SIZES:
            sizes.clear()
        kinds = sizes.setdefault(input.shape, [])
        if len(kinds) >= _KINDS:
            kinds.clear()
        known = _Known(likeness(*tensors), backend, torch.is_grad_enabled(), call, autocast.lower(input), details)
        # Before one that is like it but for its details: those belong to the layer's past.
        kinds.insert(0, known)


def conv(arguments: tuple[Any, ...], backend: str, given: Given | None = None) -> Tensor:
    """A forward or transposed convolution, by the arguments of the op `conv`; what a layer was given is remembered."""
    if traced():
        return _traced_conv(*arguments, backend)  # type: ignore[no-any-return]
    return _routed("conv", arguments, backend, given)


def deform_conv(arguments: tuple[Any, ...], backend: str, given: Given | None = None) -> Tensor:
    """A deformable convolution, by the arguments of the op `deform_conv`, likewise."""
    if traced():
        return _traced_deform_conv(*arguments, backend)  # type: ignore[no-any-return]
    return _routed("deform_conv", arguments, backend, given)


def _routed(kind: str, arguments: tuple[Any, ...], backend: str, given: Given | None = None) -> Tensor:
    *_, ours, torchs = _CALLS[kind]
    if backend == policy.TORCH:
        return torchs(*arguments)
    choice = choose(kind, arguments, backend)
    if given is not None:
        remember(kind, arguments, backend, given, choice)
    return (ours if choice.ours else torchs)(*arguments)


def choose(kind: str, arguments: tuple[Any, ...], backend: str) -> policy.Choice:
    """`policy.choose` for the arguments of the op `kind`.

    Where torchvision is not installed, the other way to a deformable convolution is plain tensor operations: no match.
    """
    count = _CALLS[kind][0]
    choice = policy.choose(kind, backend, arguments[:count], arguments[count:])
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


# How many tensors come first among an op's arguments, what is remembered of a call of ours, and who runs it.
_CALLS: dict[str, tuple[int, type[calls.Call], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "conv": (3, calls.Call, calls.conv, torch_conv),
    "deform_conv": (5, calls_deform.DeformCall, calls_deform.deform_conv, torch_deform_conv),
}


def _as_op(kind: str) -> Callable[..., Tensor]:
    """The same by the op's arguments, which hands its integers on as lists; of what is inside, all is traced."""

    def routed(*arguments: Any) -> Tensor:
        plain = tuple(tuple(value) if isinstance(value, list) else value for value in arguments[:-1])
        return _routed(kind, plain, arguments[-1])

    return routed


# The second key is that of torch.func: its transforms are for the ops inside, which have rules.
for _key in ("CompositeImplicitAutograd", "FuncTorchDynamicLayerFrontMode"):
    library.impl("routed_conv", _as_op("conv"), _key)
    library.impl("routed_deform_conv", _as_op("deform_conv"), _key)
_traced_conv = torch.ops.triton_conv.routed_conv.default
_traced_deform_conv = torch.ops.triton_conv.routed_deform_conv.default
