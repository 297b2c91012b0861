"""Finding the fastest right tile of a workload on the device at hand, within a budget of seconds.

Every candidate is compared with a float64 reference before it is timed: outputs start as NaN, so that an element nobody
wrote is an error too. A winner replaces the analytic default only if it beats it beyond both confidence intervals.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton

from .. import ops
from .. import target as targets
from ..configs import ConfigFile, Entry, read
from ..dispatch import Plan, choose_kernel, plan
from ..errors import ConfigError, StaleConfigError
from ..kernels import KERNELS, Tile
from ..problem import DeformProblem, Problem
from ..reference import reference, relative_error, tolerance
from ..workloads import Workload
from .measure import Timer, Timing
from .space import candidates

Report = Callable[[str], None]

_SCREEN_ROUNDS, _FINAL_ROUNDS, _LEAST_GAIN = 3, 15, 0.01


@dataclass(frozen=True)
class Outcome:
    """What tuning one workload came to. Times in microseconds; `error` is empty unless nothing could be measured."""

    workload: str
    kernel: str
    tile: str = ""
    time_us: float = math.nan
    interval_us: tuple[float, float] = (math.nan, math.nan)
    default_time_us: float = math.nan
    trials: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    error: str = ""

    @property
    def gain(self) -> float:
        """How many times faster than the default."""
        return self.default_time_us / self.time_us


class Subject:
    """A workload's tensors, its reference, and the way to run it with any tile."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.workload = workload
        self.tensors = workload.tensors(device)
        self.problem = workload.problem()
        self.target = targets.of_device(device)
        self.kernel = choose_kernel(self.problem)[0]
        self._images = sorted({0, workload.input[0] - 1})
        # Images are independent: the first and the last one tell as much as all, for a fraction of the float64 work.
        picked = {
            name: value[self._images] if name in ("input", "offset", "mask") else value
            for name, value in self.tensors.items()
        }
        self._expected = reference(workload.function, picked)
        self._output: torch.Tensor | None = None

    @property
    def tolerance(self) -> float:
        p = self.problem
        sampled = max(p.geometry.in_size) if isinstance(p, DeformProblem) else 0
        return tolerance(p.dtype, p.geometry.K, p.precision, sampled)

    def bind(self, made: Plan) -> Callable[[], None]:
        """A call that runs the plan into a buffer of its own; nothing is allocated while it runs."""
        if self._output is None:
            x = self.tensors["input"]
            self._output = torch.empty_strided(made.out_shape, made.out_strides, dtype=x.dtype, device=x.device)
        operands = {name.removesuffix("_ptr"): name for name in made.kernel.pointers}
        names = {"x": "input", "w": "weight", "b": "bias", "offset": "offset", "mask": "mask"}
        tensors = [self.tensors.get(names[key]) for key in operands if key != "y"]
        return lambda: made.launch(*tensors, self._output)

    def error(self, call: Callable[[], None]) -> float:
        """Deviation of one run from the reference; infinite where an element was not written."""
        assert self._output is not None
        self._output.fill_(math.nan)
        call()
        return relative_error(self._output[self._images], self._expected)


def tune(
    workloads: Sequence[Workload],
    *,
    seconds: float,
    device: torch.device,
    timer: Timer,
    folder: Path,
    report: Report = print,
) -> list[Outcome]:
    """Tunes each workload in turn, all within `seconds`; winners are written to `folder` as they are found."""
    stop = time.monotonic() + seconds
    outcomes = []
    for index, workload in enumerate(workloads):
        left = stop - time.monotonic()
        if left <= 0:
            report(f"out of time: {len(workloads) - index} workloads not tuned")
            break
        # What a workload does not use flows to those after it.
        outcome = _tune_one(workload, time.monotonic() + left / (len(workloads) - index), device, timer, folder)
        outcomes.append(outcome)
        report(describe(outcome))
    ops.forget_plans()
    return outcomes


def describe(outcome: Outcome) -> str:
    """One line."""
    if outcome.error:
        return f"{outcome.workload}: {outcome.error}"
    failures = "".join(f", {count} {kind}" for kind, count in sorted(outcome.failures.items()))
    return (
        f"{outcome.workload}: {outcome.time_us:.1f} us [{outcome.interval_us[0]:.1f}, {outcome.interval_us[1]:.1f}], "
        f"{outcome.gain:.2f}x the default, {outcome.trials} tiles tried{failures}; {outcome.kernel} {outcome.tile}"
    )


def _tune_one(workload: Workload, stop: float, device: torch.device, timer: Timer, folder: Path) -> Outcome:
    try:
        subject = Subject(workload, device)
    except (RuntimeError, MemoryError) as error:
        return Outcome(workload.title, "", error=f"cannot be set up here: {_first_line(error)}")
    name = subject.kernel.name
    failures: Counter[str] = Counter()
    times: dict[Tile, float] = {}
    errors: dict[Tile, float] = {}
    default, *others = candidates(name, subject.problem, subject.target)
    for tile in (default, *others):
        # The final needs about as long as ten trials of the incumbent.
        if times and time.monotonic() + 1e-6 * 10 * _FINAL_ROUNDS * min(times.values()) > stop:
            break
        verdict = _trial(subject, tile, timer, errors)
        if isinstance(verdict, str):
            failures[verdict] += 1
        else:
            times[tile] = verdict
    trials = len(times) + sum(failures.values())
    if default not in times:
        reason = "the default tile failed (" + ", ".join(failures) + ")"
        return Outcome(workload.title, name, str(default), trials=trials, failures=dict(failures), error=reason)
    best = min(times, key=lambda tile: times[tile])
    final = _final(subject, (default, best), timer)
    if not _beats(final[best], final[default]):
        best = default
    outcome = Outcome(
        workload.title, name, str(best), final[best].median, final[best].interval, final[default].median, trials,
        dict(failures),
    )  # fmt: skip
    if best != default:
        try:
            _store(subject, best, outcome, errors[best], folder)
        except (ConfigError, OSError) as error:
            return replace(outcome, error=f"not stored: {error}")
    return outcome


def _trial(subject: Subject, tile: Tile, timer: Timer, errors: dict[Tile, float]) -> float | str:
    """Median time of a tile in microseconds, or the class of its failure."""
    try:
        call = subject.bind(plan(subject.problem, subject.target, subject.kernel.name, tile))
        errors[tile] = subject.error(call)
        if errors[tile] > subject.tolerance:
            return "wrong result"
        return timer.rounds({"": call}, _SCREEN_ROUNDS)[""].median
    except triton.runtime.errors.OutOfResources:
        return "out of resources"
    except triton.compiler.errors.CompilationError:
        return "compilation error"
    except RuntimeError as error:
        return f"failed: {_first_line(error)[:60]}"


def _final(subject: Subject, tiles: tuple[Tile, ...], timer: Timer) -> dict[Tile, Timing]:
    """Interleaved rounds: drift of the clocks meets all of them alike."""
    calls = {
        str(tile): subject.bind(plan(subject.problem, subject.target, subject.kernel.name, tile)) for tile in tiles
    }
    timings = timer.rounds(calls, _FINAL_ROUNDS)
    return {tile: timings[str(tile)] for tile in tiles}


def _beats(challenger: Timing, champion: Timing) -> bool:
    return challenger.interval[1] < champion.interval[0] * (1 - _LEAST_GAIN)


def _store(subject: Subject, tile: Tile, outcome: Outcome, error: float, folder: Path) -> None:
    file = ConfigFile(subject.kernel.name, subject.target)
    path = file.path(folder)
    if path.is_file():
        # Winners of older kernel code are of no more use; a broken or foreign file is its owner's to move away.
        with contextlib.suppress(StaleConfigError):
            file = read(path, KERNELS[subject.kernel.name], subject.target)
    file.environment = environment()
    file.entries[subject.problem.describe()] = Entry(
        tile, outcome.time_us, outcome.interval_us, outcome.default_time_us, error, outcome.trials
    )
    file.write(folder)


def environment() -> dict[str, str]:
    """The versions a measurement depends on, and its date."""
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "python": platform.python_version(),
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def survivors(problem: Problem, target: targets.Target, seconds: float) -> tuple[list[Any], int]:
    """Candidates that compile for a target without a spill, and how many were compiled, until the time is up.

    The part of tuning that needs no device; nearest to the default first.
    """
    from ..aot import Job, compile_all

    name = choose_kernel(problem)[0].name
    stop = time.monotonic() + seconds
    tiles = candidates(name, problem, target)
    alive, compiled = [], 0
    batch = 16
    for start in range(0, len(tiles), batch):
        if compiled and time.monotonic() > stop:
            break
        jobs = [Job(name, problem, tile, target) for tile in tiles[start : start + batch]]
        rows = sorted(compile_all(jobs))
        compiled += len(rows)
        alive += [(jobs[index].tile, row) for index, row in rows if not row.error and not row.spill_bytes]
    return alive, compiled
