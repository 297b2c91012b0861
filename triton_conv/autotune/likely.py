"""Which tiles of other problems are the likeliest to be fast on one that nobody tried, over all its forms.

A tile is expected to take as much longer than counting says as it did elsewhere. So the count tells what this problem's
size does to a tile, and trials what no count knows; the more a problem is like this one, the more its trials say.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..defaults import default_tile
from ..dispatch import forms
from ..kernels import KERNELS, Tile
from ..portfolio import MOST_TILES, place
from ..problem import Problem
from ..target import Target
from .portfolio import Costs, Matrix, Vector, together
from .search import MEMORY_RATE, Candidate, cost_of
from .worth import worthwhile

# Doublings over which problems resemble each other, and how many tiles come first from portfolios, good on many. Chosen
# on simulated devices 4 and 5, with layers of networks left out: 1.5 doublings do as well, 0.7 leave twice the regret;
# 3 such tiles do as well.
_LENGTH, _MEMBERS = 1.0, 6
# What a tile counts as that was tried on no problem like this one.
_UNKNOWN = math.log(2.0)
# A tile that was slower than this on one problem says no more than that it is slow.
_SLOWEST = 1.5
# A problem that would weigh less has nothing to say.
_LEAST_WEIGHT = 1e-9


@dataclass(frozen=True)
class _Trials:
    """One kernel's trials, by problem and tile: logarithms of times over the problem's best, and of what was counted
    over its level; NaN where a tile was not tried, or a problem cannot be counted. None is the problem's own default.
    """

    tiles: list[Tile | None]
    costs: Matrix
    counts: Matrix


@dataclass(frozen=True)
class _Forecast:
    """What trials say of one form on a problem, by candidate: its number among the trials, its cost if the problem were
    like each of the others, and where nothing is known.
    """

    candidates: list[Candidate]
    numbers: list[int]
    costs: Matrix
    unknown: Vector


class Experience:
    """What was tried on a device's problems, to be asked about any problem.

    `problems` are those that can be counted, by description; of any other the trials alone count.
    """

    def __init__(self, tried: Mapping[str, Costs], problems: Mapping[str, Problem], target: Target) -> None:
        self._problems, self._target = problems, target
        self._keys = sorted({key for costs in tried.values() for key in costs})
        self._kernels = {name: self._trials(name, costs) for name, costs in tried.items()}

    def likeliest(self, problem: Problem) -> list[Candidate]:
        """At most twelve candidates: those expected to be fastest of the defaults and of each form's portfolio; then
        those that come nearest, beside them, to the best that each of the others would have here; then what is next of
        either. Trials of the problem itself say nothing.
        """
        others, weights = self._others(problem)
        forecasts = [self._forecast(kernel.name, problem, others) for kernel in forms(problem, self._target)[0]]
        candidates = [candidate for forecast in forecasts for candidate in forecast.candidates]
        table = np.concatenate([forecast.costs for forecast in forecasts], 1)
        unknown = np.concatenate([forecast.unknown for forecast in forecasts])
        expected = _means(table, weights)
        expected = np.where(np.isnan(expected), unknown, expected)
        members = np.concatenate([self._members(forecast, others) for forecast in forecasts])
        by_mean = [int(number) for number in np.argsort(expected, kind="stable")]
        portfolio = [number for number in by_mean if members[number]]
        near = together(table, weights / max(weights.max(initial=0.0), _LEAST_WEIGHT), portfolio[:_MEMBERS])
        # Where few problems are near, what is good on many and what is expected of all take turns.
        order = [*near, *itertools.chain(*zip(portfolio, by_mean, strict=False)), *by_mean]
        return list(dict.fromkeys(candidates[number] for number in order))[:MOST_TILES]

    def expected(self, problem: Problem) -> dict[Candidate, float]:
        """Logarithm of what each tile should take that was tried on a problem like this one, up to a constant."""
        others, weights = self._others(problem)
        found: dict[Candidate, float] = {}
        for kernel in forms(problem, self._target)[0]:
            forecast = self._forecast(kernel.name, problem, others)
            means = zip(forecast.candidates, _means(forecast.costs, weights), strict=True)
            found |= {candidate: float(mean) for candidate, mean in means if not math.isnan(mean)}
        return found

    def _others(self, problem: Problem) -> tuple[list[int], Vector]:
        """The other problems, and how much each says of this one."""
        own = place(problem.describe())
        others = [number for number, key in enumerate(self._keys) if key != problem.describe()]
        weights = np.exp([-((place(self._keys[number]).distance(own) / _LENGTH) ** 2) / 2 for number in others])
        return others, np.where(weights < _LEAST_WEIGHT, 0.0, weights)

    def _forecast(self, kernel: str, problem: Problem, others: list[int]) -> _Forecast:
        known = self._kernels.get(kernel) or self._trials(kernel, {})
        costs, counts = known.costs[others], known.counts[others]
        default = default_tile(kernel, problem, self._target)
        told = np.isfinite(costs).sum(0)
        suited = [
            number
            for number, tile in enumerate(known.tiles)
            if tile is None
            or (told[number] and tile.unfit(problem, self._target) is None and worthwhile(tile, problem))
        ]
        tiles = [known.tiles[number] or default for number in suited]
        level = _level(problem, self._target)
        here = np.array([counted(kernel, tile, problem, self._target) - level for tile in tiles])
        return _Forecast(
            [Candidate(kernel, tile) for tile in tiles],
            suited,
            costs[:, suited] + np.nan_to_num(here - counts[:, suited]),
            here + _UNKNOWN,
        )

    def _members(self, forecast: _Forecast, others: list[int]) -> NDArray[np.bool_]:
        """Which of a form's candidates are the default or of a portfolio."""
        known = self._kernels.get(forecast.candidates[0].kernel)
        chosen = together(known.costs[others], np.ones(len(others))) if known else []
        return np.isin(forecast.numbers, [0, *chosen])

    def _trials(self, kernel: str, costs: Costs) -> _Trials:
        tiles = sorted({tile for row in costs.values() for tile in row}, key=str)
        column = {tile: number for number, tile in enumerate(tiles, 1)}
        tables = np.full((2, len(self._keys), 1 + len(tiles)), np.nan)
        for number, key in enumerate(self._keys):
            row, problem = costs.get(key, {}), self._problems.get(key)
            places = [column[tile] for tile in row]
            tables[0, number, places] = np.minimum(list(row.values()), _SLOWEST)
            if problem is not None:
                level = _level(problem, self._target)
                tables[1, number, places] = [counted(kernel, tile, problem, self._target) - level for tile in row]
                own = column.get(default_tile(kernel, problem, self._target)) if row else None
                tables[:, number, 0] = tables[:, number, own] if own is not None else np.nan
        return _Trials([None, *tiles], *tables)


def _means(table: Matrix, weights: Vector) -> Vector:
    """Weighted means of the columns, of what is known in each; NaN where nothing is."""
    weights = np.where(np.isnan(table), 0.0, weights[:, None])
    total = weights.sum(0)
    sums = (weights * np.nan_to_num(table)).sum(0)
    means: Vector = np.divide(sums, total, out=np.full(len(total), math.nan), where=total > 0.0)
    return means


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
    floor_us = 1e6 * target.floor_seconds(problem.geometry.flops, problem.least_bytes, dtype, problem.precision)
    if math.isnan(floor_us):
        # A device without a datasheet: any bandwidth ranks the forms and tiles of a problem.
        floor_us = problem.least_bytes / MEMORY_RATE
    return math.log(floor_us * math.ceil(waves) / waves)


@functools.lru_cache(maxsize=4096)
def _level(problem: Problem, target: Target) -> float:
    """What a problem's counts are compared with: the same for all its forms."""
    last = forms(problem, target)[0][-1].name
    return counted(last, default_tile(last, problem, target), problem, target)
