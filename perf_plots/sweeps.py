"""Scaling figures: the time of one layer at growing values of one number, ours and the others'."""

from __future__ import annotations

from pathlib import Path

from matplotlib.ticker import NullFormatter

from . import layers
from .cases import describe
from .layers import Sweep
from .measured import badge, footer
from .record import Record
from .rows import Chart
from .store import DeviceResults
from .style import BLACK, BLUE, FAINT, GREEN, GREY, ORANGE, Mark, Sheet, log_ticks, paint, tick

_TICKS, _BODY = 0.11, 3.2
_OURS, _LIBRARY = Mark("triton_conv", BLUE, "o"), Mark("fastest other library", ORANGE, "s")
_STANDARD, _LIMIT = Mark("standard convolution", GREEN, "D", filled=False, size=7), Mark("computed limit", BLACK, "_")


def found(device: DeviceResults) -> list[tuple[Sweep, dict[int, Record]]]:
    """The sweeps of which there are at least two times on a device, with their records."""
    by_title = device.by_title()
    points = [
        (sweep, {value: by_title[w.title] for value, w in sweep.workloads.items() if w.title in by_title})
        for sweep in layers.sweeps()
    ]
    return [(sweep, at) for sweep, at in points if sum(r.ours_us is not None for r in at.values()) > 1]


def _verdict(points: dict[int, Record]) -> str:
    """Where the kind wins over the standard convolution, and where there is no time."""
    both = {value: factor for value, record in points.items() if (factor := record.speedup(True))}
    wins = [str(value) for value, factor in both.items() if factor >= 1]
    failed = [str(value) for value, record in points.items() if record.ours_us is None]
    where = "everywhere" if len(wins) == len(both) else f"at {', '.join(wins)}" if wins else "nowhere"
    told = f"Faster than the standard convolution {where}." if both else "No time of the standard convolution."
    return told + (f" Failed: {', '.join(failed)}." if failed else "")


def figure(sweep: Sweep, points: dict[int, Record], device: DeviceResults, stem: Path) -> list[Path]:
    """Four lines over the values; a value without a time is a gap in the line."""
    records = list(points.values())
    chart = Chart(
        f"Scaling: {sweep.title}",
        f"{device.title}; largest: {describe(sweep.workloads[max(sweep.workloads)])}",
        badge(device),
        f"{_verdict(points)} {footer(records)}",
    )
    sheet = Sheet(chart.title, chart.subtitle, chart.badge, _BODY, 2)
    axes = sheet.axes
    left, bottom, width, height = axes.get_position().bounds
    axes.set_position((left + _TICKS * width, bottom, (0.97 - _TICKS) * width, height))
    axes.set_xscale("log")
    axes.set_yscale("log")
    lines = {
        _LIMIT: {v: r.floor_us for v, r in points.items()},
        _STANDARD: {v: best[1] if (best := r.best(True)) else None for v, r in points.items()},
        _LIBRARY: {v: best[1] if (best := r.best(False)) else None for v, r in points.items()},
        _OURS: {v: r.ours_us for v, r in points.items()},
    }
    for mark, times in lines.items():
        values = [time if time is not None else float("nan") for time in times.values()]
        style = "--" if mark is _LIMIT else "-"
        axes.plot(list(times), values, style, color=mark.colour, linewidth=1.4, marker=mark.marker,
                  markersize=mark.size, **paint(mark))  # fmt: skip
    axes.set_xticks(list(points), [str(value) for value in points], size=9)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_xlabel(f"{sweep.title} (log scale)", size=9.5)
    log_ticks(axes, tick, "y")
    axes.tick_params(axis="y", left=False, labelleft=True, which="major", pad=2)
    axes.tick_params(axis="y", which="minor", left=False)
    axes.grid(axis="y", which="major", color=FAINT, linewidth=0.8)
    axes.set_ylabel("time of one call (log scale)", size=9, color=GREY)
    sheet.legend([_OURS, _LIBRARY, _STANDARD, _LIMIT], 2)
    return sheet.save(chart.footer, stem)
