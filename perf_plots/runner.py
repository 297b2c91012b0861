"""One case: allocate, check, time in turn with every baseline, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triton_conv import configs
from triton_conv.autotune.expected import Expected, expect
from triton_conv.autotune.measure import Timer
from triton_conv.dispatch import Plan, plan
from triton_conv.ops_fused import unfused
from triton_conv.problem_lectures import SeparableProblem
from triton_conv.target import Target, of_device
from triton_conv.workloads import STEP, Workload, differentiated

from .baselines import Baseline, build, fastest_algorithms, reason
from .check import check
from .clocks import sample
from .floors import Limits, Work
from .provenance import provenance
from .record import LIMITS, OURS, STANDARD, Contestant, Record, ResultError, read, write

_ROUNDS, _LEAST_ROUNDS = 20, 3
# Taps of a filter for which cuDNN has algorithms that take seconds: on an H100 its search through them took a minute
# for a 31 x 31 layer's forward pass and the standard convolution beside it, and minutes for a gradient.
_MANY_TAPS = 400
_GUESSED = "cuDNN guesses its algorithm: a search takes minutes"
# A baseline further from the reference than this does not compute the same operation: no rounding is that coarse.
_OTHER_OPERATION = 0.25


@dataclass(frozen=True)
class Bench:
    """What stays the same from case to case. `seconds` is about what timing one case may take.

    `compiled` asks for torch.compile among the baselines.
    """

    device: torch.device
    timer: Timer
    folder: Path
    limits: Limits
    seconds: float = 4.0
    seed: int = 0
    compiled: bool = False


def describe_plan(made: Plan) -> dict[str, Any]:
    """The part of a plan that a time depends on, and where it came from."""
    notes = list(made.notes)
    if isinstance(made.problem, SeparableProblem) and (reason := unfused(made)):
        notes.append(f"two kernels run instead: {reason}")
    return {
        "kernel": made.kernel.name,
        "kernel_hash": configs.kernel_hash(made.kernel.name),
        "tile": made.tile.asdict(),
        "source": made.source,
        "reason": made.reason,
        "notes": notes,
    }


def describe_plans(workload: Workload, target: Target) -> dict[str, Any]:
    """The same of a workload; of a whole training step, of all its parts."""
    if workload.part != STEP:
        return describe_plan(plan(workload.problem(), target))
    parts = workload.layer.parts()
    found = [describe_plan(plan(part.problem(), target)) for part in parts]
    joined = {name: ", ".join(each[name] for each in found) for name in ("kernel", "kernel_hash")}
    tiles = {part.part: str(each["tile"]) for part, each in zip(parts, found, strict=True)}
    sources = ", ".join(dict.fromkeys(each["source"] for each in found))
    return joined | {"tile": tiles, "source": sources, "reason": "", "notes": []}


def finished(workload: Workload, bench: Bench) -> Record | None:
    """The record of an earlier run, if the same code would run the same case with the same tile again."""
    try:
        record = read(bench.folder / f"{workload.title}.json")
    except ResultError:
        return None
    try:
        planned = describe_plans(workload, of_device(bench.device))
    except Exception:  # no plan: the earlier run's failure stands only if it had none either
        planned = None
    same_shapes = (record.workload.input, record.workload.weight) == (workload.input, workload.weight)
    same_kind = record.measured == bench.timer.measured
    return record if same_shapes and same_kind and _decisive(record.plan) == _decisive(planned) else None


def _decisive(made: Any) -> Any:
    return made and tuple(made.get(name) for name in ("kernel", "kernel_hash", "tile"))


def run_case(workload: Workload, bench: Bench) -> Record:
    """Runs one case and writes its record, whatever happens in it."""
    record = Record(workload, bench.timer.measured, Work.of(workload), provenance(bench.device) | {"seed": bench.seed})
    if bench.limits.known:
        record = replace(
            record,
            floor_us=record.work.floor_us(bench.limits),
            standard_floor_us=record.work.standard_floor_us(bench.limits),
            floor_basis=f"{bench.limits.target.name} {bench.limits.basis}",
        )
    try:
        record = replace(record, plan=describe_plans(workload, of_device(bench.device)))
        with torch.no_grad():
            record = _checked_and_timed(record, bench)
    except Exception as error:  # the next case must run: what went wrong is this case's result
        record = replace(record, error=reason(error))
    write(record, bench.folder)
    return record


def _checked_and_timed(record: Record, bench: Bench) -> Record:
    workload = record.workload
    tensors = workload.tensors(bench.device, bench.seed)
    record, expected, ours = _checked(record, tensors)
    search = workload.layer.problem().geometry.taps < _MANY_TAPS
    with fastest_algorithms(search):
        entrants = [_Entrant(OURS, ours, _seconds(ours, bench.device), record.relative_error)]
        contestants: dict[str, Contestant] = {}
        for name, baseline in build(workload, tensors, bench.compiled).items():
            try:
                floor = record.standard_floor_us if name in STANDARD else record.floor_us
                entrants.append(_enter(name, baseline, expected, bench, (floor or 0.0) / 1e6))
            except _AbsentError as absent:
                contestants[name] = Contestant(absent=str(absent))
            except Exception as failure:  # whatever a library raises is the reason why it is absent
                contestants[name] = Contestant(absent=reason(failure))
        rounds = _rounds(bench.seconds, sum(entrant.seconds for entrant in entrants))
        before = sample(bench.device)
        timings = bench.timer.rounds({entrant.name: entrant.call for entrant in entrants}, rounds)
        record = replace(record, clocks={"before": before, "after": sample(bench.device)})
    for entrant in entrants:
        guessed = not search and entrant.name not in (OURS, *LIMITS)
        note = "; ".join(filter(None, (entrant.note, _GUESSED if guessed else "")))
        contestants[entrant.name] = Contestant.of(timings[entrant.name], entrant.relative_error, note)
    return replace(record, contestants=contestants)


def _checked(record: Record, tensors: Mapping[str, Any]) -> tuple[Record, Expected, Callable[[], Tensor]]:
    """The record with our error, what a result must be, and our call.

    Of a whole step every part is checked by itself, then the step's own weight gradient.
    """
    workload = record.workload
    whole, found = workload.part == STEP, []
    for part in workload.layer.parts() if whole else [workload]:
        problem = part.problem()
        expected = expect(part, problem, tensors)
        ours = differentiated(workload.call, tensors, part.part)
        found.append((check(ours, expected, problem.repeatable), expected.tolerance))
    if whole:
        ours = differentiated(workload.call, tensors, STEP)
        found.append((check(ours, expected, problem.repeatable), expected.tolerance))
    error, bound = max(found, key=lambda each: each[0] / each[1])
    what = "every part, and the weight's gradient of a whole step" if whole else expected.description
    return replace(record, relative_error=error, tolerance=bound, checked=what), expected, ours


@dataclass(frozen=True)
class _Entrant:
    name: str
    call: Callable[[], Tensor]
    seconds: float
    relative_error: float | None
    note: str = ""


class _AbsentError(Exception):
    """Why a baseline is not timed."""


def _enter(name: str, baseline: Baseline, expected: Expected, bench: Bench, floor: float) -> _Entrant:
    """A baseline that ran, computes what it should, and is fast enough to repeat; `floor` is its limit in seconds."""
    if baseline.call is None:
        raise _AbsentError(baseline.absent)
    if floor > bench.seconds / 8:
        # Not even tried: the search for its fastest algorithm would run it dozens of times.
        raise _AbsentError(f"too slow to repeat: its limit alone is {floor:.2g} s")
    # The first call also searches for the fastest algorithm.
    result = baseline.call()
    error = None if name in (*STANDARD, *LIMITS) else expected.error(result)
    if error is not None and error > _OTHER_OPERATION:
        raise _AbsentError(f"too far from the float64 result to count (relative error {error:.2g})")
    seconds = _seconds(baseline.call, bench.device)
    if seconds > bench.seconds / 8:
        raise _AbsentError(f"too slow to repeat: one call took {seconds:.2g} s")
    return _Entrant(name, baseline.call, seconds, error, baseline.note)


def _rounds(seconds: float, per_round: float) -> int:
    """As many rounds as fit, within bounds; the timer's own warm-up counts as three."""
    return max(_LEAST_ROUNDS, min(_ROUNDS, int(seconds / per_round) - 3))


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Roughly what one call takes: to choose the number of rounds, never recorded as a result."""
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
