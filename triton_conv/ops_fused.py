"""The `torch.library` ops of shuffled and separable convolution; `padding` is flat, as in `ops`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import ops
from .dispatch import Plan, plan
from .errors import ArgumentError
from .geometry import TensorMeta, check_bias, check_tensors
from .layout import channels_last_like, dense_strides, five
from .ops import cached, meta
from .problem_lectures import SeparableProblem, ShuffleProblem

ops.library.define(
    "shuffle_conv(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, "
    "str activation) -> Tensor"
)
ops.library.define(
    "separable_conv(Tensor input, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? mid_bias, Tensor? bias, "
    "int[] stride, int[] padding, int[] dilation, str mid_activation, str activation) -> Tensor"
)


# ---------------------------------------------------------------------------------------------------------- shuffled


def plan_shuffle_conv(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Plan:
    """Plans a convolution whose channels leave shuffled; it is validated as the convolution that it is."""
    zeros = (0,) * len(stride)
    return _shuffled(
        ops.plan_conv(input, weight, bias, stride, padding, dilation, groups, False, zeros, "zeros", activation)
    )


@cached
def _shuffled(plain: Plan) -> Plan:
    problem = plain.problem
    fields = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
    return plan(ShuffleProblem(**fields), plain.target)


def _shuffle_conv(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> torch.Tensor:
    made = plan_shuffle_conv(input, weight, bias, *rest)
    return ops.run(made, input, made.arranged(weight), bias)


# --------------------------------------------------------------------------------------------------------- separable


@dataclass(frozen=True, eq=False)
class Chain:
    """The plans of a separable convolution that runs as two kernels, and why it does."""

    plans: tuple[Plan, Plan]
    reason: str

    def __str__(self) -> str:
        first, second = self.plans
        return f"two kernels: {self.reason}\n{first}\n{second}"


def plan_separable_conv(
    input: torch.Tensor,
    depthwise_weight: torch.Tensor,
    pointwise_weight: torch.Tensor,
    mid_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mid_activation: str,
    activation: str,
) -> Plan:
    """Plans the one kernel that does both; `problem.unfused` tells whether two of them are the better choice."""
    return _plan_separable_conv(
        plan_depthwise(input, depthwise_weight, mid_bias, stride, padding, dilation, mid_activation),
        TensorMeta.of("input", input),
        TensorMeta.of("pointwise_weight", pointwise_weight),
        meta("bias", bias),
        activation,
    )


def plan_depthwise(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Plan:
    """Plans the first of the two kernels, and validates its tensors."""
    if weight.shape[1] != 1 or not input.shape[1] or weight.shape[0] % input.shape[1]:
        raise ArgumentError(
            f"depthwise_weight: expected [{input.shape[1]} x multiplier, 1, ...] for input {list(input.shape)}, "
            f"got depthwise_weight {list(weight.shape)}"
        )
    groups, zeros = input.shape[1], (0,) * len(stride)
    return ops.plan_conv(input, weight, bias, stride, padding, dilation, groups, False, zeros, "zeros", activation)


@cached
def _plan_separable_conv(
    depthwise: Plan, input: TensorMeta, pointwise: TensorMeta, bias: TensorMeta | None, activation: str
) -> Plan:
    check_tensors(input, {"pointwise_weight": pointwise, "bias": bias})
    first = depthwise.problem
    g = first.geometry
    if any(size != 1 for size in pointwise.shape[2:]) or pointwise.shape[1] != g.c_out:
        raise ArgumentError(
            f"pointwise_weight: expected [c_out, {g.c_out}{', 1' * g.rank}] after a depthwise convolution to "
            f"{g.c_out} channels, got pointwise_weight {list(pointwise.shape)}"
        )
    check_bias(bias, pointwise.shape, pointwise.shape[0])
    shape = (g.batch, pointwise.shape[0], *g.out_size[3 - g.rank :])
    outer, inner = pointwise.strides[:2]
    problem = SeparableProblem(
        geometry=g,
        dtype=first.dtype,
        x_strides=first.x_strides,
        w_strides=first.w_strides,
        # A 1x1 weight is dense in either format, so that it says nothing about the output's.
        y_strides=five(dense_strides(shape, channels_last_like(input.shape, input.strides))),
        has_bias=bias is not None,
        stride_b=1 if bias is None else bias.strides[0],
        activation=activation,
        precision=first.precision,
        c_final=pointwise.shape[0],
        pointwise_strides=(outer, inner),
        has_mid_bias=first.has_bias,
        stride_mb=first.stride_b,
        mid_activation=first.activation,
    )
    return plan(problem, depthwise.target)


def _separable_conv(
    input: torch.Tensor,
    depthwise_weight: torch.Tensor,
    pointwise_weight: torch.Tensor,
    mid_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    *rest: Any,
) -> torch.Tensor:
    made = plan_separable_conv(input, depthwise_weight, pointwise_weight, mid_bias, bias, *rest)
    return ops.run(made, input, depthwise_weight, mid_bias, pointwise_weight, bias)


def register_planned(name: str, implementation: Any, planner: Callable[..., Plan]) -> Any:
    """Registers an op whose fake kernel follows from its plan; the planner takes the op's arguments."""

    def fake(input: torch.Tensor, *rest: Any) -> torch.Tensor:
        made = planner(input, *rest)
        return input.new_empty_strided(made.out_shape, made.out_strides)

    return ops.register(name, implementation, fake)


shuffle_conv = register_planned("shuffle_conv", _shuffle_conv, plan_shuffle_conv)
separable_conv = register_planned("separable_conv", _separable_conv, plan_separable_conv)

PLANNERS: dict[Any, Callable[..., Plan]] = {shuffle_conv: plan_shuffle_conv, separable_conv: plan_separable_conv}
"""What plans each op, by op."""
