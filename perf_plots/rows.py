"""The plot of one kind of convolution: a row a case, with its shapes, a verdict in words, and marks on a time axis."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .style import BLACK, FAINT, GREY, Mark, Sheet, duration, paint, time_axis

_PART = " · "
"""What stands between the parts of a verdict."""
_HEAD, _VERDICT, _NOTE, _LANE, _GAP = 0.19, 0.18, 0.15, 0.2, 0.12


@dataclass(frozen=True)
class Point:
    """A time on the axis, in a lane counted from the top: marks of different lanes never hide each other."""

    mark: Mark
    us: float
    interval_us: tuple[float, float] | None = None
    labelled: bool = False
    lane: int = 0


@dataclass(frozen=True)
class Row:
    """One case. `colour` is the verdict's, `notes` what is missing in the row and why."""

    name: str
    detail: str
    verdict: str
    colour: str = BLACK
    points: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdict_lines(self) -> list[str]:
        """Broken between its parts."""
        lines: list[str] = []
        for part in self.verdict.split(_PART) if self.verdict else []:
            if lines and len(lines[-1]) + len(_PART) + len(part) <= 80:
                lines[-1] += _PART + part
            else:
                lines += textwrap.wrap(part, 80) or [""]
        return lines

    @property
    def note_lines(self) -> list[str]:
        return textwrap.wrap("; ".join(self.notes), 92)

    @property
    def height(self) -> float:
        text = _HEAD + _VERDICT * len(self.verdict_lines) + _NOTE * len(self.note_lines)
        return text + _LANE * self.lanes + _GAP

    @property
    def lanes(self) -> int:
        return max((point.lane + 1 for point in self.points), default=0)


@dataclass(frozen=True)
class Chart:
    """Everything about a figure but its rows."""

    title: str
    subtitle: str
    badge: str
    footer: str


def draw(chart: Chart, rows: list[Row], stem: Path) -> list[Path]:
    """Writes the figure; the legend names the marks that occur in it, in the order of the row that has most."""
    rows = _said_once(rows)
    longest = sorted(rows, key=lambda row: -len(row.points))
    marks = list(dict.fromkeys(point.mark for row in longest for point in row.points))
    columns = 2 if len(marks) == 4 else 3
    sheet = Sheet(chart.title, chart.subtitle, chart.badge, sum(row.height for row in rows), -(-len(marks) // columns))
    axes = sheet.axes
    times = [point.us for row in rows for point in row.points]
    # A device on which every case of the kind failed has rows, and no time.
    time_axis(axes, times or [1.0, 100.0])
    # Inches from the top, so that text and marks have the same spacing in every figure.
    axes.set_ylim(sum(row.height for row in rows), 0)
    top = 0.0
    for row in rows:
        _draw_row(sheet, row, top)
        top += row.height
    if marks:
        sheet.legend(marks, columns)
    return sheet.save(chart.footer, stem)


def _said_once(rows: list[Row]) -> list[Row]:
    """What stands below every row with a time is said once, below the last one."""
    timed = [row for row in rows if row.points]
    if len(timed) < 2:
        return rows
    common = [note for note in timed[0].notes if all(note in row.notes for row in timed)]
    if not common:
        return rows
    own = [replace(row, notes=tuple(note for note in row.notes if note not in common)) for row in rows]
    return [*own, Row("In every case", "", "", notes=tuple(common))]


def _draw_row(sheet: Sheet, row: Row, top: float) -> None:
    axes = sheet.axes
    beside = axes.get_yaxis_transform()
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    head: dict[str, Any] = {"transform": beside, "va": "top", "ha": "left", "bbox": box}
    name = axes.text(0, top + 0.02, row.name, weight="bold", size=10, **head)
    axes.annotate(
        row.detail, xy=(1, 0), xycoords=name, xytext=(7, 0), textcoords="offset points", va="bottom", ha="left",
        size=9, color=GREY, bbox=box,
    )  # fmt: skip
    y = top + _HEAD
    for line in row.verdict_lines:
        axes.text(0, y, line, size=8.8, color=row.colour, **head)
        y += _VERDICT
    y += 0.02
    if row.points:
        _draw_points(sheet, row, y + _LANE / 2)
        y += _LANE * row.lanes
    for line in row.note_lines:
        axes.text(0, y, line, size=7.5, color=GREY, **head)
        y += _NOTE
    axes.axhline(top + row.height - 0.03, color=FAINT, linewidth=0.6)


def _draw_points(sheet: Sheet, row: Row, y: float) -> None:
    axes = sheet.axes
    for lane in range(row.lanes):
        times = [point.us for point in row.points if point.lane == lane]
        height = y + _LANE * lane
        if times:
            axes.plot([min(times), max(times)], [height, height], color="#BBBBBB", linewidth=1.2, zorder=1)
    # The first point is the one the row is about: drawn last, on top.
    for order, point in enumerate(row.points):
        zorder, height = 10 - order, y + _LANE * point.lane
        if point.interval_us:
            axes.plot(
                point.interval_us, [height, height], color=point.mark.colour, linewidth=3.5, alpha=0.45, zorder=zorder
            )
        axes.plot(
            [point.us], [height], linestyle="none", marker=point.mark.marker, markersize=point.mark.size, zorder=zorder,
            clip_on=False, **paint(point.mark),
        )  # fmt: skip
        if point.labelled:
            axes.annotate(
                duration(point.us), xy=(point.us, height), xytext=(8, 0), textcoords="offset points", size=9,
                va="center", ha="left",
            )  # fmt: skip
