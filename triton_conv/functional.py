"""The public functions: torch's and torchvision's signatures, run by our kernels and no other.

Each one normalises its arguments and calls one op. Tensors are `(N, C, *size)` or unbatched `(C, *size)`, of dtype
float16, bfloat16, float32 or float64, in any strides. Products are accumulated in float32 (float64 for float64); those
of float32 are rounded to tf32 first where `torch.backends.cudnn.conv.fp32_precision` is "tf32", torch's default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import calls, calls_deform, ops_conv, ops_deform, symbolic, vmaps  # noqa: F401 (registers its rules)
from .arguments import Padding, Size, conv_arguments, conv_transpose_arguments, deform_arguments
from .dispatch import Plan
from .errors import ArgumentTypeError


def _conv(rank: int, input: Tensor, *arguments: Any) -> Tensor:
    try:
        output = calls.conv(*conv_arguments(rank, input, *arguments))
    except ArgumentTypeError:
        return symbolic.recorded(globals()[f"conv{rank}d"], input, *arguments)  # type: ignore[no-any-return]
    return output if input.dim() == rank + 2 else output.squeeze(0)


def _conv_transpose(rank: int, input: Tensor, *arguments: Any) -> Tensor:
    try:
        output = calls.conv(*conv_transpose_arguments(rank, input, *arguments))
    except ArgumentTypeError:
        return symbolic.recorded(globals()[f"conv_transpose{rank}d"], input, *arguments)  # type: ignore[no-any-return]
    return output if input.dim() == rank + 2 else output.squeeze(0)


def _deform_conv(rank: int, *arguments: Any) -> Tensor:
    try:
        output = calls_deform.deform_conv(*deform_arguments(rank, *arguments))
    except ArgumentTypeError:
        return symbolic.recorded(globals()[f"deform_conv{rank}d"], *arguments)  # type: ignore[no-any-return]
    # Signals are images of one row.
    return output.squeeze(2) if rank == 1 else output


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


def deform_conv1d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """1-D deformable convolution: `(N, c_in, L)` by `(c_out, c_in/groups, k)` -> `(N, c_out, L_out)`.

    `offset` is `(N, offset_groups * k, L_out)`, one for each tap, in samples; `mask` has the same shape. Equivalent to
    `torchvision.ops.deform_conv2d` of an image of one row whose vertical offsets are zero, and run as that. See
    `deform_conv2d`.
    """
    return _deform_conv(1, input, offset, weight, bias, stride, padding, dilation, mask)


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
    return _deform_conv(2, input, offset, weight, bias, stride, padding, dilation, mask)


_KINDS: dict[str, tuple[Callable[..., Plan], Callable[..., tuple[Any, ...]]]] = {
    "conv": (ops_conv.plan_conv, conv_arguments),
    "conv_transpose": (ops_conv.plan_conv, conv_transpose_arguments),
    "deform_conv": (ops_deform.plan_deform_conv, deform_arguments),
}


planners: dict[Callable[..., Tensor], Callable[..., Any]] = {}
"""What plans the functions of other modules: all arguments of a call in, in the function's order, its plan out."""


def plan(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
    """What `function(*args, **kwargs)` would launch, and why, without launching it; raises what the call would.

    A `Plan`, or a `Chain` of two of them. The forward pass alone: its gradients have plans of their own. Meta tensors
    are planned for an H100.

    >>> print(tc.plan(tc.conv2d, input, weight, padding=1, groups=64))      # kernel, tile, where the tile came from
    """
    name = getattr(function, "__name__", "")
    kind, rank = name[:-2], name[-2:-1]
    if function not in planners and (globals().get(name) is not function or kind not in _KINDS):
        given = repr(function) if callable(function) else type(function).__name__
        raise ArgumentTypeError(f"function: expected a convolution of triton_conv such as conv2d, got {given}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    if function in planners:
        return planners[function](*bound.arguments.values())
    planner, arguments = _KINDS[kind]
    return planner(*arguments(int(rank), **bound.arguments))
