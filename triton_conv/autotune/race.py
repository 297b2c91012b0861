"""One workload's race: its trials, the final between the default and the fastest tile, and the winner."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import triton

from .. import target as targets
from ..aot import WarmJob
from ..configs import ConfigFile, Entry, kernel_hash, read
from ..dispatch import plan
from ..errors import ConfigError, StaleConfigError
from ..kernels import KERNELS
from ..workloads import Workload
from .measure import DeviceLostError, Timer, Timing, usable
from .search import Candidate, Search
from .subject import Subject

_SCREEN_ROUNDS, _FINAL_ROUNDS, _LEAST_GAIN = 3, 15, 0.01
# A single run so many times slower than the best so far is enough to judge by.
_HOPELESS = 1.5


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


class Race:
    """The trials of one subject, its final, and its winner."""

    def __init__(
        self, workload: Workload, device: torch.device, timer: Timer, folder: Path, journal: Path | None
    ) -> None:
        self._workload, self._device, self._timer = workload, device, timer
        self._folder, self._journal = folder, journal
        self._subject: Subject | None = None
        self._search: Search | None = None
        self._error = ""
        self._failures: Counter[str] = Counter()
        self._errors: dict[Candidate, float] = {}
        self._trials = 0
        self.pending = 0

    def start(self) -> bool:
        """Sets up operands and reference; False, with a reason for the outcome, if the device cannot hold them."""
        try:
            self._subject = Subject(self._workload, self._device)
        except (RuntimeError, MemoryError, ValueError) as error:
            if not usable(self._device):
                raise DeviceLostError(f"setting up {self._workload.title}: {_first_line(error)}") from error
            self._error = f"cannot be set up here: {_first_line(error)}"
            return False
        self._search = Search(self._subject.problem, self._subject.target)
        self._resume(self._search)
        return True

    def _resume(self, search: Search) -> None:
        """Takes over what earlier runs wrote in the journal of the same problem and the same kernel code."""
        if self._journal is None or not self._journal.is_file():
            return
        assert self._subject is not None
        problem = self._subject.problem.describe()
        for line in self._journal.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a process that was killed
                continue
            name = row["kernel"]
            if row["problem"] != problem or name not in KERNELS or row["kernel_hash"] != kernel_hash(name):
                continue
            try:
                candidate = Candidate(name, KERNELS[name].tile_type(**row["tile"]))
            except (TypeError, ConfigError):  # of a tile that had other parameters
                continue
            self._trials += 1
            if "failure" in row:
                self._failures[row["failure"]] += 1
                search.known(candidate)
            else:
                self._errors[candidate] = row["relative_error"]
                search.known(candidate, row["time_us"])

    def planned_job(self) -> WarmJob:
        """The compilation of what a call of the workload launches now."""
        made = plan(self._workload.problem(), targets.of_device(self._device))
        return WarmJob(made.kernel.name, made.problem, made.tile, made.target)

    def round(self) -> list[Candidate]:
        assert self._search is not None
        found = self._search.round()
        self.pending = len(found)
        return found

    def job(self, candidate: Candidate) -> WarmJob:
        assert self._subject is not None
        return WarmJob(candidate.kernel, self._subject.problem, candidate.tile, self._subject.target)

    @property
    def final_seconds(self) -> float:
        """About what the final will take: its rounds, warm-up included, of two candidates."""
        best = min(self._search.times.values(), default=0.0) if self._search else 0.0
        return 2 * (_FINAL_ROUNDS + 3) * (1e-6 * best + 1e-3) if best else 0.0

    def trial(self, candidate: Candidate, error: str) -> None:
        """Checks and times one candidate, which compiled with `error` or without one."""
        assert self._search is not None
        self.pending -= 1
        self._trials += 1
        outcome = _compilation_failure(error) if error else self._measured(candidate)
        if isinstance(outcome, str):
            self._failures[outcome] += 1
        else:
            self._search.times[candidate] = outcome
        self._write(candidate, outcome)

    def _measured(self, candidate: Candidate) -> float | str:
        """Median time of a candidate in microseconds, or the class of its failure."""
        assert self._subject is not None and self._search is not None
        try:
            call = self._bind(candidate)
            self._errors[candidate] = self._subject.error(call)
            if self._errors[candidate] > self._subject.tolerance:
                return "wrong result"
            # The check has warmed it up. What is far off after one run is not run again.
            time_us = self._timer.rounds({"": call}, 1, warmup=0)[""].median
            if time_us > _HOPELESS * min(self._search.times.values(), default=math.inf):
                return time_us
            return self._timer.rounds({"": call}, _SCREEN_ROUNDS, warmup=0)[""].median
        except triton.runtime.errors.OutOfResources:
            return "out of resources"
        except triton.compiler.errors.CompilationError:
            return "compilation error"
        except RuntimeError as error:
            failure = f"failed: {_first_line(error)[:60]}"
            if not usable(self._device):
                self._write(candidate, failure)
                raise DeviceLostError(f"{candidate} of {self._workload.title}: {failure}") from error
            return failure

    def _bind(self, candidate: Candidate) -> Callable[[], None]:
        assert self._subject is not None
        subject = self._subject
        return subject.bind(plan(subject.problem, subject.target, candidate.kernel, candidate.tile))

    def _write(self, candidate: Candidate, outcome: float | str) -> None:
        if self._journal is None:
            return
        assert self._subject is not None
        line: dict[str, object] = {
            "workload": self._workload.title,
            "problem": self._subject.problem.describe(),
            "kernel": candidate.kernel,
            "kernel_hash": kernel_hash(candidate.kernel),
            "tile": candidate.tile.asdict(),
        }
        if isinstance(outcome, float):
            line |= {"time_us": outcome, "relative_error": self._errors[candidate]}
        else:
            line |= {"failure": outcome}
        with self._journal.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self) -> Outcome | None:
        """The final between the default and the fastest, and the outcome; None if there was no time for a trial."""
        if self._error:
            return Outcome(self._workload.title, "", error=self._error)
        if self._search is None or self._subject is None or self._trials == 0:
            return None
        times, default = self._search.times, self._search.defaults[0]
        shown = Outcome(
            self._workload.title, default.kernel, str(default.tile), trials=self._trials, failures=dict(self._failures)
        )
        if default not in times:
            return replace(shown, error=f"the default tile failed ({', '.join(self._failures)})")
        best = min(times, key=lambda candidate: times[candidate])
        final = self._final([default, best])
        if not _beats(final[best], final[default]):
            best = default
        outcome = replace(
            shown,
            kernel=best.kernel,
            tile=str(best.tile),
            time_us=final[best].median,
            interval_us=final[best].interval,
            default_time_us=final[default].median,
        )
        try:
            _store(self._subject, best, outcome, self._errors[best], self._folder)
        except (ConfigError, OSError) as error:
            return replace(outcome, error=f"not stored: {error}")
        return outcome

    def _final(self, candidates: list[Candidate]) -> dict[Candidate, Timing]:
        """Interleaved rounds: drift of the clocks meets all of them alike."""
        calls = {str(candidate): self._bind(candidate) for candidate in dict.fromkeys(candidates)}
        timings = self._timer.rounds(calls, _FINAL_ROUNDS)
        return {candidate: timings[str(candidate)] for candidate in candidates}


def _compilation_failure(error: str) -> str:
    return "out of resources" if error.startswith("OutOfResources") else "compilation error"


def _beats(challenger: Timing, champion: Timing) -> bool:
    return challenger.interval[1] < champion.interval[0] * (1 - _LEAST_GAIN)


def _store(subject: Subject, best: Candidate, outcome: Outcome, error: float, folder: Path) -> None:
    file = ConfigFile(best.kernel, subject.target)
    path = file.path(folder)
    if path.is_file():
        # Winners of older kernel code are of no more use; a broken or foreign file is its owner's to move away.
        with contextlib.suppress(StaleConfigError):
            file = read(path, KERNELS[best.kernel], subject.target)
    file.environment = environment()
    file.entries[subject.problem.describe()] = Entry(
        best.tile, outcome.time_us, outcome.interval_us, outcome.default_time_us, error, outcome.trials
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
