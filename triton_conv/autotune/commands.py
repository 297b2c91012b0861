"""The tuner's commands: plan, predict, tune, resume, and those of `upkeep` for what was stored."""

from __future__ import annotations

import argparse
import functools
import json
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import configs, dispatch, ops, target
from ..amounts import counted, number, seconds
from ..errors import DeviceError, StoreError, WorkloadError
from ..problem import Problem
from ..target import Target
from ..workloads import Workload
from . import fleet, store, upkeep, verification
from .console import ERR, BarColumn, Progress, TextColumn, TimeRemainingColumn, say, write_json
from .funnel import compiled, expected, filtered, funnels, ranked
from .lab import Lab
from .measure import DeviceLostError
from .race import Race
from .search import Candidate
from .selection import OPS, select
from .worker import WorkerLab

PRESETS = {"rapid": 16, "normal": 96, "exhaustive": math.inf}
"""Trials of one workload at most, by preset."""

_SESSION = "session.json"


def add_to(commands: Any) -> None:
    """Adds the tuner's commands to the parser's."""
    plan = _command(commands, "plan", _plan, "show which kernel and tile a workload would run, and why")
    _selection(plan, default="all")
    plan.add_argument("--target", choices=target.KNOWN, help="for this target instead of this machine's GPU")
    plan.add_argument("--funnel", action="store_true", help="also show the candidates, and what removes how many")
    plan.add_argument("--top", type=number, default=64, metavar="N", help="with --funnel: the best ranked (default 64)")
    plan.add_argument(
        "--compile", type=seconds, default=0.0, metavar="SECONDS",
        help="with --funnel: compile these for so many seconds, and filter by registers, spills and occupancy",
    )  # fmt: skip

    predict = _command(commands, "predict", _predict, "rank the candidates for a device that is not here")
    _selection(predict)
    predict.add_argument("--target", choices=target.KNOWN, required=True, help="the device's architecture")
    predict.add_argument("--top", type=number, default=16, metavar="N", help="candidates of each workload (default 16)")
    predict.add_argument(
        "--compile", type=seconds, default=0.0, metavar="SECONDS", help="compile them too, for so many seconds"
    )

    tuning = _command(commands, "tune", _tune, "measure candidate tiles and keep the winners")
    _selection(tuning)
    _budget(tuning)
    tuning.add_argument("--preset", choices=PRESETS, default="exhaustive", help="16, 96 or all candidates a workload")
    tuning.add_argument(
        "--portfolio", action="store_true",
        help="try each workload only with the tiles of a portfolio of all the other problems tuned",
    )  # fmt: skip
    tuning.add_argument("--gpus", metavar="all|N,M", help="every GPU of this machine, or these: a process for each")
    tuning.add_argument("--device", default="cuda", metavar="NAME", help="cuda, cuda:N or simulated:h100[,noise=0.02]")
    tuning.add_argument("--target", choices=target.KNOWN, help="without a GPU: list the candidates that compile for it")

    resume = _command(commands, "resume", _resume, "go on where the last tuning of a store stopped")
    _budget(resume)
    upkeep.add_to(commands, _command)
    verification.add_to(functools.partial(_command, commands))


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--store", type=Path, metavar="DIR", help="tile configurations (default: your own folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    parser.set_defaults(run=run)
    return parser


def _selection(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument("--workload", metavar="NAME", help="a workload, a kind, all, or a .json file")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="all that this function, a step of a model, calls")
    parser.add_argument("--op", choices=OPS, help="only this function")
    parser.add_argument("--gradients", action="store_true", help="the workloads' gradients too")
    parser.set_defaults(default_workload=default)


def _budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=seconds, required=True, metavar="SECONDS", help="time for all of it")


def _selected(arguments: argparse.Namespace) -> list[Workload]:
    name = arguments.workload
    if name is None and arguments.model is None:
        name = arguments.default_workload
    return select(name, arguments.model, arguments.op, arguments.gradients)


@contextmanager
def _store_of(arguments: argparse.Namespace, *, there: bool = False) -> Iterator[Path]:
    """The store's folder; plans look into it while it is named. Raises `StoreError` where it should be `there`."""
    if arguments.store is None:
        yield configs.user_folder()
        return
    if there and not arguments.store.is_dir():
        raise StoreError(f"store: {arguments.store} is not a folder")
    before = configs.FOLDERS
    configs.FOLDERS = ((before[0][0], lambda: arguments.store), *before[1:])
    ops.forget_plans()
    try:
        yield arguments.store
    finally:
        configs.FOLDERS = before
        ops.forget_plans()


# ---------------------------------------------------------------------------------------------------- without a device


def _plan(arguments: argparse.Namespace) -> int:
    selected = _selected(arguments)
    if arguments.target:
        goal = target.known(arguments.target)
    elif torch.cuda.is_available():
        goal = target.of_device(torch.device("cuda"))
    else:
        raise WorkloadError(f"target: no GPU here; name one of {', '.join(target.KNOWN)} with --target")
    rows = []
    with _store_of(arguments, there=True):
        for workload in selected:
            made = dispatch.plan(workload.problem(), goal)
            origin = f" ({workload.origin})" if workload.origin else ""
            say(f"{workload.title}{origin}: {made}")
            row: dict[str, Any] = {"workload": workload.title, "kernel": made.kernel.name, "tile": made.tile.asdict()}
            row |= {"source": made.source, "notes": list(made.notes)}
            if arguments.funnel:
                row["funnel"] = _funnel(made.problem, goal, arguments.top, arguments.compile)
            say("")
            rows.append(row)
    write_json(arguments.json, {"target": goal.arch, "plans": rows})
    return 0


def _funnel(problem: Problem, goal: Target, count: int, seconds: float) -> dict[str, Any]:
    """Shows what each stage leaves of the candidates: of each form by count, and over all of them by compilation."""
    found = funnels(problem, goal)
    for funnel in found:
        say(f"  {funnel.kernel}: {counted(funnel.space, 'candidate')}, {funnel.left} left")
        for stage in funnel.stages:
            say(f"    {stage.name}: {stage.left} left")
            for reason, removed in stage.removed.items():
                say(f"      -{removed:<6} {reason}")
    candidates = ranked(problem, goal, count)
    say(f"  ranked by count of work: the first {len(candidates)} would be compiled and tried")
    shown: dict[str, Any] = {"kernels": [funnel.asdict() for funnel in found], "ranked": list(map(str, candidates))}
    if seconds:
        made = list(compiled(problem, goal, candidates, seconds))
        stage, left = filtered(candidates, made)
        say(f"  {stage.name}: {len(made)} compiled in the time, {stage.left} left")
        for reason, removed in stage.removed.items():
            say(f"      -{removed:<6} {reason}")
        times = expected(candidates, made)
        _say_order(times, left)
        left = [*(c for c in times if c in left), *(c for c in left if c not in times)]
        shown |= {"compiled": [row.asdict() for row in made], "stage": vars(stage), "left": list(map(str, left))}
        shown["expected_us"] = {str(candidate): round(time_us, 1) for candidate, time_us in times.items()}
    return shown


_SHOWN = 8


def _say_order(times: dict[Candidate, float], left: list[Candidate]) -> None:
    """The order in which the static model would have candidates measured."""
    order = [candidate for candidate in times if candidate in left]
    if not order:
        say("  static model: it expects nothing of these; they keep their order by count of work")
        return
    say(f"  static model: {len(order)} of {len(left)} ranked by their machine code; measured first would be")
    for candidate in order[:_SHOWN]:
        say(f"    {times[candidate]:8.1f} us expected  {candidate}")


def _predict(arguments: argparse.Namespace) -> int:
    goal = target.known(arguments.target)
    report = []
    with _store_of(arguments, there=True):
        for workload in _selected(arguments):
            problem = workload.problem()
            candidates = ranked(problem, goal, arguments.top)
            made = list(compiled(problem, goal, candidates, arguments.compile)) if arguments.compile else []
            results, times = dict(zip(candidates, made, strict=False)), expected(candidates, made)
            say(f"{workload.title} on {goal.name} ({goal.arch}), likeliest first; nothing is measured:")
            # What was compiled in the order of the static model where it has one; the rest as counted.
            candidates = [*times, *(candidate for candidate in candidates if candidate not in times)]
            rows: list[dict[str, Any]] = [{"kernel": c.kernel, "tile": c.tile.asdict()} for c in candidates]
            for candidate, row in zip(candidates, rows, strict=True):
                say(f"  {candidate}" + (f"  {times[candidate]:.1f} us expected" if candidate in times else ""))
                if candidate in results:
                    row["compiled"] = results[candidate].asdict()
            if made:
                good = [c for c in made if not c.error and not c.spill_bytes]
                say(f"  {len(made)} compiled, {len(good)} without an error or a spill")
            report.append({"workload": workload.title, "candidates": rows})
    write_json(arguments.json, {"target": goal.arch, "workloads": report})
    return 0


# ------------------------------------------------------------------------------------------------------- with a device


def _tune(arguments: argparse.Namespace) -> int:
    selected = _selected(arguments)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        if arguments.target is not None:
            say("no GPU here: nothing is measured, and nothing kept")
            arguments.top, arguments.compile = _LISTED, arguments.budget / len(selected)
            _predict(arguments)
            return 1
        raise DeviceError(
            "device: no GPU here. --target sm_90 lists the candidates that compile for one, and --device "
            "simulated:h100 goes through the motions"
        )
    start = time.monotonic()
    names = fleet.devices(arguments.device, arguments.gpus)
    labs: list[Lab] = [WorkerLab(name) for name in names]
    try:
        fleet.same_target(labs, names)
        with _store_of(arguments) as folder, store.tuning(folder, labs[0].target) as device:
            session = {name: getattr(arguments, name) for name in _SESSION_ARGUMENTS}
            store.write_text(device / _SESSION, json.dumps(session) + "\n")
            return _run(arguments, selected, labs, folder, device, start)
    except DeviceLostError as error:
        raise DeviceError(f"device: {error}; its trials are kept, `triton-conv resume` goes on") from error
    finally:
        for lab in labs:
            lab.close()


# Candidates of a workload that are listed where none can be measured.
_LISTED = 16
_SESSION_ARGUMENTS = (
    "workload", "model", "op", "gradients", "preset", "device", "gpus", "default_workload", "portfolio"
)  # fmt: skip


def _run(
    arguments: argparse.Namespace, selected: list[Workload], labs: list[Lab], folder: Path, device: Path, start: float
) -> int:
    with _interruptible() as interrupted, _shown(arguments.budget, len(selected)) as watch:
        # By the device's own clock, which of a simulated one need not be ours, since starting it counts too.
        seconds = max(0.1, arguments.budget - (time.monotonic() - start))
        outcomes = fleet.tune_all(
            selected, labs, seconds=seconds, folder=folder, device=device, most_trials=PRESETS[arguments.preset],
            portfolio=arguments.portfolio, report=say, watch=watch, stopped=lambda: bool(interrupted),
        )  # fmt: skip
    say(f"winners and trials are in {device}")
    rows = [vars(outcome) | {"gain": outcome.gain} for outcome in outcomes]
    seconds = time.monotonic() - start
    write_json(arguments.json, {"seconds": seconds, "device": labs[0].target.config_folder, "outcomes": rows})
    if interrupted:
        say("interrupted; `triton-conv resume` with the same --store goes on")
        return 130
    return 1 if not outcomes or any(outcome.error for outcome in outcomes) else 0


def _resume(arguments: argparse.Namespace) -> int:
    with _store_of(arguments) as folder:
        sessions = sorted(folder.glob(f"*/*/{_SESSION}"), key=lambda path: path.stat().st_mtime)
    if not sessions:
        raise StoreError(f"store: nothing was tuned in {folder} yet")
    try:
        session = {"gpus": None, "portfolio": False} | json.loads(sessions[-1].read_text())
        known = {name: session[name] for name in _SESSION_ARGUMENTS}
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"store: {sessions[-1]} is not readable ({error})") from error
    return _tune(argparse.Namespace(**vars(arguments) | known))


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that the first Ctrl-C fills; the second raises."""
    pressed: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        ERR.print("finishing the trial; Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _shown(seconds: float, workloads: int) -> Iterator[Any]:
    """A progress bar on a terminal, else a line every few seconds: trials, failures, seconds left."""
    trials: Counter[str] = Counter()
    start = last = time.monotonic()
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=ERR, transient=True,
        disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        task = bar.add_task("setting up", total=seconds)

        def watch(race: Race, candidate: Candidate) -> None:
            nonlocal last
            trials[race.workload.title] += 1
            now = time.monotonic()
            line = f"{counted(trials.total(), 'trial')} of {len(trials)}/{workloads} workloads; {race.standing}"
            bar.update(task, completed=now - start, description=line)
            if bar.disable and now - last > _SECONDS_BETWEEN_LINES:
                last = now
                left = max(0.0, seconds - now + start)
                ERR.print(f"{left:.0f} s left, {line}", highlight=False, markup=False, soft_wrap=True)

        yield watch


_SECONDS_BETWEEN_LINES = 5.0
