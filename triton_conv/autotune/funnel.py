"""What is known of a problem's candidates with no device: which fall away, why, and how the rest would rank."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ..aot import Compiled, Job, compile_all
from ..dispatch import forms
from ..kernels import KERNELS
from ..problem import Problem
from ..target import Target
from .search import Candidate, Search
from .space import SPACES, worthwhile

# Candidates compiled at a time: two a core of a small machine, a few for each of a large one.
_BATCH = 16


@dataclass(frozen=True)
class Funnel:
    """Candidates of one kernel: how many there are, how many each reason removed, how many are left."""

    kernel: str
    space: int
    removed: dict[str, int]
    left: int


def funnels(problem: Problem, target: Target) -> list[Funnel]:
    """The funnel of every form that can run the problem, the preferred one first."""
    found = []
    for kernel in forms(problem, target)[0]:
        space, removed, left, total = SPACES[kernel.name], Counter[str](), 0, 0
        for values in itertools.product(*space.values()):
            tile = KERNELS[kernel.name].tile_type(**dict(zip(space, values, strict=True)))
            total += 1
            if not worthwhile(tile, problem):
                removed["a block is more than twice as large as what it covers"] += 1
            elif reason := tile.unfit(problem, target):
                # Numbers differ from tile to tile; what kind of reason it is does not.
                removed[re.sub(r"\d+", "#", reason)] += 1
            else:
                left += 1
        found.append(Funnel(kernel.name, total, dict(removed.most_common()), left))
    return found


def ranked(problem: Problem, target: Target, count: int) -> list[Candidate]:
    """The candidates that a search would try first: defaults, portfolio, and the likeliest by count of work."""
    return Search(problem, target).likely(count)


def compiled(problem: Problem, target: Target, candidates: list[Candidate], seconds: float) -> Iterator[Compiled]:
    """What the compiler makes of candidates, in their order, until the time is up."""
    stop = time.monotonic() + seconds
    for start in range(0, len(candidates), _BATCH):
        if start and time.monotonic() > stop:
            return
        jobs = [Job(c.kernel, problem, c.tile, target) for c in candidates[start : start + _BATCH]]
        yield from (row for _, row in sorted(compile_all(jobs), key=lambda item: item[0]))
