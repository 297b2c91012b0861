"""Which tiles of other problems are the likeliest to be fast on one that nobody tried, over all its forms.

A tile is expected to take as much longer than counting says as it did elsewhere: a mean over the problems that it was
tried on, by how much they are like this one. So the count tells what this problem's size does to a tile, and trials
what no count knows. A tile that does not suit the problem stands for the nearest smaller one that does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

from ..defaults import default_tile
from ..dispatch import forms
from ..kernels import KERNELS, Tile
from ..portfolio import MOST_TILES, place
from ..problem import Problem
from ..target import Target
from .portfolio import Costs, choose
from .search import Candidate, cost_of
from .space import fitted

# Doublings over which problems resemble each other, and what a tile counts as that was tried on no problem like this
# one. Of simulated devices 2 and 3, 1.5 doublings do as well; 1 and 3 leave up to a half more regret.
_LENGTH, _UNKNOWN = 2.0, math.log(2.0)
# A tile that was slower than this on one problem says no more than that it is slow.
_SLOWEST = 1.5


def likeliest(
    tried: Mapping[str, Costs], problem: Problem, target: Target, problems: Mapping[str, Problem]
) -> list[Candidate]:
    """At most twelve candidates, the likeliest first: defaults, and of each form the tiles that together come nearest
    to its best on the other problems. `problems` are those that can be counted, by description; of any other the trials
    alone count.
    """
    own, expected = problem.describe(), dict[Candidate, float]()
    here, level = place(own), _level(problem, target)
    for kernel in forms(problem, target)[0]:
        rows = {key: row for key, row in tried.get(kernel.name, {}).items() if key != own}
        weights = {key: math.exp(-((place(key).distance(here) / _LENGTH) ** 2) / 2) for key in rows}
        for member in (None, *choose(rows)):
            tile = _meant(kernel.name, member, problem, target)
            if tile is None:
                continue
            total = weight = 0.0
            for key, row in rows.items():
                if weights[key] < 1e-9:
                    continue
                meant, beside = member, 0.0
                if other := problems.get(key):
                    meant = _meant(kernel.name, member, other, target)
                    beside = counted(kernel.name, meant, other, target) - _level(other, target) if meant else 0.0
                if meant is not None and meant in row:
                    total += weights[key] * (min(row[meant], _SLOWEST) - beside)
                    weight += weights[key]
            factor = total / weight if weight else _UNKNOWN
            found = factor + counted(kernel.name, tile, problem, target) - level
            candidate = Candidate(kernel.name, tile)
            expected[candidate] = min(found, expected.get(candidate, math.inf))
    return sorted(expected, key=lambda candidate: expected[candidate])[:MOST_TILES]


@functools.lru_cache(maxsize=65536)
def counted(kernel: str, tile: Tile, problem: Problem, target: Target) -> float:
    """Logarithm of the microseconds that a tile takes by count; where no matrix product is counted, of the least that
    the work takes, and of how empty the last wave of programs is.
    """
    if (cost := cost_of(kernel, problem, target)) is not None:
        return math.log(cost(tile))
    resident = max(1, min(target.shared_bytes // max(tile.shared_bytes(problem, target), 1), 16 // tile.num_warps))
    waves = max(KERNELS[kernel].grid(problem, tile), 1) / (target.sms * resident)
    dtype = str(problem.dtype).removeprefix("torch.")
    floor = target.floor_seconds(problem.geometry.flops, problem.least_bytes, dtype, problem.precision)
    return math.log(1e6 * floor * math.ceil(waves) / waves)


@functools.lru_cache(maxsize=4096)
def _level(problem: Problem, target: Target) -> float:
    """What a problem's counts are compared with: the same for all its forms."""
    last = forms(problem, target)[0][-1].name
    return counted(last, default_tile(last, problem, target), problem, target)


@functools.lru_cache(maxsize=65536)
def _meant(kernel: str, member: Tile | None, problem: Problem, target: Target) -> Tile | None:
    """The tile that a member stands for on a problem; None stands for the default."""
    return default_tile(kernel, problem, target) if member is None else fitted(member, problem, target)
