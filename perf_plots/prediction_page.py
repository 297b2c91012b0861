"""The page of predicted shares: what every flagship would reach by count, beside the goal, and what binds it."""

from __future__ import annotations

from pathlib import Path

import triton

from triton_conv.static_model.rows import PARTS, Prediction, predictions
from triton_conv.workloads import FLAGSHIPS, LECTURES

from .record import COMMITTED, write_bytes
from .store import load
from .trial_demands import H100

_HEAD = """# Predicted shares

Computed from compiled code and geometry by `python -m perf_plots.predictions`, compiled by Triton {version} for sm_90,
but for the two columns that say measured (H100, `{results}`). The limit is the slower of arithmetic and least traffic
at the ceilings measured there. A goal in bold is missed by the prediction.

## Error of the model

```
{error}
```

## Flagships

| layer | part | kernel | limit µs | predicted µs | predicted share | goal | measured µs | measured share | binds |
|---|---|---|---|---|---|---|---|---|---|
"""


def write(path: Path, error: list[str], processes: int | None = None) -> list[Prediction]:
    """Compiles the planned kernel of every flagship and writes the page."""
    found = predictions([*FLAGSHIPS, *LECTURES], tuple(PARTS), "sm_90", processes)
    measured = _measured()
    head = _HEAD.format(version=triton.__version__, results=H100.name, error="\n".join(error))
    rows = [_row(row, measured.get((row.workload, row.part))) for row in found]
    missed = [row for row in found if row.missed]
    reasons = [
        f"* {row.workload} {row.part}: {row.share:.0%} of {row.goal:.0%}; {row.binds} takes "
        f"{max(row.terms.values()):.0f} us alone, then {_next(row)}."
        for row in missed
    ]
    summary = f"\n## Goals missed by count: {len(missed)} of {sum(row.goal is not None for row in found)}\n\n"
    write_bytes(path, (head + "\n".join(rows) + "\n" + summary + "\n".join(reasons) + "\n").encode())
    return found


def _measured() -> dict[tuple[str, str], float]:
    """Times of the benchmark on that device, by layer and part."""
    names = {part: name for name, part in PARTS.items()}
    devices, _ = load(COMMITTED)
    return {
        (record.workload.name, names[record.workload.part]): record.ours_us
        for device in devices
        if device.name == H100.name
        for record in device.records
        # A whole step is no launch of its own.
        if record.ours_us is not None and record.workload.part in names
    }


def _row(row: Prediction, measured_us: float | None) -> str:
    target = "–" if row.goal is None else f"**{row.goal:.0%}**" if row.missed else f"{row.goal:.0%}"
    shown = ("–", "–") if measured_us is None else (f"{measured_us:.1f}", f"{row.floor_us / measured_us:.0%}")
    cells = (
        row.workload, row.part, row.kernel, f"{row.floor_us:.1f}", f"{row.predicted_us:.1f}", f"{row.share:.0%}",
        target, *shown, row.error or row.binds,
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _next(row: Prediction) -> str:
    """The terms that come after the one that binds."""
    terms = sorted(row.terms.items(), key=lambda item: -item[1])[1:3]
    return ", ".join(f"{name} {value:.0f}" for name, value in terms)
