"""Predictions for workloads as they would be planned, beside the floor, the goal and what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .. import configs, dispatch
from ..aot import compile_all
from ..dispatch import Plan
from ..target import Target
from ..workloads import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Workload
from .demand import CountedJob, Launch, of_row
from .machine import TERMS, Machine, of_target

PARTS = {"forward": FORWARD, "dx": INPUT_GRADIENT, "dw": WEIGHT_GRADIENT}
"""Parts of a training step, as the command line calls them."""

# Shares of the limit to reach: a depthwise layer's input gradient is such a layer too.
_GOALS = {
    "causal_dw1d": 0.9, "conformer_dw1d": 0.9, "mobile_dw5": 0.8, "mobile_dw5s2": 0.8, "convnext_dw7": 0.65,
    "dw3d": 0.7, "large_dw2d": 0.3, "narrow_groups_4": 0.75, "narrow_groups_8": 0.75, "local2d": 0.85,
    "deepface_local": 0.85, "wide_groups_56": 0.95, "dilated_1d": 0.95, "dilated_d4": 0.95, "dilated_d12": 0.95,
    "dilated_d36": 0.95,
}  # fmt: skip
_DEPTHWISE_WEIGHT_GRADIENT = 0.7


@dataclass(frozen=True)
class Prediction:
    """One launch: times in microseconds, memory in MB, `share` of the limit that the predicted time reaches, `goal` the
    share to reach and `measured_us` the time of this very tile on this device, where there are such; `binds` the term
    that decides and `terms` all of them.
    """

    workload: str
    part: str
    kernel: str
    tile: str
    source: str
    programs: int
    resident: int
    waves: float
    registers: int
    slots_per_output: float
    device_mb: float
    l2_mb: float
    floor_us: float
    predicted_us: float
    share: float
    goal: float | None
    binds: str
    measured_us: float | None
    terms: dict[str, float]
    pipes: dict[str, float]
    error: str = ""

    def asdict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def missed(self) -> bool:
        """Whether the predicted share is below the goal."""
        return self.goal is not None and self.share < self.goal


def goal(workload: Workload) -> float | None:
    """The share of the limit that a workload is to reach, if one was set."""
    if workload.part == WEIGHT_GRADIENT:
        return _DEPTHWISE_WEIGHT_GRADIENT if workload.kind == "depthwise" else None
    if workload.part == INPUT_GRADIENT and workload.kind != "depthwise":
        return None
    return _GOALS.get(workload.name)


def planned(work: Workload, device: Target) -> list[Plan]:
    """What would run."""
    return [dispatch.plan(work.problem(), device)]


def waiting(work: Workload, device: Target) -> list[Plan]:
    """The forms that would run if a measurement said so, and have none."""
    problem = work.problem()
    return [dispatch.plan(problem, device, kernel=kernel.name) for kernel in dispatch.untimed(problem, device)]


def predictions(
    selected: Sequence[Workload],
    parts: Sequence[str],
    target: str,
    processes: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
    plans: Callable[[Workload, Target], list[Plan]] = planned,
) -> list[Prediction]:
    """Compiles the kernels of every workload's parts, by default those that are planned, and predicts their times;
    `advance` is told of each.
    """
    device, machine = of_target(target)
    wanted = [PARTS[part] for part in parts]
    works = [part for workload in selected for part in workload.parts() if part.part in wanted]
    made = [(work, plan) for work in works for plan in plans(work, device)]
    jobs = [CountedJob(plan.kernel.name, plan.problem, plan.tile, device) for _, plan in made]
    rows: dict[int, Any] = {}
    for index, row in compile_all(jobs, processes):
        rows[index] = row
        advance(len(jobs))
    return [
        _predicted(work, plan, rows[index], of_row(rows[index], jobs[index]), machine)
        for index, (work, plan) in enumerate(made)
    ]


def _predicted(work: Workload, made: Plan, row: Any, launch: Launch | None, machine: Machine) -> Prediction:
    problem = made.problem
    limits = machine.limits(made.target)
    floor = limits.floor_seconds(problem.flops, problem.least_bytes, work.dtype, problem.precision)
    seconds, binds, terms = math.nan, "", {}
    if launch is not None:
        seconds, binds = machine.predict(launch.demand)
        terms = {name: round(1e6 * value, 2) for name, value in machine.seconds(launch.demand).items()}
    return Prediction(
        workload=work.name,
        part=next(name for name, part in PARTS.items() if part == work.part),
        kernel=made.kernel.name,
        tile=str(made.tile),
        source=made.source,
        programs=made.grid,
        resident=launch.resident if launch else 0,
        waves=round(launch.waves, 2) if launch else math.nan,
        registers=row.registers,
        slots_per_output=round(launch.slots_per_output(), 1) if launch else math.nan,
        device_mb=round(launch.demand.device_bytes / 1e6, 2) if launch else math.nan,
        l2_mb=round(launch.demand.l2_bytes / 1e6, 2) if launch else math.nan,
        floor_us=1e6 * floor,
        predicted_us=1e6 * seconds,
        share=floor / seconds,
        goal=goal(work),
        binds=TERMS.get(binds, ""),
        measured_us=_measured(made, made.target),
        terms=terms,
        pipes=_pipes(launch) if launch else {},
        error=row.error,
    )


def _pipes(launch: Launch) -> dict[str, float]:
    """Instructions of the innermost loop by pipe, of a thread and output."""
    slots = launch.innermost
    each = 32 / launch.outputs if launch.outputs else math.nan
    names = ("fma", "imad", "alu", "xu", "memory", "uniform", "control")
    return {name: round(each * getattr(slots, name), 2) for name in names}


def _measured(made: Plan, target: Target) -> float | None:
    """Microseconds of this tile on this problem, from the files of tile configurations."""
    for _, file in configs.files(made.kernel.name, target):
        entry = file.entries.get(made.problem.describe())
        if entry is not None and entry.tile == made.tile:
            return entry.time_us
    return None
