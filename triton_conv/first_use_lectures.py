"""The first use of a form of a separable convolution or of unshared filters' input gradient: small numbers for it.

Their other kinds have one form each, which needs no check.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import triple
from .layout import Strides, dense_strides, five, of_rank
from .problem_lectures import LocalInputGradientProblem, SeparableProblem, dense_local_input, local_weight_strides
from .reference import as_pad_takes, reference

Draw = Callable[..., Tensor]
Lay = Callable[[Tensor, Sequence[int]], Tensor]
Operands = list[Tensor | None]


def smaller_local(problem: LocalInputGradientProblem) -> LocalInputGradientProblem:
    """The problem with the strides of its geometry, which was made smaller, in the formats that it has."""
    g = problem.geometry
    weight = local_weight_strides(problem.weight_shape, not problem.flat)
    d, h, w = triple(weight[: g.rank], 0)
    return replace(
        problem,
        x_strides=_alike(g.in_shape, problem.x_strides),
        y_strides=_alike(g.out_shape, problem.y_strides),
        w_strides=five(weight[g.rank :]),
        place_strides=(d, h, w),
    )


def smaller_separable(problem: SeparableProblem, c_final: int) -> SeparableProblem:
    """The problem with `c_final` output channels, and the strides of its geometry, which was made smaller."""
    g = problem.geometry
    small = replace(
        problem,
        c_final=c_final,
        pointwise_strides=(g.c_out, 1) if problem.pointwise_strides[1] == 1 else (1, c_final),
        stride_mb=1,
    )
    return replace(small, y_strides=_alike(small.result_shape, problem.y_strides))


def _alike(shape: Sequence[int], strides: Strides) -> Strides:
    """Dense strides with that innermost which is innermost in these."""
    if strides[0] == 1 and shape[0] > 1:
        return five(dense_local_input(shape))
    return five(dense_strides(shape, strides[1] == 1 and shape[1] > 1))


def of_local(problem: LocalInputGradientProblem, draw: Draw, lay: Lay) -> tuple[Operands, Tensor]:
    """The operands of a launch, and the result in float64."""
    g = problem.geometry
    dy = draw(g.out_shape)
    weight = draw(problem.weight_shape, g.K**-0.5)
    operands: Operands = [lay(dy, of_rank(g.rank, problem.y_strides)), lay(weight, problem.weight_strides)]
    return operands, _local_input_gradient(problem, dy.double(), weight.double())


def _local_input_gradient(problem: LocalInputGradientProblem, dy: Tensor, weight: Tensor) -> Tensor:
    """Each tap's part, added to the inputs that it read; below autograd, which could not differentiate here."""
    g = problem.geometry
    own = g.out_pixels, g.groups, g.c_out_group, g.c_in_group, g.taps
    parts = torch.einsum("ngop,pgock->nkgcp", dy.reshape(g.batch, *own[1:3], own[0]), weight.reshape(own))
    parts = parts.reshape(g.batch, g.taps, g.c_in, *g.out_size)
    padded = dy.new_zeros(g.batch, g.c_in, *(size + sum(pad) for size, pad in zip(g.in_size, g.padding, strict=True)))
    for taps, part in zip(itertools.product(*map(range, g.kernel)), parts.unbind(1), strict=True):
        axes = zip(taps, g.dilation, g.stride, g.out_size, strict=True)
        d, h, w = (slice(t * step, t * step + (o - 1) * s + 1, s) for t, step, s, o in axes)
        padded[:, :, d, h, w] += part
    return F.pad(padded, [-side for side in as_pad_takes(g.padding)])


def of_separable(problem: SeparableProblem, draw: Draw, lay: Lay) -> tuple[Operands, Tensor]:
    """The operands of a launch, and the result in float64."""
    g = problem.geometry
    tensors = {
        "input": draw(g.in_shape),
        "depthwise_weight": draw(g.weight_shape, g.taps**-0.5),
        "mid_bias": draw((g.c_out,)) if problem.has_mid_bias else None,
        "pointwise_weight": draw((problem.c_final, g.c_out, *(1,) * g.rank), g.c_out**-0.5),
        "bias": draw((problem.c_final,)) if problem.has_bias else None,
    }
    outer, inner = problem.pointwise_strides
    strides = {
        "input": of_rank(g.rank, problem.x_strides),
        "depthwise_weight": of_rank(g.rank, problem.w_strides),
        "pointwise_weight": (outer, inner, *(1,) * g.rank),
        "mid_bias": (problem.stride_mb,),
        "bias": (problem.stride_b,),
    }
    window = {name: g.spatial(getattr(g, name)) for name in ("stride", "padding", "dilation")}
    activations = {"activation": problem.activation, "mid_activation": problem.mid_activation}
    expected = reference(f"separable_conv{g.rank}d", tensors | window | activations)
    return [None if value is None else lay(value, strides[name]) for name, value in tensors.items()], expected
