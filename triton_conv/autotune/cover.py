"""What won on other problems: of each kernel the few tiles that together come as near to the best of each problem as
tiles can, which is what a portfolio has.

They are a problem's likeliest tiles, and a portfolio can be judged only where all of them were tried. Every trial may
change them; no tile is asked for twice, so that asking again comes to an end.
"""

from __future__ import annotations

from collections.abc import Mapping

from .. import configs
from ..defaults import default_tile
from ..dispatch import forms
from ..errors import ConfigError
from ..kernels import KERNELS, Tile
from ..portfolio import Place, place
from ..problem import Problem
from ..target import Target
from .journal import Journal, Table
from .lab import Trial
from .likely import Experience
from .portfolio import Costs, portfolio, tried, won
from .search import Candidate
from .upkeep import known_problems


def of_others(costs: Costs, problem: str) -> list[Tile]:
    """The tiles of a portfolio of all problems but this one, those from the nearest problem first."""
    others = {key: row for key, row in costs.items() if key != problem}
    made, here = portfolio(others, 0.0), place(problem)
    far = {
        name: min(place(shape).distance(here) for shape, served in made.shapes.items() if served == name)
        for name in made.tiles
    }
    return [made.tiles[name] for name in sorted(made.tiles, key=lambda name: far[name])]


def lacking(
    costs: Mapping[str, Costs], table: Mapping[Candidate, Trial], problem: Problem, target: Target
) -> list[Candidate]:
    """What a problem must still be tried with before a portfolio of the others can be judged on it: of the kernel that
    is fastest on it, or of the preferred one while nothing was tried, their tiles that fit.
    """
    kernels = [kernel.name for kernel in forms(problem, target)[0]]
    times = {c: trial.time_us for c, trial in table.items() if not trial.failure and c.kernel in kernels}
    best = min(times, key=lambda candidate: times[candidate]).kernel if times else kernels[0]
    found = [Candidate(best, tile) for tile in of_others(costs.get(best, {}), problem.describe())]
    return [c for c in found if c not in table and c.tile.unfit(problem, target) is None]


class Cover:
    """The winners of one device's problems: of its store, and of all trials that its journal knows by now."""

    def __init__(self, target: Target, journal: Journal) -> None:
        self._target, self._journal = target, journal
        self._count = -1
        self._tables: dict[str, Table] = {}
        self._tried: dict[str, Costs] = {}
        self._costs: dict[str, Costs] = {}
        self._problems = known_problems()
        self._told: Experience | None = None

    def of(self, problem: Problem) -> list[Candidate]:
        """What is likeliest to win by what was tried elsewhere, besides the defaults."""
        defaults = {default_tile(kernel.name, problem, self._target) for kernel in forms(problem, self._target)[0]}
        found = self._experience(problem).likeliest(problem)
        return [candidate for candidate in found if candidate.tile not in defaults]

    def expected(self, problem: Problem) -> dict[Candidate, float]:
        """What tiles that were tried elsewhere should take here, as `Experience.expected` has it."""
        return self._experience(problem).expected(problem)

    def table(self, problem: Problem) -> Table:
        """What became of each candidate of a problem that was ever tried."""
        self._look()
        return self._tables.get(problem.describe(), {})

    def untried(self, problem: Problem) -> list[Candidate]:
        """What a problem should be tried with: the defaults, since a form that was never tried may be the fastest for
        all that is known, and what it is `lacking`.
        """
        table = self.table(problem)
        names = [kernel.name for kernel in forms(problem, self._target)[0]]
        defaults = [Candidate(name, default_tile(name, problem, self._target)) for name in names]
        found = [c for c in defaults if c not in table and c.tile.unfit(problem, self._target) is None]
        return list(dict.fromkeys([*found, *lacking(self._costs, table, problem, self._target)]))

    def _experience(self, problem: Problem) -> Experience:
        self._look()
        if self._told is None or problem.describe() not in self._problems:
            self._problems[problem.describe()] = problem
            self._told = Experience(self._tried, self._problems, self._target)
        return self._told

    def _look(self) -> None:
        """Reads what is new."""
        if self._count == self._journal.count:
            return
        self._count, self._tables, self._told = self._journal.count, {}, None
        for key, table in self._journal.tables().items():
            if _placed(key):
                self._tables[key] = table
        for kernel in KERNELS:
            # The better source last: it replaces what the other has.
            for _, file in reversed(configs.files(kernel, self._target)):
                for key, entry in file.entries.items():
                    trial = Trial(entry.time_us, entry.relative_error)
                    self._tables.setdefault(key, {})[Candidate(kernel, entry.tile)] = trial
        self._tried, self._costs = tried(self._tables), won(self._tables)


def _placed(description: str) -> Place | None:
    try:
        return place(description)
    except ConfigError:  # of a line that somebody else wrote
        return None
