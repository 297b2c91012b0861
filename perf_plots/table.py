"""The numbers of the figures as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from triton_conv.workloads import Workload

from .floors import Limits, Work
from .record import Record

_COMPUTED = ("case", "GFLOP", "MB", "floor us", "standard GFLOP", "standard us", "ratio", "bound")
_MEASURED = ("case", "ours us", "library us", "standard us", "vs library", "vs standard", "of limit", "tile")


def computed_table(workloads: Iterable[Workload], limits: Limits) -> list[str]:
    """Work and floors of the operation and of the standard convolution."""
    rows = []
    for workload in workloads:
        work = Work.of(workload)
        floor, standard = work.floor_us(limits), work.standard_floor_us(limits)
        rows.append(
            (
                workload.title,
                f"{work.flops / 1e9:.2f}",
                f"{work.least_bytes / 1e6:.1f}",
                f"{floor:.1f}",
                f"{work.standard_flops / 1e9:.1f}",
                f"{standard:.1f}",
                f"{standard / floor:.2f}x",
                work.bound(limits),
            )
        )
    return aligned([_COMPUTED, *rows])


def measured_table(records: Iterable[Record]) -> list[str]:
    """Medians, speed-ups (below one is a loss) and the share of the roofline limit; failures say why they have none."""
    rows, failures = [], []
    for record in records:
        if record.ours_us is None:
            failures.append(f"FAILED {record.workload.title}: {record.error}")
            continue
        rows.append(
            (
                record.workload.title,
                f"{record.ours_us:.1f}",
                *(_time(record.best(standard)) for standard in (False, True)),
                *(_factor(record.speedup(standard)) for standard in (False, True)),
                f"{record.share:.0%}" if record.share else "unknown",
                str(record.plan.get("source", "")) if record.plan else "",
            )
        )
    return failures + (aligned([_MEASURED, *rows]) if rows else [])


def _time(best: tuple[str, float] | None) -> str:
    return f"{best[1]:.1f}" if best else "absent"


def _factor(value: float | None) -> str:
    return f"{value:.2f}x" if value else "-"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell: text to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if index in (0, last) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
