"""Rounds of several races within one budget: what is compiled and tried next, and when to stop."""

from __future__ import annotations

import heapq
import queue
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from ..aot import Compiled, Pool, WarmJob
from .lab import Lab, OutOfTimeError
from .race import Race
from .search import Candidate

Watch = Callable[[Race, Candidate], None]

# Share of the budget that is kept at most for starting a process once more before the finals.
_MOST_RESERVED = 0.25
# Nothing is begun, where it could be cut off, with less time left than so many times what such things took so far.
_AS_USUAL = 3.0
# Seconds between two looks at whether the user has had enough.
_SLICE = 0.25
SETTING_UP, TRYING, WAITING = "setting up", "trying", "waiting for the compiler"


class Rounds:
    """Rounds of all races, the first of each before the second of any and then the most promising.

    The `pool` compiles, and what is ready is tried here, one after the other. `watch` is called after each trial.
    """

    def __init__(
        self, races: Sequence[Race], lab: Lab, stop: float, pool: Pool | NoPool, watch: Watch = lambda *_: None
    ) -> None:
        self._races, self._lab, self._stop, self._pool, self._watch = races, lab, stop, pool, watch
        self.spent = dict.fromkeys((SETTING_UP, TRYING, WAITING), 0.0)
        """Seconds, by what for."""
        self._done = Counter[str]()
        self._dealt = [0] * len(races)
        self._ready: deque[tuple[int, Candidate, str]] = deque()
        # A candidate that hangs takes its process along, and the finals need one.
        self._reserve = min(lab.restart_seconds, _MOST_RESERVED * (stop - lab.now()))

    def run(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Goes on until nothing is left, the time is up or `stopped` says so."""
        for index, race in enumerate(self._races):
            if not race.portfolio:
                self._begin(index)
        while (self._ready or self._pool.waiting or self._deal_anew()) and not stopped():
            finals = sum(race.final_seconds for race in self._races)
            left = self._stop - finals - self._reserve - self._lab.lost_seconds - self._lab.now()
            if left < 0 or (self._ready and self._too_short(left, TRYING)):
                return
            try:
                if self._ready:
                    self._try(left)
                else:
                    self._take(left)
            except OutOfTimeError:
                return

    def _begin(self, index: int) -> None:
        # A race starts with a launch of the planned tile, which need not wait for the compiler then.
        self._pool.submit((index, None), self._races[index].planned_job(), (0, 0, 0, *self._place(index, -1)))

    def _deal(self, index: int) -> None:
        """Has a race's next round compiled: the first of every race, then where a second gains most."""
        race, dealt = self._races[index], self._dealt[index]
        found = race.round([leader for other in self._races if other is not race and (leader := other.leader)])
        turn = (0, 0) if dealt == 0 else (1, -round(1e3 * race.promise))
        for position, candidate in enumerate(found):
            priority = (*turn, dealt, *self._place(index, position))
            self._pool.submit((index, candidate), race.job(candidate), priority)
        self._dealt[index] += 1

    def _place(self, index: int, position: int) -> tuple[int, int]:
        # Where a round is compiled before any of it is tried, one race after the other; else all of them abreast.
        return (index, position) if self._races[index].modelled else (position, index)

    def _deal_anew(self) -> bool:
        """Where only portfolios' tiles are tried: what all the trials so far make of them; whether that is anything."""
        for index, race in enumerate(self._races):
            if race.portfolio:
                self._deal(index)
                if race.pending and not race.started:
                    self._begin(index)
        return self._pool.waiting > 0

    def _too_short(self, seconds: float, what: str) -> bool:
        """Whether what usually takes longer would be cut off, and take along the process and all that it has set up."""
        return self._lab.restart_seconds > 0 and seconds * self._done[what] < _AS_USUAL * self.spent[what]

    def _start(self, index: int, seconds: float) -> None:
        if self._too_short(seconds, SETTING_UP):
            raise OutOfTimeError
        began, race = self._lab.now(), self._races[index]
        if race.start(seconds) and not race.portfolio:
            self._deal(index)
        self.spent[SETTING_UP] += self._lab.now() - began
        self._done[SETTING_UP] += 1

    def _take(self, left: float) -> None:
        """Waits for the compiler, but not for long."""
        began = self._lab.now()
        try:
            (index, candidate), compiled = self._pool.take(min(left, _SLICE))
        except queue.Empty:
            return
        finally:
            self.spent[WAITING] += self._lab.now() - began
        if candidate is not None:
            self._ready.extend((index, *each) for each in self._races[index].compiled(candidate, compiled))
        else:
            # What has begun may use what is kept for a new process: to end it would cost more.
            self._start(index, left + self._reserve - (self._lab.now() - began))

    def _try(self, left: float) -> None:
        began = self._lab.now()
        index, candidate, error = self._ready.popleft()
        race = self._races[index]
        if not race.started:  # what it plans was the last to compile
            self._start(index, left)
            left -= self._lab.now() - began
        if race.error:
            return
        race.trial(candidate, error, left + self._reserve)
        self._watch(race, candidate)
        if race.pending == 0 and not race.portfolio:
            self._deal(index)
        self.spent[TRYING] += self._lab.now() - began
        self._done[TRYING] += 1


class NoPool:
    """Where there is nothing to compile: jobs are done in order of priority."""

    def __init__(self) -> None:
        self._jobs: list[tuple[tuple[int, ...], Any, WarmJob]] = []

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    def submit(self, key: Any, job: WarmJob, priority: tuple[int, ...]) -> None:
        heapq.heappush(self._jobs, (priority, key, job))

    def take(self, seconds: float) -> tuple[Any, Compiled]:
        _, key, job = heapq.heappop(self._jobs)
        return key, job.blank()

    def close(self) -> None:
        self._jobs.clear()
