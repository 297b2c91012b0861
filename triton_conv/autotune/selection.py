"""Which workloads a command works on: named ones, those of a file, or all that a model calls."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import WorkloadError
from ..loading import call, load
from ..problem import Problem, WeightGradientProblem
from ..problem_deform import DeformInputGradientProblem, DeformProblem
from ..recording import record
from ..target import KNOWN
from ..workloads import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Workload, find

OPS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "deform_conv2d")


def select(name: str | None, model: str | None, op: str | None, gradients: bool) -> list[Workload]:
    """Workloads by name, kind, file or model; `op` keeps those of one function, `gradients` adds theirs."""
    if (name is None) == (model is None):
        raise WorkloadError("workload: name either --workload or --model")
    found = find(name) if name is not None else of_model(_step(model or ""))
    if gradients and name is not None:
        found = [part for workload in found for part in workload.parts()]
    found = [workload for workload in found if op in (None, workload.function)]
    if not found:
        raise WorkloadError(f"op: no workload of {op} among those selected")
    return found


def _step(path: str) -> Callable[[], Any]:
    """The function that `MODULE:FUNCTION` names: it takes nothing and runs a step of a model."""
    found = load(path)
    if not callable(found):
        raise WorkloadError(f"model: {path!r} is not a function")
    return functools.partial(call, path, found)


def of_model(step: Callable[[], Any]) -> list[Workload]:
    """Every different convolution that a step of a model runs, forward and backward, the dearest first.

    The step may run on the meta device: nothing need be computed. Dearest is the count of calls times the roofline
    floor.
    """
    counts: dict[str, Problem] = {}
    calls: Counter[str] = Counter()
    for problem in record(step):
        counts.setdefault(problem.describe(), problem)
        calls[problem.describe()] += 1
    if not counts:
        raise WorkloadError(
            "model: it calls no convolution of triton_conv; name a function that takes nothing and runs a step, "
            "such as a forward pass of triton_conv.convert(model, force=True)"
        )

    def cost(description: str) -> float:
        problem = counts[description]
        dtype = str(problem.dtype).removeprefix("torch.")
        floor = KNOWN["sm_90"].floor_seconds(problem.geometry.flops, problem.least_bytes, dtype, problem.precision)
        return calls[description] * floor

    found = []
    for description in sorted(counts, key=cost, reverse=True):
        if (workload := workload_of(counts[description])) is not None:
            found.append(replace(workload, calls=calls[description]))
    return found


def workload_of(problem: Problem) -> Workload | None:
    """A workload with this very problem; None for the few that no public call has, or that cannot be tuned."""
    g = problem.geometry
    arguments: dict[str, Any] = {name: g.spatial(getattr(g, name)) for name in ("stride", "padding", "dilation")}
    arguments["groups"] = g.groups
    function = f"conv{g.rank}d"
    if g.transposed:
        function = f"conv_transpose{g.rank}d"
        arguments |= {"padding": g.spatial(g.pad_before), "output_padding": g.spatial(g.output_padding)}
    elif g.padding_mode != "zeros":
        arguments["padding_mode"] = g.padding_mode
    offsets: dict[str, Any] = {}
    if isinstance(problem, DeformProblem):
        function = f"deform_conv{g.rank}d"
        offsets = {"offset_groups": problem.offset_groups, "mask": problem.has_mask}
        arguments = {"padding": g.padding[2][0], "stride": g.stride[2], "dilation": g.dilation[2]}
    elif problem.activation != "none":
        arguments["activation"] = problem.activation
    part = WEIGHT_GRADIENT if isinstance(problem, WeightGradientProblem) else FORWARD
    if isinstance(problem, DeformInputGradientProblem):
        part = INPUT_GRADIENT
    workload = Workload(
        name=problem.describe().replace(" ", "_").replace("/", "_"),
        kind=_kind(problem),
        function=function,
        input=g.in_shape,
        weight=g.weight_shape,
        arguments=arguments,
        dtype=str(problem.dtype).removeprefix("torch."),
        channels_last=not problem.pixels_last,
        bias=problem.has_bias,
        origin="model",
        part=part,
        **offsets,
    )
    try:
        return workload if workload.problem().describe() == problem.describe() else None
    except (ValueError, RuntimeError, TypeError, IndexError):
        return None


def _kind(problem: Problem) -> str:
    g = problem.geometry
    if isinstance(problem, DeformProblem):
        return "deformable"
    if g.transposed:
        return "transposed"
    if g.groups > 1:
        return "depthwise" if g.c_in_group == 1 else "grouped"
    return "dilated"
