"""The plot of all cases at once: a line a case, sorted, factors on a log axis around one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .rows import Chart
from .style import BLACK, GREY, VERMILLION, Mark, Sheet, log_ticks, paint, ratio

_LINE = 0.235
# Shares of the width: names to the left, and to the right a column of numbers for each mark, or room for the last tick.
_NAMES, _COLUMN, _MARGIN = 0.29, 0.115, 0.045


@dataclass(frozen=True)
class Line:
    """One case: a factor for every mark of the figure, None where there is none; or why there is none at all."""

    name: str
    factors: tuple[float | None, ...]
    missing: str = ""
    colour: str = BLACK


def draw_bars(chart: Chart, lines: list[Line], label: str, legend: list[Mark], stem: Path) -> list[Path]:
    """A bar from one for the only factor of each line, in the line's colour, the factor written at its end."""
    sheet = _sheet(chart, lines, label, legend, _MARGIN)
    axes = sheet.axes
    for y, line in enumerate(lines):
        factor = line.factors[0] or 1.0
        axes.barh(y, factor - 1, left=1, height=0.62, color=line.colour, edgecolor="none")
        if abs(factor - 1) < 0.05:
            # A bar of no length would not show its colour.
            axes.plot([factor], [y], linestyle="none", marker="s", markersize=6, color=line.colour)
        axes.annotate(
            ratio(factor), xy=(max(factor, 1.0), y), xytext=(8, 0), textcoords="offset points", va="center", ha="left",
            size=9, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    return sheet.save(chart.footer, stem)


def draw_marks(
    chart: Chart, lines: list[Line], label: str, marks: list[Mark], heads: list[str], stem: Path
) -> list[Path]:
    """A mark for every factor; the numbers stand in columns to the right, losses in another colour."""
    sheet = _sheet(chart, lines, label, marks, _COLUMN * len(marks), least=4.0)
    axes = sheet.axes
    beside = axes.get_yaxis_transform()
    axes.axvspan(axes.get_xlim()[0], 1, color=VERMILLION, alpha=0.08, linewidth=0, zorder=0)
    # Share of the plot's own width that a column of numbers takes.
    column = _COLUMN / (1 - _NAMES - _COLUMN * len(marks))
    for index, head in enumerate(heads):
        axes.text(1 + column * (index + 1), -0.9, head, transform=beside, ha="right", va="center", size=8.5, color=GREY)
    for y, line in enumerate(lines):
        for index, (mark, factor) in enumerate(zip(marks, line.factors, strict=True)):
            if factor is not None:
                axes.plot([factor], [y], linestyle="none", marker=mark.marker, markersize=mark.size, zorder=9 - index,
                          **paint(mark))  # fmt: skip
            number = ratio(factor) if factor is not None else "–" if line.missing else "absent"
            colour = GREY if factor is None else VERMILLION if factor < 0.995 else BLACK
            right = 1 + column * (index + 1)
            axes.text(right, y, number, transform=beside, ha="right", va="center", size=9, color=colour)
        if line.missing:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
            axes.text(0.05, y, line.missing, transform=beside, va="center", size=8.5, color=line.colour, bbox=box)
    return sheet.save(chart.footer, stem)


def _sheet(chart: Chart, lines: list[Line], label: str, legend: list[Mark], right: float, least: float = 1.0) -> Sheet:
    """The empty plot: names, and a log axis that holds one, all factors, and at least `least` times from end to end."""
    columns = 3
    sheet = Sheet(chart.title, chart.subtitle, chart.badge, _LINE * len(lines) + 0.2, -(-len(legend) // columns))
    axes = sheet.axes
    left, bottom, width, height = axes.get_position().bounds
    axes.set_position((left + _NAMES * width, bottom, (1 - _NAMES - right) * width, height))
    factors = [factor for line in lines for factor in line.factors if factor] + [1.0]
    low, high = min(factors), max(factors)
    pad = max((high / low) ** 0.06, (least / (high / low)) ** 0.5, 1.06)
    axes.set_xscale("log")
    # Beyond the longest bar its number is written.
    axes.set_xlim(low / pad, high * pad * (pad if least > 1 else max((high / low) ** 0.12, 1.3)))
    log_ticks(axes, lambda value: f"{value:g}×")
    axes.set_xlabel(label, size=9.5)
    axes.set_ylim(len(lines) - 0.4, -1.3 if least > 1 else -0.7)
    axes.axvline(1, color=BLACK, linewidth=1.0, zorder=1)
    for y, line in enumerate(lines):
        axes.text(-0.02, y, line.name, transform=axes.get_yaxis_transform(), ha="right", va="center", size=9)
    sheet.legend(legend, columns)
    return sheet
