"""Which candidates to try, and in which order: an opening of likely ones, then the neighbours of the best so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..dispatch import forms
from ..kernels import KERNELS, Tile
from ..problem import Problem
from ..target import Target
from .space import candidates, neighbours

_OPENING, _GLANCE, _ROUND, _LEADERS = 40, 4, 32, 3
# Microseconds for loads to come back from L2 or beyond, and bytes a microsecond that L2 gives one multiprocessor
# and memory all of them.
_LATENCY, _L2_RATE, _MEMORY_RATE = 0.7, 40e3, 3e6
# FLOP a microsecond of one multiprocessor's matrix units, by bytes of an operand; orders of magnitude are enough here.
_MATRIX_RATE = {2: 6e6, 4: 3e6, 8: 0.4e6}


@dataclass(frozen=True)
class Candidate:
    """A kernel of the kind, with a tile."""

    kernel: str
    tile: Tile

    def __str__(self) -> str:
        return f"{self.kernel} {self.tile}"


class Search:
    """The candidates of one problem, round by round; `times` holds what was measured, in microseconds.

    `spaces` are the tiles to choose from, the default first, where not all of a kernel's can be measured; `seeds` what
    won elsewhere, tried right after the defaults.
    """

    def __init__(
        self,
        problem: Problem,
        target: Target,
        spaces: Mapping[str, Sequence[Tile]] | None = None,
        seeds: Sequence[Candidate] = (),
    ) -> None:
        self._problem, self._target = problem, target
        self._spaces = spaces or {kernel.name: candidates(kernel.name, problem, target) for kernel in forms(problem)[0]}
        self._seeds = [seed for seed in seeds if seed.tile in self._spaces.get(seed.kernel, ())]
        self.defaults = [Candidate(name, tiles[0]) for name, tiles in self._spaces.items() if tiles]
        self.times: dict[Candidate, float] = {}
        self._given: set[Candidate] = set()

    def known(self, candidate: Candidate, time_us: float | None = None) -> None:
        """Takes note of an earlier trial, which is not given out again."""
        if candidate.kernel not in self._spaces:
            return
        self._given.add(candidate)
        if time_us is not None:
            self.times[candidate] = time_us

    def round(self) -> list[Candidate]:
        """The next candidates to try; empty when none is left."""
        seen = {candidate.kernel for candidate in self._given}
        new = [name for name in self._spaces if name not in seen]
        # Whatever earlier runs tried, the winner is compared with today's default.
        likely = dict.fromkeys((*self.defaults, *self._seeds))
        found = [candidate for candidate in likely if candidate not in self._given]
        for name in new:
            # The preferred form's in earnest; of the others enough to see whether they are as fast.
            found += self._opening(name, _OPENING if name == self.defaults[0].kernel else _GLANCE, set(found))
        found += [candidate for candidate in self._neighbours() if candidate not in found]
        if len(found) < _ROUND // 4:
            for name in self._spaces:
                found += self._spread(name, _ROUND // len(self._spaces), set(found))
        self._given |= set(found)
        return found

    def _opening(self, name: str, count: int, known: set[Candidate]) -> list[Candidate]:
        """The likely ones by count of work, if that can be counted, and as many from everywhere."""
        likely = []
        if (cost := _cost(name, self._problem, self._target)) is not None:
            ranked = sorted(self._spaces[name], key=cost)[: count // 2]
            likely = [candidate for tile in ranked if (candidate := Candidate(name, tile)) not in known]
        return likely + self._spread(name, count - len(likely), known | set(likely))

    def _spread(self, name: str, count: int, known: set[Candidate]) -> list[Candidate]:
        """Evenly from a form's candidates in the order of their distance from the default."""
        known = known | self._given
        left = [candidate for tile in self._spaces[name] if (candidate := Candidate(name, tile)) not in known]
        return left[:: max(1, math.ceil(len(left) / max(1, count)))]

    def _neighbours(self) -> list[Candidate]:
        found: dict[Candidate, None] = {}
        for leader in sorted(self.times, key=lambda candidate: self.times[candidate])[:_LEADERS]:
            for tile in neighbours(leader.tile, self._spaces[leader.kernel]):
                candidate = Candidate(leader.kernel, tile)
                if candidate not in self._given:
                    found[candidate] = None
        return list(found)[:_ROUND]


def _cost(name: str, problem: Problem, target: Target) -> Callable[[Tile], float] | None:
    """Microseconds that a tile of a matrix product would take by count, to rank by; None for other kernels."""
    kernel, g = KERNELS[name], problem.geometry
    if not {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= set(kernel.safe_tile.sizes()):
        return None

    def cost(tile: Tile) -> float:
        m, n, k = (int(str(tile.sizes()[f"BLOCK_{axis}"])) for axis in "MNK")
        programs = kernel.grid(problem, tile)
        products = 2 * g.flops if g.taps * g.c_in_group < k else g.flops
        steps = max(1.0, products / (2 * m * n * k) / programs)
        # Wide tiles of eight warps keep the matrix units fed; narrow ones wait for shared memory.
        fed = min(1.0, 0.4 + 0.3 * n / 128 + 0.3 * m / 128)
        matrix = 2 * m * n * k / (_MATRIX_RATE[problem.itemsize] * fed)
        loads = (m + n) * k * problem.itemsize / _L2_RATE
        resident = max(1, min(target.shared_bytes // max(tile.shared_bytes(problem), 1), 16 // tile.num_warps))
        waves = math.ceil(programs / (target.sms * resident))
        latency = _LATENCY / tile.num_stages
        # Partial sums are written and read again.
        sums = 2 * int(tile.asdict().get("SPLITS", 0)) * problem.accumulator_bytes * math.prod(problem.result_shape)
        return waves * steps * max(resident * matrix, resident * loads, latency) + sums / _MEMORY_RATE

    return cost
