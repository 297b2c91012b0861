"""What the tuner is worth, in figures: `python -m perf_plots.tuner --out FILE`, no GPU needed.

Regret of the search on simulated tables and on recorded trials, beside random search and a plain top-k; of portfolios
on problems left out; what the count of shared memory misses in the table of compilations (`shared_memory` adds to it);
look-ups; how far runs pass their budget (`--runs N`). A figure says on what it was computed; simulated tables are no
measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from triton_conv import configs, dispatch
from triton_conv.autotune.cover import lacking
from triton_conv.autotune.journal import Table, read_trials, tables
from triton_conv.autotune.lab import Trial
from triton_conv.autotune.likely import Experience
from triton_conv.autotune.portfolio import (
    Costs,
    Judged,
    choose,
    leave_one_out,
    passed_over,
    percentile,
    summary,
    tried,
    won,
)
from triton_conv.autotune.search import LIKELIEST, Candidate, Search, cost_of
from triton_conv.autotune.simulated import Simulation, table
from triton_conv.autotune.space import candidates
from triton_conv.autotune.store import environment
from triton_conv.autotune.upkeep import corrected, files, known_problems
from triton_conv.configs import ConfigFile, Entry
from triton_conv.defaults import default_tile
from triton_conv.kernels import Tile
from triton_conv.portfolio import MOST_TILES
from triton_conv.problem import Problem
from triton_conv.target import KNOWN, Target
from triton_conv.workloads import Workload

from . import layers, shared_memory

Times = Mapping[Candidate, float]
Strategy = Callable[[Problem, Target, Times, int], Any]

_TRIALS_SIMULATED, _TRIALS_RECORDED = (16, 32, 96), (4, 8, 16)
_NOISE = 0.01
# So many problems of a tail are named.
_WORST = 10
_TRIALS = Path(__file__).parent / "results" / "h100-80gb-hbm3-132sm" / "trials.jsonl"


class Fixed:
    """A search that knows its order from the start."""

    def __init__(self, order: Sequence[Candidate]) -> None:
        self._order = list(order)
        self.times: dict[Candidate, float] = {}

    def round(self) -> list[Candidate]:
        order, self._order = self._order, []
        return order


def spaces(problem: Problem, target: Target, times: Times) -> dict[str, list[Tile]]:
    """The tiles of a table by kernel, the nearest to the default first."""
    found: dict[str, list[Tile]] = {}
    for kernel in dispatch.forms(problem, target)[0]:
        order = {tile: i for i, tile in enumerate(candidates(kernel.name, problem, target))}
        known = [candidate.tile for candidate in times if candidate.kernel == kernel.name]
        if known:
            found[kernel.name] = sorted(known, key=lambda tile: order.get(tile, math.inf))
    return found


def ours(problem: Problem, target: Target, times: Times, seed: int) -> Search:
    return Search(problem, target, spaces(problem, target, times))


def at_random(problem: Problem, target: Target, times: Times, seed: int) -> Fixed:
    order = list(times)
    random.Random(seed).shuffle(order)
    return Fixed([*ours(problem, target, times, seed).defaults[:1], *order])


def top_k(problem: Problem, target: Target, times: Times, seed: int) -> Fixed:
    """The preferred form's tiles by count of work, or by distance from the default where that is not counted."""
    name, tiles = next(iter(spaces(problem, target, times).items()))
    cost = cost_of(name, problem, target)
    return Fixed([Candidate(name, tile) for tile in (sorted(tiles, key=cost) if cost else tiles)])


SHIPPED = "as shipped: ours, after the likeliest by the others"
STRATEGIES: dict[str, Strategy] = {"ours": ours, "random": at_random, "top-k": top_k}


def by_each_other(cases: Sequence[tuple[Problem, Target, Times]]) -> Experience:
    """What the cases say of each other."""
    tables = {p.describe(): {c: Trial(t, 0.0) for c, t in times.items()} for p, _, times in cases}
    return Experience(tried(tables), {p.describe(): p for p, _, _ in cases}, cases[0][1])


def seeded(experience: Experience) -> Strategy:
    """Ours, by what was tried on all problems but the one that is searched: as a tuning begins."""

    def strategy(problem: Problem, target: Target, times: Times, seed: int) -> Search:
        defaults = set(ours(problem, target, times, seed).defaults)
        likely = [candidate for candidate in experience.likeliest(problem) if candidate not in defaults]
        tiles, elsewhere = spaces(problem, target, times), experience.expected(problem)
        return Search(problem, target, tiles, likely[:LIKELIEST], elsewhere=elsewhere, later=likely[LIKELIEST:])

    return strategy


def regrets(search: Any, times: Times, counts: Sequence[int], seed: int) -> list[float]:
    """Logarithm of the true time of what looks best after so many trials over the best of all."""
    noise, best, tried = random.Random(seed), min(times.values()), 0
    found: dict[int, float] = {}
    seen: set[Candidate] = set()
    while tried < max(counts) and (given := search.round()):
        for candidate in given:
            if candidate in seen or tried == max(counts):
                continue
            seen.add(candidate)
            tried += 1
            search.times[candidate] = times[candidate] * (1 + abs(noise.gauss(0, _NOISE)))
            found[tried] = math.log(times[min(search.times, key=search.times.get)] / best)
    return [found[min(count, tried)] for count in counts]


def search_figures(
    cases: Sequence[tuple[Problem, Target, Times]],
    counts: Sequence[int],
    each: bool = False,
    others: Mapping[str, Experience] | None = None,
) -> dict[str, Any]:
    """Regret of each strategy: geometric mean and 95th percentile over the cases, by trials; of `each` case too. What
    is shipped goes by what the cases say of each other, or by each of `others`.
    """
    figures: dict[str, Any] = {"cases": len(cases)}
    singly: dict[str, Any] = {p.describe(): {"tiles": len(times)} for p, _, times in cases}
    known = {SHIPPED: by_each_other(cases)} if others is None else {f"{SHIPPED}, {n}": e for n, e in others.items()}
    for name, strategy in (STRATEGIES | {name: seeded(experience) for name, experience in known.items()}).items():
        rows = [regrets(strategy(p, goal, times, i), times, counts, i) for i, (p, goal, times) in enumerate(cases)]
        for (p, _, _), row in zip(cases, rows, strict=True):
            singly[p.describe()][name] = [round(math.expm1(regret), 4) for regret in row]
        figures[name] = {
            str(count): {
                "geomean": round(math.expm1(statistics.fmean(row[i] for row in rows)), 4),
                "p95": round(math.expm1(percentile([row[i] for row in rows], 0.95)), 4),
            }
            for i, count in enumerate(counts)
        }
    return figures | ({"trials": list(counts), "each": singly} if each else {})


def experiences(seed: int, cases: Sequence[tuple[Problem, Target, Times]]) -> dict[str, Experience]:
    """What the flagships of a simulated device say of each other, and what the layers of `layers.json` do besides: by
    how many others there are of each.
    """
    simulation, known = Simulation(seed=seed), {p.describe() for p, _, _ in cases}
    more = {p.describe(): p for layer in further_layers() for p in (part.problem() for part in layer.parts())}
    whole = [*cases, *((p, simulation.target, table(p, simulation)) for key, p in more.items() if key not in known)]
    return {f"{len(found) - 1} problems": by_each_other(found) for found in (cases, whole)}


def twelve_regrets(
    seed: int, cases: Sequence[tuple[Problem, Target, Times]], others: Mapping[str, Experience]
) -> dict[str, dict[str, float]]:
    """Each flagship left out of a simulated device's tables: the first of the twelve likeliest tiles by `others`, which
    costs no trial, and the best of them, which costs twelve; beside the default, twelve tiles at random and by count.
    The logarithm of each regret, by problem.

    A tile that a table lacks is timed too; one that beats the table's best counts as no better.
    """
    simulation = Simulation(seed=seed)
    found: dict[str, dict[str, float]] = {}
    for number, (problem, target, times) in enumerate(cases):
        first = dispatch.serving(dispatch.forms(problem, target)[0])[0].name
        orders = {
            "default": [Candidate(first, default_tile(first, problem, target))],
            "best of twelve, random": random.Random(number).sample(list(times), min(MOST_TILES, len(times))),
            "best of twelve, top-k": top_k(problem, target, times, 0).round()[:MOST_TILES],
        }
        for name, experience in others.items():
            order = experience.likeliest(problem)
            orders |= {f"without a trial, by {name}": order[:1], f"best of twelve, likeliest by {name}": order}
        for name, order in orders.items():
            fastest = min(simulation.true_time(problem, candidate) for candidate in order)
            found.setdefault(name, {})[problem.describe()] = max(0.0, math.log(fastest / min(times.values())))
    return found


def twelve_figures(seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """The regrets of one or more simulated devices, the share of problems with next to none, and the problems that make
    the tails of what is shipped.
    """
    figures: dict[str, Any] = {"cases": sum(len(next(iter(found.values()))) for found in seeds)}
    for name in seeds[0]:
        rows = [(regret, problem) for found in seeds for problem, regret in found[name].items()]
        regrets = [regret for regret, _ in rows]
        figures[name] = {
            "geomean": round(math.expm1(statistics.fmean(regrets)), 4),
            "p95": round(math.expm1(percentile(regrets, 0.95)), 4),
            "within 5%": round(sum(regret <= math.log(1.05) for regret in regrets) / len(regrets), 4),
        }
        if "problems" in name:
            worst = sorted(rows, reverse=True)[:_WORST]
            figures[name]["worst"] = [f"{problem}: {math.expm1(regret):.3f}" for regret, problem in worst]
    return figures


def further_layers() -> list[Workload]:
    """Layers of networks and of the scaling sweeps."""
    return [*layers.networks(), *(layer for sweep in layers.sweeps() for layer in sweep.workloads.values())]


def simulated_cases(seed: int) -> list[tuple[Problem, Target, dict[Candidate, float]]]:
    """The exhaustive tables of all flagships and their gradients on one simulated device."""
    simulation = Simulation(seed=seed)
    return [(problem, simulation.target, table(problem, simulation)) for problem in known_problems().values()]


def recorded_tables(trials: Path) -> dict[str, Table]:
    """Recorded trials of known problems, with the times of the finals where there are some."""
    shipped = {
        file.kernel: file
        for path, file in files(configs.shipped_folder())
        if isinstance(file, ConfigFile) and path.parent.name == trials.parent.name
    }
    known = known_problems()
    return {key: found for key, found in corrected(tables(read_trials(trials)), shipped).items() if key in known}


def complete(recorded: Mapping[str, Table], target: Target) -> set[str]:
    """The problems that were tried with every tile of a portfolio of the others: of these nothing is guessed."""
    costs, problems = won(recorded), known_problems()
    return {key for key, table in recorded.items() if not lacking(costs, table, problems[key], target)}


def portfolio_figures(recorded: Mapping[str, Table], target: Target, radius: float) -> dict[str, Any]:
    """Portfolios on problems left out, by kernel and over all of them; and over those with complete trials, which
    alone the others' tiles can be judged by. A kernel with a single problem has no others: it is none of these.
    """
    whole, judged_whole = complete(recorded, target), list[Judged]()
    problems, every, found, possible = known_problems(), [], {}, list[float]()
    for kernel, costs in won(recorded).items():
        defaults = {key: default_tile(kernel, problems[key], target) for key in costs}
        judged = leave_one_out(costs, defaults, radius, passed_over(kernel, problems, target))
        found[kernel] = summary(judged)
        every += judged
        judged_whole += [one for one in judged if one.problem in whole and len(costs) > 1]
        possible += best_of_others(costs)
    bound = {"judged": len(possible), "geomean": round(math.expm1(statistics.fmean(possible or [0.0])), 4),
             "p95": round(math.expm1(percentile(possible or [0.0], 0.95)), 4)}  # fmt: skip
    return {
        "radius": radius,
        "all": summary(every),
        "problems with complete trials": summary(judged_whole),
        "best tile of the portfolio, whoever chose it": bound,
    } | found


def best_of_others(costs: Costs) -> list[float]:
    """Of each problem the logarithm of the regret of the best tile, of those tried on it, that a portfolio of the other
    problems has: what no rule of choosing among its tiles can be better than.
    """
    found = []
    for problem, row in costs.items():
        tiles = choose({other: costs[other] for other in costs if other != problem})
        found += [min(row[tile] for tile in tiles if tile in row)] if set(tiles) & set(row) else []
    return found


# ----------------------------------------------------------------------------------------------- compiles, look-ups


def look_ups(entries: int = 1000) -> dict[str, float]:
    """Microseconds of a warm plan, and milliseconds of the first one with a file of so many entries."""
    problem, target = known_problems()["n8 c512-512 hw65x65 k3x3 s1x1 p4x4 d4x4 g1 bfloat16 NHWC"], KNOWN["sm_90"]
    dispatch.plan(problem, target)
    warm = []
    for _ in range(2000):
        start = time.perf_counter_ns()
        dispatch.plan(problem, target)
        warm.append((time.perf_counter_ns() - start) / 1e3)
    with tempfile.TemporaryDirectory() as folder:
        tile = default_tile("implicit_gemm", problem, target)
        entry = Entry(tile, 1.0, (1.0, 1.0), 1.0, 1e-3, 1)
        rows = {problem.describe().replace("n8 ", f"n{8 + i} ", 1): entry for i in range(entries)}
        ConfigFile("implicit_gemm", target, environment(), rows).write(Path(folder))
        before, configs.FOLDERS = configs.FOLDERS, (("user tuned", lambda: Path(folder)), configs.FOLDERS[1])
        first = []
        try:
            for _ in range(20):
                configs.forget()
                dispatch.plan.cache_clear()
                start = time.perf_counter_ns()
                dispatch.plan(problem, target)
                first.append((time.perf_counter_ns() - start) / 1e6)
        finally:
            configs.FOLDERS = before
            configs.forget()
            dispatch.plan.cache_clear()
    return {"warm_us": round(statistics.median(warm), 3), "first_ms": round(statistics.median(first), 3),
            "entries": entries}  # fmt: skip


def overshoot(runs: int = 10, seconds: float = 10.0) -> dict[str, Any]:
    """Real runs of the command on a simulated device that takes its time: seconds past the budget of the search."""
    found = []
    for seed in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "outcome.json"
            device = f"simulated:h100,pace=1,seed={seed},hang=0.02,crash=0.02"
            subprocess.run(
                [sys.executable, "-m", "triton_conv.cli", "tune", "--workload", "all", "--budget", str(seconds),
                 "--device", device, "--store", folder, "--json", str(file)],
                check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ,
            )  # fmt: skip
            found.append(json.loads(file.read_text())["seconds"] / seconds - 1)
    return {
        "runs": runs,
        "budget_s": seconds,
        "worst": round(max(found), 4),
        "median": round(statistics.median(found), 4),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf_plots.tuner", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the figures are kept")
    parser.add_argument(
        "--trials", type=Path, default=_TRIALS, metavar="FILE",
        help="a journal of trials of this package's sm_90 kernels (default: those measured on an H100)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="simulated devices")
    parser.add_argument("--runs", type=int, default=0, help="runs against the clock, for the overshoot")
    options = parser.parse_args(argv)
    figures: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    figures["environment"] = environment()

    def keep(name: str, value: Any) -> None:
        figures[name] = value
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
        print(f"{name}: {json.dumps(value, indent=1)}", flush=True)

    keep("look-ups", look_ups())
    if options.seeds:
        twelve = []
        for seed in range(1, options.seeds + 1):
            cases = simulated_cases(seed)
            others = experiences(seed, cases)
            searched = search_figures(cases, _TRIALS_SIMULATED, others=others)
            keep(f"search, simulated tables, seed {seed}", searched)
            twelve.append(twelve_regrets(seed, cases, others))
            keep(f"twelve tiles, simulated tables, seed {seed}", twelve_figures(twelve[-1:]))
            whole = {p.describe(): {c: Trial(t, 0.0) for c, t in times.items()} for p, _, times in cases}
            keep(f"portfolio, simulated tables, seed {seed}", portfolio_figures(whole, cases[0][1], 8.0))
        if len(twelve) > 1:
            keep("twelve tiles, simulated tables, all seeds", twelve_figures(twelve))
    if options.trials.is_file():
        recorded, target, known = recorded_tables(options.trials), KNOWN["sm_90"], known_problems()
        times = {key: {c: t.time_us for c, t in found.items() if not t.failure} for key, found in recorded.items()}
        keep(
            "search, recorded trials",
            search_figures([(known[k], target, t) for k, t in times.items()], _TRIALS_RECORDED, each=True),
        )
        for radius in (1.0, 3.0, 8.0):
            keep(f"portfolio, recorded trials, radius {radius:g}", portfolio_figures(recorded, target, radius))
    if options.runs:
        keep("overshoot", overshoot(options.runs))
    for arch, value in shared_memory.figures().items():
        if isinstance(value, dict):
            keep(f"shared memory, {arch}", value)
    return 0


if __name__ == "__main__":
    sys.exit(main())
