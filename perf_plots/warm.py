"""Compiling ahead of the measurements, on every core: one after the other it would take longer than they do."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterable, Iterator, Sequence

import torch

from triton_conv.aot import Pool, WarmJob
from triton_conv.dispatch import plan
from triton_conv.problem import Problem
from triton_conv.target import of_device
from triton_conv.workloads import STEP, Workload

from . import model_bench
from .model_record import Unit

# Starting a process on every core takes as long as compiling so many.
_WORTHWHILE = 6


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
    target, stop = of_device(device), time.monotonic() + seconds
    if target.interpreted:
        return "nothing to compile for the interpreter"
    jobs: dict[WarmJob, None] = {}
    for problem in problems:
        if time.monotonic() > stop:
            break
        try:
            made = plan(problem, target)
        except Exception:  # the case's own run will say so
            continue
        jobs[WarmJob(made.kernel.name, problem, made.tile, target)] = None
    if len(jobs) < _WORTHWHILE:
        return f"{len(jobs)} kernels to compile, on the way"
    pool, start, done = Pool(), time.monotonic(), 0
    try:
        for job in jobs:
            pool.submit(job, job)
        while pool.waiting and time.monotonic() < stop:
            try:
                pool.take(stop - time.monotonic())
            except (queue.Empty, ValueError):
                break
            done += 1
    finally:
        pool.close()
    return f"{done} of {len(jobs)} kernels compiled ahead in {time.monotonic() - start:.0f} s"
