"""What ranking by the static model is worth to the tuner: `python -m perf_plots.tuner_model --out FILE`, no GPU needed.

Replays the recorded trials as a tuning runs on that device: of every round twice as many candidates are compiled as
are tried, and those that the model expects to be fastest are tried first. Its constants were fitted on the same trials;
so it is also asked with constants that were fitted without the case.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from triton_conv.autotune.journal import candidate_of
from triton_conv.autotune.portfolio import percentile
from triton_conv.autotune.race import WIDER
from triton_conv.autotune.search import OPENING, ROUND, Candidate, Search
from triton_conv.autotune.upkeep import known_problems
from triton_conv.problem import Problem
from triton_conv.static_model.machine import MACHINES
from triton_conv.target import KNOWN, Target

from . import tuner
from .predictions import Judged, cross_validated, judge
from .record import write_json
from .trial_demands import H100, journal, read

_COUNTS = (4, 8, 16)
Expected = Mapping[str, Mapping[Candidate, float]]
"""By problem, microseconds of its candidates."""


class Ranked:
    """A search whose rounds the model narrows, as `autotune.race` does."""

    def __init__(self, search: Search, expected: Mapping[Candidate, float]) -> None:
        self._search, self._expected = search, expected
        self.times = search.times

    def round(self) -> list[Candidate]:
        given = self._search.round()
        for candidate in given:
            if candidate in self._expected:
                self._search.expect(candidate, self._expected[candidate])
        return self._search.pick(given, ROUND if self.times else OPENING)


def expectations(judged: Sequence[Judged]) -> Expected:
    """The predictions of trials, by problem and candidate."""
    rows, found = journal(H100), dict[str, dict[Candidate, float]]()
    for one in judged:
        row = rows[one.trial.line]
        if (candidate := candidate_of(row)) is not None:
            found.setdefault(str(row["problem"]), {})[candidate] = one.predicted_us
    return found


def ranked_by(expected: Expected) -> Callable[[Problem, Target, tuner.Times, int], Ranked]:
    """The strategy of a tuning with these expectations."""

    def strategy(problem: Problem, target: Target, times: tuner.Times, seed: int) -> Ranked:
        spaces = tuner.spaces(problem, target, times)
        search = Search(problem, target, spaces, (), WIDER * ROUND, WIDER * OPENING)
        return Ranked(search, expected.get(problem.describe(), {}))

    return strategy


def figures() -> dict[str, Any]:
    """Regret at so many trials, with and without the model."""
    known, target = known_problems(), KNOWN["sm_90"]
    recorded = tuner.recorded_tables(H100 / "trials.jsonl")
    times = {key: {c: t.time_us for c, t in found.items() if not t.failure} for key, found in recorded.items()}
    cases = [(known[key], target, found) for key, found in times.items()]
    trials, machine = read(), MACHINES["sm_90"]
    strategies: dict[str, tuner.Strategy] = {
        "count of work": tuner.ours,
        "static model": ranked_by(expectations(judge(trials, machine))),
        "static model, fitted without the case": ranked_by(expectations(cross_validated(trials, machine))),
    }
    return {"cases": len(cases)} | {
        name: _summary([tuner.regrets(strategy(*case, i), case[2], _COUNTS, i) for i, case in enumerate(cases)])
        for name, strategy in strategies.items()
    }


def _summary(rows: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
    """Geometric mean and 95th percentile by count of trials."""
    return {
        str(count): {
            "geomean": round(math.expm1(statistics.fmean(column)), 4),
            "p95": round(math.expm1(percentile(column, 0.95)), 4),
        }
        for count, column in zip(_COUNTS, zip(*rows, strict=True), strict=True)
    }


def main(arguments: list[str] | None = None) -> int:
    """Adds its figures to those of the tuner."""
    parser = argparse.ArgumentParser(prog="python -m perf_plots.tuner_model", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the tuner's figures are kept")
    options = parser.parse_args(arguments)
    kept: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    found = figures()
    write_json(options.out, kept | {"search, recorded trials, with the static model": found})
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
