"""Building portfolios from trials, and judging them on problems that were left out.

A kernel's portfolio has the problems on which that kernel won, and at most twelve tiles that together come as near to
the best of each as they can. Left out one at a time, each problem is answered from the others; where the answer was
never tried on it nothing is known, and nothing is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..dispatch import idle
from ..kernels import KERNELS, Tile
from ..portfolio import MOST_TILES, Portfolio
from ..problem import Problem
from ..target import Target
from .journal import Table

# A tile that was not tried on a problem, or failed there, covers it as badly as one twice as slow.
_UNKNOWN = math.log(2.0)
# Less than this part of a thousand that another tile would win, summed over all problems, is noise.
_LEAST_GAIN = 0.005
_RADII = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
# Answers that must have been judged before a portfolio is believed.
_LEAST_JUDGED = 3

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]

Refused = Callable[[str, Tile], bool]
"""Whether a plan of a problem would pass over a tile."""

Costs = Mapping[str, Mapping[Tile, float]]
"""By problem and tile, the logarithm of its time over the best time of any kernel."""


@dataclass(frozen=True)
class Judged:
    """What a portfolio is worth on one problem that it was made without.

    `regret` and `default_regret` are logarithms of times over the best; the first is None where the answer was not
    tried, and the second where the default was not. Beyond the radius the answer is the default.
    """

    problem: str
    answered: bool
    regret: float | None
    default_regret: float | None


def tried(tables: Mapping[str, Table]) -> dict[str, Costs]:
    """The costs of each kernel on the problems on which any of its tiles ran."""
    found: dict[str, dict[str, dict[Tile, float]]] = {}
    for problem, table in tables.items():
        times = {candidate: trial.time_us for candidate, trial in table.items() if not trial.failure}
        least = min(times.values(), default=0.0)
        for candidate, time_us in times.items():
            found.setdefault(candidate.kernel, {}).setdefault(problem, {})[candidate.tile] = math.log(time_us / least)
    return {kernel: dict(costs) for kernel, costs in found.items()}


def won(tables: Mapping[str, Table]) -> dict[str, Costs]:
    """The costs of each kernel on the problems on which it is the fastest form."""
    found: dict[str, Costs] = {}
    for kernel, costs in tried(tables).items():
        rows = {problem: row for problem, row in costs.items() if min(row.values()) == 0.0}
        found |= {kernel: rows} if rows else {}
    return found


def choose(costs: Costs) -> list[Tile]:
    """At most twelve tiles, each the one that helps most beside those before it; of each problem the best of the same
    kernel is what can be reached.
    """
    tiles = sorted({tile for row in costs.values() for tile in row}, key=str)
    column = {tile: number for number, tile in enumerate(tiles)}
    table = np.full((len(costs), len(tiles)), np.nan)
    for line, row in zip(table, costs.values(), strict=True):
        line[[column[tile] for tile in row]] = np.array(list(row.values()))
    return [tiles[number] for number in together(table, np.ones(len(costs)))]


def together(table: Matrix, weights: Vector, chosen: Sequence[int] = ()) -> list[int]:
    """The columns already `chosen` and, up to twelve in all, those that come nearest to the least of each row together:
    each the one that helps most beside those before it. NaN is what is not known; a row weighs 1 at most.
    """
    told = ~np.isnan(table).all(1)
    table, weights = table[told], weights[told, None]
    regrets = np.nan_to_num(table - np.nanmin(table, 1, initial=np.inf, keepdims=True), nan=_UNKNOWN)
    found, covered = list(chosen), np.min(regrets[:, list(chosen)], 1, initial=_UNKNOWN, keepdims=True)
    while len(found) < min(MOST_TILES, table.shape[1]):
        gains = (weights * np.maximum(covered - regrets, 0.0)).sum(0)
        best = int(gains.argmax())
        if gains[best] < _LEAST_GAIN:
            break
        found.append(best)
        covered = np.minimum(covered, regrets[:, best, None])
    return found


def portfolio(costs: Costs, radius: float, regret: Mapping[str, float] | None = None) -> Portfolio:
    """Tiles for these problems, each served by the best that was tried on it."""
    tiles = {chr(ord("a") + number): tile for number, tile in enumerate(choose(costs))}
    shapes = {}
    for problem, row in sorted(costs.items()):
        name = min(tiles, key=lambda name: row.get(tiles[name], math.inf), default=None)
        if name is not None and tiles[name] in row:
            shapes[problem] = name
    used = {name: tile for name, tile in tiles.items() if name in shapes.values()}
    return Portfolio(used, shapes, radius, regret or {})


def leave_one_out(
    costs: Costs, defaults: Mapping[str, Tile], radius: float, refused: Refused = lambda problem, tile: False
) -> list[Judged]:
    """Answers for each problem from a portfolio of the others; `defaults` are the analytic default tiles, which answer
    where the portfolio's would be `refused`.
    """
    found = []
    for problem, row in costs.items():
        made = portfolio({other: costs[other] for other in costs if other != problem}, radius)
        answer = made.nearest(problem)
        if answer and refused(problem, answer[2]):
            answer = None
        default = row.get(defaults[problem]) if problem in defaults else None
        found.append(Judged(problem, answer is not None, row.get(answer[2]) if answer else default, default))
    return found


def summary(judged: Sequence[Judged]) -> dict[str, float]:
    """Regrets over the problems where answer and default are both known; without any, only how many were asked."""
    known = [j for j in judged if j.regret is not None and j.default_regret is not None]
    pairs = [(j.regret or 0.0, j.default_regret or 0.0) for j in known]
    result = {
        "asked": float(len(judged)),
        "answered": float(sum(j.answered for j in judged)),
        "judged": float(len(pairs)),
        "judged_answers": float(sum(j.answered for j in known)),
    }
    if pairs:
        regrets, default = [a for a, _ in pairs], [b for _, b in pairs]
        result |= {"geomean": _geomean(regrets), "p95": math.expm1(percentile(regrets, 0.95))}
        result |= {"default_geomean": _geomean(default), "default_p95": math.expm1(percentile(default, 0.95))}
    return {name: round(value, 4) for name, value in result.items()}


def passed_over(kernel: str, problems: Mapping[str, Problem], target: Target) -> Refused:
    """What a plan does with a portfolio's answer that does not fit the problem or leaves multiprocessors idle."""

    def refused(key: str, tile: Tile) -> bool:
        problem = problems.get(key)
        return problem is not None and bool(tile.unfit(problem, target) or idle(KERNELS[kernel], tile, problem, target))

    return refused


def build(
    costs: Costs, defaults: Mapping[str, Tile], refused: Refused = lambda problem, tile: False
) -> Portfolio | None:
    """The portfolio of a kernel with the radius that is best on problems left out.

    None if no radius beats the analytic default there, on enough problems: then that one had better answer.
    """
    best: tuple[float, Portfolio] | None = None
    for radius in _RADII:
        regret = summary(leave_one_out(costs, defaults, radius, refused))
        if regret["judged_answers"] < _LEAST_JUDGED or regret["p95"] > regret["default_p95"]:
            continue
        gain = regret["default_geomean"] - regret["geomean"]
        if gain > 0.001 and (best is None or gain > best[0]):
            best = gain, portfolio(costs, radius, regret)
    return best[1] if best else None


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of all does not pass."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _geomean(logarithms: Sequence[float]) -> float:
    return math.expm1(sum(logarithms) / len(logarithms))
