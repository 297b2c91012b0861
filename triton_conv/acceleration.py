"""`accelerate`: torch's own convolution functions, wherever they are called, on our kernels where those are faster."""

from __future__ import annotations

import functools
import marshal
from collections.abc import Callable
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import calls, calls_deform, policy, routing
from .arguments import conv_arguments, conv_transpose_arguments, deform_arguments
from .eager import traced
from .errors import ArgumentTypeError, TritonConvError
from .report import Report, Row

Function = TypeVar("Function", bound=Callable[..., Any])


def _forward(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> tuple[Any, ...]:
    return conv_arguments(weight.dim() - 2, input, weight, bias, stride, padding, dilation, groups, "zeros", None)


def _transposed(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: Any = 1,
    dilation: Any = 1,
) -> tuple[Any, ...]:
    return conv_transpose_arguments(
        weight.dim() - 2, input, weight, bias, stride, padding, output_padding, groups, dilation, None
    )


def _torchvisions(
    input: Any, weight: Any, offset: Any, mask: Any, bias: Any, stride_h: Any, stride_w: Any, pad_h: Any, pad_w: Any,
    dilation_h: Any, dilation_w: Any, groups: Any, offset_groups: Any, use_mask: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The op below `torchvision.ops.deform_conv2d`; the groups follow from the shapes."""
    window = (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w)
    return deform_arguments(2, input, offset, weight, bias, *window, mask if use_mask else None)


def _is_torchvisions(function: Any) -> bool:
    """Whether it is that op, or its overload, of a torchvision that somebody has imported."""
    packet = getattr(function, "overloadpacket", function)
    return getattr(packet, "_qualified_op_name", "") == "torchvision::deform_conv2d"


_CALLS: dict[Any, tuple[str, Callable[..., tuple[Any, ...]]]] = {
    F.conv1d: ("conv1d", _forward),
    F.conv2d: ("conv2d", _forward),
    F.conv3d: ("conv3d", _forward),
    F.conv_transpose1d: ("conv_transpose1d", _transposed),
    F.conv_transpose2d: ("conv_transpose2d", _transposed),
    F.conv_transpose3d: ("conv_transpose3d", _transposed),
}


# Functions with their options: beyond them they hardly ever repeat.
_MOST = 4096


class _Function:
    """A function with its options, which are all in what it is looked up by; `routing` remembers its calls."""

    def routed_window(self) -> tuple[Any, ...]:
        return ()


class accelerate(TorchFunctionMode):
    """Inside it, `torch.nn.functional.conv1d` to `conv_transpose3d`, and torchvision's `deform_conv2d`, run on our
    kernels where a stored measurement says that those are faster, whoever calls them: unmodified models, libraries,
    your own functions.

    A context manager, which yields the report of its calls so far, and a decorator. What our kernels cannot run stays
    torch's, and so does everything on a device without measurements. Backward passes follow their forward passes, also
    after the end of the block.

    Args:
        force: whether to take our kernels wherever they can run, measured or not.

    >>> with tc.accelerate() as report:
    ...     model(x)
    >>> print(report)                      # every kind of call: where it ran, why, and the expected gain
    """

    def __init__(self, force: bool = False) -> None:
        super().__init__()
        if not isinstance(force, bool):
            raise ArgumentTypeError(f"force: expected True or False, got {force!r}; as a decorator: @tc.accelerate()")
        self._force = force
        # Dynamo, which may trace this, knows dictionaries, and not functools' caches.
        self._functions: dict[tuple[Any, bytes], _Function] = {}
        self.report = Report("accelerate(force=True)" if force else "accelerate()")

    def __enter__(self) -> Report:  # type: ignore[override]
        super().__enter__()
        return self.report

    def __call__(self, function: Function) -> Function:
        @functools.wraps(function)
        def accelerated(*args: Any, **kwargs: Any) -> Any:
            mode = accelerate(self._force)
            # Of which each call has its own report; what was chosen is the same.
            mode._functions = self._functions
            with mode:
                return function(*args, **kwargs)

        return accelerated  # type: ignore[return-value]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CALLS:
            (name, normalise), kind = _CALLS[func], "conv"
        elif _is_torchvisions(func):
            name, normalise, kind = "deform_conv2d", _torchvisions, "deform_conv"
        else:
            return func(*args, **kwargs)
        backend = policy.OURS if self._force else policy.current_backend()
        given = self._given(func, args, kwargs) if kind == "conv" and not traced() else None
        output = given and routing.again(backend, *given)
        if isinstance(output, Tensor):
            return output
        if output is routing.TORCHS:
            return func(*args, **kwargs)
        try:
            arguments = normalise(*args, **kwargs)
        except (TritonConvError, TypeError, AttributeError):
            # Not for us to say what is wrong with it, if anything is.
            return func(*args, **kwargs)
        if traced():
            output = getattr(routing, kind)(arguments, backend)
        else:
            choice = routing.choose(kind, arguments, backend)
            self.report.add(Row.of(name, "function", choice))
            if given is not None:
                routing.remember(kind, arguments, backend, given, choice)
            if not choice.ours:
                return func(*args, **kwargs)
            output = (calls.conv if kind == "conv" else calls_deform.deform_conv)(*arguments)
        # Without a batch the arguments have one of their own, and so has the output.
        input = args[0] if args else kwargs["input"]
        return output if output.dim() == input.dim() else output.squeeze(0)

    def _given(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> routing.Given | None:
        """A call as a layer would have it; None where tensors are named, or options are more than numbers and words."""
        try:
            # To the type of each: torch takes 1 for a stride, and not 1.0.
            key = func, marshal.dumps((args[3:], kwargs), 2)
        except ValueError:
            return None
        if (function := self._functions.get(key)) is None:
            if len(self._functions) >= _MOST:
                self._functions.clear()
            function = self._functions[key] = _Function()
        return (function, *args, None)[:4] if len(args) > 1 else None
