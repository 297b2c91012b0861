"""Gradients of shuffled, separable and locally connected convolution, made of ops that have gradients again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from . import autograd, calls, ops, ops_fused, ops_local
from .dispatch import Plan
from .eager import differentiated
from .problem_lectures import is_channels_last


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Channel j of group s goes to place j * groups + s; a copy in the memory format of `x`."""
    if is_channels_last(x.shape, x.stride()):
        shuffled: Tensor = x.movedim(1, -1).unflatten(-1, (groups, -1)).transpose(-1, -2).flatten(-2).movedim(-1, 1)
    else:
        shuffled = x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
    return shuffled


# ---------------------------------------------------------------------------------------------------------- shuffled


def _shuffle_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, *ctx.arguments = inputs
    ctx.save_for_backward(input, weight, *autograd.slope_tellers(ctx.arguments[-1], bias, output))


def _shuffle_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight, bias, output = ctx.saved_tensors
    stride, padding, dilation, groups, activation = ctx.arguments
    # Shuffling in as many groups as a group has channels puts every channel back.
    back = weight.shape[0] // groups
    grad = shuffle_channels(grad, back)
    output = None if output is None else shuffle_channels(output, back)
    arguments = (stride, padding, dilation, groups, False, [0] * len(stride), "zeros", activation)
    found = autograd.conv_gradients((input, weight, bias, output), arguments, ctx.needs_input_grad[:3], grad)
    return *found, *(None,) * len(ctx.arguments)


# --------------------------------------------------------------------------------------------------------- separable


def separable_halves(arguments: tuple[Any, ...], channels: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What the op `conv` takes besides tensors, for the depthwise convolution of so many channels and for the 1x1."""
    *window, mid_activation, activation = arguments
    stride, padding, dilation = map(tuple, window)
    ones, zeros = (1,) * len(stride), (0,) * len(stride)
    first = stride, padding, dilation, channels, False, zeros, "zeros", mid_activation
    return first, (ones, (0,) * len(padding), ones, 1, False, zeros, "zeros", activation)


def separable_pair(
    input: Tensor, depthwise: Tensor, pointwise: Tensor, mid_bias: Tensor | None, bias: Tensor | None, *arguments: Any
) -> Tensor:
    """The op `separable_conv` as two convolutions, with gradients that need no second filtering."""
    first, second = separable_halves(arguments, input.shape[1])
    return calls.conv(calls.conv(input, depthwise, mid_bias, *first), pointwise, bias, *second)


class SeparableCall(calls.Call):
    """A separable convolution of tensors like some that were seen: the plan of the one kernel that it could be, and
    the two calls that it is made of where those are better."""

    __slots__ = ("_halves",)
    planner = staticmethod(ops_fused.plan_separable_conv)

    def __init__(self, made: Plan, window: tuple[Any, ...]) -> None:
        super().__init__(made, window)
        self._halves: tuple[calls.Call, calls.Call] | None = None

    @staticmethod
    def details(input: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
        depthwise, pointwise, *_ = others
        assert depthwise is not None and pointwise is not None
        places = input.data_ptr() % 16, depthwise.data_ptr() % 16, pointwise.data_ptr() % 16
        return *places, ops.conv_precision(input.dtype)

    def __call__(  # type: ignore[override]
        self, input: Tensor, depthwise: Tensor, pointwise: Tensor, mid_bias: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        if not ops_fused.unfused(self.plan):
            fused: Tensor = separable_conv(input, depthwise, pointwise, mid_bias, bias, *self.window)
            return fused
        if self._halves is None:
            one, other = separable_halves(self.window, input.shape[1])
            first = calls.Call.like((input, depthwise, mid_bias), one)
            mid = first(input, depthwise, mid_bias)
            self._halves = first, (second := calls.Call.like((mid, pointwise, bias), other))
        else:
            first, second = self._halves
            mid = first(input, depthwise, mid_bias)
        return second(mid, pointwise, bias)

    def _direct(self) -> bool:
        # Each half has gradients of its own.
        return False


def _separable_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, bias, stride, padding, dilation, mid_activation, activation = inputs
    ctx.arguments = stride, padding, dilation, mid_activation, activation
    ctx.save_for_backward(*tensors, *autograd.slope_tellers(activation, bias, output))


def _separable_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """As of two convolutions; the intermediate, which was never stored, is computed anew."""
    input, depthwise, pointwise, mid_bias, bias, output = ctx.saved_tensors
    first, second = separable_halves(ctx.arguments, input.shape[1])
    need_input, need_depthwise, need_pointwise, need_mid_bias, need_bias = ctx.needs_input_grad[:5]
    mid = calls.conv(input, depthwise, mid_bias, *first)
    below = need_input or need_depthwise or need_mid_bias
    needed = (below, need_pointwise, need_bias)
    grad_mid, grad_pointwise, grad_bias = calls.conv_gradients((mid, pointwise, bias, output), second, needed, grad)
    grad_input = grad_depthwise = grad_mid_bias = None
    if grad_mid is not None:
        tensors = input, depthwise, *autograd.slope_tellers(first[-1], mid_bias, mid)
        found = calls.conv_gradients(tensors, first, (need_input, need_depthwise, need_mid_bias), grad_mid)
        grad_input, grad_depthwise, grad_mid_bias = found
    return grad_input, grad_depthwise, grad_pointwise, grad_mid_bias, grad_bias, *(None,) * len(ctx.arguments)


# -------------------------------------------------------------------------------------------------- locally connected


def _format(tensor: Tensor) -> bool:
    return tensor.dim() > 3 and is_channels_last(tensor.shape, tensor.stride())


def _channels_innermost(weight: Tensor) -> bool:
    """Whether a weight `(*out_size, c_out, c_in/groups, *kernel)` has its input channels innermost."""
    rank = (weight.dim() - 2) // 2
    return weight.stride(rank + 1) == 1 and weight.shape[rank + 1] > 1 and weight.shape[rank + 2 :].numel() > 1


def _local_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, *ctx.arguments = inputs
    ctx.save_for_backward(input, weight)


def _local_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight = ctx.saved_tensors
    grad_input = grad_weight = grad_bias = None
    rank = input.dim() - 2
    if ctx.needs_input_grad[0]:
        grad_input = local_conv_input_gradient(grad, weight, input.shape[2:], *ctx.arguments, _format(input))
    if ctx.needs_input_grad[1]:
        grad_weight = local_conv_weight_gradient(
            input, grad, weight.shape[rank + 2 :], *ctx.arguments, _channels_innermost(weight)
        )
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum(0)
    return grad_input, grad_weight, grad_bias, *(None,) * len(ctx.arguments)


def _local_input_gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, weight, size, *ctx.arguments, ctx.channels_last = inputs
    ctx.size = size
    ctx.save_for_backward(grad_output, weight)


def _local_input_gradient_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """dx is linear in dy and in w: with its own gradient in the input's place, both are locally connected again."""
    grad_output, weight = ctx.saved_tensors
    rank = grad.dim() - 2
    grad_grad = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_grad = local_conv(grad, weight, None, *ctx.arguments)
    if ctx.needs_input_grad[1]:
        grad_weight = local_conv_weight_gradient(
            grad, grad_output, weight.shape[rank + 2 :], *ctx.arguments, _channels_innermost(weight)
        )
    return grad_grad, grad_weight, *(None,) * (len(ctx.arguments) + 2)


def _local_weight_gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, grad_output, kernel_size, *ctx.arguments, ctx.channels_last = inputs
    ctx.size = kernel_size
    ctx.save_for_backward(input, grad_output)


def _local_weight_gradient_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, grad_output = ctx.saved_tensors
    grad_input = grad_grad = None
    if ctx.needs_input_grad[0]:
        grad_input = local_conv_input_gradient(grad_output, grad, input.shape[2:], *ctx.arguments, _format(input))
    if ctx.needs_input_grad[1]:
        grad_grad = local_conv(input, grad, None, *ctx.arguments)
    return grad_input, grad_grad, *(None,) * (len(ctx.arguments) + 2)


# ------------------------------------------------------------------------------------------------------ forward mode


def _jvp_of_shuffle(ctx: Any, *tangents: Any) -> Tensor:
    """That of the convolution, shuffled."""
    input, weight, bias, output = ctx.saved_for_forward
    *window, groups, activation = ctx.arguments
    if output is not None:
        output = shuffle_channels(output, weight.shape[0] // groups)
    plain = SimpleNamespace(
        saved_for_forward=(input, weight, bias, output),
        arguments=(*window, groups, False, [0] * len(window[0]), "zeros", activation),
        shape=ctx.shape,
    )
    return shuffle_channels(autograd.jvp_of_conv(plain, *tangents[:3]), groups)


def _jvp_of_separable(ctx: Any, *tangents: Any) -> Tensor:
    """Through the one convolution, and with what comes of it through the other."""
    input, depthwise, pointwise, mid_bias, bias, output = ctx.saved_for_forward
    first, second = separable_halves(ctx.arguments, input.shape[1])
    d_input, d_depthwise, d_pointwise, d_mid_bias, d_bias = tangents[:5]
    mid = autograd.conv(input, depthwise, mid_bias, *first)
    d_mid = None
    if any(tangent is not None for tangent in (d_input, d_depthwise, d_mid_bias)):
        kept = mid if first[-1] in ("relu", "relu6") else None
        saved = (input, depthwise, mid_bias, kept)
        context = SimpleNamespace(saved_for_forward=saved, arguments=first, shape=mid.shape)
        d_mid = autograd.jvp_of_conv(context, d_input, d_depthwise, d_mid_bias)
    saved = (mid, pointwise, bias, output)
    context = SimpleNamespace(saved_for_forward=saved, arguments=second, shape=ctx.shape)
    return autograd.jvp_of_conv(context, d_mid, d_pointwise, d_bias)


def _of_both(call: Any, ctx: Any, tangents: Any, *arguments: Any) -> Tensor:
    """The tangent of a function that is linear in each of its two tensors."""
    one, other = ctx.saved_for_forward
    parts = [] if tangents[0] is None else [call(tangents[0], other, *arguments)]
    parts += [] if tangents[1] is None else [call(one, tangents[1], *arguments)]
    result: Tensor = sum(parts[1:], parts[0])
    return result


def _jvp_of_local(ctx: Any, *tangents: Any) -> Tensor:
    d_bias = tangents[2]
    if tangents[0] is None and tangents[1] is None:
        bias_alone: Tensor = d_bias.expand(ctx.shape)
        return bias_alone
    result = _of_both(local_conv, ctx, tangents, None, *ctx.arguments)
    return result if d_bias is None else result + d_bias


def _jvp_of_local_input_gradient(ctx: Any, *tangents: Any) -> Tensor:
    return _of_both(local_conv_input_gradient, ctx, tangents, ctx.size, *ctx.arguments, ctx.channels_last)


def _jvp_of_local_weight_gradient(ctx: Any, *tangents: Any) -> Tensor:
    return _of_both(local_conv_weight_gradient, ctx, tangents, ctx.size, *ctx.arguments, ctx.channels_last)


# The ops, now with their gradients.
shuffle_conv = differentiated(ops_fused.shuffle_conv, _shuffle_backward, _shuffle_setup, _jvp_of_shuffle)
separable_conv = differentiated(ops_fused.separable_conv, _separable_backward, _separable_setup, _jvp_of_separable)
local_conv = differentiated(ops_local.local_conv, _local_backward, _local_setup, _jvp_of_local)
local_conv_input_gradient = differentiated(
    ops_local.local_conv_input_gradient, _local_input_gradient_backward, _local_input_gradient_setup,
    _jvp_of_local_input_gradient,
)  # fmt: skip
local_conv_weight_gradient = differentiated(
    ops_local.local_conv_weight_gradient, _local_weight_gradient_backward, _local_weight_gradient_setup,
    _jvp_of_local_weight_gradient,
)  # fmt: skip
