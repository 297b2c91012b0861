"""The plot of all cases at once: a line a case, sorted, factors on a log axis around one, or shares of a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.ticker import FuncFormatter

from .rows import Chart
from .style import BLACK, GREY, LOSS, VERMILLION, Mark, Sheet, log_ticks, paint, ratio

_LINE = 0.235
# Shares of the width: names to the left, and to the right a column of numbers for each mark, or room for the last tick.
_NAMES, _COLUMN, _MARGIN = 0.29, 0.115, 0.045
# So many letters of the usual size fit into that share; for longer names it grows, up to a share.
_LETTERS, _MOST_NAMES = 21, 0.39
# Of a line's height, between the marks of one line.
_APART = 0.22


@dataclass(frozen=True)
class Scale:
    """What the axis means. `losses` shades what lies below one; `share` runs from zero to one, not logarithmic."""

    label: str
    losses: bool = False
    share: bool = False

    @property
    def text(self) -> Callable[[float], str]:
        return percent if self.share else ratio


def percent(value: float) -> str:
    """A share: "93%"."""
    return f"{value:.0%}"


@dataclass(frozen=True)
class Line:
    """One case: a factor for every mark of the figure, None where there is none; or why there is none at all."""

    name: str
    factors: tuple[float | None, ...]
    missing: str = ""
    colour: str = BLACK


def draw_bars(chart: Chart, lines: list[Line], label: str, legend: list[Mark], stem: Path) -> list[Path]:
    """A bar from one for the only factor of each line, in the line's colour, the factor written at its end."""
    sheet = _sheet(chart, lines, Scale(label), legend, _MARGIN, bars=True)
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
    chart: Chart, lines: list[Line], scale: Scale, marks: list[Mark], heads: list[str], stem: Path
) -> list[Path]:
    """A mark for every factor; the numbers stand in columns to the right, losses in another colour."""
    sheet = _sheet(chart, lines, scale, marks, _COLUMN * len(marks))
    axes = sheet.axes
    beside = axes.get_yaxis_transform()
    if scale.losses:
        axes.axvspan(axes.get_xlim()[0], 1, color=VERMILLION, alpha=0.08, linewidth=0, zorder=0)
    # Share of the plot's own width that a column of numbers takes.
    column = _COLUMN / (1 - _names_share(lines) - _COLUMN * len(marks))
    for index, head in enumerate(heads):
        axes.text(1 + column * (index + 1), -0.9, head, transform=beside, ha="right", va="center", size=8.5, color=GREY)
    for y, line in enumerate(lines):
        for index, (mark, factor) in enumerate(zip(marks, line.factors, strict=True)):
            if factor is not None:
                # A little apart, so that none hides another.
                height = y + _APART * (index - (len(marks) - 1) / 2)
                axes.plot(
                    [factor], [height], linestyle="none", marker=mark.marker, markersize=mark.size, zorder=9 - index,
                    **paint(mark),
                )  # fmt: skip
            number = scale.text(factor) if factor is not None else "–" if line.missing else "absent"
            loss = scale.losses and factor is not None and factor < 0.995
            colour = GREY if factor is None else LOSS if loss else BLACK
            right = 1 + column * (index + 1)
            axes.text(right, y, number, transform=beside, ha="right", va="center", size=9, color=colour)
        if line.missing:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
            axes.text(0.05, y, line.missing, transform=beside, va="center", size=8.5, color=line.colour, bbox=box)
    return sheet.save(chart.footer, stem)


def _names_share(lines: list[Line]) -> float:
    """Share of the width for the names: as the longest needs, in letters that a phone can show."""
    return min(_MOST_NAMES, max(_NAMES, _NAMES * max((len(line.name) for line in lines), default=0) / _LETTERS))


def _sheet(
    chart: Chart, lines: list[Line], scale: Scale, legend: list[Mark], right: float, bars: bool = False
) -> Sheet:
    """The empty plot: names, and an axis that holds one and all factors; without bars four times from end to end."""
    columns = 3
    sheet = Sheet(chart.title, chart.subtitle, chart.badge, _LINE * len(lines) + 0.2, -(-len(legend) // columns))
    axes = sheet.axes
    left, bottom, width, height = axes.get_position().bounds
    names = _names_share(lines)
    axes.set_position((left + names * width, bottom, (1 - names - right) * width, height))
    factors = [factor for line in lines for factor in line.factors if factor] + [1.0]
    low, high = min(factors), max(factors)
    if scale.share:
        axes.set_xlim(0, 1.06 * high)
        axes.set_xticks([0, 0.5, 1])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
        axes.tick_params(axis="x", labelsize=9)
    else:
        pad = max((high / low) ** 0.06, 1.06 if bars else (4.0 / (high / low)) ** 0.5)
        axes.set_xscale("log")
        # Beyond the longest bar its number is written.
        axes.set_xlim(low / pad, high * pad * (max((high / low) ** 0.12, 1.3) if bars else 1.0))
        log_ticks(axes, lambda value: f"{value:g}×")
    axes.set_xlabel(scale.label, size=9.5)
    axes.set_ylim(len(lines) - 0.4, -0.7 if bars else -1.3)
    axes.axvline(1, color=BLACK, linewidth=1.0, zorder=1)
    for y, line in enumerate(lines):
        size = min(9.0, 9.0 * _LETTERS * names / _NAMES / max(1, len(line.name)))
        axes.text(-0.02, y, line.name, transform=axes.get_yaxis_transform(), ha="right", va="center", size=size)
    sheet.legend(legend, columns)
    return sheet
