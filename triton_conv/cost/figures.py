"""Figures of computed numbers; they need matplotlib. Each says that nothing in it was measured."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import WorkloadError
from .arithmetic import Dimension
from .formulas import transposed as as_direct
from .layers import Cost
from .variants import FORMS, Sharing, compare

# Okabe and Ito's palette, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
_GREY, _FAINT = "#595959", "#DDDDDD"
_STYLE = {"font.size": 9.0, "svg.fonttype": "none", "svg.hashsalt": "triton_conv", "savefig.dpi": 160}
_FORMATS = (".svg", ".png", ".pdf")
_MOST_LINKS = 4000


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise WorkloadError("plot: figures need matplotlib: pip install 'triton-conv[plots]'") from error
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, matplotlib


def _save(figure: Any, matplotlib: Any, path: Path) -> Path:
    """Writes the figure without a date: the same numbers give the same bytes."""
    if path.suffix not in _FORMATS:
        raise WorkloadError(f"plot: {path} should end in one of {', '.join(_FORMATS)}")
    metadata = {".svg": {"Date": None}, ".png": {"Software": None}, ".pdf": {"CreationDate": None}}[path.suffix]
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return path


def draw_forms(cost: Cost, path: Path, title: str, groups: int = 4) -> Path:
    """Weights and products of every convolution of a network in four forms, on log axes."""
    rows = compare(cost, groups)
    if not rows:
        raise WorkloadError("plot: there is no convolution to draw")
    figure, matplotlib = _figure(9.0, 1.6 + 0.42 * len(rows))
    with matplotlib.rc_context(_STYLE):
        axes = figure.subplots(1, 2, sharey=True)
        for panel, unit in zip(axes, ("weights", "macs"), strict=True):
            for index, form in enumerate(FORMS):
                places = [row + 0.19 * (index - 1.5) for row in range(len(rows))]
                panel.barh(
                    places, [getattr(found[form], unit) for _, found in rows], height=0.19, color=_COLOURS[index],
                    label=form,
                )  # fmt: skip
            panel.set_xscale("log")
            panel.set_xlabel({"weights": "weights (log scale)", "macs": "products (log scale)"}[unit])
            panel.grid(axis="x", color=_FAINT)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
        names = [f"{layer.name or 'call'}  {'x'.join(map(str, layer.output_shape[1:]))}" for layer, _ in rows]
        axes[0].set_yticks(range(len(rows)), names)
        axes[0].invert_yaxis()
        figure.suptitle(f"{title}: each layer in four forms, computed", x=0.01, ha="left", weight="bold")
        handles, labels = axes[0].get_legend_handles_labels()
        labels = [f"{name}, up to {groups} groups" if name in ("grouped", "shuffle") else name for name in labels]
        figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False)
        return _save(figure, matplotlib, path)


def draw_sharing(sharing: Sharing, path: Path, title: str) -> Path:
    """Weights of a layer with parameters shared in full, in part and not at all."""
    figure, matplotlib = _figure(6.5, 2.2)
    with matplotlib.rc_context(_STYLE):
        axes = figure.subplots()
        values = (sharing.full, sharing.partial, sharing.none)
        names = ("full: convolution", "partial: locally connected", "none: fully connected")
        bars = axes.barh(names, values, color=_COLOURS[:3])
        times = ("", f" = {values[1] / values[0]:,.0f} times", f" = {values[2] / values[1]:,.0f} times")
        axes.bar_label(bars, [f"{value:,}{more}" for value, more in zip(values, times, strict=True)], padding=4)
        axes.set_xscale("log")
        axes.set_xlim(right=values[2] * (values[2] / values[0]) ** 0.75)
        axes.set_xlabel("weights (log scale)")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle("Sharing of parameters, computed", x=0.01, ha="left", weight="bold")
        axes.set_title(title, loc="left", size=8.5, color=_GREY)
        return _save(figure, matplotlib, path)


def draw_links(dimensions: Sequence[Dimension], path: Path, title: str) -> Path:
    """Inputs above, outputs below, a line for each weight that joins them; a transposed one also as a direct one."""
    if sum(len(dimension.links) for dimension in dimensions) > _MOST_LINKS:
        raise WorkloadError(f"plot: more than {_MOST_LINKS} lines cannot be told apart; take a smaller --size")
    panels = [
        (each, direct) for each in dimensions for direct in (False, True) if each.geometry.transposed or not direct
    ]
    widest = max(max(d.out_size, d.size * (d.geometry.stride[2] if d.geometry.transposed else 1)) for d in dimensions)
    figure, matplotlib = _figure(max(6.5, 0.36 * (widest + 6)), 0.5 + 2.9 * len(panels))
    with matplotlib.rc_context(_STYLE):
        for axes, (dimension, direct) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
            _draw_panel(axes, dimension, direct)
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        return _save(figure, matplotlib, path)


def _draw_panel(axes: Any, dimension: Dimension, direct: bool) -> None:
    note = _draw_direct(axes, dimension) if direct else _draw_own(axes, dimension)
    for tap in range(dimension.geometry.kernel[2]):
        axes.plot([], [], color=_COLOURS[tap % len(_COLOURS)], label=f"w{tap}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=7.5)
    axes.set_title(note, loc="left", size=8.5, color=_GREY)
    axes.set_ylim(-0.25, 1.25)
    axes.margins(x=0.06)
    axes.axis("off")


def _draw_direct(axes: Any, dimension: Dimension) -> str:
    """A transposed convolution as the direct one over the spread input; returns a line that says so."""
    g = dimension.geometry
    k, s, d = g.kernel[2], g.stride[2], g.dilation[2]
    same = as_direct(dimension.size, k, s, g.pad_before[2], g.output_padding[2], d)
    width, middle = (dimension.size - 1) * s + 1, (g.extent[2] - 1) / 2
    # The direct convolution's own places: output o reads o - p' + tap d of the spread input.
    places = range(-max(same.border, 0), width + max(same.border_after, 0))
    real = {place: 0 <= place < width and place % s == 0 for place in places}
    for place, inside in real.items():
        _cell(axes, place + same.border, 1, f"x{place // s}" if inside else "0", inside)
    for output in range(dimension.out_size):
        _cell(axes, output + middle, 0, f"y{output}", True)
        for tap in range(k):
            place = output - same.border + tap * d
            if place in real:
                _line(axes, place + same.border, output + middle, k - 1 - tap, real[place])
    return f"the same, direct: z = {same.zeros} zeros inserted, border p' = {same.border}, stride s' = 1"


def _draw_own(axes: Any, dimension: Dimension) -> str:
    """A convolution as it is; returns the line of its arithmetic.

    A stride spreads the outputs of a forward convolution, and the inputs of a transposed one.
    """
    g = dimension.geometry
    middle = (g.extent[2] - 1) / 2

    def input_x(at: float) -> float:
        return at * g.stride[2] - g.pad_before[2] + middle if g.transposed else at + g.pad_before[2]

    def output_x(output: float) -> float:
        return output if g.transposed else output * g.stride[2] + middle

    for at in sorted({link.at for link in dimension.links} | set(range(dimension.size))):
        inside = 0 <= at < dimension.size
        border = next((link.source for link in dimension.links if link.at == at), None)
        _cell(axes, input_x(at), 1, f"x{at}" if inside else "0" if border is None else f"x{border}", inside)
    for output in range(dimension.out_size):
        _cell(axes, output_x(output), 0, f"y{output}", True)
    for link in dimension.links:
        _line(axes, input_x(link.at), output_x(link.output), link.tap, link.source is not None)
    return dimension.lines()[-1]


def _cell(axes: Any, x: float, y: float, text: str, filled: bool) -> None:
    box = {"boxstyle": "square,pad=0.35", "facecolor": "white", "edgecolor": _GREY if filled else _FAINT}
    axes.text(x, y, text, ha="center", va="center", size=7.5, color="black" if filled else _GREY, bbox=box, zorder=3)


def _line(axes: Any, top: float, bottom: float, tap: int, real: bool) -> None:
    """A weight's line; dotted where it meets a zero."""
    axes.plot([top, bottom], [1, 0], color=_COLOURS[tap % len(_COLOURS)], linewidth=1.1, linestyle="-" if real else ":")
