"""One HTML page with every figure and table, and filters: a single file that opens from a disk, without a network."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from triton_conv.workloads import KINDS, LECTURE_KINDS, NOT_SERVED, PARTS, STEP, Workload

from .cases import describe
from .ceilings import describe as describe_ceilings
from .clocks import describe as describe_clocks
from .evidence import Evidence
from .floors import DATASHEET, Work
from .measured import badge, footer, origin
from .model_figures import MARKS as MODEL_MARKS
from .model_figures import table as model_table
from .overview import percent
from .record import LIMITS, OURS, Record, write_bytes
from .store import DeviceResults
from .style import MARKS, duration, ratio

PAGE = "index.html"
_TEMPLATES = Path(__file__).parent / "template"
_LOSS = 0.995


@dataclass(frozen=True)
class Drawing:
    """A figure in its files, the .svg first, and what it is of; empty where it is of everything."""

    paths: tuple[Path, ...]
    title: str
    kind: str = ""
    parts: tuple[str, ...] = ()
    device: str = ""
    computed: bool = False
    note: str = ""


def write_page(
    out: Path,
    devices: Sequence[DeviceResults],
    drawings: Sequence[Drawing],
    workloads: Sequence[Workload],
    evidence: Evidence | None,
    complaints: Sequence[str],
) -> Path:
    """Writes `out`/index.html; `workloads` are those whose floors are computed, the drawings lie below `out`."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    rows = [row(record, device) for device in devices for record in sorted(device.records, key=_place)]
    html = environment.get_template("page.html").render(
        devices=[_device(device) for device in devices],
        rows=rows,
        summary=summary(rows),
        choices=choices(rows),
        figures=[_figure(drawing) for drawing in drawings],
        computed=[_computed(workload) for workload in workloads],
        datasheet=DATASHEET.target,
        not_served=NOT_SERVED,
        evidence=evidence,
        models=[each for device in devices for each in model_table(device)],
        model_marks=list(MODEL_MARKS.values()),
        complaints=[complaint.replace(str(Path.cwd()) + "/", "") for complaint in complaints],
    )
    write_bytes(out / PAGE, html.encode())
    return out / PAGE


def _place(record: Record) -> tuple[Any, ...]:
    """Kind by kind, a layer's forward pass before its gradients, and 9 before 10 in its name."""
    workload = record.workload
    words = [(int(word) if word.isdigit() else 0, word) for word in re.split(r"(\d+)", workload.layer.title)]
    return (KINDS + LECTURE_KINDS).index(workload.kind), words, (*PARTS, STEP).index(workload.part)


def row(record: Record, device: DeviceResults) -> dict[str, Any]:
    """A case as the page shows it; texts and, for sorting, numbers."""
    workload, ours = record.workload, record.contestants.get(OURS)
    cells = {
        "ours": (record.ours_us, duration),
        "library": (best[1] if (best := record.best(False)) else None, duration),
        "standard": (best[1] if (best := record.best(True)) else None, duration),
        "vs_library": (record.speedup(False), ratio),
        "vs_standard": (record.speedup(True), ratio),
        "saving": (record.saving, ratio),
        "share": (record.share, percent),
    }
    library, plan = record.best(False), record.plan or {}
    return {
        "device": device.name,
        "badge": badge(device),
        "kind": workload.kind,
        "part": workload.part,
        "dtype": workload.dtype,
        "name": workload.name,
        "shape": describe(workload.layer),
        "origin": workload.origin,
        "error": record.error,
        "cells": {name: _cell(value, text) for name, (value, text) in cells.items()},
        "library_name": _label(library[0]) if library else "",
        "loss": [name for name in ("vs_library", "vs_standard") if (value := cells[name][0]) and value < _LOSS],
        "contestants": [_contestant(name, record) for name in _ordered(record)],
        "unsteady": bool(record.unsteady),
        "kernel": plan.get("kernel", ""),
        "tile": ", ".join(f"{name} {value}" for name, value in sorted((plan.get("tile") or {}).items())),
        "source": plan.get("source", ""),
        "interval": [duration(us) for us in ours.interval_us] if ours and ours.interval_us else [],
        "error_bound": f"{record.relative_error:.2g} of at most {record.tolerance:.2g}, {record.checked}"
        if record.relative_error is not None and record.tolerance is not None
        else "",
        "clocks": describe_clocks(record.clocks) if record.clocks else "",
        "provenance": origin([record.provenance]),
    }


def _cell(value: float | None, text: Any) -> dict[str, Any]:
    return {"text": text(value) if value else "absent", "value": "" if not value else f"{value:.6g}"}


def _ordered(record: Record) -> list[str]:
    """Ours, then the others from fast to slow, then the absent ones."""

    def key(name: str) -> tuple[bool, bool, float]:
        contestant = record.contestants[name]
        return name != OURS, not contestant.samples_us, contestant.median_us if contestant.samples_us else 0.0

    return sorted(record.contestants, key=key)


def _contestant(name: str, record: Record) -> dict[str, Any]:
    contestant = record.contestants[name]
    low, high = contestant.interval_us or (None, None)
    return {
        "name": _label(name),
        "limit": name in LIMITS,
        "time": duration(contestant.median_us) if contestant.samples_us else "absent",
        "interval": f"{duration(low)} to {duration(high)}" if low and high else "",
        "samples": len(contestant.samples_us),
        "note": contestant.note or contestant.absent,
    }


def _label(name: str) -> str:
    return MARKS[name].label if name in MARKS else name


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page's head says of the rows shown; its script computes the same of those that a filter leaves."""
    factors = [float(value) for row in rows if (value := row["cells"]["vs_library"]["value"])]
    mean = math.exp(sum(map(math.log, factors)) / len(factors)) if factors else None
    return {
        "cases": len(rows),
        "compared": len(factors),
        "mean": ratio(mean) if mean else "–",
        "wins": sum(factor >= _LOSS for factor in factors),
        "worst": ratio(min(factors)) if factors else "–",
        "failed": sum(bool(row["error"]) for row in rows),
    }


def _by_part(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same for each part of a training step of the five kinds: a mean over all would count a step twice."""
    found = []
    for part in (*PARTS, STEP):
        said = summary([row for row in rows if row["part"] == part and row["kind"] in KINDS])
        found += [said | {"part": part}] if said["compared"] else []
    return found


def choices(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The values of every filter that occur, kinds and parts in their own order."""
    orders: dict[str, Sequence[str]] = {"kind": KINDS + LECTURE_KINDS, "part": (*PARTS, STEP)}
    found = {}
    for name in ("kind", "part", "dtype", "device"):
        values = {str(row[name]) for row in rows}
        order = orders.get(name, ())
        found[name] = [value for value in order if value in values] + sorted(values - set(order))
    return found


def _device(device: DeviceResults) -> dict[str, Any]:
    return {
        "name": device.name,
        "title": device.title,
        "badge": badge(device),
        "measured": device.measured,
        "cases": len(device.records),
        "ceilings": describe_ceilings(dict(device.ceilings)) if device.ceilings else "",
        "parts": _by_part([row(record, device) for record in device.records]),
        "footer": footer(list(device.records)),
    }


def _figure(drawing: Drawing) -> dict[str, Any]:
    svg = drawing.paths[0].read_bytes()
    return {
        "title": drawing.title,
        "note": drawing.note,
        "id": f"{drawing.device or 'computed'}-{drawing.paths[0].stem}",
        "name": drawing.paths[0].stem,
        "kind": drawing.kind,
        "parts": " ".join(part.replace(" ", "_") for part in drawing.parts),
        "device": drawing.device,
        "computed": drawing.computed,
        "data": base64.b64encode(svg).decode(),
    }


def _computed(workload: Workload) -> dict[str, Any]:
    work = Work.of(workload)
    floor, standard = work.floor_us(DATASHEET), work.standard_floor_us(DATASHEET)
    return {
        "name": workload.name,
        "shape": describe(workload),
        "kind": workload.kind,
        "gflop": f"{work.flops / 1e9:.3g}",
        "megabytes": f"{work.least_bytes / 1e6:.3g}",
        "floor": duration(floor),
        "standard": duration(standard),
        "saving": ratio(standard / floor),
        "bound": work.bound(DATASHEET),
    }
