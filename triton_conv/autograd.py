"""Gradients of the ops, made of the ops: so that second derivatives, and all further ones, follow.

For y = x * w, a convolution with its transpose *T: dL/dx = dL/dy *T w, and dL/dw is the sum over pixels that the op
`conv_weight_gradient` computes. Both are bilinear in convolutions again. Only what is asked for is computed.
Deformable convolution has first derivatives of its own, too; its second ones are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops, ops_deform
from .layout import channels_last_like
from .problem import weight_first
from .reference import deform_conv2d

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
    result: Tensor = conv(grad, weight, None, stride, _flat(inner), dilation, groups, True, extra, "zeros", "none")
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


def conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
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
        padding = _flat(pads)

    def weight_gradient() -> Tensor:
        pair = (grad, input) if transposed else (input, grad)
        result: Tensor = conv_weight_gradient(
            *pair, weight.shape[2:], stride, padding, dilation, groups, padding_mode,
            channels_last_like(weight.shape, weight.stride()), transposed,
        )  # fmt: skip
        return result

    first = need_weight and _weight_first(weight, input, grad)
    if first:
        grad_weight = weight_gradient()
    if need_input and transposed:
        shape = (stride, padding, dilation, groups, False, [0] * len(stride), "zeros", "none")
        grad_input = conv(grad, weight, None, *shape)
    elif need_input:
        grad_input = conv_input_gradient(grad, weight, input.shape[2:], stride, padding, dilation, groups, padding_mode)
    if need_weight and not first:
        grad_weight = weight_gradient()
    return grad_input, grad_weight, grad_bias, *(None,) * len(ctx.arguments)


def _weight_first(weight: Tensor, *read: Tensor) -> bool:
    """`weight_first` of tensors; where sizes are symbols, which a comparison would tie down, as of a usual batch."""
    first = weight_first(weight.numel(), sum(tensor.numel() for tensor in read))
    return first if isinstance(first, bool) else True


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
    before = conv(input, weight, bias, *arguments, "none")
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
    _, stride, padding, dilation, groups, padding_mode, *_ = ctx.arguments
    grad_input = grad_grad = None
    if ctx.needs_input_grad[0]:
        grad_input = conv_input_gradient(
            grad_output, grad, input.shape[2:], stride, padding, dilation, groups, padding_mode
        )
    if ctx.needs_input_grad[1]:
        none = [0] * len(stride)
        grad_grad = conv(input, grad, None, stride, padding, dilation, groups, False, none, padding_mode, "none")
    return grad_input, grad_grad, *(None,) * len(ctx.arguments)


# ---------------------------------------------------------------------------------------------- deformable convolution


def _deform_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, stride, padding, dilation = inputs
    ctx.arguments = stride, padding, dilation
    ctx.save_for_backward(*tensors)


def _deform_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, offset, mask, weight = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    sampled: list[Tensor | None] = [None, None, None]
    grad_bias = None

    def weight_gradient() -> Tensor | None:
        if not ctx.needs_input_grad[3]:
            return None
        result: Tensor = deform_conv_weight_gradient(
            input, offset, mask, grad, weight.shape[2:], *ctx.arguments, input.shape[1] // weight.shape[1]
        )
        return result

    first = _weight_first(weight, input, grad)
    grad_weight = weight_gradient() if first else None
    if any(needed):
        results = deform_conv_input_gradient(
            input, offset, mask, weight, grad, *ctx.arguments, needed, torch.are_deterministic_algorithms_enabled()
        )
        sampled = [result if need else None for result, need in zip(results, needed, strict=True)]
    if not first:
        grad_weight = weight_gradient()
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum((0, 2, 3))
    return *sampled, grad_weight, grad_bias, None, None, None


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
    with torch.enable_grad():
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
    input, weight, bias, output = ctx.saved_for_forward
    *arguments, _ = ctx.arguments
    dx, dw, db = tangents[:3]
    parts = [] if dx is None else [conv(dx, weight, None, *arguments, "none")]
    parts += [] if dw is None else [conv(input, dw, None, *arguments, "none")]
    parts += [] if db is None else [db.reshape(-1, *(1,) * (input.dim() - 2))]
    tangent: Tensor = sum(parts[1:], parts[0])
    if ctx.arguments[-1] != "none":
        tangent = _activation_gradient(ctx, tangent, input, weight, bias, output)
    return tangent.expand(ctx.shape)


def _jvp_of_weight_gradient(ctx: Any, *tangents: Any) -> Tensor:
    input, grad_output = ctx.saved_for_forward
    dx, dy = tangents[:2]
    parts = [] if dx is None else [conv_weight_gradient(dx, grad_output, *ctx.arguments)]
    parts += [] if dy is None else [conv_weight_gradient(input, dy, *ctx.arguments)]
    result: Tensor = sum(parts[1:], parts[0])
    return result


_Formula = Callable[..., Any]


def differentiated(op: Any, backward: _Formula, setup: _Formula, jvp: _Formula | None = None) -> _Formula:
    """Registers an op's gradient for graphs; returns the op with the same gradient for plain calls and for torch.func.

    What `register_autograd` makes of the formulas costs 28 us a call on the host where an autograd.Function costs 5
    (perf_plots.host_overhead), and torch.func's transforms and forward mode refuse it. `vmaps` adds the rule for vmap.
    """
    torch.library.register_autograd(op.name(), backward, setup_context=setup)

    def below(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = below(*arguments)
            setup(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return below(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup(ctx, inputs, output)
            if jvp is not None:
                ctx.save_for_forward(*ctx.to_save)
                ctx.shape = output.shape

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    if jvp is not None:
        Transformed.jvp = staticmethod(jvp)  # type: ignore[method-assign]
    for function in (Plain, Transformed):
        function.__name__ = function.__qualname__ = op.name()

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*arguments)
        if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
            return Transformed.apply(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return Plain.apply(*arguments)
        return below(*arguments)

    call.transformed = Transformed  # type: ignore[attr-defined]
    return call


conv = differentiated(ops.conv, conv_backward, _conv_setup, jvp_of_conv)
conv_weight_gradient = differentiated(
    ops.conv_weight_gradient, _weight_gradient_backward, _weight_gradient_setup, _jvp_of_weight_gradient
)
deform_conv = differentiated(ops_deform.deform_conv, _deform_backward, _deform_setup)
deform_conv_input_gradient = differentiated(
    ops_deform.deform_conv_input_gradient, _deform_input_gradient_backward, _deform_input_gradient_setup
)
deform_conv_weight_gradient = differentiated(
    ops_deform.deform_conv_weight_gradient, _deform_weight_gradient_backward, _deform_weight_gradient_setup
)
