"""Where candidates are judged: one small interface, behind which there is a device, a simulation or a recorded table.

A `Lab` opens a `Bench` for each workload; a bench checks a candidate against float64, times it, and says what became
of it. Search, budget, journal and store see nothing else, so that they are tested for real without a device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import triton

from .. import target as targets
from ..dispatch import plan
from ..errors import TritonConvError
from ..kernels import Tile
from ..problem import Problem
from ..target import Target
from ..workloads import Workload
from .measure import DeviceLostError, Timer, Timing, usable
from .search import Candidate
from .subject import OutOfBoundsError, Subject

SCREEN_ROUNDS = 3
# A candidate so many times slower than the best so far is not timed further. A single run is not enough to say so: the
# host of an H100 now and then adds 2 to 4 ms to one (some 20 of 1194 trials; a depthwise tile of 31 us once took 3861).
# More than this many microseconds it never added.
_HOPELESS, _HICCUP_US = 1.5, 10e3


@dataclass(frozen=True)
class Trial:
    """What became of one candidate: its median time in microseconds and its relative error, or the class of its
    failure. `lost` says that the device does not answer this process any more.
    """

    time_us: float = math.nan
    relative_error: float = math.nan
    failure: str = ""
    lost: bool = False


class OutOfTimeError(Exception):
    """The time for a trial was up before its own limit: nothing is known of its candidate."""


class Bench(Protocol):
    """One problem, set up on a device."""

    @property
    def problem(self) -> Problem: ...

    def spaces(self) -> Mapping[str, Sequence[Tile]] | None:
        """The tiles that can be judged here, by kernel, the default first; None for every one of the space."""
        ...

    def judge(self, candidate: Candidate, best_us: float, seconds: float = math.inf) -> Trial:
        """Checks and times a candidate; `best_us` is the best time so far, or infinite.

        Raises `OutOfTimeError` where a trial can be cut off and `seconds` were not enough; others take what they take.
        """
        ...

    def rounds(self, candidates: Sequence[Candidate], count: int, seconds: float = math.inf) -> dict[Candidate, Timing]:
        """Interleaved rounds: drift of the clocks meets all candidates alike. Of whole calls, where a trial times the
        launch alone: some forms read a weight as it is that others copy first.

        Raises `OutOfTimeError` where `seconds` were not enough to set the problem up anew.
        """
        ...


class Lab(Protocol):
    """A device to judge candidates on. `compiles` says whether candidates must be compiled for it first."""

    compiles: bool

    @property
    def target(self) -> Target: ...

    def now(self) -> float:
        """Seconds, by the clock that the budget is counted in."""
        ...

    restart_seconds: float
    """What a candidate that must be killed costs besides its own time."""

    @property
    def lost_seconds(self) -> float:
        """What it takes to set up again what such a candidate has taken along."""
        ...

    def open(self, workload: Workload, seconds: float = math.inf) -> Bench:
        """Sets up a workload.

        Raises `RuntimeError`, `MemoryError` or `ValueError` if that is impossible here, `DeviceLostError` if the device
        no longer answers, and `OutOfTimeError` where it can be cut off and `seconds` were not enough.
        """
        ...

    def compilation_failure(self, workload: Workload, candidate: Candidate) -> str:
        """Why the candidate would not compile, where the lab does not compile for real; else empty."""
        ...

    def close(self) -> None: ...


def screen(once: Callable[[], float], more: Callable[[int], Timing], best_us: float) -> float:
    """The screening time of a warm candidate: what is far off after two runs is not run again."""
    time_us = once()
    if time_us > _HOPELESS * best_us:
        if time_us - best_us < _HICCUP_US:
            time_us = min(time_us, once())
        if time_us > _HOPELESS * best_us:
            return time_us
    return more(SCREEN_ROUNDS).median


class DeviceBench:
    """A workload with real operands; the kernel runs on the device, or in the interpreter."""

    def __init__(self, workload: Workload, device: torch.device, timer: Timer) -> None:
        self._workload, self._device, self._timer = workload, device, timer
        self._subject = Subject(workload, device)

    @property
    def problem(self) -> Problem:
        return self._subject.problem

    def spaces(self) -> None:
        return None

    def judge(self, candidate: Candidate, best_us: float, seconds: float = math.inf) -> Trial:
        try:
            call = self._bind(candidate)
            error = self._subject.error(call)
            # A NaN compares as neither.
            if not error <= self._subject.tolerance:
                return Trial(relative_error=error, failure="wrong result")
            # The check has warmed it up.
            time_us = screen(
                lambda: self._timer.rounds({"": call}, 1, warmup=0)[""].median,
                lambda count: self._timer.rounds({"": call}, count, warmup=0)[""],
                best_us,
            )
            return Trial(time_us, error)
        except OutOfBoundsError:
            return Trial(failure="out-of-bounds write")
        except triton.runtime.errors.OutOfResources:
            return Trial(failure="out of resources")
        except triton.compiler.errors.CompilationError:
            return Trial(failure="compilation error")
        except Exception as error:  # Triton and its assembler raise kinds of their own; the next candidate must run
            return Trial(failure=f"failed: {first_line(error)[:60]}", lost=not usable(self._device))

    def rounds(self, candidates: Sequence[Candidate], count: int, seconds: float = math.inf) -> dict[Candidate, Timing]:
        calls = {str(candidate): self._bind(candidate, whole=True) for candidate in dict.fromkeys(candidates)}
        timings = self._timer.rounds(calls, count)
        return {candidate: timings[str(candidate)] for candidate in candidates}

    def _bind(self, candidate: Candidate, whole: bool = False) -> Callable[[], None]:
        subject = self._subject
        return subject.bind(plan(subject.problem, subject.target, candidate.kernel, candidate.tile), whole)


class DeviceLab:
    """The GPU at hand, or Triton's interpreter."""

    restart_seconds = lost_seconds = 0.0

    def __init__(self, device: torch.device, timer: Timer) -> None:
        self._device, self._timer = device, timer
        self.compiles = device.type != "cpu"

    @property
    def target(self) -> Target:
        return targets.of_device(self._device)

    def now(self) -> float:
        return time.monotonic()

    def open(self, workload: Workload, seconds: float = math.inf) -> DeviceBench:
        try:
            return DeviceBench(workload, self._device, self._timer)
        except TritonConvError:
            raise
        except RuntimeError as error:
            if usable(self._device):
                raise
            raise DeviceLostError(f"setting up {workload.title}: {first_line(error)}") from error

    def compilation_failure(self, workload: Workload, candidate: Candidate) -> str:
        return ""

    def close(self) -> None:
        pass


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
