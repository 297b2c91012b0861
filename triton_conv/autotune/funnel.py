"""What is known of a problem's candidates with no device: which fall away, why, and how the rest would rank."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..aot import Compiled, Job, compile_all
from ..dispatch import forms
from ..kernels import KERNELS, Tile
from ..problem import Problem
from ..target import Target
from .modelled import Modelled, ModelledJob, known
from .search import Candidate, Search
from .space import SPACES
from .worth import worthwhile

# Candidates compiled at a time: two a core of a small machine, a few for each of a large one.
_BATCH = 16


# What a tile must not lose to the default: a third of the threads that a multiprocessor holds.
_LEAST_OCCUPANCY = 2 / 3


@dataclass(frozen=True)
class Stage:
    """One stage of the funnel: how many of its candidates each reason removed, and how many are left."""

    name: str
    removed: dict[str, int]
    left: int


@dataclass(frozen=True)
class Funnel:
    """Candidates of one kernel: how many there are, and what each stage leaves of them."""

    kernel: str
    space: int
    stages: tuple[Stage, ...]

    @property
    def removed(self) -> dict[str, int]:
        """By reason, over all stages."""
        return {reason: count for stage in self.stages for reason, count in stage.removed.items()}

    @property
    def left(self) -> int:
        return self.stages[-1].left

    def asdict(self) -> dict[str, Any]:
        stages = [vars(stage) for stage in self.stages]
        return {
            "kernel": self.kernel,
            "space": self.space,
            "removed": self.removed,
            "left": self.left,
            "stages": stages,
        }


def funnels(problem: Problem, target: Target) -> list[Funnel]:
    """The funnel of every form that can run the problem, the preferred one first, as far as counting goes."""
    found = []
    for kernel in forms(problem, target)[0]:
        space, removed, total = SPACES[kernel.name], {name: Counter[str]() for name in _COUNTED}, 0
        for values in itertools.product(*space.values()):
            tile = KERNELS[kernel.name].tile_type(**dict(zip(space, values, strict=True)))
            total += 1
            if not worthwhile(tile, problem):
                removed["size"]["a block is more than twice as large as what it covers"] += 1
            elif reason := tile.unfit(problem, target):
                # Numbers differ from tile to tile; what kind of reason it is does not.
                removed[_stage_of(tile, problem, reason)][re.sub(r"\d+", "#", reason)] += 1
        stages, left = [], total
        for name, counts in removed.items():
            left -= counts.total()
            stages.append(Stage(name, dict(counts.most_common()), left))
        found.append(Funnel(kernel.name, total, tuple(stages)))
    return found


_COUNTED = ("size", "constraints", "shared memory", "registers, by count")


def _stage_of(tile: Tile, problem: Problem, reason: str) -> str:
    if "shared memory" in reason:
        return "shared memory"
    return "registers, by count" if "registers" in reason else "constraints"


def filtered(candidates: Sequence[Candidate], made: Sequence[Compiled]) -> tuple[Stage, list[Candidate]]:
    """What the compiler's own figures remove of ranked candidates, and those that are left, the best ranked first.

    The first candidate is the default: one that fills less than two thirds of the multiprocessor that the default fills
    is no good bet, nor is one that spills more.
    """
    removed, left = Counter[str](), []
    default = made[0] if made else None
    for candidate, row in zip(candidates, made, strict=False):
        if row.error:
            removed["it does not compile" if "died" not in row.error else "its compiler died"] += 1
        elif row.spill_bytes > (default.spill_bytes if default and not default.error else 0):
            removed["it spills registers"] += 1
        elif default and not default.error and row.occupancy < _LEAST_OCCUPANCY * default.occupancy:
            removed["it fills less than two thirds of what the default fills of a multiprocessor"] += 1
        else:
            left.append(candidate)
    return Stage("compiled: registers, spills, occupancy", dict(removed.most_common()), len(left)), left


def expected(candidates: Sequence[Candidate], made: Sequence[Compiled]) -> dict[Candidate, float]:
    """What the static model expects of compiled candidates, in microseconds, the fastest first; empty where it does not
    know the target, or could not read the code.
    """
    found = {
        candidate: row.expected_us
        for candidate, row in zip(candidates, made, strict=False)
        if isinstance(row, Modelled) and row.expected_us is not None
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))


def ranked(problem: Problem, target: Target, count: int) -> list[Candidate]:
    """The candidates that a search would try first: defaults, portfolio, and the likeliest by count of work."""
    return Search(problem, target).likely(count)


def compiled(problem: Problem, target: Target, candidates: list[Candidate], seconds: float) -> Iterator[Compiled]:
    """What the compiler makes of candidates, in their order, until the time is up; with what the static model expects
    of them where it knows the target.
    """
    stop = time.monotonic() + seconds
    make = ModelledJob if known(target) else Job
    for start in range(0, len(candidates), _BATCH):
        if start and time.monotonic() > stop:
            return
        jobs = [make(c.kernel, problem, c.tile, target) for c in candidates[start : start + _BATCH]]
        yield from (row for _, row in sorted(compile_all(jobs), key=lambda item: item[0]))
