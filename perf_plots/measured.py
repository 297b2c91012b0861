"""Figures of what was measured on a device: ours, other libraries, the standard convolution, the computed limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from triton_conv.workloads import FORWARD, KINDS, Workload

from .cases import KIND_TITLES, describe, label
from .overview import Line, Scale, draw_marks
from .record import COMPILED, LIMITS, MEASURED, OURS, REHEARSED, Record
from .rows import Chart, Point, Row
from .rows import draw as draw_rows
from .store import DeviceResults
from .style import BLACK, BLUE, FLOOR, GREEN, GREY, LOSS, MARKS, Mark, duration, ratio

_LIBRARY = Mark("over the fastest other library", BLUE, "o", size=9)
_STANDARD = Mark("over the standard convolution", GREEN, "D", filled=False, size=7)


# Sources that a footer has room to name; the files name them all.
_COMMITS = 4
NOT_MEASURED = "A rehearsal of the program: no number here was measured"


def badge(results: DeviceResults) -> str:
    return MEASURED if results.measured else REHEARSED


def origin(found: Sequence[Mapping[str, Any]]) -> str:
    """Device, versions, commits and dates of provenances, in one line."""

    def each(label: str, key: str) -> str:
        values = [_version(key, p[key]) for p in found if p.get(key) not in (None, "")]
        return f"{label}{', '.join(dict.fromkeys(values)) or 'unknown'}"

    commits = dict.fromkeys(
        f"{str(p.get('commit', 'unknown'))[:12]}{' with changes' if p.get('dirty') else ''}, "
        f"source {p.get('source', 'unknown')}"
        for p in found
    )
    named = [*list(commits)[:_COMMITS], *([f"{len(commits) - _COMMITS} more"] if len(commits) > _COMMITS else [])]
    days = sorted(str(p.get("date", "unknown"))[:10] for p in found)
    dates = " to ".join(dict.fromkeys((days[0], days[-1])))
    keys = {"driver": "driver", "CUDA": "cuda", "cuDNN": "cudnn", "torch": "torch", "triton": "triton"}
    versions = "; ".join(each(f"{label} ", key) for label, key in keys.items())
    return f"{each('', 'device')}; {versions}; commit {'; '.join(named)}; {dates}"


def _version(key: str, value: Any) -> str:
    """As its maker writes it: cuDNN tells 91900 of 9.19.0, and 8902 of 8.9.2."""
    if key != "cudnn" or not isinstance(value, int):
        return str(value)
    major, rest = divmod(value, 10_000 if value >= 90_000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def footer(records: list[Record]) -> str:
    """Where the records drawn come from, and how they were timed."""
    bases = ", ".join(dict.fromkeys(record.floor_basis for record in records if record.floor_basis)) or "none"
    method = "Medians of interleaved rounds with a cold L2 cache, 95% intervals shaded"
    if not all(record.measured for record in records):
        method = NOT_MEASURED
    unsteady = ", ".join(label(record.workload) for record in records if record.unsteady)
    unsteady = f" Unsteady, an interval is wider than half its median: {unsteady}." if unsteady else ""
    return (
        f"{origin([record.provenance for record in records])}. {method}.{unsteady} Computed limit: "
        f"roofline of the {bases}. Run by python -m perf_plots.gpu."
    )


def kind_figure(kind: str, what: str, workloads: list[Workload], results: DeviceResults, stem: Path) -> list[Path]:
    """Every case of a kind in `what`, forward pass or gradients; one without a result says so in its row."""
    found = results.by_title()
    records = [found[workload.title] for workload in workloads if workload.title in found]
    chart = Chart(KIND_TITLES[kind], f"{what} on {results.title}", badge(results), footer(records))
    rows = [
        _row(found[w.title]) if w.title in found else Row(label(w), describe(w), "not measured", GREY)
        for w in workloads
    ]
    return draw_rows(chart, rows, stem)


def others_figure(kind: str, what: str, records: list[Record], results: DeviceResults, stem: Path) -> list[Path]:
    """The same for results in other dtypes and formats, or of cases that only an earlier program had."""
    chart = Chart(
        KIND_TITLES[kind],
        f"{what} on {results.title}",
        badge(results),
        footer(records),
    )
    return draw_rows(chart, [_row(record) for record in records], stem)


def _row(record: Record) -> Row:
    workload = record.workload
    if record.ours_us is None:
        return Row(label(workload), describe(workload), f"FAILED, no time: {record.error[:70]}", LOSS)
    points = [Point(MARKS[OURS], record.ours_us, record.contestants[OURS].interval_us)]
    for name, mark in MARKS.items():
        contestant = record.contestants.get(name)
        if name != OURS and contestant and contestant.samples_us:
            lane = int(name not in LIMITS)
            points.append(Point(mark, contestant.median_us, contestant.interval_us, lane=lane))
    if record.floor_us:
        points.append(Point(FLOOR, record.floor_us))
    reasons: dict[str, list[str]] = {}
    for name, why in record.absent().items():
        reasons.setdefault(why, []).append(_label(name))
    notes = [f"absent: {' and '.join(names)} ({why})" for why, names in reasons.items()]
    if untimed := [_label(name) for name in _expected(workload) if name not in record.contestants]:
        notes.append(f"not timed yet: {', '.join(untimed)}")
    losing = any((speedup := record.speedup(standard)) and speedup < 0.995 for standard in (False, True))
    return Row(
        label(workload), describe(workload), _verdict(record), LOSS if losing else BLACK, tuple(points), tuple(notes)
    )


def _expected(workload: Workload) -> tuple[str, ...]:
    """What a case should be timed beside, but a result of an earlier program may lack."""
    compiled = workload.part == FORWARD and workload.kind in KINDS and not workload.offset_groups
    return (*((COMPILED,) if compiled else ()), *LIMITS)


def _label(name: str) -> str:
    return MARKS[name].label if name in MARKS else name


def _verdict(record: Record) -> str:
    assert record.ours_us is not None
    parts = [duration(record.ours_us) + (f", {record.share:.0%} of limit" if record.share else "")]
    for standard in (False, True):
        best, speedup = record.best(standard), record.speedup(standard)
        if best is None or speedup is None:
            parts.append(f"no time of {'the standard' if standard else 'another library'}")
        else:
            loss, other = "" if speedup >= 0.995 else "LOSS ", "standard" if standard else _label(best[0])
            saving = f" (computed: {ratio(record.saving)})" if standard and record.saving else ""
            parts.append(f"{loss}{ratio(speedup)} vs {other}{saving}")
    if OURS in record.unsteady and (interval := record.contestants[OURS].interval_us):
        parts.append(f"UNSTEADY: 95% of the median {duration(interval[0])} to {duration(interval[1])}")
    return " · ".join(parts)


def overview(what: str, workloads: list[Workload], results: DeviceResults, stem: Path) -> list[Path]:
    """Speed-ups over the fastest other library and the standard convolution, worst first; what has none comes last."""
    found = results.by_title()
    records = [found[workload.title] for workload in workloads if workload.title in found]
    lines = []
    for workload in workloads:
        record = found.get(workload.title)
        if record is None:
            lines.append(Line(label(workload), (None, None), "not measured", GREY))
        elif record.ours_us is None:
            lines.append(Line(label(workload), (None, None), "FAILED, no time", LOSS))
        else:
            lines.append(Line(label(workload), (record.speedup(False), record.speedup(True))))
    chart = Chart(
        f"Speed-up of triton_conv: {what}",
        f"{results.title}; shaded: slower than the other",
        badge(results),
        footer(records or list(results.records)),
    )
    lines.sort(key=lambda line: (bool(line.missing), line.factors[0] is None, line.factors[0] or line.factors[1] or 0))
    scale, marks = Scale("times as fast (log scale)", losses=True), [_LIBRARY, _STANDARD]
    return draw_marks(chart, lines, scale, marks, ["library", "standard"], stem)
