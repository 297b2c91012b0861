"""The static model against the measurements: how wrong it is, where, and whether it ranks tiles.

    python -m perf_plots.predictions            the error over all trials, and the page of predicted shares
    python -m perf_plots.predictions --fit      the constants that fit the trials best, and the error on cases left out

Predictions are computed, never measured, and say so; times are those of the device's journal of trials. The figure is
drawn by `python -m perf_plots`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from triton_conv.amounts import number
from triton_conv.autotune.search import cost_of
from triton_conv.kernels import KERNELS
from triton_conv.static_model.machine import MACHINES, TERMS, Machine
from triton_conv.target import KNOWN
from triton_conv.workloads import FLAGSHIPS

from . import prediction_page
from .model_fit import fit
from .style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, Mark, Sheet, duration, log_ticks, paint
from .trial_demands import DEMANDS, Counted, read

# The host of an H100 now and then adds milliseconds to a trial that is run but once.
_HICCUP_US, _HICCUP = 1000.0, 8.0
# A case is ranked if so many of its tiles were tried.
_RANKED = 8
_FOLDS = 10
_COLOURS = {
    "memory": (BLUE, ("device memory", "L2", "L1 and shared memory")),
    "instructions": (
        ORANGE,
        ("instruction issue", "integer and float units", "special functions", "memory instructions"),
    ),
    "tensor cores": (GREEN, ("tensor cores",)),
    "latency": (PURPLE, ("latency",)),
}


@dataclass(frozen=True)
class Judged:
    """A trial beside its prediction in microseconds, and the term that is said to bind it."""

    trial: Counted
    predicted_us: float
    binds: str

    @property
    def factor(self) -> float:
        """Predicted over measured."""
        return self.predicted_us / self.trial.time_us

    @property
    def hiccup(self) -> bool:
        """Whether the time is one that no kernel takes: left out of the figures, and counted."""
        return self.trial.time_us - self.predicted_us > _HICCUP_US and self.factor * _HICCUP < 1


def judge(trials: Sequence[Counted], machine: Machine) -> list[Judged]:
    """Every trial with its prediction."""
    found = []
    for trial in trials:
        seconds, binds = machine.predict(trial.demand)
        found.append(Judged(trial, 1e6 * seconds, TERMS[binds]))
    return found


@dataclass(frozen=True)
class Error:
    """How far predictions are off: `typical` and `mean` as factors (median and geometric mean), `bias` above 1 where
    they are too long, the share `within` a quarter.
    """

    count: int
    typical: float
    mean: float
    bias: float
    within: float

    @classmethod
    def of(cls, judged: Sequence[Judged]) -> Error:
        logs = [math.log(one.factor) for one in judged]
        sizes = [abs(log) for log in logs]
        return cls(
            len(judged),
            math.exp(statistics.median(sizes)),
            math.exp(statistics.fmean(sizes)),
            math.exp(statistics.median(logs)),
            sum(size < math.log(1.25) for size in sizes) / len(sizes),
        )

    def __str__(self) -> str:
        return (
            f"{self.count} trials: off by {self.typical:.2f}x (median), {self.mean:.2f}x (geometric mean), "
            f"{self.within:.0%} within a quarter, bias {self.bias:.2f}"
        )


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of two lists without order between them; ties in the order of the list."""
    first, second = _ranks(a), _ranks(b)
    return statistics.correlation(first, second)


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    for place, index in enumerate(order):
        ranks[index] = float(place)
    return ranks


@dataclass(frozen=True)
class Ranking:
    """How well an order of the tiles of one kernel and case finds the fast ones, over all such groups: the mean rank
    correlation with the times, and how much slower the best of the first one and four is than the best of all.
    """

    groups: int
    correlation: float
    first: float
    four: float

    def __str__(self) -> str:
        return (
            f"{self.groups} groups: rank correlation {self.correlation:.2f}; the first tile {self.first:.2f}x, the "
            f"best of four {self.four:.2f}x the fastest"
        )


def groups(judged: Sequence[Judged]) -> dict[tuple[str, str], list[Judged]]:
    """The trials of each case and kernel that has enough of them."""
    found: dict[tuple[str, str], list[Judged]] = {}
    for one in judged:
        if not one.hiccup:
            found.setdefault((one.trial.workload, one.trial.kernel), []).append(one)
    return {key: group for key, group in sorted(found.items()) if len(group) >= _RANKED}


def ranking(found: Mapping[tuple[str, str], list[Judged]], order: Callable[[Judged], float]) -> Ranking:
    """The worth of an order, smaller first."""
    correlations, first, four = [], [], []
    for group in found.values():
        times = [one.trial.time_us for one in group]
        correlations.append(rank_correlation([order(one) for one in group], times))
        ordered = [one.trial.time_us for one in sorted(group, key=order)]
        first.append(math.log(ordered[0] / min(times)))
        four.append(math.log(min(ordered[:4]) / min(times)))
    return Ranking(
        len(found), statistics.fmean(correlations), math.exp(statistics.fmean(first)), math.exp(statistics.fmean(four))
    )


def by_count(found: Mapping[tuple[str, str], list[Judged]]) -> dict[int, float]:
    """The order that the tuner's funnel has today, by line of the trial, of the kernels that it has one for."""
    target, costs = KNOWN["sm_90"], dict[int, float]()
    problems = {part.title: part.problem() for workload in FLAGSHIPS for part in workload.parts()}
    for (title, kernel), group in found.items():
        if (cost := cost_of(kernel, problems[title], target)) is not None:
            tile_type = KERNELS[kernel].tile_type
            costs |= {one.trial.line: cost(tile_type(**one.trial.tile)) for one in group}
    return costs


def cross_validated(trials: Sequence[Counted], machine: Machine) -> list[Judged]:
    """Every trial predicted with constants that were fitted without its case."""
    cases = sorted({trial.workload for trial in trials})
    found: list[Judged] = []
    for fold in range(_FOLDS):
        left_out = set(cases[fold::_FOLDS])
        own = fit([trial for trial in trials if trial.workload not in left_out], machine)
        found += judge([trial for trial in trials if trial.workload in left_out], own)
    return sorted(found, key=lambda one: one.trial.line)


def lines(judged: Sequence[Judged]) -> list[str]:
    """The error in words: over all, by kernel, and the worst."""
    sound = [one for one in judged if not one.hiccup]
    told = [str(Error.of(sound)), f"left out: {len(judged) - len(sound)} times of one run that the host interrupted"]
    for kernel in sorted({one.trial.kernel for one in sound}):
        own = [one for one in sound if one.trial.kernel == kernel]
        counts = {binds: sum(one.binds == binds for one in own) for binds in {one.binds for one in own}}
        most = ", ".join(
            f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:3]
        )
        told.append(f"  {kernel}: {Error.of(own)}; bound by {most}")
    clean = [one for one in sound if not one.trial.spilled]
    told.append(f"without a spill: {Error.of(clean)}")
    every = groups(sound)
    told.append(f"ranking, every kernel: {ranking(every, lambda one: one.predicted_us)}")
    costs = by_count(every)
    counted = {key: group for key, group in every.items() if group[0].trial.line in costs}
    told.append(f"ranking, products, this model: {ranking(counted, lambda one: one.predicted_us)}")
    told.append(f"ranking, products, the funnel's count: {ranking(counted, lambda one: costs[one.trial.line])}")
    worst = sorted(sound, key=lambda one: -abs(math.log(one.factor)))[:8]
    told += ["worst:"] + [
        f"  {one.trial.workload} {one.trial.kernel}: {one.predicted_us:.0f} us predicted, {one.trial.time_us:.0f} "
        f"measured, {one.trial.spilled} bytes spilled, {one.binds}"
        for one in worst
    ]
    return told


def figure(stem: Path, judged: Sequence[Judged] | None = None) -> list[Path]:
    """Predicted against measured times of trials, by what is said to bind them; of all committed ones by default."""
    judged = judge(read(), MACHINES["sm_90"]) if judged is None else judged
    sound = [one for one in judged if not one.hiccup]
    error = Error.of(sound)
    title = f"{len(sound)} tiles: median error {error.typical:.2f}x, geometric mean {error.mean:.2f}x"
    sheet = Sheet("Static model: predicted against measured", title, "COMPUTED and MEASURED", 4.6, 1)
    axes = sheet.axes
    left, bottom, width, height = axes.get_position().bounds
    axes.set_position((left + 0.1 * width, bottom, 0.88 * width, height))
    times = [time for one in sound for time in (one.trial.time_us, one.predicted_us)]
    low, high = min(times) / 1.3, max(times) * 1.3
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.plot([low, high], [low, high], color=BLACK, linewidth=1.0)
    for factor in (0.5, 2.0):
        axes.plot([low, high], [factor * low, factor * high], "--", color=GREY, linewidth=0.8)
    marks = []
    for name, (colour, terms) in _COLOURS.items():
        mark = Mark(name, colour, "o", size=3.5)
        own = [one for one in sound if one.binds in terms]
        x, y = [one.trial.time_us for one in own], [one.predicted_us for one in own]
        style = paint(mark) | {"markeredgewidth": 0.2}
        # Thousands of dots take less room as pixels.
        axes.plot(x, y, linestyle="none", marker="o", markersize=mark.size, alpha=0.7, rasterized=True, **style)
        marks.append(replace(mark, size=7.0))
    log_ticks(axes, duration)
    log_ticks(axes, duration, "y")
    axes.tick_params(axis="y", labelleft=True)
    axes.set_xlabel("measured time (log scale)", size=9.5)
    axes.text(0.02, 0.985, "predicted (log scale)", transform=axes.transAxes, size=9, va="top", color=GREY)
    sheet.legend(marks, 4)
    footer = (
        "Every tile that was tried on an H100 (trials.jsonl), predicted from its machine code and geometry; colours: "
        f"what is said to bind it. {len(judged) - len(sound)} times of one run that the host interrupted are left out. "
        "Dashed: a factor of two."
    )
    return sheet.save(footer, stem)


def main(arguments: list[str] | None = None) -> int:
    """Prints the error; writes the page, or fits."""
    parser = argparse.ArgumentParser(prog="python -m perf_plots.predictions", description=__doc__.partition("\n")[0])
    parser.add_argument("--fit", action="store_true", help="fit the constants, and judge them on cases left out")
    parser.add_argument("--demands", type=Path, default=DEMANDS)
    parser.add_argument("--page", type=Path, default=prediction_page.PAGE)
    parser.add_argument("--processes", type=number, metavar="N", help="compiler processes")
    options = parser.parse_args(arguments)
    trials, machine = read(options.demands), MACHINES["sm_90"]
    if options.fit:
        print(fit(trials, machine))
        left_out = cross_validated(trials, machine)
        print("on cases left out of the fit:", *lines(left_out), sep="\n")
        return 0
    told = lines(judge(trials, machine))
    print(*told, sep="\n")
    prediction_page.write(options.page, told, trials, options.processes)
    print(f"{options.page} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
