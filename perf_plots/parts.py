"""Figures of a whole device by part of a training step: the saving, the share of the limit, what tuning brought."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from triton_conv.workloads import Workload

from .cases import label
from .measured import badge, footer
from .overview import Line, Scale, draw_marks
from .record import Record
from .rows import Chart
from .store import DeviceResults
from .style import BLACK, BLUE, GREEN, GREY, KIND_COLOURS, ORANGE, Mark
from .trials import Times, tuned

PART_MARKS = {
    "forward": Mark("forward", BLUE, "o", size=8),
    "input gradient": Mark("input gradient", ORANGE, "s", size=7),
    "weight gradient": Mark("weight gradient", GREEN, "D", filled=False, size=6.5),
}
_HEADS = ["forward", "input", "weight"]
_ACHIEVED = Mark("achieved, measured", BLUE, "o", size=8)
_COUNTED = Mark("by the count, computed", BLACK, "|", size=12)


def saving(records: Sequence[Record], results: DeviceResults, what: str, stem: Path) -> list[Path]:
    """Over the standard convolution: the achieved saving beside the computed one, kind after kind."""
    kinds = list(KIND_COLOURS)
    lines = [
        Line(label(record.workload), (record.speedup(True), record.saving))
        for record in sorted(records, key=lambda r: (kinds.index(r.workload.kind), r.saving or 0.0))
        if record.speedup(True) and record.saving
    ]
    chart = Chart(
        f"Saving over the standard convolution: {what}",
        f"{results.title}; bars: computed from the device's limits",
        badge(results),
        "Beyond a bar: the standard convolution is further from its own limit. " + footer(list(records)),
    )
    scale = Scale("times less time than the standard convolution (log scale)", losses=True)
    return draw_marks(chart, lines, scale, [_ACHIEVED, _COUNTED], ["achieved", "by count"], stem)


def shares(records: Sequence[Record], results: DeviceResults, stem: Path) -> list[Path]:
    """How much of the roofline limit every case reaches, in the order of the worst part."""
    found = results.by_title()
    chart = Chart(
        "Share of the limit", f"Computed limit / measured time, {results.title}", badge(results), footer(list(records))
    )
    lines = _lines(records, lambda workload: found[workload.title].share if workload.title in found else None)
    scale = Scale("share of the roofline limit", share=True)
    return draw_marks(chart, lines, scale, list(PART_MARKS.values()), _HEADS, stem)


def tuning(records: Sequence[Record], results: DeviceResults, times: Times, stem: Path) -> list[Path]:
    """The fastest tile over the analytic default; nothing where no default was tried."""
    target = results.target
    if target is None:
        return []

    found = results.by_title()

    def gain(workload: Workload) -> float | None:
        what = tuned(workload, times, target, found.get(workload.title))
        return what.gain if what else None

    lines = _lines(records, gain)
    lines.sort(key=lambda line: (bool(line.missing), max((f for f in line.factors if f), default=0.0)))
    if not any(factor for line in lines for factor in line.factors):
        return []
    trials = sum(map(len, times.values()))
    chart = Chart(
        "Tuned against default tiles",
        f"{results.title}, {trials} tiles timed; absent: the default was not tried",
        badge(results),
        "Defaults: by the rules of now, which these trials helped to find. " + footer(list(records)),
    )
    scale = Scale("times as fast as the default tile (log scale)")
    return draw_marks(chart, lines, scale, list(PART_MARKS.values()), _HEADS, stem)


def _lines(records: Sequence[Record], value: Callable[[Workload], float | None]) -> list[Line]:
    """A line a layer, a factor for each part of its training step, the lowest first."""
    layers = {record.workload.layer.title: record.workload.layer for record in records}
    lines = []
    for layer in layers.values():
        factors = tuple(value(part) for part in layer.parts())
        lines.append(Line(layer.name, factors, "" if any(factors) else "absent", GREY))
    return sorted(lines, key=lambda line: (bool(line.missing), min((f for f in line.factors if f), default=0.0)))
