"""How long a run may take: a share for every stage, what one leaves unused goes to those after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]


class BudgetError(ValueError):
    """The budget is not a positive number of seconds."""


@dataclass(frozen=True)
class Deadline:
    """A moment on a clock."""

    at: float
    clock: Clock = time.monotonic

    @property
    def left(self) -> float:
        """Seconds until then, never negative."""
        return max(self.at - self.clock(), 0.0)

    @property
    def passed(self) -> bool:
        return self.left == 0.0


class Budget:
    """Seconds from now on; `reserve` of them are kept for the end."""

    def __init__(self, seconds: float, reserve: float = 0.0, clock: Clock = time.monotonic) -> None:
        if not seconds > 0:
            raise BudgetError(f"the budget must be a positive number of seconds, got {seconds:g}")
        self._clock, self._start, self._work = clock, clock(), max(seconds - reserve, 0.0)
        self.end = Deadline(self._start + seconds, clock)

    def deadlines(self, shares: dict[str, float]) -> dict[str, Deadline]:
        """When each stage is to be over: cumulative, so that unused time flows on, and none of the reserve."""
        total, passed, found = sum(shares.values()), 0.0, {}
        for name, share in shares.items():
            passed += share
            found[name] = Deadline(self._start + self._work * passed / total, self._clock)
        return found
