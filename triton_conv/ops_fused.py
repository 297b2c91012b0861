"""The `torch.library` ops of shuffled and separable convolution; `padding` is flat, as in `ops`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import configs, ops, ops_conv
from .dispatch import Plan, plan
from .errors import ArgumentError, ArgumentValueError
from .geometry import ConvGeometry
from .layout import channels_last_like, dense_strides, five
from .ops import cached
from .problem_lectures import SeparableProblem, ShuffleProblem
from .settings import Setting
from .tensors import TensorMeta, check_bias, check_tensors, meta

ops.library.define(
    "shuffle_conv(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt groups, str activation) -> Tensor",
    tags=ops.TAGS,
)
ops.library.define(
    "separable_conv(Tensor input, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? mid_bias, Tensor? bias, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, str mid_activation, str activation) -> Tensor",
    tags=ops.TAGS,
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
        ops_conv.plan_conv(input, weight, bias, stride, padding, dilation, groups, False, zeros, "zeros", activation)
    )


@cached
def _shuffled(plain: Plan) -> Plan:
    problem = plain.problem
    fields = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
    return plan(ShuffleProblem(**fields), plain.target)


def _shuffle_conv(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> torch.Tensor:
    made = plan_shuffle_conv(input, weight, bias, *rest)
    return ops.run(made, input, made.arranged(weight), bias)


def _fake_shuffle_conv(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *arguments: Any
) -> torch.Tensor:
    *window, activation = arguments
    return ops_conv.fake_conv(input, weight, bias, *window, False, (0,) * len(window[0]), "zeros", activation)


# --------------------------------------------------------------------------------------------------------- separable


@dataclass(frozen=True, eq=False)
class Chain:
    """The plans of a separable convolution that runs as two kernels, why it does, and that of the one it could be."""

    plans: tuple[Plan, Plan]
    reason: str
    fused: Plan

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
    """Plans the one kernel that does both; `unfused` tells whether two of them are the better choice.

    Sizes that are symbols are planned for by those that the graph is traced with.
    """
    known = (
        *_metas(input, depthwise_weight, pointwise_weight, mid_bias, bias),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        mid_activation,
        activation,
        ops.conv_precision(input.dtype),
    )
    try:
        return _plan_separable_conv(*known)
    except TypeError:
        # Symbols have no hash.
        return _plan_separable_conv(*ops.traced(known))


def _metas(
    input: torch.Tensor,
    depthwise_weight: torch.Tensor,
    pointwise_weight: torch.Tensor,
    mid_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[TensorMeta, TensorMeta, TensorMeta, TensorMeta | None, TensorMeta | None]:
    return (
        TensorMeta.of("input", input),
        TensorMeta.of("depthwise_weight", depthwise_weight),
        TensorMeta.of("pointwise_weight", pointwise_weight),
        meta("mid_bias", mid_bias),
        meta("bias", bias),
    )


def _separable_geometry(
    input: TensorMeta,
    depthwise: TensorMeta,
    pointwise: TensorMeta,
    mid_bias: TensorMeta | None,
    bias: TensorMeta | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> ConvGeometry:
    """The depthwise convolution's geometry, after checking the tensors of both."""
    tensors = {"depthwise_weight": depthwise, "pointwise_weight": pointwise, "mid_bias": mid_bias, "bias": bias}
    check_tensors(input, tensors)
    c_in, middle = input.shape[1], depthwise.shape[0]
    if depthwise.shape[1] != 1 or c_in == 0 or middle % c_in:
        raise ArgumentError(
            f"depthwise_weight: expected [{c_in} x multiplier, 1, ...] for input {list(input.shape)}, "
            f"got depthwise_weight {list(depthwise.shape)}"
        )
    geometry = ConvGeometry.of(input.shape, depthwise.shape, stride, ops.pairs(padding), dilation, c_in)
    if any(size != 1 for size in pointwise.shape[2:]) or pointwise.shape[1] != middle:
        raise ArgumentError(
            f"pointwise_weight: expected [c_out, {middle}{', 1' * geometry.rank}] after a depthwise convolution to "
            f"{middle} channels, got pointwise_weight {list(pointwise.shape)}"
        )
    if mid_bias is not None and tuple(mid_bias.shape) != (middle,):
        raise ArgumentError(
            f"mid_bias: expected [{middle}] for depthwise_weight {list(depthwise.shape)}, got mid_bias "
            f"{list(mid_bias.shape)}"
        )
    check_bias(bias, pointwise.shape, pointwise.shape[0])
    return geometry


def _separable_result(
    geometry: ConvGeometry, input: TensorMeta, pointwise: TensorMeta
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of the result."""
    shape = (geometry.batch, pointwise.shape[0], *geometry.spatial(geometry.out_size))
    # A 1x1 weight is dense in either format, so that it says nothing about the output's.
    return shape, dense_strides(shape, channels_last_like(input.shape, input.strides))


@cached
def _plan_separable_conv(
    input: TensorMeta,
    depthwise: TensorMeta,
    pointwise: TensorMeta,
    mid_bias: TensorMeta | None,
    bias: TensorMeta | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    mid_activation: str,
    activation: str,
    precision: str,
) -> Plan:
    geometry = _separable_geometry(input, depthwise, pointwise, mid_bias, bias, stride, padding, dilation)
    zeros, window = (0,) * len(stride), (stride, padding, dilation, geometry.groups)
    plain = ops_conv.plan_conv_of(
        input, depthwise, mid_bias, *window, False, zeros, "zeros", mid_activation, precision
    )  # fmt: skip
    first = plain.problem
    outer, inner = pointwise.strides[:2]
    problem = SeparableProblem(
        geometry=first.geometry,
        dtype=first.dtype,
        x_strides=first.x_strides,
        w_strides=first.w_strides,
        y_strides=five(_separable_result(geometry, input, pointwise)[1]),
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
    return plan(problem, plain.target)


_fusion: bool | None = None


class set_separable_fusion(Setting):
    """Sets whether a separable convolution is one kernel (True), two (False), or what is faster (None, the default).

    Takes effect at once; as a context manager, until its end.

    >>> with tc.set_separable_fusion(True):
    ...     y = tc.separable_conv2d(x, depthwise_weight, pointwise_weight)

    Raises:
        ArgumentValueError (a ValueError): for anything else.
    """

    def __init__(self, fused: bool | None) -> None:
        if fused not in (True, False, None):
            raise ArgumentValueError(f"fused: expected True, False or None, got {fused!r}")
        super().__init__(globals(), "_fusion", fused)


def unfused(made: Plan) -> str | None:
    """Why a call runs as two kernels, or None: as asked for; by the time of a tile that was measured on this very
    problem; else by counting.
    """
    if _fusion is not None:
        return None if _fusion else "asked for"
    return _slower(made)


@cached
def _slower(made: Plan) -> str | None:
    problem = made.problem
    assert isinstance(problem, SeparableProblem)
    bandwidth = 0.9 * made.target.bandwidth
    for source, file in configs.files(made.kernel.name, made.target):
        entry = file.entries.get(problem.describe())
        if source == made.source and entry is not None and bandwidth:
            two = problem.itemsize * problem.moved_unfused / bandwidth * 1e6
            slower = entry.time_us > two
            return f"one takes {entry.time_us:.1f} us, measured, two {two:.1f} us, by count" if slower else None
    # Where nothing can be counted, what somebody measured is worth having.
    return problem.unfused if bandwidth or made.source in ("analytic default", "safe") else None


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


def _fake_separable_conv(input: torch.Tensor, *arguments: Any) -> torch.Tensor:
    tensors, window = _metas(input, *arguments[:4]), arguments[4:7]
    shape, strides = _separable_result(_separable_geometry(*tensors, *window), tensors[0], tensors[2])
    return input.new_empty_strided(shape, strides)


shuffle_conv = ops.register(
    "shuffle_conv", _shuffle_conv, _fake_shuffle_conv, lambda x, w, *rest, out_shape: ops.flops_at(out_shape, w)
)
separable_conv = ops.register(
    "separable_conv", _separable_conv, _fake_separable_conv,
    lambda x, depthwise, pointwise, *rest, out_shape: ops.flops_at(out_shape, depthwise, pointwise),
)  # fmt: skip

PLANNERS: dict[Any, Callable[..., Plan]] = {shuffle_conv: plan_shuffle_conv, separable_conv: plan_separable_conv}
"""What plans each op, by op."""
