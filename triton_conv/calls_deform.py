"""Deformable convolutions called again, as `calls` has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import autocast, autograd, ops, ops_deform
from .calls import Call, Gradients
from .dispatch import Plan
from .eager import on_device, plain


class DeformCall(Call):
    """A deformable convolution of tensors like some that were seen; `Gradients.of_input` is the plan of those of input,
    offset and mask.

    Where its tensors begin decides nothing.
    """

    __slots__ = ()
    planner = staticmethod(ops_deform.plan_deform_conv)
    lowered = staticmethod(autocast.deform_operands)

    @staticmethod
    def details(input: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
        return (ops.conv_precision(input.dtype),)

    @staticmethod
    def gradient_details(grad: Tensor, *others: Tensor) -> tuple[Any, ...]:
        return torch.are_deterministic_algorithms_enabled(), ops.conv_precision(grad.dtype)

    def __call__(  # type: ignore[override]
        self, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(input, offset, mask, weight, bias):
            return _apply(input, offset, mask, weight, bias, self)  # type: ignore[no-any-return]
        return _forward(input, offset, mask, weight, bias, self.plan)  # type: ignore[no-any-return]

    def backward(self, tensors: Sequence[Any], needed: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, offset, mask, weight and bias, where needed; `tensors` are all but the bias."""
        if (plans := self.gradients((grad, *tensors), needed[:4])) is None:
            return autograd.deform_gradients(tensors, self.window, needed, grad)
        grad_bias = autograd.bias_gradient(grad) if needed[4] else None
        return *_backward(grad, *tensors, plans), grad_bias

    def _direct(self) -> bool:
        return True

    def _planned(self, tensors: Sequence[Any], needed: Sequence[bool]) -> Gradients:
        grad, input, offset, mask, weight = tensors
        *need_sampled, need_weight = needed
        of_input = of_weight = None
        if any(need_sampled):
            how: tuple[Any, ...] = (*self.window, need_sampled, torch.are_deterministic_algorithms_enabled())
            of_input = ops_deform.plan_deform_conv_input_gradient(input, offset, mask, weight, grad, *how)
        if need_weight:
            how = (weight.shape[2:], *self.window, input.shape[1] // weight.shape[1])
            of_weight = ops_deform.plan_deform_conv_weight_gradient(input, offset, mask, grad, *how)
        return Gradients(of_input, of_weight, autograd.weight_comes_first(weight, input, grad))


@on_device
def _forward(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, made: Plan
) -> Tensor:
    return ops.run(made, input, offset, mask, weight, bias)


@on_device
def _backward(
    grad: Tensor, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, plans: Gradients
) -> tuple[Tensor | None, ...]:
    of_input, of_weight, weight_first, _ = plans
    sampled: tuple[Tensor | None, ...] = (None, None, None)
    grad_weight = None
    if of_weight is not None and weight_first:
        grad_weight = ops.run_partial(of_weight, input, offset, mask, grad)
    if of_input is not None:
        sampled = ops_deform.run_input_gradient(of_input, input, offset, mask, weight, grad)
    if of_weight is not None and not weight_first:
        grad_weight = ops.run_partial(of_weight, input, offset, mask, grad)
    return *sampled, grad_weight


class DeformConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None,
        call: DeformCall,
    ) -> Tensor:  # fmt: skip
        ctx.call = call
        ctx.save_for_backward(input, offset, mask, weight)
        return _forward(input, offset, mask, weight, bias, call.plan)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.call.backward(ctx.saved_tensors, ctx.needs_input_grad[:5], grad), None


DeformConvolution.__name__ = DeformConvolution.__qualname__ = ops_deform.deform_conv.name()
_apply = super(torch.autograd.Function, DeformConvolution).apply


def deform_conv(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, *window: Any
) -> Tensor:
    """The op `deform_conv`, differentiable, wherever it is called."""
    tensors = input, offset, mask, weight, bias
    if plain(*tensors):
        return DeformCall.like(tensors, window)(*tensors)
    return autograd.deform_conv(*tensors, *window)  # type: ignore[no-any-return]
