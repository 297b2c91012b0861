"""Figure and table of whole models: plain, converted by measurement, ours everywhere; eager, compiled, as a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .clocks import describe as describe_clocks
from .measured import NOT_MEASURED, badge, origin
from .model_record import COMPILED, CONVERTED, FORCED, GRAPH, PLAIN, ModelRecord, Unit
from .rows import Chart, Point, Row, draw
from .store import DeviceResults
from .style import BLACK, BLUE, GREY, LOSS, ORANGE, PURPLE, SKY, Mark, duration, ratio

MARKS = {
    CONVERTED: Mark("converted", BLUE, "o", size=9),
    PLAIN: Mark("PyTorch", ORANGE, "s"),
    FORCED: Mark("ours everywhere", SKY, "D", size=7),
    PLAIN + GRAPH: Mark("PyTorch, CUDA graph", ORANGE, "^", filled=False),
    FORCED + GRAPH: Mark("ours, CUDA graph", SKY, "^", filled=False),
    CONVERTED + COMPILED: Mark("converted, compiled", BLUE, "o", filled=False),
    PLAIN + COMPILED: Mark("torch.compile", PURPLE, "p"),
    FORCED + COMPILED: Mark("ours, compiled", SKY, "D", filled=False, size=7),
}
"""Contestants in the order of the table; those of the figure's first lane are eager, or replayed."""
_SLOWER = 0.995


@dataclass(frozen=True)
class Entry:
    """A model in one memory format, its forward pass or a training step: the eager unit's record and the compiled's."""

    model: str
    channels_last: bool
    training: bool
    eager: ModelRecord | None
    compiled: ModelRecord | None

    @property
    def records(self) -> list[ModelRecord]:
        return [record for record in (self.eager, self.compiled) if record]

    def us(self, name: str) -> float | None:
        """A contestant's time: of the plain model, which both units time, the eager one's."""
        times = (record.us(name) for record in self.records)
        return next((time for time in times if time), None)

    def gain(self, name: str) -> float | None:
        """How many times as fast as PyTorch in the same mode, timed beside it."""
        mode = next((mode for mode in (COMPILED, GRAPH) if name.endswith(mode)), "")
        gains = (record.gain(name, PLAIN + mode) for record in self.records)
        return next((gain for gain in gains if gain), None)

    @property
    def usual(self) -> bool:
        """Whether it is in the memory format that such a model is run in."""
        known = next((record for record in self.records if record.input), None)
        return self.channels_last or known is None or len(known.input) == 2

    @property
    def detail(self) -> str:
        """Shape, dtype and format in a few words."""
        known = next((record for record in self.records if record.batch), None)
        if known is None:
            return "NHWC" if self.channels_last else "NCHW"
        shape = "×".join(map(str, (known.batch, *known.input)))
        short = {"bfloat16": "bf16", "float32": "fp32"}.get(known.dtype, known.dtype)
        return f"{shape} {short} {'channels last' if self.channels_last else 'contiguous'}"

    @property
    def layers(self) -> str:
        """How many convolutions the converted model runs on our kernels."""
        known = next((record.layers for record in self.records if record.layers), None)
        return f"{known['ours']} of {known['convolutions']}" if known else ""

    @property
    def notes(self) -> list[str]:
        """What is missing, and why."""
        found = [f"{record.unit.title}: {record.error}" for record in self.records if record.error]
        for record in self.records:
            for name, each in record.contestants.items():
                if not each.samples_us:
                    found.append(f"absent: {MARKS[name].label} ({each.absent})")
        return list(dict.fromkeys(found))


def entries(results: DeviceResults) -> list[Entry]:
    """Every model of which there is a result, in the order of their names."""
    found: dict[tuple[str, bool, bool], dict[bool, ModelRecord]] = {}
    for record in results.models:
        unit: Unit = record.unit
        found.setdefault((unit.model, unit.channels_last, unit.training), {})[unit.compiled] = record
    return [
        Entry(*key, records.get(False), records.get(True))
        for key, records in sorted(found.items(), key=lambda item: (item[0][2], item[0][0], not item[0][1]))
    ]


def figure(results: DeviceResults, training: bool, stem: Path) -> list[Path]:
    """A row a model and format; nothing where there is no result."""
    chosen = [entry for entry in entries(results) if entry.training == training]
    if not chosen:
        return []
    records = [record for entry in chosen for record in entry.records]
    what = "A training step" if training else "The forward pass"
    lanes = "; upper line eager, lower compiled" if any(record.unit.compiled for record in records) else "; eager"
    chart = Chart(
        f"Whole models: {'training' if training else 'forward'}",
        f"{what} on {results.title}{lanes}",
        badge(results),
        _footer(records),
    )
    return draw(chart, [_row(entry) for entry in chosen], stem)


def _row(entry: Entry) -> Row:
    """In the colour of a loss where the model as `convert` makes it loses; ours everywhere is bound to, in places."""
    parts, lost = [], False
    for name in (CONVERTED, FORCED, FORCED + GRAPH, CONVERTED + COMPILED, FORCED + COMPILED):
        time, gain = entry.us(name), entry.gain(name)
        if time and gain:
            lost |= gain < _SLOWER and name.startswith(CONVERTED)
            mode = next((mode for mode in (COMPILED, GRAPH) if name.endswith(mode)), "")
            other = MARKS[PLAIN + mode].label
            parts.append(f"{'LOSS ' if gain < _SLOWER else ''}{MARKS[name].label} {ratio(gain)} vs {other}")
    points = [
        Point(mark, us, lane=int(name.endswith(COMPILED))) for name, mark in MARKS.items() if (us := entry.us(name))
    ]
    failed = any(record.error for record in entry.records)
    verdict = " · ".join(parts) or ("FAILED, no time" if failed else "no time of ours")
    layers = [f"converted: {entry.layers} convolutions on our kernels"] if entry.layers else []
    return Row(
        entry.model, entry.detail, verdict, LOSS if lost or failed else BLACK if parts else GREY, tuple(points),
        (*layers, *entry.notes),
    )  # fmt: skip


def _footer(records: list[ModelRecord]) -> str:
    method = "Medians of interleaved calls by the host's clock, launches included"
    if not all(record.measured for record in records):
        method = NOT_MEASURED
    return (
        f"{origin([record.provenance for record in records])}. {method}. Converted: our kernels where measured faster. "
        "Run by python -m perf_plots.gpu."
    )


def table(results: DeviceResults) -> list[dict[str, Any]]:
    """The rows of the page's table."""
    return [_page_row(entry, results.name) for entry in entries(results)]


def _page_row(entry: Entry, device: str) -> dict[str, Any]:
    clocks = [describe_clocks(record.clocks) for record in entry.records if record.clocks]
    return {
        "device": device,
        "part": "forward and backward" if entry.training else "forward",
        "name": entry.model,
        "detail": entry.detail,
        "layers": entry.layers,
        "cells": [_cell(entry, name) for name in MARKS],
        "notes": [*entry.notes, *dict.fromkeys(clocks)],
    }


def _cell(entry: Entry, name: str) -> Mapping[str, Any]:
    time, gain = entry.us(name), entry.gain(name)
    tried = any(name in record.contestants for record in entry.records)
    shown = ratio(gain) if gain and not name.startswith(PLAIN) else ""
    return {
        "label": MARKS[name].label,
        "text": duration(time) if time else "absent" if tried else "–",
        "gain": shown,
        "loss": bool(shown) and gain is not None and gain < _SLOWER,
    }
