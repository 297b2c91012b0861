"""Compiling ahead of the measurements, on every core: one after the other it would take longer than they do."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch

from triton_conv.amounts import counted
from triton_conv.aot import WarmJob
from triton_conv.dispatch import plan
from triton_conv.problem import Problem
from triton_conv.target import Target, of_device
from triton_conv.workloads import STEP, Workload

from . import model_bench
from .compilers import Compilers
from .model_record import Unit

# So few are compiled on the way while the processes start.
_WORTHWHILE = 4
_compilers: dict[Target, Compilers] = {}


def start(device: torch.device) -> None:
    """Starts what compiles, so that it is there when it is asked; nothing for the interpreter."""
    target = of_device(device)
    if not target.interpreted and not (target in _compilers and _compilers[target].alive):
        _compilers[target] = Compilers(target)


def of_workloads(workloads: Sequence[Workload], device: torch.device, seconds: float) -> str:
    """Compiles what cases will launch; says what came of it."""
    return _compile(_problems(workloads), device, seconds)


def of_models(units: Sequence[Unit], device: torch.device, seconds: float) -> str:
    """The same for models, eager ones: a compiled one launches the same kernels."""
    return _compile((problem for unit in units for problem in model_bench.problems(unit)), device, seconds)


def _problems(workloads: Sequence[Workload]) -> Iterator[Problem]:
    for workload in workloads:
        parts = workload.layer.parts() if workload.part == STEP else [workload]
        yield from (part.problem() for part in parts)


def _compile(problems: Iterable[Problem], device: torch.device, seconds: float) -> str:
    """Into Triton's cache, where the launches find it. What fails here fails again, and is told, where it counts."""
    target, began = of_device(device), time.monotonic()
    if target.interpreted:
        return "nothing to compile for the interpreter"
    start(device)
    jobs: dict[WarmJob, None] = {}
    for problem in problems:
        if time.monotonic() > began + seconds:
            break
        try:
            made = plan(problem, target)
        except Exception:  # the case's own run will say so
            continue
        jobs[WarmJob(made.kernel.name, problem, made.tile, target)] = None
    if len(jobs) < _WORTHWHILE:
        return f"{counted(len(jobs), 'kernel')} to compile, on the way"
    made_ahead = _compilers[target].compile(list(jobs), began + seconds)
    failed = "".join(f"; {count} in vain: {error}" for error, count in Counter(made_ahead.errors).most_common(1))
    return f"{made_ahead.done} of {len(jobs)} kernels compiled ahead in {time.monotonic() - began:.0f} s{failed}"
