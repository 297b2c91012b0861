"""What kernels take besides tensors: the arguments that several of them share, and how a plan keeps them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from ..problem import Problem
from ..problem_lectures import LocalProblem, SeparableProblem

_ACCUMULATOR = {torch.float64: tl.float64}


class Arguments(dict[str, Any]):
    """The arguments of a kernel that are no tensors, by name; and beside them what Triton compiled for these, and the
    launches that come before and follow, if any do.
    """

    __slots__ = ("compiled", "first", "second")

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        self.compiled: dict[tuple[Any, ...], Any] = {}
        self.first: Another | None = None
        self.second: Another | None = None

    @classmethod
    def of(cls, function: Any, known: dict[str, object]) -> Arguments:
        """Those of all that is known which a function takes, in its order."""
        return cls(
            (name, known[name]) for name in inspect.signature(function.fn).parameters if not name.endswith("_ptr")
        )


@dataclass(frozen=True)
class Another:
    """Another launch of one problem and tile, as `Ahead` and `Join` explain."""

    numbers: int
    grid: int
    values: Arguments


def geometry_arguments(problem: Problem, block_m: int) -> dict[str, object]:
    """The arguments that every kernel takes: sizes, strides, convolution constants and flags."""
    g = problem.geometry
    arguments: dict[str, object] = dict(batch=g.batch, stride_b=problem.stride_b, RANK=g.rank)
    for prefix, strides in (("x", problem.x_strides), ("y", problem.y_strides)):
        arguments |= {f"stride_{prefix}{axis}": s for axis, s in zip("ncdhw", strides, strict=True)}
    arguments |= {f"stride_w{axis}": s for axis, s in zip("oidhw", problem.w_strides, strict=True)}
    for i, axis in enumerate("dhw"):
        arguments |= {f"{axis}_in": g.in_size[i], f"{axis}_out": g.out_size[i]}
        upper = axis.upper()
        arguments |= {
            f"K{upper}": g.kernel[i],
            f"STRIDE_{upper}": g.stride[i],
            f"PAD_{upper}": g.pad_before[i],
            f"DIL_{upper}": g.dilation[i],
        }
    return arguments | dict(
        PADDING_MODE=g.padding_mode,
        HAS_BIAS=problem.has_bias,
        ACTIVATION=problem.activation,
        PRECISION=problem.precision,
        ACC_DTYPE=_ACCUMULATOR.get(problem.dtype, tl.float32),
        INDEX_INT64=problem.wide_index(block_m),
        PIXELS_LAST=problem.pixels_last,
        Y_PIXELS_LAST=problem.y_strides[1] != 1 or g.c_out == 1,
    )


def weight_arguments(problem: Problem) -> dict[str, object]:
    """A group's weight as a product of N by K reads it, of a transposed convolution with its first two dimensions the
    other way round, and how many of its channels lie side by side.
    """
    g = problem.geometry
    outer, inner, *_ = problem.w_strides
    stride_wn, stride_wk = (inner, outer) if g.transposed else (outer, inner)
    return dict(
        c_in_group=g.c_in_group,
        c_out_group=g.c_out_group,
        groups=g.groups,
        stride_wg=outer * (g.c_in_group if g.transposed else g.c_out_group),
        stride_wn=stride_wn,
        stride_wk=stride_wk,
        TRANSPOSED=g.transposed,
        K_LAST=stride_wk == 1,
        W_VECTOR=problem.w_vector(g.c_in_group, g.c_out_group),
    )


def place_arguments(problem: LocalProblem, block_m: int) -> dict[str, object]:
    """The arguments of every kernel with filters for each place: those that all kernels take, places and groups."""
    g = problem.geometry
    places = {f"stride_p{axis}": s for axis, s in zip("dhw", problem.place_strides, strict=True)}
    groups = dict(c_in_group=g.c_in_group, c_out_group=g.c_out_group, groups=g.groups)
    return geometry_arguments(problem, block_m) | places | groups


def separable_arguments(problem: SeparableProblem, block_m: int) -> dict[str, object]:
    """The arguments of every kernel that filters and multiplies by a 1x1 weight: those that all take, and its own."""
    g = problem.geometry
    outer, inner = problem.pointwise_strides
    return geometry_arguments(problem, block_m) | dict(
        c_mid=g.c_out,
        c_out=problem.c_final,
        stride_mb=problem.stride_mb,
        stride_po=outer,
        stride_pi=inner,
        HAS_MID_BIAS=problem.has_mid_bias,
        MID_ACTIVATION=problem.mid_activation,
        X_VECTOR=problem.x_vector(g.c_out) if g.c_out_group == 1 else 1,
        P_VECTOR=problem.pointwise_vector(g.c_out),
        Y_VECTOR=problem.y_vector(problem.c_final),
        Y_PIXELS_LAST=problem.y_strides[1] != 1 or problem.c_final == 1,
    )
