"""The roofline of a device with every case on it: arithmetic intensity against the rate that was reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from .floors import Limits
from .measured import badge, footer
from .record import Record
from .rows import Chart
from .store import DeviceResults
from .style import BLACK, FAINT, GREY, KIND_COLOURS, Mark, Sheet, log_ticks, paint

# Shares of the width: the rates' tick labels to the left, the names of the cases to the right.
_TICKS, _NAMES, _LINE = 0.1, 0.3, 0.2
_MARKERS = {
    "grouped": "s", "depthwise": "o", "dilated": "D", "transposed": "^", "deformable": "v", "separable": "P",
    "shuffle": "X", "local": "H",
}  # fmt: skip
_STYLES = ("-", "--", ":", "-.")


def roofline(what: str, records: Sequence[Record], results: DeviceResults, stem: Path) -> list[Path]:
    """Every case with a time; its name stands beside the plot at the height of its rate, a thin line leads to it."""
    limits = results.limits
    timed = [record for record in records if record.ours_us is not None]
    if limits is None or not timed:
        return []
    roofs = {(r.work.dtype, r.work.precision): limits.target.rate(r.work.dtype, r.work.precision) for r in timed}
    named = ", ".join(f"{rate / 1e12:.0f} TFLOP/s {dtype}" for (dtype, _), rate in roofs.items())
    chart = Chart(
        f"Roofline: {what}",
        f"{results.title}; lines: {limits.target.bandwidth / 1e12:.3g} TB/s, {named} ({limits.basis})",
        badge(results),
        footer(list(records)),
    )
    kinds = [kind for kind in KIND_COLOURS if any(record.workload.kind == kind for record in timed)]
    legend = [Mark(k, KIND_COLOURS[k], _MARKERS[k], size=7) for k in kinds]
    sheet = Sheet(chart.title, chart.subtitle, chart.badge, max(3.4, _LINE * len(timed) + 0.3), -(-len(legend) // 3))
    axes = sheet.axes
    left, bottom, width, height = axes.get_position().bounds
    axes.set_position((left + _TICKS * width, bottom, (1 - _TICKS - _NAMES) * width, height))
    _roofs(axes, timed, limits, sorted(roofs.values(), reverse=True))
    _points(axes, timed)
    sheet.legend(legend, 3)
    return sheet.save(chart.footer, stem)


def _intensity(record: Record) -> float:
    return record.work.flops / record.work.least_bytes


def _rate(record: Record) -> float:
    assert record.ours_us is not None
    return record.work.flops / (1e-6 * record.ours_us)


def _roofs(axes: Axes, records: Sequence[Record], limits: Limits, rates: list[float]) -> None:
    intensities, reached = [_intensity(r) for r in records], [_rate(r) for r in records]
    low, high = min(intensities) / 1.6, max([*intensities, 1.5 * rates[0] / limits.target.bandwidth]) * 1.6
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(min(reached) / 1.8, rates[0] * 1.8)
    for rate, style in zip(rates, _STYLES * len(rates), strict=False):
        knee = rate / limits.target.bandwidth
        points = sorted({low, max(low, knee), high})
        axes.plot(points, [min(rate, x * limits.target.bandwidth) for x in points], style, color=BLACK, linewidth=1.2)
    log_ticks(axes, lambda value: f"{value:g}")
    axes.set_xlabel("FLOP for each byte that must move (log scale)", size=9.5)
    ticks = [10.0**power for power in range(9, 17) if axes.get_ylim()[0] <= 10.0**power <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [f"{tick / 1e12:g}" for tick in ticks], size=9)
    axes.tick_params(axis="y", left=False, labelleft=True, which="major", pad=2)
    axes.tick_params(axis="y", which="minor", left=False)
    axes.grid(axis="y", which="major", color=FAINT, linewidth=0.8)
    axes.text(0.02, 0.985, "TFLOP/s (log scale)", transform=axes.transAxes, size=9, va="top", color=GREY)


def _points(axes: Axes, records: Sequence[Record]) -> None:
    """Marks, and the names of all in a column ordered as they are: lines that hardly cross lead to them."""
    ordered = sorted(records, key=lambda record: (_rate(record), _intensity(record)))
    for index, record in enumerate(ordered):
        mark = Mark("", KIND_COLOURS[record.workload.kind], _MARKERS[record.workload.kind], size=7)
        x, y, height = _intensity(record), _rate(record), (index + 0.5) / len(ordered)
        axes.plot([x], [y], linestyle="none", marker=mark.marker, markersize=mark.size, zorder=5, **paint(mark))
        axes.annotate(
            record.workload.name, xy=(x, y), xytext=(1.04, height), textcoords="axes fraction", va="center", ha="left",
            size=8.5, arrowprops={"arrowstyle": "-", "color": "#BBBBBB", "linewidth": 0.5, "relpos": (0, 0.5),
                        "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip
