"""`accelerate`: torch's own convolution functions, wherever they are called, on our kernels where those are faster."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch.nn.functional as F
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
        self.report = Report("accelerate(force=True)" if force else "accelerate()")

    def __enter__(self) -> Report:  # type: ignore[override]
        super().__enter__()
        return self.report

    def __call__(self, function: Function) -> Function:
        @functools.wraps(function)
        def accelerated(*args: Any, **kwargs: Any) -> Any:
            with accelerate(self._force):
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
        try:
            arguments = normalise(*args, **kwargs)
        except (TritonConvError, TypeError, AttributeError):
            # Not for us to say what is wrong with it, if anything is.
            return func(*args, **kwargs)
        backend = policy.OURS if self._force else policy.current_backend()
        if traced():
            output = getattr(routing, kind)(arguments, backend)
        else:
            choice = routing.choose(kind, arguments, backend)
            self.report.add(Row.of(name, "function", choice))
            if not choice.ours:
                return func(*args, **kwargs)
            output = (calls.conv if kind == "conv" else calls_deform.deform_conv)(*arguments)
        # Without a batch the arguments have one of their own, and so has the output.
        given = args[0] if args else kwargs["input"]
        result: Any = output if output.dim() == given.dim() else output.squeeze(0)
        return result
