"""Figures of what the operations must cost, from counts and a datasheet: drawn where nothing has been measured."""

from __future__ import annotations

from pathlib import Path

from triton_conv.workloads import KINDS, Workload

from .cases import KIND_TITLES, describe
from .floors import DATASHEET, Limits, Work
from .overview import Line, draw_bars
from .record import COMPUTED
from .rows import Chart, Point, Row
from .rows import draw as draw_rows
from .style import BLUE, GREEN, KIND_COLOURS, Mark, ratio

_OPERATION = Mark("this operation, computed floor", BLUE, "o", size=9)
_STANDARD = Mark("standard convolution, computed floor", GREEN, "D", size=7)


def amount(value: float, unit: str) -> str:
    """A count with a prefix: "19.8 TFLOP", "805 MB"."""
    for limit, prefix in ((1e12, "T"), (1e9, "G")):
        if value >= limit:
            return f"{value / limit:.3g} {prefix}{unit}"
    return f"{value / 1e6:.3g} M{unit}"


def footer(limits: Limits) -> str:
    """What was computed, from which figures, by which command."""
    t = limits.target
    return (
        f"Computed by python -m perf_plots: floor = max(FLOPs / {t.rate('bfloat16') / 1e12:.0f} TFLOP/s bf16, least "
        f"bytes / {t.bandwidth / 1e12:.3g} TB/s), {limits.basis} of NVIDIA {t.name} ({t.arch}). Each tensor crosses "
        "memory once. Standard convolution: same input, kernel size and output, one group, no dilation, no offsets; "
        "for a transposed one, over inputs with zeros inserted. Nothing here has been run."
    )


def kind_figure(
    kind: str, workloads: list[Workload], stem: Path, missing: str = "", limits: Limits = DATASHEET
) -> list[Path]:
    """The floor of every case of a kind beside the floor of the standard convolution."""
    chart = Chart(
        KIND_TITLES[kind],
        missing or f"Least time on NVIDIA {limits.target.name}, by its datasheet",
        COMPUTED,
        footer(limits),
    )
    return draw_rows(chart, [_row(workload, limits) for workload in workloads], stem)


def _row(workload: Workload, limits: Limits) -> Row:
    work = Work.of(workload)
    floor, standard = work.floor_us(limits), work.standard_floor_us(limits)
    verdict = (
        f"{amount(work.flops, 'FLOP')}, {amount(work.least_bytes, 'B')}, {work.bound(limits)}-bound · "
        f"standard: {amount(work.standard_flops, 'FLOP')}, {amount(work.standard_bytes, 'B')}, "
        f"{ratio(standard / floor)}"
    )
    points = (Point(_OPERATION, floor, labelled=True), Point(_STANDARD, standard, labelled=True, lane=1))
    return Row(workload.name, describe(workload), verdict, points=points)


def overview(workloads: list[Workload], stem: Path, limits: Limits = DATASHEET) -> list[Path]:
    """How much less each operation must cost than the standard convolution, sorted."""
    chart = Chart(
        "What the five kinds can save",
        f"Floor of the standard convolution / floor of the operation, NVIDIA {limits.target.name}",
        COMPUTED,
        footer(limits),
    )
    lines = []
    for workload in workloads:
        work = Work.of(workload)
        saved = work.standard_floor_us(limits) / work.floor_us(limits)
        lines.append(Line(workload.name, (saved,), colour=KIND_COLOURS[workload.kind]))
    lines.sort(key=lambda line: line.factors[0] or 0.0)
    legend = [Mark(KIND_TITLES[kind].split()[0].lower(), KIND_COLOURS[kind], "s") for kind in KINDS]
    return draw_bars(chart, lines, "times less than the standard convolution (log scale)", legend, stem)
