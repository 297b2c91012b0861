"""The commands for what was stored: report, merge, promote; `verification` has verify."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import comparisons, configs
from ..amounts import counted
from ..configs import ConfigFile
from ..defaults import default_tile
from ..errors import ConfigError, StoreError
from ..kernels import KERNELS
from ..problem import Problem
from ..target import KNOWN, Target
from ..workloads import FLAGSHIPS
from . import journal, store
from .console import OUT, say, write_json
from .console import Table as Grid
from .journal import Table, read_trials, tables
from .lab import Trial
from .portfolio import build, passed_over, won
from .search import Candidate

# What no real device measured is not for real devices.
_NOT_SHIPPED = ("simulated", "replay", "interpreter")


def add_to(commands: Any, command: Any) -> None:
    """Adds the commands to the parser's."""
    command(commands, "report", _report, "show what tuning gained, losses too")
    merge = command(commands, "merge", _merge, "put the winners and trials of other stores into one")
    merge.add_argument("source", nargs="+", type=Path, metavar="DIR", help="stores to take from")
    promote = command(commands, "promote", _promote, "copy a store's winners to where they ship, with portfolios")
    promote.add_argument("--into", type=Path, metavar="DIR", help="default: the package's autotune_configs")
    promote.add_argument("--trials", type=Path, action="append", default=[], metavar="FILE", help="further journals")


def folder_of(arguments: argparse.Namespace) -> Path:
    """The store that a command works on; raises `StoreError` if there is none."""
    folder: Path = arguments.store or configs.user_folder()
    if not folder.is_dir():
        raise StoreError(f"store: there is no folder {folder}")
    return folder


def load(path: Path) -> ConfigFile:
    """One file of a store, whatever device it is of; raises `ConfigError`."""
    if path.stem not in KERNELS:
        raise ConfigError(f"{path}: there is no kernel {path.stem!r}")
    try:
        device = json.loads(path.read_text())["device"]
        sheet = KNOWN.get(device["arch"])
        target = Target(
            device["vendor"], device["arch"], device["name"], device["sms"], device["shared_bytes"],
            warp_size=sheet.warp_size if sheet else 32,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a readable file of tile configurations ({error})") from error
    if not path.parent.match(target.config_folder):
        raise ConfigError(f"{path}: measured on {target.config_folder}, in another device's folder")
    return configs.read(path, KERNELS[path.stem], target)


def files(folder: Path) -> Iterator[tuple[Path, ConfigFile | ConfigError]]:
    """Every kernel's file of every device, or what is wrong with it."""
    for path in sorted(folder.glob("*/*/*.json")):
        if path.stem == "session" or path.name == comparisons.FILE:
            continue
        try:
            yield path, load(path)
        except ConfigError as error:
            yield path, error


def _good(folder: Path) -> list[ConfigFile]:
    """The files of a store; raises the first complaint."""
    found = []
    for _, file in files(folder):
        if isinstance(file, ConfigError):
            raise file
        found.append(file)
    return found


# ------------------------------------------------------------------------------------------------------ report


def _report(arguments: argparse.Namespace) -> int:
    grid = Grid(box=None, header_style="bold")
    for column in ("device", "kernel", "problem"):
        grid.add_column(column)
    for column in ("us", "interval", "default", "gain", "trials"):
        grid.add_column(column, justify="right", no_wrap=True)
    rows: list[dict[str, Any]] = []
    for file in _good(folder_of(arguments)):
        for key, entry in sorted(file.entries.items()):
            low, high = entry.interval_us
            gains = [entry.default_time_us / time for time in (high, entry.time_us, low)]
            shown = f"{gains[1]:.2f}x [{gains[0]:.2f}, {gains[2]:.2f}]" if min(low, entry.time_us) > 0 else "?"
            device = file.target.config_folder
            grid.add_row(
                device, file.kernel, key, f"{entry.time_us:.1f}", f"[{low:.1f}, {high:.1f}]",
                f"{entry.default_time_us:.1f}", shown, str(entry.trials),
            )  # fmt: skip
            rows.append({"device": device, "kernel": file.kernel, "problem": key, "time_us": entry.time_us,
                         "interval_us": [low, high], "default_time_us": entry.default_time_us, "gain": gains[1],
                         "trials": entry.trials})  # fmt: skip
    OUT.print(grid)
    losses = sum(row["gain"] < 1 for row in rows)
    say(f"{counted(len(rows), 'problem')}, {losses} slower than the default")
    write_json(arguments.json, {"entries": rows})
    return 0


# ------------------------------------------------------------------------------------------------------ merge, promote


def _merge(arguments: argparse.Namespace) -> int:
    folder = arguments.store or configs.user_folder()
    sources = [(source, _good(folder_of(argparse.Namespace(store=source)))) for source in arguments.source]
    taken = trials = 0
    for source, found in sources:
        for file in found:
            with store.tuning(folder, file.target):
                taken += store.merge_file(folder, file)
        for path in sorted(source.glob(f"*/*/{journal.NAME}")):
            read_trials(path)
            trials += journal.append(path, folder / path.relative_to(source))
    say(f"{counted(taken, 'winner')} and {counted(trials, 'trial')} merged into {folder}")
    write_json(arguments.json, {"winners": taken, "trials": trials})
    return 0


def _promote(arguments: argparse.Namespace) -> int:
    folder, goal = folder_of(arguments), arguments.into or configs.shipped_folder()
    found = _good(folder)
    for file in found:
        if file.target.vendor in _NOT_SHIPPED:
            raise StoreError(f"store: {folder} was not measured on a device but {file.target.vendor}")
    if not found:
        raise StoreError(f"store: nothing to promote in {folder}")
    for file in found:
        store.merge_file(goal, file)
    report = {}
    for device in sorted({file.target.config_folder for file in found}):
        own = folder / device / journal.NAME
        rows = [row for path in ([own] if own.is_file() else []) + arguments.trials for row in read_trials(path)]
        target = next(file.target for file in found if file.target.config_folder == device)
        report[device] = add_portfolios(goal, target, tables(rows))
        for kernel, regret in report[device].items():
            say(f"{device} {kernel}: {regret}")
    say(f"{counted(sum(len(file.entries) for file in found), 'winner')} promoted to {goal}")
    write_json(arguments.json, {"portfolios": report})
    return 0


def add_portfolios(folder: Path, target: Target, recorded: dict[str, Table]) -> dict[str, Any]:
    """Writes a portfolio into each kernel's file where one beats the analytic default, and says what it is worth."""
    problems = known_problems()
    report: dict[str, Any] = {}
    every = [file for _, file in files(folder) if isinstance(file, ConfigFile)]
    mine = {file.kernel: file for file in every if file.target.config_folder == target.config_folder}
    for kernel, costs in won(fitting(corrected(recorded, mine), problems, target)).items():
        defaults = {key: default_tile(kernel, problems[key], target) for key in costs if key in problems}
        made = build(costs, defaults, passed_over(kernel, problems, target))
        report[kernel] = dict(made.regret) | {"radius": made.radius} if made else "the analytic default answers"
        if made and kernel in mine:
            mine[kernel].portfolio = made
            mine[kernel].write(folder)
    return report


def fitting(recorded: Mapping[str, Table], problems: Mapping[str, Problem], target: Target) -> dict[str, Table]:
    """The trials of tiles that their kernels still take."""
    return {
        key: {c: trial for c, trial in table.items() if key not in problems or not c.tile.unfit(problems[key], target)}
        for key, table in recorded.items()
    }


def known_problems() -> dict[str, Problem]:
    """The problems of the flagships and their gradients, by description."""
    problems = [part.problem() for workload in FLAGSHIPS for part in workload.parts()]
    return {problem.describe(): problem for problem in problems}


def corrected(recorded: dict[str, Table], files: dict[str, ConfigFile]) -> dict[str, Table]:
    """Trials with the times of the finals in place of the screening's: more rounds, and no hiccup of the host."""
    for kernel, file in files.items():
        for key, entry in file.entries.items():
            trial = Trial(entry.time_us, entry.relative_error)
            recorded.setdefault(key, {})[Candidate(kernel, entry.tile)] = trial
    return recorded
