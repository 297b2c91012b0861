"""Finding the fastest right tile of a workload on the device at hand, within a budget of seconds.

Every candidate is compared with a float64 reference before it is timed: outputs start as NaN between guard bands, so
that an element nobody wrote, or somebody should not have, is an error too. A winner replaces the analytic default
only if it beats it beyond both confidence intervals; the default is stored too where it stands, so that a slower form's
entry cannot take its place.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import ops
from ..amounts import counted
from ..aot import Pool
from ..workloads import Workload
from .cover import Cover
from .journal import Journal
from .lab import Lab
from .race import Outcome, Race
from .rounds import NoPool, Rounds, Watch
from .search import ROUND

Report = Callable[[str], None]

# Cores left to this process while the others compile.
_OWN_CORES = 2
# No tile worth having takes as long as this to compile; one that does holds up a core.
_SECONDS_PER_COMPILE = 20.0


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
    pool = Pool(cores, _SECONDS_PER_COMPILE) if lab.compiles else NoPool()
    rounds = Rounds(races, lab, stop, pool, watch)
    try:
        rounds.run(stopped)
    finally:
        pool.close()
    report("; ".join(f"{seconds:.0f} s {what}" for what, seconds in rounds.spent.items()))
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
