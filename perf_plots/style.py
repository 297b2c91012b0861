"""One look for every figure: colours that the colour-blind tell apart, text for a phone, the same bytes each time."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .record import MEASURED, OURS, write_bytes

# Okabe and Ito's palette.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, FAINT = "#595959", "#DDDDDD"
LOSS = "#B34E00"
"""Of text: vermillion, dark enough for small letters."""

KIND_COLOURS = {
    "grouped": BLUE, "depthwise": ORANGE, "dilated": GREEN, "transposed": PURPLE, "deformable": SKY,
    "separable": VERMILLION, "shuffle": BLACK, "local": GREY,
}  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """How a contestant is drawn, and what the legend calls it."""

    label: str
    colour: str
    marker: str
    filled: bool = True
    size: float = 8.0


MARKS = {
    OURS: Mark("triton_conv", BLUE, "o", size=9),
    "cudnn": Mark("PyTorch (cuDNN)", ORANGE, "s"),
    "cudnn other format": Mark("PyTorch, other format", ORANGE, "s", filled=False),
    "cudnn depthwise kernel": Mark("cuDNN forced", VERMILLION, "^"),
    "native depthwise kernel": Mark("PyTorch's own kernel", VERMILLION, "v", filled=False),
    "torchvision": Mark("torchvision", ORANGE, "P"),
    "torchvision float16": Mark("torchvision, fp16", ORANGE, "X", filled=False),
    "torch.compile": Mark("torch.compile", PURPLE, "p"),
    "device copy": Mark("copy of the same bytes", GREY, "3", size=10),
    "matrix product": Mark("product of the same FLOPs", GREY, "4", size=10),
    "two kernels": Mark("ours, two kernels", SKY, "h"),
    "one kernel": Mark("ours, one kernel", SKY, "H", filled=False),
    "unfold": Mark("PyTorch, unfolded", ORANGE, "P"),
    "standard": Mark("standard convolution", GREEN, "D", size=7),
    "standard other format": Mark("standard, other format", GREEN, "D", filled=False, size=7),
}
FLOOR = Mark("computed limit", BLACK, "|", size=14)

WIDTH = 6.0
"""Inches. Narrow, so that at the width of a phone the letters stay readable."""

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "triton_conv",
    "savefig.dpi": 160,
}

FOOTER_LINES = 6
"""What a footer has room for."""
_HEADER, _FOOTER, _AXIS = 0.92, 0.94, 0.52
# A taller mark would touch that of the line above it in a legend.
_LEGEND_SIZE = 10.0


class Sheet:
    """A figure with a title, a badge that says what kind of numbers these are, one plot, a legend and a footer."""

    def __init__(self, title: str, subtitle: str, badge: str, body: float, legend_rows: int) -> None:
        self._legend = 0.24 * legend_rows
        height = _HEADER + body + _AXIS + self._legend + _FOOTER
        self._height = height
        self._title = f"{title}: {badge}"
        with matplotlib.rc_context(_STYLE):
            self.figure = Figure(figsize=(WIDTH, height), facecolor="white")
            FigureCanvasAgg(self.figure)
            self._text(0.12, 0.10, title, size=14, weight="bold")
            self._text(0.12, 0.40, subtitle, size=9.5, color=GREY)
            box = {"facecolor": BLUE if badge == MEASURED else VERMILLION, "edgecolor": "none", "pad": 2.5}
            self._text(0.16, 0.64, badge, size=10.5, weight="bold", color="white", bbox=box)
            self.axes: Axes = self.figure.add_axes(
                (0.14 / WIDTH, (self._legend + _FOOTER + _AXIS) / height, (WIDTH - 0.28) / WIDTH, body / height)
            )
            self.axes.tick_params(axis="y", left=False, labelleft=False)
            self.axes.set_axisbelow(True)
            self.axes.grid(axis="x", which="major", color=FAINT, linewidth=0.8)

    def _text(self, x: float, y: float, text: str, **options: Any) -> None:
        """Text at inches from the left and from the top."""
        self.figure.text(x / WIDTH, 1 - y / self._height, text, va="top", ha="left", **options)

    def legend(self, marks: list[Mark], columns: int) -> None:
        handles = [
            Line2D(
                [], [], linestyle="none", marker=mark.marker, markersize=min(mark.size, _LEGEND_SIZE), label=mark.label,
                **paint(mark),
            )
            for mark in marks
        ]  # fmt: skip
        with matplotlib.rc_context(_STYLE):
            self.figure.legend(
                handles=handles, loc="lower left", bbox_to_anchor=(0.06 / WIDTH, (_FOOTER - 0.08) / self._height),
                ncols=columns, frameon=False, fontsize=8.5, handletextpad=0.2, columnspacing=1.0, labelspacing=0.35,
            )  # fmt: skip

    def save(self, footer: str, stem: Path) -> list[Path]:
        """Writes <stem>.svg and <stem>.png, without dates, so that the same results give the same bytes."""
        lines = footer_lines(footer)
        options: dict[str, Any] = {"va": "bottom", "ha": "left", "size": 7, "color": GREY}
        self.figure.text(0.12 / WIDTH, 0.08 / self._height, "\n".join(lines), **options)
        paths = []
        with matplotlib.rc_context(_STYLE):
            for kind, metadata in (("svg", {"Date": None, "Title": self._title}), ("png", {"Software": None})):
                buffer = io.BytesIO()
                self.figure.savefig(buffer, format=kind, metadata=metadata)
                paths.append(stem.with_name(f"{stem.name}.{kind}"))
                write_bytes(paths[-1], buffer.getvalue())
        return paths


def footer_lines(footer: str) -> list[str]:
    """A footer as it is broken."""
    return textwrap.wrap(footer, 104)


def paint(mark: Mark) -> dict[str, Any]:
    """Colours of a mark: hollow ones have a white inside, so that they read where they overlap."""
    bar = mark.marker in "|_34"
    edge = "white" if mark.filled and not bar else mark.colour
    return {
        "markerfacecolor": mark.colour if mark.filled else "white",
        "markeredgecolor": edge,
        "markeredgewidth": 2.2 if bar else 0.8 if mark.filled else 1.6,
    }


def time_axis(axes: Axes, values: list[float], margin: float = 0.15) -> None:
    """A log axis of microseconds that holds all values, with room to the right for the last one's label."""
    low, high = min(values), max(values)
    span = max((high / low) ** margin, 1.5)
    axes.set_xscale("log")
    axes.set_xlim(low / span**0.6, high * span)
    low, high = axes.get_xlim()

    def shown(us: float) -> str:
        # At the very end of a plot as wide as the sheet a label would be cut off.
        return tick(us) if 0.03 < math.log(us / low) / math.log(high / low) < 0.955 else ""

    log_ticks(axes, shown)
    axes.set_xlabel("time of one call (log scale)", size=9.5)


def log_ticks(axes: Axes, label: Callable[[float], str], which: Literal["x", "y"] = "x") -> None:
    """Ticks at powers of ten; below two decades also at 2 and 5."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    subs = (1.0,) if high / low > 150 else (1.0, 2.0, 5.0) if high / low > 8 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(10, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    axis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis=which, labelsize=9)


def duration(us: float) -> str:
    """A time with its unit, three digits: "240 µs", "18.8 ms", "1.30 ms"."""
    for scale, unit in ((1e-3, "ns"), (1.0, "µs"), (1e3, "ms")):
        if us < 999.5 * scale:
            return f"{_digits(us / scale)} {unit}"
    return f"{_digits(us / 1e6)} s"


def tick(us: float) -> str:
    """The same at an axis, where a time is as round as it looks: "50 µs"."""
    amount, unit = duration(us).split()
    return f"{float(amount):g} {unit}"


def ratio(value: float) -> str:
    """A factor: "0.85×", "12.3×", "384×"."""
    return f"{value:.2f}×" if value < 9.995 else f"{_digits(value)}×"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
