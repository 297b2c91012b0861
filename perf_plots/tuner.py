"""What the tuner is worth, in figures: `python -m perf_plots.tuner --out FILE`, no GPU needed.

Regret of the search on simulated tables and on recorded trials, beside random search and a plain top-k; of portfolios
on problems left out; what the shared-memory formula misses over real compiles (`--compiles N` an architecture);
look-ups; how far runs pass their budget. A figure says on what it was computed; simulated tables are no measurement.
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
from triton_conv.aot import Job, compile_all
from triton_conv.autotune.lab import Trial
from triton_conv.autotune.portfolio import choose, leave_one_out, percentile, summary, won
from triton_conv.autotune.replay import Table, read_trials, tables
from triton_conv.autotune.search import Candidate, Search, cost_of
from triton_conv.autotune.simulated import Simulation, table
from triton_conv.autotune.space import SPACES, candidates
from triton_conv.autotune.store import environment
from triton_conv.autotune.upkeep import corrected, files, known_problems
from triton_conv.configs import ConfigFile, Entry
from triton_conv.defaults import default_tile
from triton_conv.kernels import Tile
from triton_conv.problem import DeformInputGradientProblem, Problem
from triton_conv.target import KNOWN, Target

Times = Mapping[Candidate, float]
Strategy = Callable[[Problem, Target, Times, int], Any]

_TRIALS_SIMULATED, _TRIALS_RECORDED = (16, 32, 96), (4, 8, 16)
_NOISE = 0.01


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


STRATEGIES: dict[str, Strategy] = {"ours": ours, "random": at_random, "top-k": top_k}


def seeded(cases: Sequence[tuple[Problem, Target, Times]]) -> Strategy:
    """Ours, after a portfolio of all problems but the one that is searched."""
    tables = {p.describe(): {c: Trial(t, 0.0) for c, t in times.items()} for p, _, times in cases}
    costs = won(tables)

    def strategy(problem: Problem, target: Target, times: Times, seed: int) -> Search:
        others = {
            kernel.name: {key: row for key, row in costs.get(kernel.name, {}).items() if key != problem.describe()}
            for kernel in dispatch.forms(problem, target)[0]
        }
        seeds = [Candidate(name, tile) for name, rows in others.items() for tile in choose(rows)]
        return Search(problem, target, spaces(problem, target, times), seeds)

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


def search_figures(cases: Sequence[tuple[Problem, Target, Times]], counts: Sequence[int]) -> dict[str, Any]:
    """Regret of each strategy: geometric mean and 95th percentile over the cases, by trials."""
    figures: dict[str, Any] = {"cases": len(cases)}
    for name, strategy in (STRATEGIES | {"ours, with the portfolio of the others": seeded(cases)}).items():
        rows = [regrets(strategy(p, goal, times, i), times, counts, i) for i, (p, goal, times) in enumerate(cases)]
        figures[name] = {
            str(count): {
                "geomean": round(math.expm1(statistics.fmean(row[i] for row in rows)), 4),
                "p95": round(math.expm1(percentile([row[i] for row in rows], 0.95)), 4),
            }
            for i, count in enumerate(counts)
        }
    return figures


def simulated_cases(seed: int) -> list[tuple[Problem, Target, dict[Candidate, float]]]:
    """The exhaustive tables of all flagships and their gradients on one simulated device."""
    simulation = Simulation(seed=seed)
    return [(problem, simulation.target, table(problem, simulation)) for problem in _tunable().values()]


def _tunable() -> dict[str, Problem]:
    every = known_problems()
    return {key: problem for key, problem in every.items() if not isinstance(problem, DeformInputGradientProblem)}


def recorded_tables(trials: Path) -> dict[str, Table]:
    """Recorded trials of known problems, with the times of the finals where there are some."""
    shipped = {
        file.kernel: file
        for path, file in files(configs.shipped_folder())
        if isinstance(file, ConfigFile) and path.parent.name == trials.parent.name
    }
    known = _tunable()
    return {key: found for key, found in corrected(tables(read_trials(trials)), shipped).items() if key in known}


def portfolio_figures(recorded: Mapping[str, Table], target: Target, radius: float) -> dict[str, Any]:
    """Portfolios on problems left out, by kernel and over all of them."""
    problems, every, found = _tunable(), [], {}
    for kernel, costs in won(recorded).items():
        judged = leave_one_out(costs, {key: default_tile(kernel, problems[key], target) for key in costs}, radius)
        found[kernel] = summary(judged)
        every += judged
    return {"radius": radius, "all": summary(every)} | found


# ----------------------------------------------------------------------------------------------- compiles, look-ups


def shared_memory(arch: str, count: int, seed: int = 0) -> dict[str, Any]:
    """What the count of shared memory says and what the compiler takes, of tiles drawn from all spaces."""
    target, draw = KNOWN[arch], random.Random(seed)
    problems = list(_tunable().values())
    jobs: list[Job] = []
    while len(jobs) < count:
        problem = draw.choice(problems)
        kernel = draw.choice(dispatch.forms(problem, target)[0])
        space = SPACES[kernel.name]
        tile = kernel.tile_type(**{name: draw.choice(values) for name, values in space.items()})
        share = tile.shared_bytes(problem) / target.shared_bytes if tile.mismatch(problem) is None else 0.0
        # Half of them where a wrong count would decide; a tile of no use says nothing.
        if 0.4 < share < 2.5 or (0.05 < share < 2.5 and len(jobs) % 2):
            jobs.append(Job(kernel.name, problem, tile, target))
    missed = false = under = compiled = 0
    worst: list[str] = []
    for index, row in compile_all(jobs):
        if row.error:
            continue
        compiled += 1
        counted = jobs[index].tile.shared_bytes(jobs[index].problem)
        fits, counted_fits = row.shared_bytes <= target.shared_bytes, counted <= target.shared_bytes
        missed += counted_fits and not fits
        false += fits and not counted_fits
        under += row.shared_bytes > counted
        if fits != counted_fits or row.shared_bytes > counted:
            worst.append(f"{row.kernel} {row.dtype} {row.tile}: counted {counted}, takes {row.shared_bytes}")
    return {"drawn": count, "compiled": compiled, "missed": missed, "false_alarms": false, "undercounted": under,
            "false_alarm_share": round(false / max(compiled, 1), 4), "examples": worst[:20]}  # fmt: skip


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


def overshoot(runs: int = 10, seconds: float = 6.0) -> dict[str, Any]:
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
        "--trials", type=Path, metavar="FILE", help="a journal of trials of this package's sm_90 kernels"
    )
    parser.add_argument("--seeds", type=int, default=3, help="simulated devices")
    parser.add_argument("--compiles", type=int, default=0, metavar="N", help="compile so many tiles an architecture")
    parser.add_argument("--arch", choices=KNOWN, action="append", help="only this architecture (repeatable)")
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
        for seed in range(1, options.seeds + 1):
            cases = simulated_cases(seed)
            keep(f"search, simulated tables, seed {seed}", search_figures(cases, _TRIALS_SIMULATED))
            whole = {p.describe(): {c: Trial(t, 0.0) for c, t in times.items()} for p, _, times in cases}
            keep(f"portfolio, simulated tables, seed {seed}", portfolio_figures(whole, cases[0][1], 8.0))
    if options.trials:
        recorded, target, known = recorded_tables(options.trials), KNOWN["sm_90"], _tunable()
        times = {key: {c: t.time_us for c, t in found.items() if not t.failure} for key, found in recorded.items()}
        keep(
            "search, recorded trials",
            search_figures([(known[k], target, t) for k, t in times.items()], _TRIALS_RECORDED),
        )
        for radius in (1.0, 3.0, 8.0):
            keep(f"portfolio, recorded trials, radius {radius:g}", portfolio_figures(recorded, target, radius))
    if options.runs:
        keep("overshoot", overshoot(options.runs))
    for arch in (options.arch or KNOWN) if options.compiles else ():
        keep(f"shared memory, {arch}", shared_memory(arch, options.compiles))
    return 0


if __name__ == "__main__":
    sys.exit(main())
