"""Timing behind one small interface: interleaved rounds, a cold cache, medians with their intervals.

`CudaTimer` measures with CUDA events; `RehearsalTimer` goes through the same motions on a machine without a GPU, with a
fake clock, so that no line runs for the first time where time is dear. What it returns is no measurement, and says so.
"""

from __future__ import annotations

import math
import statistics
import time
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


# A head start of the device, in cycles of about half a nanosecond: at least half a millisecond, and four times what the
# host needs to queue the call (a gradient passes through Python twice, in another thread).
_HEAD_START, _CYCLES_PER_SECOND, _HOST_TIMES = 1_000_000, 2e9, 4
# Idle after a long call, as long as that was: an H100 that has just multiplied matrices for 30 ms runs a third slower.
_MOST_REST = 0.02


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
        host = dict.fromkeys(calls, 0.0)
        rest = dict(host)
        for name, call in calls.items():
            for _ in range(warmup):
                torch.cuda.synchronize()
                start = time.perf_counter()
                call()
                host[name] = time.perf_counter() - start
                torch.cuda.synchronize()
                rest[name] = min(time.perf_counter() - start, _MOST_REST)
        torch.cuda.synchronize()
        pending: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
        before = ""
        for _ in range(count):
            for name, call in calls.items():
                # The device must still be busy when the call is queued, or the events time the host's launch.
                seconds = max(_HOST_TIMES * host[name], rest.get(before, 0.0) if before != name else 0.0)
                torch.cuda._sleep(max(_HEAD_START, int(seconds * _CYCLES_PER_SECOND)))
                before = name
                start_event, stop_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self._flush.zero_()
                start_event.record()
                call()
                stop_event.record()
                pending[name].append((start_event, stop_event))
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
