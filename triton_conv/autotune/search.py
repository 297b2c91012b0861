"""Which candidates to try, and in which order: an opening of likely ones, then what the trials so far speak for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..dispatch import forms, serving
from ..kernels import KERNELS, Tile
from ..problem import Problem
from ..target import Target
from .space import candidates, distance
from .surrogate import Surrogate

# On simulated tables rounds of 3 leave a tenth less regret than rounds of 6 (after 32 trials 3.3% against 3.7), which
# leave half that of rounds of 32. Of more candidates than 6 the opening is worth no more.
OPENING, ROUND = 6, 3
# So many of the likeliest by other problems are tried before anything is known of this one. All twelve at once leave
# 3.3% after 16 trials and 1.5 after 32, on simulated devices 1, 2, 13 and 14; two, and of every round one of the others
# or of another form, 2.5 and 1.3; two and then bets alone 2.6 and 1.9.
LIKELIEST = 2
# Tiles that won on another problem of the same run, at most so many a round: they are good bets, not certain ones.
_SUGGESTIONS = 3
# A tile that failed counts as so many times slower than the slowest that did not: its neighbours are no good bet.
_FAILED = 3.0
# Where work is not counted, a doubling away from the default counts as so much slower: a rule is seldom far off.
_FAR = 0.03
# Microseconds for loads to come back from L2 or beyond, and bytes a microsecond that L2 gives one multiprocessor
# and memory all of them.
_LATENCY, _L2_RATE, MEMORY_RATE = 0.7, 40e3, 3e6
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
    won elsewhere, tried right after the defaults. Of `per_round` candidates at a time none knows of the others.
    `elsewhere` is the logarithm of what tiles should take by trials of other problems, up to a constant: it counts in
    place of the count of work, and the search's own trials correct it. `later` are good bets too, for later rounds.
    """

    def __init__(
        self,
        problem: Problem,
        target: Target,
        spaces: Mapping[str, Sequence[Tile]] | None = None,
        seeds: Sequence[Candidate] = (),
        per_round: int = ROUND,
        opening: int = OPENING,
        elsewhere: Mapping[Candidate, float] | None = None,
        later: Sequence[Candidate] = (),
    ) -> None:
        self._elsewhere = elsewhere or {}
        self._per_round, self._opens_with = per_round, opening
        self._problem, self._target = problem, target
        self._spaces = (
            dict(spaces)
            if spaces
            else {kernel.name: candidates(kernel.name, problem, target) for kernel in forms(problem, target)[0]}
        )
        if not spaces:
            # What won elsewhere may be no value of the space, a rule's own tile for instance.
            for seed in (*seeds, *later):
                tiles = self._spaces.get(seed.kernel)
                if tiles and seed.tile not in tiles and seed.tile.unfit(problem, target) is None:
                    self._spaces[seed.kernel] = [*tiles, seed.tile]
        self._seeds, self._later = (
            [each for each in likely if each.tile in self._spaces.get(each.kernel, ())] for likely in (seeds, later)
        )
        self.defaults = [Candidate(name, tiles[0]) for name, tiles in self._spaces.items() if tiles]
        self.times: dict[Candidate, float] = {}
        self.hope = math.inf
        """What the best bet of the last round may take, in microseconds, if the trials so far tell."""
        self.opened = 0
        """How many forms the last round opened."""
        self._turn = 0
        self._given: set[Candidate] = set()
        self._surrogates: dict[str, Surrogate] = {}
        self._expected: dict[Candidate, float] = {}

    @property
    def default(self) -> Candidate:
        """What runs where nothing was measured: a winner must beat it."""
        names = {kernel.name for kernel in serving(forms(self._problem, self._target)[0])}
        return next((default for default in self.defaults if default.kernel in names), self.defaults[0])

    def expect(self, candidate: Candidate, time_us: float) -> None:
        """Takes note of the microseconds that a candidate should take, as seen from its machine code: they count in
        place of the count of work.
        """
        self._expected[candidate] = time_us
        self._surrogates.pop(candidate.kernel, None)

    def pick(self, candidates: Sequence[Candidate], count: int) -> list[Candidate]:
        """What to try of these candidates: defaults and winners of other problems, and `count` of the others, which
        may be given out again.
        """
        open_to = set(candidates).difference(self.defaults, self._seeds)
        likely = [candidate for candidate in candidates if candidate not in open_to]
        # What was not tried yet did not fail either.
        self._given -= set(candidates)
        if self.times:
            others = [candidate for _, candidate in self._bets(self._given) if candidate in open_to]
        else:
            others = sorted(
                (candidate for candidate in candidates if candidate in open_to),
                key=lambda candidate: self._expected.get(candidate, math.inf),
            )
        chosen = [*likely, *others[:count]]
        self._given |= set(chosen)
        return chosen

    def known(self, candidate: Candidate, time_us: float | None = None) -> None:
        """Takes note of an earlier trial, which is not given out again."""
        if candidate.kernel not in self._spaces:
            return
        self._given.add(candidate)
        if time_us is not None:
            self.times[candidate] = time_us

    def suggest(self, candidates: Sequence[Candidate]) -> None:
        """Takes note of what is fastest on other problems, the likeliest first, for the next round."""
        known = self._given.union(self._seeds)
        new = [c for c in dict.fromkeys(candidates) if c not in known and c.tile in self._spaces.get(c.kernel, ())]
        self._seeds = [*self._seeds, *new[:_SUGGESTIONS]]

    def round(self) -> list[Candidate]:
        """The next candidates to try; empty when none is left."""
        # Whatever earlier runs tried, the winner is compared with today's default. Of the other forms the default shows
        # whether they are as fast.
        likely = dict.fromkeys((*self.defaults, *self._seeds))
        # As many winners of other problems say more than counting: of simulated devices 4 and 5 they leave 3.4 and 4.7%
        # after 16 trials, with an opening besides 4.4 and 5.5.
        names = [default.kernel for default in self.defaults]
        if not self._given:
            names = names[:1] if len(self._seeds) < self._opens_with and not self._elsewhere else []
        else:
            # Where trials of the other forms are known, a default alone would have to stand up to what they won. Those
            # forms can wait for the next round.
            given = {candidate.kernel for candidate in self._given}
            if names := [name for name in names if name not in given]:
                likely = {c: None for c in likely if c.kernel in names or c in self.defaults}
        for name in names:
            likely |= dict.fromkeys(self._opening(name))
        self.opened = len(names)
        found = [candidate for candidate in likely if candidate not in self._given]
        found += self._promising(max(0, self._per_round - len(found)), {*found, *self._given})
        self._given |= set(found)
        return found

    def likely(self, count: int) -> list[Candidate]:
        """The first `count` candidates with no trial to go by, over all forms by count of work where there is one."""
        found = dict.fromkeys((*self.defaults, *self._seeds))
        name = self.defaults[0].kernel
        cost = cost_of(name, self._problem, self._target)
        tiles = sorted(self._spaces[name], key=cost) if cost else self._spaces[name]
        found |= dict.fromkeys(Candidate(name, tile) for tile in tiles)
        return list(found)[:count]

    def _opening(self, name: str) -> list[Candidate]:
        """The likely ones by count of work, if that can be counted; else some from everywhere."""
        tiles = self._spaces[name]
        if (cost := cost_of(name, self._problem, self._target)) is not None:
            return [Candidate(name, tile) for tile in sorted(tiles, key=cost)[: self._opens_with]]
        return [Candidate(name, tile) for tile in tiles[:: math.ceil(len(tiles) / self._opens_with)]]

    def _promising(self, count: int, given: set[Candidate]) -> list[Candidate]:
        """The best bets among what was not given out, over all forms; in place of the last, by turns, that of another
        form than the best and what other problems speak for: the bets alone stay where the first trials went well.
        """
        if not count:
            return []
        bets = self._bets(given, count)
        self.hope = math.exp(bets[0][0]) if bets else math.inf
        found = [candidate for _, candidate in bets]
        if 1 < count <= len(found):
            self._turn += 1
            wanted = [candidate for candidate in found if candidate.kernel != found[0].kernel] if self._turn % 2 else []
            wanted = wanted or [candidate for candidate in self._later if candidate not in given]
            if wanted and wanted[0] not in found[: count - 1]:
                found[count - 1] = wanted[0]
        return found[:count]

    def _bets(self, given: set[Candidate], most: int | None = None) -> list[tuple[float, Candidate]]:
        """(optimistic logarithm of the time, candidate) of what was not given out, the best first, `most` of each form;
        of one without a trial to go by, what its machine code should take, and then the nearest tiles first.
        """
        slow = math.log(_FAILED * max(self.times.values(), default=1.0))
        found: list[tuple[float, Candidate]] = []
        for name, tiles in self._spaces.items():
            known = {c.tile: slow for c in self._given if c.kernel == name}
            known |= {c.tile: math.log(time) for c, time in self.times.items() if c.kernel == name}
            exclude = {c.tile for c in given if c.kernel == name}
            bets = self._surrogate(name).promising(known, exclude)
            bets = bets or self._foretold(name, [tile for tile in tiles if tile not in exclude], slow)
            found += [(bound, Candidate(name, tile)) for bound, tile in bets[:most]]
        return sorted(found, key=lambda bet: bet[0])

    def _foretold(self, name: str, tiles: Sequence[Tile], slow: float) -> list[tuple[float, Tile]]:
        """The same of one form without a trial."""
        told = [math.log(self._expected.get(Candidate(name, tile), math.inf)) for tile in tiles]
        return sorted(
            ((min(bound, slow), tile) for bound, tile in zip(told, tiles, strict=True)), key=lambda bet: bet[0]
        )

    def _surrogate(self, name: str) -> Surrogate:
        if name not in self._surrogates:
            tiles, cost = self._spaces[name], cost_of(name, self._problem, self._target)
            prior = [math.log(cost(tile)) if cost else _FAR * distance(tile, tiles[0]) for tile in tiles]
            own = [Candidate(name, tile) for tile in tiles]
            _replace(prior, {n: self._elsewhere[each] for n, each in enumerate(own) if each in self._elsewhere})
            _replace(prior, {n: math.log(self._expected[each]) for n, each in enumerate(own) if each in self._expected})
            self._surrogates[name] = Surrogate(tiles, prior)
        return self._surrogates[name]


def _replace(prior: list[float], better: Mapping[int, float]) -> None:
    """Puts what is better known in its places. Two scales: it lies about where what it replaces did."""
    if better:
        shift = statistics.median(prior[position] - expected for position, expected in better.items())
        for position, expected in better.items():
            prior[position] = expected + shift


def cost_of(name: str, problem: Problem, target: Target) -> Callable[[Tile], float] | None:
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
        resident = max(1, min(target.shared_bytes // max(tile.shared_bytes(problem, target), 1), 16 // tile.num_warps))
        waves = math.ceil(programs / (target.sms * resident))
        latency = _LATENCY / tile.num_stages
        # Partial sums are written and read again.
        sums = 2 * int(tile.asdict().get("SPLITS", 0)) * problem.accumulator_bytes * math.prod(problem.result_shape)
        return waves * steps * max(resident * matrix, resident * loads, latency) + sums / MEMORY_RATE

    return cost
