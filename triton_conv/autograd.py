"""Gradients of the ops, made of the ops: so that second derivatives, and all further ones, follow.

For y = x * w, a convolution with its transpose *T: dL/dx = dL/dy *T w, and dL/dw is the sum over pixels that the op
`conv_weight_gradient` computes. Both are bilinear in convolutions again. Only what is asked for is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .errors import GradientError

Pairs = list[tuple[int, int]]


def _pairs(flat: Sequence[int]) -> Pairs:
    return [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]


def _flat(pairs: Pairs) -> list[int]:
    return [p for pair in pairs for p in pair]


# ------------------------------------------------------------------------------------------------- forward convolution


def conv_input_gradient(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
) -> Tensor:
    """dL/dx of a forward convolution whose input has spatial `size`: a transposed convolution with the same weight."""
    pads = _pairs(padding)
    # A folded border is an input of its own, as wide as the padding; its gradient is folded back afterwards.
    inner = pads if padding_mode == "zeros" else [(0, 0)] * len(pads)
    wide = [s + b + a - i - j for s, (b, a), (i, j) in zip(size, pads, inner, strict=True)]
    extra = [
        s - ((out - 1) * step - b - a + dil * (k - 1) + 1)
        for s, out, step, (b, a), dil, k in zip(
            wide, grad.shape[2:], stride, inner, dilation, weight.shape[2:], strict=True
        )
    ]
    result: Tensor = ops.conv(grad, weight, None, stride, _flat(inner), dilation, groups, True, extra, "zeros", "none")
    if padding_mode != "zeros":
        for dim, (before, after) in enumerate(pads, start=2):
            result = _fold_back(result, dim, before, after, padding_mode)
    return result


def _fold_back(grad: Tensor, dim: int, before: int, after: int, padding_mode: str) -> Tensor:
    """Adds the gradient of a border to the elements that it repeats: the adjoint of padding one dimension."""
    size = grad.shape[dim] - before - after
    centre = grad.narrow(dim, before, size)
    for start, length, first in ((0, before, True), (before + size, after, False)):
        if length == 0:
            continue
        border = grad.narrow(dim, start, length)
        if padding_mode == "reflect":
            border = border.flip(dim)
            at = 1 if first else size - 1 - length
        elif padding_mode == "circular":
            at = size - length if first else 0
        else:
            border = border.sum(dim, keepdim=True)
            at, length = (0 if first else size - 1), 1
        shape = [0, 0] * (grad.dim() - dim - 1) + [at, size - at - length]
        centre = centre + torch.nn.functional.pad(border, shape)
    return centre


# ---------------------------------------------------------------------------------------------------------- the op conv


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, *ctx.arguments = inputs
    # The output tells where relu was flat; other activations need what was before them, which is computed anew.
    activation = ctx.arguments[-1]
    ctx.save_for_backward(input, weight, bias, output if activation in ("relu", "relu6") else None)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight, bias, output = ctx.saved_tensors
    stride, padding, dilation, groups, transposed, output_padding, padding_mode, activation = ctx.arguments
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    if activation != "none":
        grad = _activation_gradient(ctx, grad, input, weight, bias, output)
    grad_input = grad_weight = grad_bias = None
    if need_bias:
        grad_bias = grad.sum((0, *range(2, grad.dim())))
    if transposed:
        grad, pads = _matching(grad, input, _pairs(padding), output_padding)
        if need_input:
            shape = (stride, _flat(pads), dilation, groups, False, [0] * len(stride), "zeros", "none")
            grad_input = ops.conv(grad, weight, None, *shape)
        if need_weight:
            grad_weight = ops.conv_weight_gradient(
                grad, input, weight.shape[2:], stride, _flat(pads), dilation, groups, "zeros"
            )
    else:
        if need_input:
            grad_input = conv_input_gradient(
                grad, weight, input.shape[2:], stride, padding, dilation, groups, padding_mode
            )
        if need_weight:
            grad_weight = ops.conv_weight_gradient(
                input, grad, weight.shape[2:], stride, padding, dilation, groups, padding_mode
            )
    return grad_input, grad_weight, grad_bias, *(None,) * len(ctx.arguments)


def _matching(grad: Tensor, input: Tensor, pads: Pairs, output_padding: Sequence[int]) -> tuple[Tensor, Pairs]:
    """The output's gradient and the padding with which a forward convolution has exactly the input's size.

    Output padding adds elements at the end: they take the place of padding, or are past the reach of every input.
    """
    fitted = []
    for dim, ((before, after), extra) in enumerate(zip(pads, output_padding, strict=True), start=2):
        if extra > after:
            grad = grad.narrow(dim, 0, grad.shape[dim] - (extra - after))
        fitted.append((before, max(after - extra, 0)))
    return grad, fitted


def _activation_gradient(
    ctx: Any, grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor | None
) -> Tensor:
    *arguments, activation = ctx.arguments
    if output is not None:
        live = output > 0
        return grad * (live if activation == "relu" else live & (output < 6))
    before = ops.conv(input, weight, bias, *arguments, "none")
    if activation == "gelu":
        result: Tensor = torch.ops.aten.gelu_backward(grad, before)
        return result
    # torch's silu_backward has no derivative of its own.
    gate = before.sigmoid()
    result = grad * gate * (1 + before * (1 - gate))
    return result


# ------------------------------------------------------------------------------------------ the op conv_weight_gradient


def _weight_gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, grad_output, *ctx.arguments = inputs
    ctx.save_for_backward(input, grad_output)


def _weight_gradient_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """dw is linear in x and in dy: with the gradient G of dw in the weight's place, they are convolutions again."""
    input, grad_output = ctx.saved_tensors
    _, stride, padding, dilation, groups, padding_mode = ctx.arguments
    grad_input = grad_grad = None
    if ctx.needs_input_grad[0]:
        grad_input = conv_input_gradient(
            grad_output, grad, input.shape[2:], stride, padding, dilation, groups, padding_mode
        )
    if ctx.needs_input_grad[1]:
        none = [0] * len(stride)
        grad_grad = ops.conv(input, grad, None, stride, padding, dilation, groups, False, none, padding_mode, "none")
    return grad_input, grad_grad, *(None,) * len(ctx.arguments)


def _deform_backward(ctx: Any, *gradients: Tensor) -> Any:
    raise GradientError(
        "deform_conv: triton_conv computes no gradients of deformable convolution yet; call it under torch.no_grad(), "
        "or on tensors that require none"
    )


# The ops, now with their gradients.
conv, deform_conv = ops.conv, ops.deform_conv

torch.library.register_autograd("triton_conv::conv", _conv_backward, setup_context=_conv_setup)
torch.library.register_autograd(
    "triton_conv::conv_weight_gradient", _weight_gradient_backward, setup_context=_weight_gradient_setup
)
torch.library.register_autograd("triton_conv::deform_conv", _deform_backward)
