"""One workload's race: its trials, the final between the default and the fastest tiles, and the winner."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..aot import Compiled, WarmJob
from ..configs import Entry, portfolio_tiles
from ..defaults import default_tile
from ..dispatch import forms, plan, serving
from ..errors import ConfigError
from ..portfolio import Place, place
from ..workloads import Workload
from .cover import Cover
from .journal import Journal
from .lab import Bench, Lab, OutOfTimeError, Trial, first_line
from .measure import DeviceLostError, Timing
from .modelled import Modelled, ModelledWarmJob, known
from .search import LIKELIEST, OPENING, ROUND, Candidate, Search
from .seeds import seeds
from .store import store_entry

FINAL_ROUNDS, FINALISTS, _LEAST_GAIN = 15, 3, 0.01
# What a trial costs, about: compiling and comparing, and the runs of its own.
_TRIAL_SECONDS, _TRIAL_RUNS = 0.1, 8
# Where the static model ranks what was compiled, so many times as many are compiled as are tried.
WIDER = 2


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
    """The trials of one workload, its final, and its winner.

    It begins with what won on other problems; where `portfolio`, it tries nothing else.
    """

    def __init__(
        self,
        workload: Workload,
        lab: Lab,
        folder: Path,
        journal: Journal,
        cover: Cover,
        most_trials: float,
        per_round: int = ROUND,
        portfolio: bool = False,
    ) -> None:
        self._per_round, self._cover, self.portfolio = per_round, cover, portfolio
        self.modelled = lab.compiles and known(lab.target) and not portfolio
        """Whether the static model ranks what was compiled: a round is then compiled before any of it is tried."""
        self._best_before = math.inf
        self._compiled: dict[Candidate, str] = {}
        self.workload, self._lab = workload, lab
        self._folder, self._journal, self._most_trials = folder, journal, most_trials
        self._bench: Bench | None = None
        self._search: Search | None = None
        self.error = ""
        self._failures: Counter[str] = Counter()
        self._errors: dict[Candidate, float] = {}
        self._trials = 0
        self.pending = 0

    def start(self, seconds: float = math.inf) -> bool:
        """Sets up operands and reference; False, with a reason for the outcome, if the device cannot hold them.

        Raises `OutOfTimeError` if `seconds` were not enough.
        """
        try:
            self._bench = self._lab.open(self.workload, seconds)
        except DeviceLostError:
            raise
        except (RuntimeError, MemoryError, ValueError) as error:
            self.error = f"cannot be set up here: {first_line(error)}"
            return False
        problem, target = self._bench.problem, self._lab.target
        # The store's winners too, where nothing but what others won is tried: a tile of theirs must beat them.
        earlier = list(self._cover.table(problem).items() if self.portfolio else self._journal.known(problem))
        names = [kernel.name for kernel in forms(problem, target)[0]]
        # What nobody timed yet is for problems that others' winners were tried on already.
        likely = [Candidate(name, tile) for name in names if earlier for tile in seeds(name, problem, target)]
        others = self._cover.of(problem)
        likely += others[:LIKELIEST]
        likely += [Candidate(name, tile) for name in names for tile in portfolio_tiles(name, target)]
        wider = WIDER if self.modelled else 1
        self._search = Search(
            problem, target, self._bench.spaces(), likely, wider * self._per_round, wider * OPENING,
            self._cover.expected(problem), others[LIKELIEST:],
        )  # fmt: skip
        for candidate, trial in earlier:
            if candidate.tile.unfit(problem, target):
                # Measured before the kernel declared what rules it out.
                continue
            self._trials += 1
            if trial.failure:
                self._failures[trial.failure] += 1
                self._search.known(candidate)
            else:
                self._errors[candidate] = trial.relative_error
                self._search.known(candidate, trial.time_us)
        self._best_before = self.best_us
        return True

    @property
    def started(self) -> bool:
        """Whether operands are there, or it is known that they cannot be."""
        return self._search is not None or bool(self.error)

    @property
    def lacking(self) -> list[Candidate]:
        """What a portfolio of the other problems is still to be tried with on this one."""
        return [] if self.error else self._cover.untried(self.workload.problem())

    def planned_job(self) -> WarmJob:
        """The compilation of what a call of the workload launches now."""
        made = plan(self.workload.problem(), self._lab.target)
        return WarmJob(made.kernel.name, made.problem, made.tile, made.target)

    @property
    def leader(self) -> tuple[Place, Candidate] | None:
        """The fastest so far, and of what problem it is."""
        if self._search is None or self._bench is None or not self._search.times:
            return None
        times = self._search.times
        return place(self._bench.problem.describe()), min(times, key=lambda candidate: times[candidate])

    def round(self, others: Sequence[tuple[Place, Candidate]] = ()) -> list[Candidate]:
        """The next candidates, none that would pass the most trials of a workload; `others` lead other races."""
        if self.portfolio:
            found = [] if self._trials >= self._most_trials else self.lacking
            self.pending = len(found)
            return found
        assert self._search is not None and self._bench is not None
        here = place(self._bench.problem.describe())
        far = {number: where.distance(here) for number, (where, _) in enumerate(others)}
        near = sorted((number for number in far if far[number] < math.inf), key=lambda number: far[number])
        self._search.suggest([others[number][1] for number in near])
        found = [] if self._trials >= self._most_trials else self._search.round()
        self.pending = len(found)
        self._compiled.clear()
        return found

    def job(self, candidate: Candidate) -> WarmJob:
        make = ModelledWarmJob if self.modelled else WarmJob
        problem = self._bench.problem if self._bench else self.workload.problem()
        return make(candidate.kernel, problem, candidate.tile, self._lab.target)

    def compiled(self, candidate: Candidate, made: Compiled) -> list[tuple[Candidate, str]]:
        """What to try now that a candidate is compiled, with its error or without one: itself; or, where the static
        model ranks, nothing until the whole round is compiled, and then its best.
        """
        if not self.modelled:
            return [(candidate, made.error)]
        assert self._search is not None
        self._compiled[candidate] = made.error
        if isinstance(made, Modelled) and made.expected_us is not None:
            self._search.expect(candidate, made.expected_us)
        if len(self._compiled) < self.pending:
            return []
        failed = [each for each, error in self._compiled.items() if error]
        sound = [each for each, error in self._compiled.items() if not error]
        chosen = self._search.pick(sound, OPENING * self._search.opened or self._per_round)
        self.pending = len(failed) + len(chosen)
        return [(each, self._compiled[each]) for each in (*failed, *chosen)]

    @property
    def final_seconds(self) -> float:
        """About what the final will take: its rounds, warm-up included, of all finalists."""
        best = min(self._search.times.values(), default=0.0) if self._search else 0.0
        return (FINALISTS + 1) * (FINAL_ROUNDS + 3) * (1e-6 * best + 1e-3) if best else 0.0

    @property
    def promise(self) -> float:
        """What a second of trials may gain, in microseconds of the model's step: weight x expected gain / cost."""
        if self._search is None or not self._search.times:
            return 0.0
        gain = max(0.0, self.best_us - self._search.hope)
        return self.workload.calls * gain / (_TRIAL_SECONDS + _TRIAL_RUNS * 1e-6 * self.best_us)

    @property
    def best_us(self) -> float:
        return min(self._search.times.values(), default=math.inf) if self._search else math.inf

    @property
    def standing(self) -> str:
        """The best so far against the default, in a few words."""
        default = self._search.times.get(self._search.default, math.nan) if self._search else math.nan
        failed = f", {self._failures.total()} failed" if self._failures else ""
        return f"{self.workload.title} {self.best_us:.1f} us, default {default:.1f}{failed}"

    def trial(self, candidate: Candidate, error: str, seconds: float) -> None:
        """Judges one candidate within `seconds`, which compiled with `error` or without one, and writes it down."""
        assert self._search is not None and self._bench is not None
        self.pending -= 1
        if self._trials >= self._most_trials:
            return
        error = error or self._lab.compilation_failure(self.workload, candidate)
        if error:
            trial = Trial(failure=_compilation_failure(error))
        else:
            trial = self._bench.judge(candidate, self.best_us, seconds)
        self._trials += 1
        if trial.failure:
            self._failures[trial.failure] += 1
        else:
            self._search.times[candidate] = trial.time_us
            self._errors[candidate] = trial.relative_error
        self._journal.write(self.workload.title, self._bench.problem, candidate, trial)
        if trial.lost:
            raise DeviceLostError(f"{candidate} of {self.workload.title}: {trial.failure}")

    def finish(self, seconds: float = math.inf) -> Outcome | None:
        """The final between the default and the fastest, and the outcome; None if there was no time for a trial."""
        if self.error:
            return Outcome(self.workload.title, "", error=self.error)
        if self.portfolio and self.best_us >= self._best_before:
            return None if self.lacking else self._unchanged()
        if self._search is None or self._bench is None or self._trials == 0:
            return None
        times, default = self._search.times, self._search.default
        shown = Outcome(
            self.workload.title, default.kernel, str(default.tile), trials=self._trials, failures=dict(self._failures)
        )
        if default not in times:
            why = f"failed ({', '.join(self._failures)})" if self._failures else "was not tried in time"
            return replace(shown, error=f"the default tile {why}")
        try:
            final = self._bench.rounds(_finalists(times, default), FINAL_ROUNDS, seconds)
        except OutOfTimeError:
            return replace(shown, error="no time was left for its final; its trials are kept for `triton-conv resume`")
        except DeviceLostError as error:
            return replace(shown, error=f"lost in the final: {error}")
        best = min(final, key=lambda candidate: final[candidate].median)
        if not _beats(final[best], final[default]):
            best = default
        found = final[best].median, final[best].interval, final[default].median
        entry, failure = Entry(best.tile, *found, self._errors[best], self._trials), ""
        try:
            store_entry(self._folder, best.kernel, self._lab.target, self._bench.problem, entry)
        except (ConfigError, OSError) as error:
            failure = f"not stored: {error}"
        return Outcome(
            shown.workload, best.kernel, str(best.tile), *found, shown.trials, shown.failures, failure
        )  # fmt: skip

    def _unchanged(self) -> Outcome | None:
        """The outcome where none of the others' tiles is faster than what was known: no final is held."""
        problem, target = self.workload.problem(), self._lab.target
        table = self._cover.table(problem)
        times = {candidate: trial.time_us for candidate, trial in table.items() if not trial.failure}
        if not times:
            return None
        best = min(times, key=lambda candidate: times[candidate])
        first = serving(forms(problem, target)[0])[0].name
        default = Candidate(first, default_tile(first, problem, target))
        failures = Counter(trial.failure for trial in table.values() if trial.failure)
        return Outcome(
            self.workload.title, best.kernel, str(best.tile), times[best],
            default_time_us=times.get(default, math.nan), trials=len(table), failures=dict(failures),
        )  # fmt: skip


def _finalists(times: Mapping[Candidate, float], default: Candidate) -> list[Candidate]:
    """The default, the fastest, and the fastest of each form, which may be the faster one by what its calls need not do
    besides the launch.

    The favourite last: in a rehearsal, whose times only get shorter, it wins as it would on a device.
    """
    fastest = sorted(times, key=lambda candidate: times[candidate])
    of_forms = {candidate.kernel: candidate for candidate in reversed(fastest)}.values()
    return sorted({default, *fastest[:FINALISTS], *of_forms}, key=lambda candidate: -times[candidate])


def _compilation_failure(error: str) -> str:
    """The class of a failure to compile: the compiler's own death is one of its own."""
    if error.startswith("OutOfResources"):
        return "out of resources"
    return "compiler aborted" if "died" in error or "Aborted" in error else "compilation error"


def _beats(challenger: Timing, champion: Timing) -> bool:
    return challenger.interval[1] < champion.interval[0] * (1 - _LEAST_GAIN)
