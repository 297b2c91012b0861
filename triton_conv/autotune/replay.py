"""Measuring from a record: every trial of a journal is a cell of a table, and a run of it costs nothing.

With an exhaustive table the optimum is known, and a change of the search is scored without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..dispatch import forms
from ..errors import WorkloadError
from ..kernels import Tile
from ..problem import Problem
from ..target import Target
from ..workloads import Workload
from .journal import Table
from .lab import Trial
from .measure import Timing
from .search import Candidate
from .space import candidates

# Seconds that the record's own trials took, about: compiling, checking, timing.
_SECONDS_PER_TRIAL = 0.1


class ReplayLab:
    """Answers with what was recorded, by a clock that counts trials."""

    compiles = False
    restart_seconds = lost_seconds = 0.0

    def __init__(self, recorded: Mapping[str, Table], target: Target) -> None:
        self._tables, self._target = recorded, replace(target, vendor="replay")
        self._spent = 0.0

    @property
    def target(self) -> Target:
        return self._target

    def now(self) -> float:
        return self._spent

    def open(self, workload: Workload, seconds: float = math.inf) -> ReplayBench:
        problem = workload.problem()
        if problem.describe() not in self._tables:
            raise WorkloadError(f"workload: {workload.title} is not in the record")
        return ReplayBench(self, problem, self._tables[problem.describe()])

    def compilation_failure(self, workload: Workload, candidate: Candidate) -> str:
        return ""

    def spend(self) -> None:
        self._spent += _SECONDS_PER_TRIAL

    def close(self) -> None:
        pass


class ReplayBench:
    """One problem's table."""

    def __init__(self, lab: ReplayLab, problem: Problem, recorded: Table) -> None:
        self._lab, self._problem, self._table = lab, problem, recorded

    @property
    def problem(self) -> Problem:
        return self._problem

    def spaces(self) -> dict[str, list[Tile]]:
        found: dict[str, list[Tile]] = {}
        for kernel in forms(self._problem, self._lab.target)[0]:
            known = [candidate.tile for candidate in self._table if candidate.kernel == kernel.name]
            # In the order of the whole space, so that what stands for the default is what lies nearest to it.
            order = {t: i for i, t in enumerate(candidates(kernel.name, self._problem, self._lab.target))}
            if known:
                found[kernel.name] = sorted(known, key=lambda tile: order.get(tile, math.inf))
        return found

    def judge(self, candidate: Candidate, best_us: float, seconds: float = math.inf) -> Trial:
        self._lab.spend()
        return self._table[candidate]

    def rounds(self, candidates: Sequence[Candidate], count: int, seconds: float = math.inf) -> dict[Candidate, Timing]:
        return {c: Timing((self._table[c].time_us,) * count, measured=False) for c in candidates}
