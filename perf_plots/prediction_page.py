"""The page of predicted shares: what every flagship would reach by count, beside the goal, and what binds it."""

from __future__ import annotations

import itertools
import math
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
_AGAINST = """
## Beside the fastest library, once these forms are decided

Computed, but for two columns of what is measured: the fastest library there, in either memory format, and ours now, the
benchmark's time or the tuner's of the tile that runs (which leaves out what packs a weight). Predicted is the best of
the forms that wait and of ours now. Below 0.95, the worst first; {rest}.

| layer | part | library µs | ours µs | ratio | best form | predicted µs | predicted ratio |
|---|---|---|---|---|---|---|---|
"""
_GOAL = 0.95
_NO_TIME = "–"


def write(path: Path, error: list[str], trials: Iterable[Counted], processes: int | None = None) -> None:
    """Compiles the planned kernel of every flagship, and the forms without a trial, and writes the page."""
    layers, tried = [*FLAGSHIPS, *LECTURES], {(trial.workload, trial.kernel) for trial in trials}

    def untried(work: Workload, device: Target) -> list[Plan]:
        return [plan for plan in waiting(work, device) if (work.title, plan.kernel.name) not in tried]

    found = predictions(layers, tuple(PARTS), "sm_90", processes)
    others = predictions(layers, tuple(PARTS), "sm_90", processes, plans=untried)
    measured, library = _measured()
    now = {(row.workload, row.part): row for row in found}
    head = _HEAD.format(version=triton.__version__, results=H100.name, error="\n".join(error))
    rows = [_row(row, measured.get((row.workload, row.part))) for row in found]
    missed = [row for row in found if row.missed]
    summary = f"\n## Goals missed by count: {len(missed)} of {sum(row.goal is not None for row in found)}\n\n"
    beside = [_beside(row, now[row.workload, row.part], measured.get((row.workload, row.part))) for row in others]
    text = head + "\n".join(rows) + "\n" + _WAITING + "\n".join(beside) + "\n"
    text += _against(found, others, measured, library) + summary
    write_bytes(path, (text + "\n".join(_reason(row, others) for row in missed) + "\n").encode())


def gains(path: Path) -> dict[tuple[str, str], float]:
    """By layer and part, the microseconds that the best of the forms that wait would save, as the page tells.

    The model says by how much a form is faster than the one that runs, whose time is the measured one where there is;
    or the form is as fast as predicted, and the one that runs is slower than the model knows of.
    """
    found: dict[tuple[str, str], float] = {}
    table = path.read_text().partition(_WAITING)[2]
    for line in itertools.takewhile(lambda line: line.startswith("|"), table.splitlines()):
        layer, part, _, predicted, *_, now, measured = (cell.strip() for cell in line.strip("|").split("|"))
        try:
            form_us, ratio = float(predicted), float(predicted) / float(now)
        except ValueError:  # an error stands in place of a time
            continue
        now_us = float(now if measured == _NO_TIME else measured)
        gain = max((1 - ratio) * now_us, now_us - form_us)
        found[layer, PARTS[part]] = max(gain, found.get((layer, PARTS[part]), 0.0))
    return found


_Times = dict[tuple[str, str], float]


def _measured() -> tuple[_Times, _Times]:
    """Times of the benchmark on that device, by layer and part: ours, and the fastest library's."""
    names = {part: name for name, part in PARTS.items()}
    ours, library = _Times(), _Times()
    for record in (record for device in load(COMMITTED)[0] if device.name == H100.name for record in device.records):
        # A whole step is no launch of its own.
        if record.ours_us is None or record.workload.part not in names:
            continue
        key = record.workload.name, names[record.workload.part]
        ours[key] = record.ours_us
        if (best := record.best(standard=False)) is not None:
            library[key] = best[1]
    return ours, library


def _against(found: list[Prediction], others: list[Prediction], measured: _Times, library: _Times) -> str:
    """What would still be slower than the fastest library, by count."""
    lines, ratios = [], []
    for row in found:
        key = row.workload, row.part
        if key not in library or key not in measured:
            continue
        ours = min(measured[key], row.measured_us or measured[key])
        forms = [other for other in others if (other.workload, other.part) == key and not other.error]
        best = min(forms, key=lambda form: form.predicted_us, default=None)
        name, after = (best.kernel, best.predicted_us) if best and best.predicted_us < ours else (_NO_TIME, ours)
        ratio = library[key] / after
        ratios.append(ratio)
        cells = (
            f"{library[key]:.1f}",
            f"{ours:.1f}",
            f"{library[key] / ours:.2f}",
            name,
            f"{after:.1f}",
            f"{ratio:.2f}",
        )
        lines += [(ratio, _line((*key, *cells)))] if ratio < _GOAL else []
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan
    rest = f"of {len(ratios)} cases the geometric mean is {mean:.2f}"
    return _AGAINST.format(rest=rest) + "".join(f"{line}\n" for _, line in sorted(lines))


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
