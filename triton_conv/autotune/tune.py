"""Finding the fastest right tile of a workload on the device at hand, within a budget of seconds.

Every candidate is compared with a float64 reference before it is timed: outputs start as NaN between guard bands, so
that an element nobody wrote, or somebody should not have, is an error too. A winner replaces the analytic default
only if it beats it beyond both confidence intervals; the default is stored too where it stands, so that a slower form's
entry cannot take its place.
"""

from __future__ import annotations

import heapq
import math
import os
import queue
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import ops
from ..amounts import counted
from ..aot import Compiled, Pool, WarmJob
from ..workloads import Workload
from .cover import Cover
from .journal import Journal
from .lab import Lab, OutOfTimeError
from .race import Outcome, Race
from .search import ROUND, Candidate

Report = Callable[[str], None]
Watch = Callable[[Race, Candidate], None]

# Cores left to this process while the others compile.
_OWN_CORES = 2
# No tile worth having takes as long as this to compile; one that does holds up a core.
_SECONDS_PER_COMPILE = 20.0
# Share of the budget that is kept at most for starting a process once more before the finals.
_MOST_RESERVED = 0.25
# Nothing is begun, where it could be cut off, with less time left than so many times what such things took so far.
_AS_USUAL = 3.0
# Seconds between two looks at whether the user has had enough.
_SLICE = 0.25


def tune(
    workloads: Sequence[Workload],
    *,
    seconds: float,
    lab: Lab,
    folder: Path,
    journal: Path | None = None,
    known: Sequence[Path] = (),
    compilers: int | None = None,
    most_trials: float = math.inf,
    portfolio: bool = False,
    report: Report = print,
    watch: Watch = lambda race, candidate: None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Outcome]:
    """Tunes each workload, all within `seconds`; winners are written to `folder` at the end.

    On a GPU every core compiles, or `compilers` of them, round by round, while this process tries what is ready. Each
    trial is a line of the file `journal`; those in the files `known` are not repeated either. `watch` is called after
    each trial; the search ends early when `stopped` says so. With `portfolio` each workload is tried with the tiles
    that a portfolio of the other problems has, and no others: what judging portfolios takes.
    """
    stop = lab.now() + seconds
    trials = Journal(journal, lab.target, known)
    cores = compilers or max(1, len(os.sched_getaffinity(0)) - _OWN_CORES)
    # No core that could compile waits for the trials of a round.
    per_round = max(ROUND, -(-cores // max(len(workloads), 1))) if lab.compiles else ROUND
    cover = Cover(lab.target, trials)
    races = [Race(each, lab, folder, trials, cover, most_trials, per_round, portfolio) for each in workloads]
    pool = Pool(cores, _SECONDS_PER_COMPILE) if lab.compiles else _NoPool()
    spent = dict.fromkeys(("setting up", "trying", "waiting for the compiler"), 0.0)
    try:
        _run(races, lab, stop, pool, spent, watch, stopped)
    finally:
        pool.close()
    report("; ".join(f"{seconds:.0f} s {what}" for what, seconds in spent.items()))
    outcomes = []
    for race in races:
        if (outcome := race.finish(max(0.0, stop - lab.now()))) is not None:
            outcomes.append(outcome)
            report(describe(outcome))
    if portfolio:
        done = sum(not race.lacking for race in races)
        report(f"{done} of {len(races)} workloads tried with every tile of a portfolio of the others")
    if left := len(races) - len(outcomes):
        report(f"out of time: {counted(left, 'workload')} not tuned")
    ops.forget_plans()
    return outcomes


def _run(
    races: list[Race],
    lab: Lab,
    stop: float,
    pool: Pool | _NoPool,
    spent: dict[str, float],
    watch: Watch,
    stopped: Callable[[], bool],
) -> None:
    """Rounds of all races, the first of each before the second of any and then the most promising, until nothing is
    left or the time is up.
    """
    rounds = [0] * len(races)

    def place(index: int, position: int) -> tuple[int, int]:
        # Where a round is compiled before any of it is tried, one race after the other; else all of them abreast.
        return (index, position) if races[index].modelled else (position, index)

    reserve = min(lab.restart_seconds, _MOST_RESERVED * (stop - lab.now()))

    def deal(index: int) -> None:
        leaders = [race.leader for race in races if race is not races[index]]
        found = races[index].round([leader for leader in leaders if leader])
        # The first of every race before the second of any; then where a second gains most.
        turn = (0, 0) if rounds[index] == 0 else (1, -round(1e3 * races[index].promise))
        for position, candidate in enumerate(found):
            pool.submit(
                (index, candidate), races[index].job(candidate), (*turn, rounds[index], *place(index, position))
            )
        rounds[index] += 1

    def begin(index: int) -> None:
        # A race starts with a launch of the planned tile, which need not wait for the compiler then.
        pool.submit((index, None), races[index].planned_job(), (0, 0, 0, *place(index, -1)))

    def deal_anew() -> bool:
        """Where only portfolios' tiles are tried: what all the trials so far make of them; whether that is anything."""
        for index, race in enumerate(races):
            if race.portfolio:
                deal(index)
                if race.pending and not race.started:
                    begin(index)
        return pool.waiting > 0

    done = Counter[str]()

    def too_short(seconds: float, what: str) -> bool:
        """Whether what usually takes longer would be cut off, and take along the process and all that it has set up."""
        return lab.restart_seconds > 0 and seconds * done[what] < _AS_USUAL * spent[what]

    def start_race(index: int, seconds: float) -> None:
        if too_short(seconds, "setting up"):
            raise OutOfTimeError
        began = lab.now()
        if races[index].start(seconds) and not races[index].portfolio:
            deal(index)
        spent["setting up"] += lab.now() - began
        done["setting up"] += 1

    ready: deque[tuple[int, Candidate, str]] = deque()
    for index, race in enumerate(races):
        if not race.portfolio:
            begin(index)
    while (ready or pool.waiting or deal_anew()) and not stopped():
        # A candidate that hangs takes its process along, and the finals need one. What has begun may use what is kept
        # for that: to end it would cost more.
        left = stop - sum(race.final_seconds for race in races) - reserve - lab.lost_seconds - lab.now()
        if left < 0 or (ready and too_short(left, "trying")):
            return
        start = lab.now()
        if not ready:
            try:
                (index, candidate), compiled = pool.take(min(left, _SLICE))
            except queue.Empty:
                continue
            finally:
                spent["waiting for the compiler"] += lab.now() - start
            if candidate is not None:
                ready.extend((index, *each) for each in races[index].compiled(candidate, compiled))
                continue
            try:
                start_race(index, left + reserve - (lab.now() - start))
            except OutOfTimeError:
                return
            continue
        index, candidate, error = ready.popleft()
        race = races[index]
        try:
            if not race.started:  # what it plans was the last to compile
                start_race(index, left)
                left -= lab.now() - start
            if race.error:
                continue
            race.trial(candidate, error, left + reserve)
        except OutOfTimeError:
            return
        watch(race, candidate)
        if race.pending == 0 and not race.portfolio:
            deal(index)
        spent["trying"] += lab.now() - start
        done["trying"] += 1


class _NoPool:
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


def describe(outcome: Outcome) -> str:
    """One line."""
    if outcome.error:
        return f"{outcome.workload}: {outcome.error}"
    low, high = outcome.interval_us
    interval = "" if math.isnan(low) else f" [{low:.1f}, {high:.1f}]"
    failures = "".join(f", {count} {kind}" for kind, count in sorted(outcome.failures.items()))
    return (
        f"{outcome.workload}: {outcome.time_us:.1f} us{interval}, "
        f"{outcome.gain:.2f}x the default, {counted(outcome.trials, 'tile')} tried{failures}; "
        f"{outcome.kernel} {outcome.tile}"
    )
