"""The stages of a run on a GPU. Each one looks at what is on disk, goes on from there, and writes as it goes."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from triton_conv import ops
from triton_conv.amounts import counted, finite
from triton_conv.autotune.measure import DeviceLostError, usable
from triton_conv.defaults import default_tile
from triton_conv.dispatch import forms
from triton_conv.target import of_device
from triton_conv.workloads import Workload

from . import ceilings, cold_start, comparisons, model_bench, model_record, sanitizer, testing, warm
from .budget import Deadline
from .children import work_off
from .prediction_page import PAGE, gains
from .provenance import output, provenance
from .record import CEILINGS, COMMITTED, COMPILED, Contestant, refuse_rehearsal, write, write_json
from .run import Run
from .runner import finished, run_case
from .state import TRIALS, TUNING
from .store import load, read_ceilings

if TYPE_CHECKING:
    from triton_conv.autotune.race import Outcome

Report = dict[str, Any]

# A rehearsal tries as many tiles of each workload, however busy the machine: seconds here are a bound and no budget.
_REHEARSAL_TRIALS, _REHEARSAL_TUNING = 2, 120.0
# Share of a stage's time in which its kernels are compiled on every core; seconds that one unit of a child may take.
# A model has a hundred kernels, which one core compiles in a minute.
_WARMING, _WARMING_MODELS = 0.25, 0.4
_UNIT_SECONDS = {"model_bench": 240.0, "compiled": 120.0}
# Models' units whose kernels are compiled before the first of them runs: every model in its usual format.
_UNITS_AT_A_TIME = 32


def environment(run: Run, deadline: Deadline) -> Report:
    """Device and versions; the whole of nvidia-smi beside them. What compiles for later stages starts meanwhile."""
    warm.start(run.device)
    found = provenance(run.device)
    if not run.rehearse:
        (run.out / "nvidia-smi.txt").write_text(output("nvidia-smi") or "nvidia-smi could not be run\n")
    run.say(", ".join(f"{name} {value}" for name, value in found.items() if value is not None))
    return found


def tests(run: Run, deadline: Deadline) -> Report:
    """The tests, on the device, in processes of their own; nothing that has passed for the same code."""
    return testing.run(run.out, run.device, deadline.left, run.say, run.rehearse)


def measure_ceilings(run: Run, deadline: Deadline) -> Report:
    """The rates that shares of the limit refer to; not again where they are there."""
    found = read_ceilings(run.results)
    if found is None:
        found = ceilings.measure(run.device, run.timer())
        refuse_rehearsal(found["measured"], run.results)
        write_json(run.results / CEILINGS, found)
    run.say(ceilings.describe(found))
    return {}


def benchmark(stage: str, run: Run, deadline: Deadline) -> Report:
    """The cases of a stage; one that has been run with the tile that would run now is not run again."""
    ops.forget_plans()
    bench, workloads = run.bench(), run.cases(stage)
    todo = [workload for workload in workloads if finished(workload, bench) is None]
    run.say(warm.of_workloads(todo, run.device, min(_WARMING * deadline.left, 60.0)))
    ran = 0
    for workload in todo:
        if deadline.passed:
            break
        record = run_case(workload, bench)
        ran += 1
        run.say(f"{workload.title}: " + (record.error or f"{record.ours_us:.1f} us, {_factors(record.speedup)}"))
        if record.error and not usable(run.device):
            raise DeviceLostError(f"the device does not answer after {workload.title}")
    kept, left = len(workloads) - len(todo), len(todo) - ran
    run.say(f"{counted(ran, 'case')} run, {kept} kept, {left} left for want of time")
    return {"ran": ran, "kept": kept, "left": left}


def _factors(speedup: Callable[[bool], float | None]) -> str:
    library, standard = (f"{value:.2f}x vs" if value else "no time of" for value in (speedup(False), speedup(True)))
    return f"{library} the fastest other library, {standard} the standard convolution"


def tuning(run: Run, deadline: Deadline) -> Report:
    """Tunes flagships, their gradients and the lectures' kinds; trials of the same code are kept.

    All of the time is for those with a form that no trial tells of, what is predicted to gain most first. Where there
    are none, or they cannot be set up, it is for the others, the worst first.
    """
    names = ("benchmark",) if run.rehearse else ("benchmark", "gradients", "lectures")
    workloads = sorted((each for name in names for each in run.cases(name)), key=_standing(run))
    waiting = _waiting(run, workloads)
    outcomes: list[Outcome] = []
    for some in (waiting, [workload for workload in workloads if workload not in waiting]):
        if some and not deadline.passed:
            outcomes += _tuned(run, deadline.left, some)
    found = {outcome.workload: finite(asdict(outcome)) for outcome in outcomes}
    write_json(run.out / TUNING, {"provenance": provenance(run.device), "outcomes": found})
    return {"tuned": len(found), "trials": sum(outcome.trials for outcome in outcomes)}


def portfolio(run: Run, deadline: Deadline) -> Report:
    """Tries the flagships and their gradients with what won on the others, after all trials that are kept of the same
    code, those committed for this device among them: what portfolios are judged by.
    """
    workloads = run.cases("benchmark") + run.cases("gradients")
    committed = COMMITTED / run.results.name / TRIALS
    outcomes = _tuned(run, deadline.left, workloads, known=(committed,), portfolio=True)
    faster = sum(math.isfinite(outcome.interval_us[0]) for outcome in outcomes)
    run.say(f"{counted(faster, 'workload')} with a final, for a tile of another that is faster")
    return {"finals": faster, "left": len(workloads) - len(outcomes)}


def _tuned(run: Run, seconds: float, workloads: Sequence[Workload], **settings: Any) -> list[Outcome]:
    """In a process of its own: a tile that hangs or loses the device takes only that along."""
    from triton_conv.autotune.tune import tune
    from triton_conv.autotune.worker import WorkerLab

    stop, lab = time.monotonic() + seconds, WorkerLab(str(run.device))
    try:
        # To answer, the process starts: that counts.
        assert lab.target.interpreted == run.rehearse
        seconds = stop - time.monotonic()
        if run.rehearse:
            seconds, settings = _REHEARSAL_TUNING, {"most_trials": _REHEARSAL_TRIALS} | settings
        return tune(
            workloads, seconds=seconds, lab=lab, folder=run.out / "autotune_configs", journal=run.out / TRIALS,
            report=run.say, **settings,
        )  # fmt: skip
    finally:
        lab.close()


def _waiting(run: Run, workloads: Sequence[Workload]) -> list[Workload]:
    """Those of whose forms' default tiles no trial tells, what is predicted to gain most in a step first."""
    from triton_conv.autotune.journal import Journal
    from triton_conv.autotune.search import Candidate

    target, hope = of_device(run.device), gains(PAGE)
    journal = Journal(run.out / TRIALS, target)

    def waits(workload: Workload) -> bool:
        problem = workload.problem()
        tried = {candidate for candidate, _ in journal.known(problem)}
        defaults = (
            Candidate(form.name, default_tile(form.name, problem, target)) for form in forms(problem, target)[0]
        )
        return any(each not in tried and each.tile.unfit(problem, target) is None for each in defaults)

    def gain(workload: Workload) -> float:
        return workload.calls * hope.get((workload.name, workload.part), 0.0)

    return sorted(filter(waits, workloads), key=gain, reverse=True)


def _standing(run: Run) -> Callable[[Workload], float]:
    """How a workload compares with the fastest other, as far as is known: what is not known comes first."""
    devices, _ = load(run.out / "results")
    found = {title: record for device in devices for title, record in device.by_title().items()}

    def standing(workload: Workload) -> float:
        record = found.get(workload.title)
        return (record.speedup(False) or record.speedup(True) or 0.0) if record else 0.0

    return standing


def figures(run: Run, deadline: Deadline) -> Report:
    """Every figure of what is there."""
    from .figures import draw_all

    paths, complaints = draw_all(run.out / "results", run.out / "figures", say=lambda line: None)
    run.say(f"{counted(len(paths), 'file')} written below {run.out / 'figures'}")
    return {"files": len(paths), "complaints": complaints}


def models(run: Run, deadline: Deadline) -> Report:
    """Published models, plain and converted, each in a process that may be killed."""
    _write_comparisons(run)
    found = {unit.title: unit for unit in model_bench.units(run.rehearse)}

    def done(title: str) -> bool:
        return model_bench.finished(run.results, found[title])

    def failed(title: str, why: str) -> None:
        model_bench.fail(run.results, found[title], run.device, why)

    # What no code has a result of comes before what other code has one of.
    todo = sorted(
        (title for title in found if not done(title)),
        key=lambda title: model_record.path(run.results, found[title]).exists(),
    )
    ran = 0
    # Nothing is compiled for models that no time will be left for.
    for start in range(0, len(todo), _UNITS_AT_A_TIME):
        if deadline.passed:
            break
        some = todo[start : start + _UNITS_AT_A_TIME]
        run.say(
            warm.of_models([found[title] for title in some], run.device, min(_WARMING_MODELS * deadline.left, 90.0))
        )
        ran += _in_children(run, deadline, "model_bench", some, done, failed)
    if spent := model_bench.spent(run.results, [found[title] for title in todo if done(title)]):
        run.say(spent)
    return _said(run, ran, len(found) - len(todo), len(todo) - ran)


def _write_comparisons(run: Run) -> None:
    """What this run has measured is what `convert` decides by."""
    if not run.rehearse:
        comparisons.main([f"--results={run.out / 'results'}", f"--store={run.out / 'autotune_configs'}"])


def compiled(run: Run, deadline: Deadline) -> Report:
    """The flagships again, torch.compile's search among the baselines, each case in a process that may be killed."""
    bench = run.bench()
    found = {workload.title: workload for workload in run.cases("compiled")}

    def done(title: str) -> bool:
        record = finished(found[title], bench)
        return record is not None and (bool(record.error) or COMPILED in record.contestants)

    def failed(title: str, why: str) -> None:
        record = finished(found[title], bench)
        if record is not None:
            write(replace(record, contestants={**record.contestants, COMPILED: Contestant(absent=why)}), bench.folder)

    todo = [title for title in found if not done(title)]
    ran = _in_children(run, deadline, "compiled", todo, done, failed)
    return _said(run, ran, len(found) - len(todo), len(todo) - ran)


def _said(run: Run, ran: int, kept: int, left: int) -> Report:
    run.say(f"{ran} run, {kept} kept, {left} left for want of time")
    return {"ran": ran, "kept": kept, "left": left}


def _in_children(
    run: Run, deadline: Deadline, module: str, todo: Sequence[str], done: Callable[[str], bool],
    failed: Callable[[str, str], None],
) -> int:  # fmt: skip
    """Has `python -m perf_plots.<module>` do what is to be done; how many it has done."""
    options = ["--rehearse"] if run.rehearse else []

    def command(left: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", f"perf_plots.{module}", f"--work={run.out}", "--units", ",".join(left), *options]

    def report(title: str, why: str) -> None:
        run.say(f"{title}: {why}")
        failed(title, why)

    # This process's spare memory is the children's.
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    return work_off(todo, command, done, report, _UNIT_SECONDS[module], deadline)


def first_calls(run: Run, deadline: Deadline) -> Report:
    """What the first call of a process costs."""
    left = cold_start.measure(run.results, provenance(run.device), run.rehearse, deadline)
    run.say(f"{counted(left, 'case')} left for want of time")
    return {"left": left}


def sanitized(run: Run, deadline: Deadline) -> Report:
    """Every form under compute-sanitizer."""
    total, left, complaints = sanitizer.run(run.results, provenance(run.device), deadline, run.rehearse)
    run.say(f"{total - left} of {total} units watched, {complaints} complained of")
    return {"watched": total - left, "left": left, "complaints": complaints}


_Stage = Callable[[Run, Deadline], Report]
STAGES: dict[str, tuple[float, _Stage]] = {
    "environment": (0.005, environment),
    "ceilings": (0.015, measure_ceilings),
    "tests": (0.25, tests),
    "tuning": (0.38, tuning),
    "portfolio": (0.01, portfolio),
    **{
        name: (share, partial(benchmark, name))
        for name, share in {"benchmark": 0.06, "gradients": 0.09, "lectures": 0.02, "steps": 0.04}.items()
    },
    "models": (0.03, models),
    "sweeps": (0.02, partial(benchmark, "sweeps")),
    "cold_start": (0.01, first_calls),
    "compiled": (0.01, compiled),
    "sanitizer": (0.03, sanitized),
    "networks": (0.01, partial(benchmark, "networks")),
    "network_gradients": (0.005, partial(benchmark, "network_gradients")),
    "variants": (0.005, partial(benchmark, "variants")),
    "figures": (0.01, figures),
}
"""Share of the budget and function, in order: what one leaves flows on to those after it."""
