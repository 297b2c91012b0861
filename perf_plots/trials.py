"""What tuning brought: the trials of a device, every tile with its time, the default among them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_conv.amounts import counted
from triton_conv.defaults import default_tile
from triton_conv.dispatch import forms, serving
from triton_conv.errors import TritonConvError
from triton_conv.target import Target
from triton_conv.workloads import Workload

from . import sound
from .record import Record
from .state import TRIALS


@dataclass(frozen=True)
class Tuned:
    """Times of the fastest tile and of the default in microseconds; None for a default that was not tried or failed."""

    best_us: float
    default_us: float | None
    trials: int

    @property
    def gain(self) -> float | None:
        """How many times faster than the default."""
        return self.default_us / self.best_us if self.default_us else None


Times = dict[str, dict[tuple[Any, ...], float]]


def read_trials(folder: Path) -> tuple[Times, list[str]]:
    """By workload the time of every tile in a device's folder, and complaints about lines that do not hold up.

    A run that is under way keeps its trials beside its folder of results.
    """
    path = next((p for p in (folder / TRIALS, folder.parent.parent / TRIALS) if p.is_file()), None)
    times: Times = {}
    if path is None:
        return times, []
    broken = 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            if "failure" not in row:
                key = _key(row["kernel"], row["tile"])
                (time_us,) = sound.samples("time_us", [row["time_us"]])
                times.setdefault(row["workload"], {})[key] = time_us
        except sound.UNREADABLE:
            broken += 1
    return times, [f"left out: no trial in {counted(broken, 'line')} of {path}"] if broken else []


def _key(kernel: str, tile: dict[str, Any]) -> tuple[Any, ...]:
    return kernel, *sorted(tile.items())


def tuned(workload: Workload, times: Times, target: Target, record: Record | None = None) -> Tuned | None:
    """The fastest trial of a workload beside the default that this code would take; None if nothing was tried.

    A trial may be a single run: where the benchmark ran a tile too, `record` has its median, and the lower one counts.
    """
    tried = dict(times.get(workload.title, {}))
    if not tried:
        return None
    if record and record.ours_us and record.plan and "tile" in record.plan:
        key = _key(record.plan["kernel"], dict(record.plan["tile"]))
        tried[key] = min(record.ours_us, tried.get(key, record.ours_us))
    return Tuned(min(tried.values()), _default_us(workload, tried, target), len(tried))


def _default_us(workload: Workload, tried: dict[tuple[Any, ...], float], target: Target) -> float | None:
    try:
        problem = workload.problem()
        for kernel in serving(forms(problem, target)[0]):
            tile = default_tile(kernel.name, problem, target)
            if tile.unfit(problem, target) is None:
                return tried.get(_key(kernel.name, tile.asdict()))
    except TritonConvError:  # this code no longer takes what was tried
        pass
    return None
