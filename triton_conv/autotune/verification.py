"""`triton-conv verify`: what a store says, and with a device whether it is still so."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..amounts import counted, seconds
from ..configs import ConfigFile, Entry
from ..defaults import default_tile
from ..errors import ConfigError, DeviceError, StoreError, WorkloadError
from ..workloads import FLAGSHIPS, LECTURES, Workload
from .console import say, write_json
from .lab import Lab, OutOfTimeError, first_line
from .measure import DeviceLostError, Timing
from .race import FINAL_ROUNDS
from .search import Candidate
from .selection import select
from .upkeep import files, folder_of
from .worker import WorkerLab

# Clocks and drivers move a time by some per cent from day to day; more than this is another time.
_DRIFT = 1.1


@dataclass(frozen=True)
class Checked:
    """A stored winner that ran again: its time and the default's, and what is wrong with it if anything is."""

    path: Path
    problem: str
    time_us: float = math.nan
    interval_us: tuple[float, float] = (math.nan, math.nan)
    default_time_us: float = math.nan
    stored_time_us: float = math.nan
    complaint: str = ""
    skipped: str = ""


def add_to(command: Any) -> None:
    """Adds the command by means of the function that adds one."""
    parser = command("verify", verify, "check every file of a store; with a device, run its winners again")
    parser.add_argument(
        "--device", metavar="NAME", help="cuda, cuda:N or simulated:h100 (default: a GPU, if there is one)"
    )
    parser.add_argument(
        "--budget", type=seconds, default=math.inf, metavar="SECONDS", help="time for running them again"
    )
    parser.add_argument("--workload", metavar="NAME", help="where stored problems come from besides: a .json file")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="or this function, a step of a model")


def verify(arguments: argparse.Namespace) -> int:
    """Runs the command; 1 if anything is wrong."""
    folder = folder_of(arguments)
    found = list(files(folder))
    if not found:
        raise StoreError(f"store: there is no file of tiles in {folder}")
    complaints = [complaint for path, file in found for complaint in complaints_of(path, file)]
    rows: list[Checked] = []
    device = arguments.device or ("cuda" if torch.cuda.is_available() else None)
    if device is None:
        say("no GPU here: no time was checked (--device simulated:h100 runs what was tuned on one)")
    else:
        rows = measured(arguments, folder, device)
        complaints += [f"{row.path}: {row.problem}: {row.complaint}" for row in rows if row.complaint]
    for line in complaints:
        say(line)
    ran = [row for row in rows if not row.skipped]
    for row in rows:
        if row.skipped:
            say(f"not run: {row.problem}: {row.skipped}")
    if device is not None:
        say(f"{len(ran)} of {len(rows)} winners of this device ran again")
    say(f"{counted(len(found), 'file')}, {counted(len(complaints), 'complaint')}")
    shown = [vars(row) | {"path": str(row.path)} for row in rows]
    write_json(arguments.json, {"files": len(found), "complaints": complaints, "device": device, "entries": shown})
    return 1 if complaints else 0


def complaints_of(path: Path, file: ConfigFile | ConfigError) -> Iterator[str]:
    """What is wrong with a file as it stands."""
    if isinstance(file, ConfigError):
        yield str(file)
        return
    for key, entry in file.entries.items():
        low, high = entry.interval_us
        if not 0 < low <= entry.time_us <= high:
            yield f"{path}: {key}: {entry.time_us:g} us lies outside its interval [{low:g}, {high:g}]"
        if not entry.relative_error < 0.1:
            yield f"{path}: {key}: relative error {entry.relative_error:g}"


def measured(arguments: argparse.Namespace, folder: Path, device: str) -> list[Checked]:
    """Every stored winner of the device, run again beside the default of today; those of other devices are left out."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(f"device: {device}: no GPU here; without --device the files alone are checked")
    if not arguments.budget > 0:
        raise WorkloadError(f"budget: expected a positive number of seconds, got {arguments.budget:g}")
    stop, known = time.monotonic() + arguments.budget, known_workloads(arguments, folder)
    lab, rows = WorkerLab(device), []
    try:
        mine = lab.target.config_folder
        for path, file in files(folder):
            if isinstance(file, ConfigError) or file.target.config_folder != mine:
                continue
            for key, entry in sorted(file.entries.items()):
                left = stop - time.monotonic()
                if key not in known:
                    why = "no workload known here has this problem; --workload FILE or --model names more"
                    rows.append(Checked(path, key, skipped=why))
                elif left < 0:
                    rows.append(Checked(path, key, skipped="out of time"))
                else:
                    rows.append(_run(lab, path, key, file.kernel, entry, known[key], left))
    except DeviceLostError as error:
        raise DeviceError(f"device: {error}") from error
    finally:
        lab.close()
    if not rows:
        raise StoreError(f"store: nothing in {folder} was measured on this device ({mine})")
    return rows


def known_workloads(arguments: argparse.Namespace, folder: Path) -> dict[str, Workload]:
    """Workloads by the description of their problem: those that come with the package, those of the command, and those
    that the store was last tuned for.
    """
    every = [part for workload in FLAGSHIPS + LECTURES for part in workload.parts()]
    selections = [(arguments.workload, arguments.model)] if arguments.workload or arguments.model else []
    for path in folder.glob("*/*/session.json"):
        try:
            session = json.loads(path.read_text())
            selections.append((session["workload"], session["model"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    for number, (name, model) in enumerate(selections):
        try:
            every += select(name, model, None, gradients=model is None)
        except WorkloadError:
            # The model of a session may be gone; what the command names must be there.
            if number == 0 and (arguments.workload or arguments.model):
                raise
    return {workload.problem().describe(): workload for workload in reversed(every)}


def _run(lab: Lab, path: Path, key: str, kernel: str, entry: Entry, workload: Workload, seconds: float) -> Checked:
    row = Checked(path, key, stored_time_us=entry.time_us)
    try:
        bench = lab.open(workload, seconds)
        winner = Candidate(kernel, entry.tile)
        default = Candidate(kernel, default_tile(kernel, bench.problem, lab.target))
        trial = bench.judge(winner, math.inf, seconds)
        if trial.failure:
            return _with(row, complaint=f"its tile fails now: {trial.failure} ({entry.tile})")
        timings = bench.rounds(list(dict.fromkeys((default, winner))), FINAL_ROUNDS, seconds)
    except OutOfTimeError:
        return _with(row, skipped="out of time")
    except DeviceLostError as error:
        return _with(row, complaint=f"lost while it ran again: {error}")
    except (RuntimeError, MemoryError, ValueError) as error:
        return _with(row, skipped=f"cannot be set up here: {first_line(error)}")
    now, other = timings[winner], timings[default]
    row = _with(row, time_us=now.median, interval_us=now.interval, default_time_us=other.median)
    return _with(row, complaint=_judgement(entry, now, other))


def _judgement(entry: Entry, now: Timing, default: Timing) -> str:
    shown = f"{now.median:.1f} us [{now.interval[0]:.1f}, {now.interval[1]:.1f}]"
    if now.interval[0] > default.interval[1]:
        return f"slower than the default: {shown} against {default.median:.1f} us; tune it again"
    if now.interval[0] > _DRIFT * entry.interval_us[1]:
        return f"stale: {shown} now, {entry.time_us:.1f} us when it was stored"
    return ""


def _with(row: Checked, **changes: Any) -> Checked:
    return Checked(**vars(row) | changes)
