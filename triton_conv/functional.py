"""The public functions: torch's and torchvision's signatures, run by our kernels and no other.

Each one normalises its arguments and calls one op. Tensors are `(N, C, *size)` or unbatched `(C, *size)`, of dtype
float16, bfloat16, float32 or float64, in any strides. Products are accumulated in float32 (float64 for float64); those
of float32 are rounded to tf32 first where `torch.backends.cudnn.conv.fp32_precision` is "tf32", torch's default.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autocast, autograd, ops, ops_deform, vmaps  # noqa: F401 (registers its rules)
from .dispatch import Plan
from .errors import ArgumentError, ArgumentTypeError, ArgumentValueError
from .geometry import ACTIVATIONS

Size = int | Sequence[int]
Padding = str | int | Sequence[int] | Sequence[tuple[int, int]]


def _int(value: Any) -> int | None:
    """The value as an int where torch takes it for one (so do numpy's integers), else None."""
    if type(value) is int:
        return value
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _ints(value: Any) -> tuple[int, ...] | None:
    """A sequence of ints as a tuple, else None."""
    if not isinstance(value, (tuple, list)):
        return None
    ints = [_int(v) for v in value]
    return None if None in ints else tuple(ints)  # type: ignore[arg-type]


def _tuple(name: str, value: Any, rank: int) -> tuple[int, ...]:
    """An int, or a sequence of one or `rank` ints, as `rank` ints."""
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


def _groups(value: Any) -> int:
    groups = _int(value)
    if groups is None:
        raise ArgumentTypeError(f"groups: expected an int, got {value!r}")
    return groups


def _flat_padding(value: Any, rank: int, stride: tuple[int, ...], weight: Tensor, dilation: tuple[int, ...]) -> Any:
    """Padding as before, after, before, after, ...: from "same", "valid", an int, ints, or (before, after) pairs."""
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
    if isinstance(value, (tuple, list)) and value and all(isinstance(v, (tuple, list)) for v in value):
        pairs = [_ints(v) for v in value]
        if len(pairs) != rank or not all(pair is not None and len(pair) == 2 for pair in pairs):
            raise ArgumentError(f"padding: expected {rank} pairs of (before, after), got {value!r}")
        return tuple(p for pair in pairs if pair for p in pair)
    return tuple(p for p in _tuple("padding", value, rank) for _ in range(2))


def _tensors(function: str, input: Any, rank: int, **others: Any) -> Tensor:
    """Checks that the arguments are tensors and the input's rank; returns the input with a batch dimension."""
    for name, tensor in (("input", input), *others.items()):
        if not isinstance(tensor, Tensor) and not (tensor is None and name in ("bias", "mask")):
            raise ArgumentTypeError(f"{name}: {function}() expects a Tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.layout is not torch.strided:
            raise ArgumentError(f"{name}: expected a strided tensor, got layout {tensor.layout}")
    dims, weight = input.dim(), others["weight"]
    if weight.dim() != rank + 2:
        # torch has one phrase for a weight without a kernel dimension and another for any other rank.
        phrase = (
            "weight should have at least three dimensions"
            if weight.dim() < 3
            else f"Expected {weight.dim()}-dimensional input for {weight.dim()}-dimensional weight {list(weight.shape)}"
        )
        raise ArgumentError(
            f"weight: {phrase}; {function} takes a weight of {rank + 2} dimensions, got weight {list(weight.shape)} "
            f"and input {list(input.shape)}"
        )
    if dims == rank + 2:
        return input  # type: ignore[no-any-return]
    if dims != rank + 1:
        raise ArgumentError(
            f"input: Expected {rank + 1}D (unbatched) or {rank + 2}D (batched) input to {function}, but got input of "
            f"size: {list(input.shape)}, weight of size: {list(weight.shape)}"
        )
    return input.unsqueeze(0)  # type: ignore[no-any-return]


def _activation(value: str | None) -> str:
    if value is None:
        return "none"
    if value not in ACTIVATIONS:
        raise ArgumentValueError(f"activation: {value!r} is not known; choose None or one of {ACTIVATIONS[1:]}")
    return value


def _conv_arguments(
    rank: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int,
    padding_mode: str, activation: str | None,
) -> tuple[Any, ...]:  # fmt: skip
    input = _tensors(f"conv{rank}d", input, rank, weight=weight, bias=bias)
    stride = _tuple("stride", stride, rank)
    dilation = _tuple("dilation", dilation, rank)
    padding = _flat_padding(padding, rank, stride, weight, dilation)
    input, weight, bias = autocast.operands(input, weight, bias)
    return (
        input, weight, bias, stride, padding, dilation, _groups(groups), False, (0,) * rank, padding_mode,
        _activation(activation),
    )  # fmt: skip


def _conv_transpose_arguments(
    rank: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, output_padding: Any, groups: int,
    dilation: Any, activation: str | None,
) -> tuple[Any, ...]:  # fmt: skip
    input = _tensors(f"conv_transpose{rank}d", input, rank, weight=weight, bias=bias)
    flat = tuple(p for p in _tuple("padding", padding, rank) for _ in range(2))
    input, weight, bias = autocast.operands(input, weight, bias)
    return (
        input, weight, bias, _tuple("stride", stride, rank), flat, _tuple("dilation", dilation, rank), _groups(groups),
        True, _tuple("output_padding", output_padding, rank), "zeros", _activation(activation),
    )  # fmt: skip


def _deform_arguments(
    rank: int, input: Any, offset: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, mask: Any
) -> tuple[Any, ...]:
    _tensors(f"deform_conv{rank}d", input, rank, weight=weight, offset=offset, bias=bias, mask=mask)
    if input.dim() != rank + 2:
        raise ArgumentError(f"input: deform_conv{rank}d needs a batched input, got size {list(input.shape)}")
    flat = tuple(p for p in _tuple("padding", padding, rank) for _ in range(2))
    offset, mask = autocast.coordinates(input, offset, mask)
    input, weight, bias = autocast.operands(input, weight, bias)
    return (
        input, offset, mask, weight, bias, _tuple("stride", stride, rank), flat, _tuple("dilation", dilation, rank)
    )  # fmt: skip


def _conv(rank: int, input: Tensor, *arguments: Any) -> Tensor:
    output: Tensor = autograd.conv(*_conv_arguments(rank, input, *arguments))
    return output if input.dim() == rank + 2 else output.squeeze(0)


def _conv_transpose(rank: int, input: Tensor, *arguments: Any) -> Tensor:
    output: Tensor = autograd.conv(*_conv_transpose_arguments(rank, input, *arguments))
    return output if input.dim() == rank + 2 else output.squeeze(0)


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
) -> Tensor:
    """1-D convolution: `(N, c_in, L)` by `(c_out, c_in/groups, k)` -> `(N, c_out, L_out)`.

    Equivalent to `torch.nn.functional.conv1d(input, weight, bias, stride, padding, dilation, groups)`. See `conv2d`.
    """
    return _conv(1, input, weight, bias, stride, padding, dilation, groups, padding_mode, activation)


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
) -> Tensor:
    """2-D convolution, dense, dilated, grouped or depthwise, with bias and activation in the same kernel.

    Equivalent to `torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)`, followed by the
    activation of that name.

    Args:
        input: `(N, c_in, H, W)` or `(c_in, H, W)`, contiguous, channels_last or strided in any way; never copied.
        weight: `(c_out, c_in/groups, KH, KW)`, same dtype and device.
        bias: `(c_out,)` or None.
        stride, dilation: one int, or one a dimension.
        padding: ints likewise, "valid", "same" (stride 1 only), or one (before, after) pair a dimension:
            `((3, 0),)` for a causal `conv1d` of 4 taps.
        groups: divides c_in and c_out.
        padding_mode: "zeros", "reflect", "replicate" or "circular": what lies beyond the border. Folded into the loads;
            no padded copy is made. Equivalent to `torch.nn.functional.pad(input, ..., mode=padding_mode)` first, and
            limited as it is: reflect to less than the input's size, circular to the size.
        activation: None, "relu", "relu6", "gelu" (by erf, not tanh) or "silu", computed on the accumulator.

    Returns:
        `(N, c_out, H_out, W_out)`, `H_out = (H + before + after - dilation (KH - 1) - 1) // stride + 1`; channels_last
        if input or weight is.

    Raises:
        ArgumentError (a RuntimeError), ArgumentTypeError (a TypeError), ArgumentValueError (a ValueError): as torch.
        DtypeError, DeviceError: for a dtype or device our kernels do not serve, for instance CPU tensors without
            TRITON_INTERPRET=1.
    """
    return _conv(2, input, weight, bias, stride, padding, dilation, groups, padding_mode, activation)


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
) -> Tensor:
    """3-D convolution: `(N, c_in, D, H, W)` by `(c_out, c_in/groups, KD, KH, KW)` -> `(N, c_out, D_out, H_out, W_out)`.

    Equivalent to `torch.nn.functional.conv3d(input, weight, bias, stride, padding, dilation, groups)`. See `conv2d`.
    """
    return _conv(3, input, weight, bias, stride, padding, dilation, groups, padding_mode, activation)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """1-D transposed convolution: `(N, c_in, L)` by `(c_in, c_out/groups, k)` -> `(N, c_out, L_out)`.

    Equivalent to `torch.nn.functional.conv_transpose1d(input, weight, bias, stride, padding, output_padding, groups,
    dilation)`. See `conv_transpose2d`.
    """
    return _conv_transpose(1, input, weight, bias, stride, padding, output_padding, groups, dilation, activation)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """2-D transposed convolution by output phases: no zero is inserted between the inputs, none is multiplied.

    Equivalent to `torch.nn.functional.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups,
    dilation)`, followed by the activation of that name.

    Args:
        input: `(N, c_in, H, W)` or `(c_in, H, W)`.
        weight: `(c_in, c_out/groups, KH, KW)`.
        bias: `(c_out,)` or None.
        stride, padding, output_padding, dilation: one int, or one a dimension; output_padding is smaller than stride or
            dilation.
        groups: divides c_in and c_out.
        activation: as in `conv2d`.

    Returns:
        `(N, c_out, H_out, W_out)`, `H_out = (H - 1) stride - 2 padding + dilation (KH - 1) + output_padding + 1`.

    Raises:
        As `conv2d`.

    Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285.
    """
    return _conv_transpose(2, input, weight, bias, stride, padding, output_padding, groups, dilation, activation)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """3-D transposed convolution: `(N, c_in, D, H, W)` by `(c_in, c_out/groups, KD, KH, KW)`.

    Equivalent to `torch.nn.functional.conv_transpose3d(input, weight, bias, stride, padding, output_padding, groups,
    dilation)`. See `conv_transpose2d`.
    """
    return _conv_transpose(3, input, weight, bias, stride, padding, output_padding, groups, dilation, activation)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = (1, 1),
    padding: Size = (0, 0),
    dilation: Size = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution v1, and v2 where `mask` is given: each tap of each output reads at an offset of its own.

    Equivalent to `torchvision.ops.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)`, without
    the column buffer, and in bfloat16 too.

    Args:
        input: `(N, c_in, H, W)`.
        offset: `(N, 2 * offset_groups * KH * KW, H_out, W_out)`, (y, x) for each tap, in pixels. Dtype of the input, or
            float32 beside half-precision data.
        weight: `(c_out, c_in/groups, KH, KW)`; the number of groups follows from the shapes.
        bias: `(c_out,)` or None.
        stride, padding, dilation: one int, or one a dimension.
        mask: `(N, offset_groups * KH * KW, H_out, W_out)` or None.

    Returns:
        `(N, c_out, H_out, W_out)`. Samples are bilinear, and zero more than a pixel outside the input.

    Gradients of all five tensors sample anew, without a column buffer either. The input's is added up by atomics, in an
    order that changes, or, under `torch.use_deterministic_algorithms(True)`, in 64-bit fixed point: the same bits every
    time. Second derivatives are a slow path in torch's own operations, with a column buffer.

    Raises:
        As `conv2d`.

    Dai et al., arXiv:1703.06211 (v1); Zhu et al., arXiv:1811.11168 (v2).
    """
    arguments = _deform_arguments(2, input, offset, weight, bias, stride, padding, dilation, mask)
    return autograd.deform_conv(*arguments)  # type: ignore[no-any-return]


_KINDS: dict[str, tuple[Callable[..., Plan], Callable[..., tuple[Any, ...]]]] = {
    "conv": (ops.plan_conv, _conv_arguments),
    "conv_transpose": (ops.plan_conv, _conv_transpose_arguments),
    "deform_conv": (ops_deform.plan_deform_conv, _deform_arguments),
}


planners: dict[Callable[..., Tensor], Callable[..., Any]] = {}
"""What plans the functions of other modules: a call's arguments in, its plan out."""


def plan(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
    """What `function(*args, **kwargs)` would launch, and why, without launching it; raises what the call would.

    A `Plan`, or a `Chain` of two of them. The forward pass alone: its gradients have plans of their own. Meta tensors
    are planned for an H100.

    >>> print(tc.plan(tc.conv2d, input, weight, padding=1, groups=64))      # kernel, tile, where the tile came from
    """
    if function in planners:
        return planners[function](*args, **kwargs)
    name = getattr(function, "__name__", "")
    kind, rank = name[:-2], name[-2:-1]
    if globals().get(name) is not function or kind not in _KINDS:
        raise ArgumentTypeError(f"function: expected a convolution of triton_conv such as conv2d, got {function!r}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    planner, arguments = _KINDS[kind]
    return planner(*arguments(int(rank), **bound.arguments))
