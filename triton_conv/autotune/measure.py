"""Timing behind one small interface: interleaved rounds, a cold cache, medians with their intervals.

`CudaTimer` measures with CUDA events; `RehearsalTimer` goes through the same motions on a machine without a GPU, with a
fake clock, so that no line runs for the first time where time is dear. What it returns is no measurement, and says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """All samples of one contestant, in microseconds, in the order they were taken."""

    samples: tuple[float, ...]
    measured: bool = True

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the median, from order statistics; the whole range below six samples."""
        ordered, n = sorted(self.samples), len(self.samples)
        if n < 6:
            return ordered[0], ordered[-1]
        # The median's rank is binomial(n, 1/2): 0.98 sqrt(n) is 1.96 of its standard deviations.
        below = math.floor(n / 2 - 0.98 * math.sqrt(n))
        return ordered[max(below, 0)], ordered[min(n - 1 - below, n - 1)]


# Device cycles, about half a millisecond: several times what the host needs to queue a flush and a call.
_HEAD_START = 1_000_000


class DeviceLostError(RuntimeError):
    """The device no longer answers this process, as after an illegal access: a new process must go on."""


def usable(device: torch.device) -> bool:
    """Whether the device still answers: after an illegal access every further call of this process fails."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        return True
    except RuntimeError:
        return False


class Timer(Protocol):
    """Measures contestants in turn."""

    measured: bool

    def rounds(self, calls: Mapping[str, Call], count: int, warmup: int = 3) -> dict[str, Timing]:
        """Times every call once a round, `count` rounds after `warmup` untimed runs; the samples by name."""
        ...


class CudaTimer:
    """CUDA events around single calls; the L2 cache is overwritten, outside the timed region, before each."""

    measured = True

    def __init__(self, device: torch.device | str = "cuda") -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
        self._flush = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def rounds(self, calls: Mapping[str, Call], count: int, warmup: int = 3) -> dict[str, Timing]:
        for call in calls.values():
            for _ in range(warmup):
                call()
        torch.cuda.synchronize()
        pending: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
        for _ in range(count):
            for name, call in calls.items():
                # The device must still be busy when the call is queued, or the events time the host's launch.
                torch.cuda._sleep(_HEAD_START)
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self._flush.zero_()
                start.record()
                call()
                stop.record()
                pending[name].append((start, stop))
            torch.cuda.synchronize()
        return {name: Timing(tuple(1e3 * a.elapsed_time(b) for a, b in events)) for name, events in pending.items()}


class RehearsalTimer:
    """Runs every call once, and answers with made-up times: each contestant looks faster than the one before it."""

    measured = False

    def __init__(self) -> None:
        self._calls = 0

    def rounds(self, calls: Mapping[str, Call], count: int, warmup: int = 3) -> dict[str, Timing]:
        timings = {}
        for name, call in calls.items():
            call()
            self._calls += 1
            time = 1e3 * 0.97 ** (self._calls % 100)
            timings[name] = Timing(tuple(time * (1 + i % 3 / 1e4) for i in range(count)), measured=False)
        return timings
