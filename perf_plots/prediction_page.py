"""The page of predicted shares: what every flagship would reach by count, beside the goal, and what binds it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import triton

from triton_conv.dispatch import Plan
from triton_conv.static_model.rows import PARTS, Prediction, predictions, waiting
from triton_conv.target import Target
from triton_conv.workloads import FLAGSHIPS, LECTURES, Workload

from .record import COMMITTED, write_bytes
from .store import load
from .trial_demands import H100, Counted

PAGE = Path(__file__).parent / "predictions.md"
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

_WAITING = """
## Forms that no GPU has timed on these layers

They serve where a measurement says so. Beside each the form that runs now, by the same model and as measured. Those
that leave out products with the padding may pass 100%: the limit counts them.

| layer | part | form | predicted µs | predicted share | goal | runs now | predicted µs | measured µs |
|---|---|---|---|---|---|---|---|---|
"""
_NO_TIME = "–"


def write(path: Path, error: list[str], trials: Iterable[Counted], processes: int | None = None) -> None:
    """Compiles the planned kernel of every flagship, and the forms without a trial, and writes the page."""
    layers, tried = [*FLAGSHIPS, *LECTURES], {(trial.workload, trial.kernel) for trial in trials}

    def untried(work: Workload, device: Target) -> list[Plan]:
        return [plan for plan in waiting(work, device) if (work.title, plan.kernel.name) not in tried]

    found = predictions(layers, tuple(PARTS), "sm_90", processes)
    others = predictions(layers, tuple(PARTS), "sm_90", processes, plans=untried)
    measured, now = _measured(), {(row.workload, row.part): row for row in found}
    head = _HEAD.format(version=triton.__version__, results=H100.name, error="\n".join(error))
    rows = [_row(row, measured.get((row.workload, row.part))) for row in found]
    missed = [row for row in found if row.missed]
    summary = f"\n## Goals missed by count: {len(missed)} of {sum(row.goal is not None for row in found)}\n\n"
    beside = [_beside(row, now[row.workload, row.part], measured.get((row.workload, row.part))) for row in others]
    text = head + "\n".join(rows) + "\n" + _WAITING + "\n".join(beside) + "\n" + summary
    write_bytes(path, (text + "\n".join(_reason(row, others) for row in missed) + "\n").encode())


def gains(path: Path) -> dict[tuple[str, str], float]:
    """By layer and part, the microseconds that the best of the forms that wait would save, as the page tells.

    The model says by how much a form is faster than the one that runs, whose time is the measured one where there is.
    """
    found: dict[tuple[str, str], float] = {}
    table = path.read_text().partition(_WAITING)[2]
    for line in itertools.takewhile(lambda line: line.startswith("|"), table.splitlines()):
        layer, part, _, predicted, *_, now, measured = (cell.strip() for cell in line.strip("|").split("|"))
        try:
            ratio = float(predicted) / float(now)
        except ValueError:  # an error stands in place of a time
            continue
        gain = (1 - ratio) * float(now if measured == _NO_TIME else measured)
        found[layer, PARTS[part]] = max(gain, found.get((layer, PARTS[part]), 0.0))
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


def _goal(row: Prediction) -> str:
    return "–" if row.goal is None else f"**{row.goal:.0%}**" if row.missed else f"{row.goal:.0%}"


def _row(row: Prediction, measured_us: float | None) -> str:
    shown = (_NO_TIME, _NO_TIME) if measured_us is None else (f"{measured_us:.1f}", f"{row.floor_us / measured_us:.0%}")
    cells = (
        row.workload, row.part, row.kernel, f"{row.floor_us:.1f}", f"{row.predicted_us:.1f}", f"{row.share:.0%}",
        _goal(row), *shown, row.error or row.binds,
    )  # fmt: skip
    return _line(cells)


def _beside(row: Prediction, now: Prediction, measured_us: float | None) -> str:
    """A form that waits for a measurement, beside the one that runs."""
    cells = (
        row.workload, row.part, row.kernel, row.error or f"{row.predicted_us:.1f}", f"{row.share:.0%}", _goal(row),
        now.kernel, f"{now.predicted_us:.1f}", _NO_TIME if measured_us is None else f"{measured_us:.1f}",
    )  # fmt: skip
    return _line(cells)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _reason(row: Prediction, others: list[Prediction]) -> str:
    """What binds a launch that misses its goal, and what the best form that waits would reach."""
    same = [other for other in others if (other.workload, other.part) == (row.workload, row.part) and not other.error]
    best = max(same, key=lambda other: other.share, default=row)
    hope = f" {best.kernel} would reach {best.share:.0%}." if best.share > row.share else ""
    return (
        f"* {row.workload} {row.part}: {row.share:.0%} of {row.goal:.0%}; {row.binds} takes "
        f"{max(row.terms.values()):.0f} us alone, then {_next(row)}.{hope}"
    )


def _next(row: Prediction) -> str:
    """The terms that come after the one that binds."""
    terms = sorted(row.terms.items(), key=lambda item: -item[1])[1:3]
    return ", ".join(f"{name} {value:.0f}" for name, value in terms)
