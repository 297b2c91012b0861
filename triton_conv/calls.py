"""Convolutions called again: all that one of them launches, forward and backward, is kept together and looked up once.

Of tensors that torch's dispatcher has nothing to do with (`eager.plain`), a call is known by their sizes, strides,
dtypes and device. One seen before costs a look-up forward and one backward. Everything else goes through `autograd`, to
the same plans.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import autocast, autograd, ops, ops_conv
from .dispatch import Plan
from .eager import likeness, on_device, ordinary, plain, undisturbed

# Calls, and gradients of one: beyond them sizes hardly ever repeat.
_MOST, _MOST_GRADIENTS = 4096, 16
_calls: dict[tuple[Any, ...], Any] = {}
ops.on_forgetting.append(_calls.clear)


def seen(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """All of a `plain` tensor that a plan can depend on."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16


class Gradients(NamedTuple):
    """The plans of the gradients of a convolution's input and weight, of those that are needed."""

    of_input: Plan | None
    of_weight: Plan | None
    weight_first: bool
    transposed: bool = False


Self = TypeVar("Self", bound="Call")


class Call:
    """A convolution of tensors like some that were seen: its plan, and its gradients' once they were asked for."""

    __slots__ = ("_gradients", "direct", "plan", "window")
    planner: Callable[..., Plan] = staticmethod(ops_conv.plan_conv)
    lowered: Callable[..., tuple[Any, ...]] = staticmethod(autocast.operands)
    """Its tensors as autocast has them."""

    def __init__(self, made: Plan, window: tuple[Any, ...]) -> None:
        self.plan, self.window = made, window
        self.direct = self._direct()
        """Whether gradients are what kernels write, of the output's gradient as it comes."""
        self._gradients: list[tuple[Callable[..., bool], Sequence[bool], tuple[Any, ...], Gradients]] = []

    @classmethod
    def like(cls: type[Self], tensors: Sequence[Tensor | None], window: tuple[Any, ...]) -> Self:
        """The call of `plain` tensors like these; raises what planning it raises."""
        key = cls, *map(seen, tensors), window, ops.conv_precision(tensors[0].dtype)  # type: ignore[union-attr]
        found: Self | None = _calls.get(key)
        if found is None:
            made = cls.planner(*tensors, *window)
            if len(_calls) >= _MOST:
                _calls.clear()
            found = _calls[key] = cls(made, window)
        return found

    @staticmethod
    def details(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        """All that the plan depends on besides its window and the likeness of its tensors."""
        return input.data_ptr() % 16, weight.data_ptr() % 16, ops.conv_precision(input.dtype)

    @staticmethod
    def gradient_details(grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Any, ...]:
        """The same of the gradients' plans."""
        return grad.data_ptr() % 16, input.data_ptr() % 16, weight.data_ptr() % 16, ops.conv_precision(grad.dtype)

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of tensors that are `plain`, and like those."""
        if torch.is_grad_enabled() and torch._C._any_requires_grad(input, weight, bias):
            return _apply(input, weight, bias, self)  # type: ignore[no-any-return]
        return _forward(input, weight, bias, self.plan)  # type: ignore[no-any-return]

    def backward(self, tensors: Sequence[Any], needed: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias, where needed; `tensors` as of `autograd.conv_gradients`."""
        input, weight, *_ = tensors
        grad = autograd.activation_gradient(tensors, self.window, grad)
        if (plans := self.gradients((grad, input, weight), needed[:2])) is None:
            return autograd.linear_gradients(input, weight, self.window, needed, grad)
        grad_bias = autograd.bias_gradient(grad) if needed[2] else None
        return *_backward(grad, input, weight, plans), grad_bias

    def gradients(self, tensors: Sequence[Any], needed: Sequence[bool]) -> Gradients | None:
        """What computes those gradients that are needed but for the bias's, by the output's and by what else they
        read; None where that is left to ops."""
        # Gradients that have gradients are made of ops; and hooks may have made anything of what was saved.
        if not self.direct or torch.is_grad_enabled() or not undisturbed():
            return None
        for alike, asked, details, found in self._gradients:
            if asked == needed and alike(*tensors) and details == self.gradient_details(*tensors):
                return found
        if not ordinary(*tensors):
            return None
        if len(self._gradients) >= _MOST_GRADIENTS:
            self._gradients.clear()
        found = self._planned(tensors, needed)
        self._gradients.append((likeness(*tensors), needed, self.gradient_details(*tensors), found))
        return found

    def _direct(self) -> bool:
        _, padding, _, _, transposed, output_padding, padding_mode, _ = self.window
        past_padding = transposed and any(map(operator.gt, output_padding, padding[1::2]))
        return padding_mode == "zeros" and not past_padding

    def _planned(self, tensors: Sequence[Any], needed: Sequence[bool]) -> Gradients:
        (grad, input, weight), (need_input, need_weight) = tensors, needed
        grad, window = autograd.matched(grad, input, self.window)
        of_input = of_weight = None
        if need_input:
            sizes = grad.shape[2:], weight.shape[2:], input.shape[2:]
            of_input = ops_conv.plan_conv(grad, weight, None, *autograd.input_gradient_window(*sizes, window))
        if need_weight:
            pair = (grad, input) if window[4] else (input, grad)
            of_weight = ops_conv.plan_conv_weight_gradient(*pair, *autograd.weight_gradient_window(weight, window))
        return Gradients(of_input, of_weight, autograd.weight_comes_first(weight, input, grad), window[4])


@on_device
def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, made: Plan) -> Tensor:
    return ops_conv.run_conv(made, input, weight, bias)


@on_device
def _backward(grad: Tensor, input: Tensor, weight: Tensor, plans: Gradients) -> tuple[Tensor | None, Tensor | None]:
    of_input, of_weight, weight_first, transposed = plans
    pair = (grad, input) if transposed else (input, grad)
    grad_input = grad_weight = None
    if of_weight is not None and weight_first:
        grad_weight = ops.run_partial(of_weight, *pair)
    if of_input is not None:
        grad_input = ops_conv.run_conv(of_input, grad, weight, None)
    if of_weight is not None and not weight_first:
        grad_weight = ops.run_partial(of_weight, *pair)
    return grad_input, grad_weight


class Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        ctx.call = call
        output: Tensor = _forward(input, weight, bias, call.plan)
        ctx.save_for_backward(input, weight, *autograd.slope_tellers(call.window[-1], bias, output))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.call.backward(ctx.saved_tensors, ctx.needs_input_grad[:3], grad), None


Convolution.__name__ = Convolution.__qualname__ = ops_conv.conv.name()
# What `apply` of autograd.Function does before is for transforms, of which there are none here: 1 of 5 us.
_apply = super(torch.autograd.Function, Convolution).apply


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, *window: Any) -> Tensor:
    """The op `conv`, differentiable, wherever it is called."""
    if plain(input, weight, bias):
        return Call.like((input, weight, bias), window)(input, weight, bias)
    return autograd.conv(input, weight, bias, *window)  # type: ignore[no-any-return]


def conv_gradients(
    tensors: Sequence[Any], window: tuple[Any, ...], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """`autograd.conv_gradients`, wherever it is called."""
    input, weight, bias, _ = tensors
    if plain(input, weight, bias):
        return Call.like((input, weight, bias), window).backward(tensors, needed, grad)
    return autograd.conv_gradients(tensors, window, needed, grad)
