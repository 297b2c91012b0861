"""Gradients of the ops, made of the ops: so that second derivatives, and all further ones, follow.

For y = x * w, a convolution with its transpose *T: dL/dx = dL/dy *T w, and dL/dw is the sum over pixels that the op
`conv_weight_gradient` computes. Both are bilinear in convolutions again. Only what is asked for is computed.
Deformable convolution has first derivatives of its own, too; its second ones are torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, ops_conv, ops_deform
from .eager import differentiated
from .layout import channels_last_like
from .problem import weight_first
from .reference import deform_conv2d


def _flat(pairs: list[tuple[int, int]]) -> list[int]:
    return [p for pair in pairs for p in pair]


# ------------------------------------------------------------------------------------------------- forward convolution


# What follows the tensors among the op's arguments: stride, padding, dilation, groups, transposed, output_padding,
# padding_mode and activation.
Window = Sequence[Any]


def conv_input_gradient(grad: Tensor, weight: Tensor, size: Sequence[int], window: Window) -> Tensor:
    """dL/dx of a convolution whose input has spatial `size`; its output padding is `matched`."""
    result: Tensor = conv(grad, weight, None, *input_gradient_window(grad.shape[2:], weight.shape[2:], size, window))
    padding, padding_mode = window[1], window[6]
    if padding_mode != "zeros":
        for dim, (before, after) in enumerate(ops.pairs(padding), start=2):
            result = _fold_back(result, dim, before, after, padding_mode)
    return result


def input_gradient_window(
    out_size: Sequence[int], kernel: Sequence[int], size: Sequence[int], window: Window
) -> tuple[Any, ...]:
    """Of a convolution with this window the gradient of the input is one with that window, and the same weight."""
    stride, padding, dilation, groups, transposed, _, padding_mode, _ = window
    if transposed:
        return stride, padding, dilation, groups, False, (0,) * len(stride), "zeros", "none"
    pads = ops.pairs(padding)
    # A folded border is an input of its own, as wide as the padding; its gradient is folded back afterwards.
    inner = pads if padding_mode == "zeros" else [(0, 0)] * len(pads)
    wide = [s + b + a - i - j for s, (b, a), (i, j) in zip(size, pads, inner, strict=True)]
    extra = [
        s - ((out - 1) * step - b - a + dil * (k - 1) + 1)
        for s, out, step, (b, a), dil, k in zip(wide, out_size, stride, inner, dilation, kernel, strict=True)
    ]
    return stride, _flat(inner), dilation, groups, True, extra, "zeros", "none"


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
    ctx.save_for_backward(input, weight, *slope_tellers(ctx.arguments[-1], bias, output))


def slope_tellers(activation: str, bias: Tensor | None, output: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Bias and output, those of them that an activation's gradient reads: the output tells where relu was flat; others
    need what was before them, which is computed anew. What is not saved may change before the backward pass.
    """
    if activation == "none":
        return None, None
    return (None, output) if activation in ("relu", "relu6") else (bias, None)


def conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    found = conv_gradients(ctx.saved_tensors, ctx.arguments, ctx.needs_input_grad[:3], grad)
    return *found, *(None,) * len(ctx.arguments)


def conv_gradients(
    tensors: Sequence[Tensor | None], window: Window, needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a convolution's input, weight and bias, those that are needed; `tensors` are input and weight, and
    the `slope_tellers`.
    """
    input, weight, *_ = tensors
    assert input is not None and weight is not None
    return linear_gradients(input, weight, window, needed, activation_gradient(tensors, window, grad))


def linear_gradients(
    input: Tensor, weight: Tensor, window: Window, needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those by the gradient before the activation."""
    need_input, need_weight, need_bias = needed
    grad_input = grad_weight = None
    grad_bias = bias_gradient(grad) if need_bias else None
    grad, window = matched(grad, input, window)

    def weight_gradient() -> Tensor:
        pair = (grad, input) if window[4] else (input, grad)
        result: Tensor = conv_weight_gradient(*pair, *weight_gradient_window(weight, window))
        return result

    first = need_weight and weight_comes_first(weight, input, grad)
    if first:
        grad_weight = weight_gradient()
    if need_input:
        grad_input = conv_input_gradient(grad, weight, input.shape[2:], window)
    if need_weight and not first:
        grad_weight = weight_gradient()
    return grad_input, grad_weight, grad_bias


# Of tensors of so many dimensions.
_ALL_BUT_CHANNELS = {3: (0, 2), 4: (0, 2, 3), 5: (0, 2, 3, 4)}


def bias_gradient(grad: Tensor) -> Tensor:
    return grad.sum(_ALL_BUT_CHANNELS[grad.dim()])


def weight_gradient_window(weight: Tensor, window: Window) -> tuple[Any, ...]:
    """What the op `conv_weight_gradient` takes besides tensors."""
    stride, padding, dilation, groups, transposed, _, padding_mode, _ = window
    channels_last = channels_last_like(weight.shape, weight.stride())
    return weight.shape[2:], stride, padding, dilation, groups, padding_mode, channels_last, transposed


def weight_comes_first(weight: Tensor, *read: Tensor) -> bool:
    """`weight_first` of tensors; where sizes are symbols, which a comparison would tie down, as of a usual batch."""
    first = weight_first(weight.numel(), sum(tensor.numel() for tensor in read))
    return first if isinstance(first, bool) else True


def matched(grad: Tensor, input: Tensor, window: Window) -> tuple[Tensor, Window]:
    """The gradient of a transposed convolution's output, and the window with whose padding a forward convolution of it
    has exactly the input's size; of a forward convolution, what is given.

    Output padding adds elements at the end: they take the place of padding, or are past the reach of every input.
    """
    stride, padding, dilation, groups, transposed, output_padding, *others = window
    if not transposed:
        return grad, window
    fitted = []
    for dim, ((before, after), extra) in enumerate(zip(ops.pairs(padding), output_padding, strict=True), start=2):
        if extra > after:
            grad = grad.narrow(dim, 0, grad.shape[dim] - (extra - after))
        fitted.append((before, max(after - extra, 0)))
    return grad, (stride, _flat(fitted), dilation, groups, transposed, output_padding, *others)


def activation_gradient(tensors: Sequence[Tensor | None], window: Window, grad: Tensor) -> Tensor:
    """The gradient before the activation."""
    if (activation := window[-1]) == "none":
        return grad
    input, weight, bias, output = tensors
    if output is not None:
        # It selects, as torch does: infinity times zero would be no number. What selects has no derivative of its own.
        output = output.detach()
        result: Tensor = (
            torch.ops.aten.threshold_backward(grad, output, 0)
            if activation == "relu"
            else torch.ops.aten.hardtanh_backward(grad, output, 0, 6)
        )
        return result
    before = conv(input, weight, bias, *window[:-1], "none")
    if activation == "gelu":
        result = torch.ops.aten.gelu_backward(grad, before)
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
    _, stride, padding, dilation, groups, padding_mode, *_ = ctx.arguments
    window = stride, padding, dilation, groups, False, [0] * len(stride), padding_mode, "none"
    grad_input = grad_grad = None
    if ctx.needs_input_grad[0]:
        grad_input = conv_input_gradient(grad_output, grad, input.shape[2:], window)
    if ctx.needs_input_grad[1]:
        grad_grad = conv(input, grad, None, *window)
    return grad_input, grad_grad, *(None,) * len(ctx.arguments)


# ---------------------------------------------------------------------------------------------- deformable convolution


def _deform_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, stride, padding, dilation = inputs
    ctx.arguments = stride, padding, dilation
    ctx.save_for_backward(*tensors)


def _deform_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    found = deform_gradients(ctx.saved_tensors, ctx.arguments, ctx.needs_input_grad[:5], grad)
    return *found, *(None,) * len(ctx.arguments)


def deform_gradients(
    tensors: Sequence[Any], window: Window, needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of input, offset, mask, weight and bias, those that are needed; `tensors` are all but the bias."""
    input, offset, mask, weight = tensors
    *need_sampled, need_weight, need_bias = needed
    sampled: list[Tensor | None] = [None, None, None]

    def weight_gradient() -> Tensor | None:
        if not need_weight:
            return None
        result: Tensor = deform_conv_weight_gradient(
            input, offset, mask, grad, weight.shape[2:], *window, input.shape[1] // weight.shape[1]
        )
        return result

    first = weight_comes_first(weight, input, grad)
    grad_weight = weight_gradient() if first else None
    if any(need_sampled):
        results = deform_conv_input_gradient(
            input, offset, mask, weight, grad, *window, need_sampled, torch.are_deterministic_algorithms_enabled()
        )
        sampled = [result if need else None for result, need in zip(results, need_sampled, strict=True)]
    if not first:
        grad_weight = weight_gradient()
    return *sampled, grad_weight, bias_gradient(grad) if need_bias else None


# Second derivatives of deformable convolution, and further ones, are rare: they are those of the definition in torch's
# own operations, with a column buffer, in float32 (float64).


def _defined_gradients(
    tensors: Sequence[Tensor | None], grad_output: Tensor, wanted: Sequence[int], arguments: Sequence[Sequence[int]]
) -> tuple[Tensor, ...]:
    """Gradients of the definition for the `wanted` of (input, offset, mask, weight), differentiable themselves."""
    input, offset, mask, weight = tensors
    stride, padding, dilation = arguments
    assert input is not None and offset is not None and weight is not None
    output = deform_conv2d(input, offset, weight, None, stride, padding[::2], dilation, mask)
    differentiated = [tensor for index, tensor in enumerate(tensors) if index in wanted and tensor is not None]
    return torch.autograd.grad(output, differentiated, grad_output, create_graph=True)


def _second_derivatives(
    ctx: Any, tensors: Sequence[Tensor | None], wanted: Sequence[int], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of sum(first derivatives * cotangents) for (input, offset, mask, weight, grad_output)."""
    again = torch.is_grad_enabled()
    # A backward pass may run under autocast; what is precise stays so.
    with torch.enable_grad(), torch.autocast(cotangents[0].device.type, enabled=False):
        # Views cut off what the tensors have in common: an offset may itself have been computed from the input.
        leaves = [
            None if t is None else t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_()
            for t in tensors
        ]
        precise = [None if t is None else t if t.dtype == torch.float64 else t.float() for t in leaves]
        assert precise[4] is not None
        first = _defined_gradients(precise[:4], precise[4], wanted, ctx.arguments)
        present = [leaf for leaf in leaves if leaf is not None]
        cotangents = [c.to(f.dtype) for c, f in zip(cotangents, first, strict=True)]
        found = iter(torch.autograd.grad(first, present, cotangents, create_graph=again, allow_unused=True))
    return [None if leaf is None else next(found) for leaf in leaves]


def _deform_input_gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, stride, padding, dilation, needed, _ = inputs
    ctx.arguments = stride, padding, dilation
    ctx.wanted = [index for index, need in enumerate(needed) if need]
    ctx.save_for_backward(*tensors)


def _deform_input_gradient_backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    found = _second_derivatives(ctx, ctx.saved_tensors, ctx.wanted, [gradients[index] for index in ctx.wanted])
    return *found, *(None,) * 5


def _deform_weight_gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, stride, padding, dilation, _ = inputs
    ctx.arguments = stride, padding, dilation
    ctx.weight_shape = output.shape
    ctx.save_for_backward(*tensors)


def _deform_weight_gradient_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, offset, mask, grad_output = ctx.saved_tensors
    # The gradient of a weight does not depend on the weight.
    weight = grad.new_zeros(ctx.weight_shape)
    *found, _, grad_grad = _second_derivatives(ctx, (input, offset, mask, weight, grad_output), [3], [grad])
    return *found, grad_grad, *(None,) * 5


# The ops, now with their gradients.


def jvp_of_conv(ctx: Any, *tangents: Any) -> Tensor:
    """A convolution is linear in its input, its weight and its bias; the activation's slope comes after."""
    input, weight, *_ = ctx.saved_for_forward
    *arguments, _ = ctx.arguments
    dx, dw, db = tangents[:3]
    parts = [] if dx is None else [conv(dx, weight, None, *arguments, "none")]
    parts += [] if dw is None else [conv(input, dw, None, *arguments, "none")]
    parts += [] if db is None else [db.reshape(-1, *(1,) * (input.dim() - 2))]
    tangent: Tensor = sum(parts[1:], parts[0])
    return activation_gradient(ctx.saved_for_forward, ctx.arguments, tangent).expand(ctx.shape)


def _jvp_of_weight_gradient(ctx: Any, *tangents: Any) -> Tensor:
    input, grad_output = ctx.saved_for_forward
    dx, dy = tangents[:2]
    parts = [] if dx is None else [conv_weight_gradient(dx, grad_output, *ctx.arguments)]
    parts += [] if dy is None else [conv_weight_gradient(input, dy, *ctx.arguments)]
    result: Tensor = sum(parts[1:], parts[0])
    return result


conv = differentiated(ops_conv.conv, conv_backward, _conv_setup, jvp_of_conv)
conv_weight_gradient = differentiated(
    ops_conv.conv_weight_gradient, _weight_gradient_backward, _weight_gradient_setup, _jvp_of_weight_gradient
)
deform_conv = differentiated(ops_deform.deform_conv, _deform_backward, _deform_setup)
deform_conv_input_gradient = differentiated(
    ops_deform.deform_conv_input_gradient, _deform_input_gradient_backward, _deform_input_gradient_setup
)
deform_conv_weight_gradient = differentiated(
    ops_deform.deform_conv_weight_gradient, _deform_weight_gradient_backward, _deform_weight_gradient_setup
)
