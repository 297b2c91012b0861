"""One result file a case: what was run, on what, how long it took, and whether that is a measurement.

`<results>/<device>/<case>.json`. Readers check everything they use; a file that does not hold up is named and left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from triton_conv.autotune.measure import Timing
from triton_conv.workloads import KINDS, LECTURE_KINDS, PARTS, STEP, Workload
from triton_conv.writing import write_bytes as write_bytes
from triton_conv.writing import write_json as write_json

from . import sound
from .floors import Work
from .sound import ResultError as ResultError

SCHEMA = 1
OURS = "triton_conv"
COMPILED = "torch.compile"
STANDARD = ("standard", "standard other format")
# Not the operation, but what it is held against: they win no comparison.
LIMITS = ("device copy", "matrix product")
CEILINGS, COLD_START, SANITIZER = "ceilings.json", "cold_start.json", "sanitizer.json"
# What kind of numbers a figure or a table shows.
COMPUTED, MEASURED, REHEARSED = "computed, not measured", "measured", "REHEARSAL: made-up times, not a measurement"
COMMITTED = Path(__file__).parent / "results"
# Share of its median that an interval may be wide: on a machine of its own it is a few per cent.
_UNSTEADY = 0.5


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case: its samples, or why there are none."""

    samples_us: tuple[float, ...] = ()
    interval_us: tuple[float, float] | None = None
    relative_error: float | None = None
    absent: str = ""
    note: str = ""

    @classmethod
    def of(cls, timing: Timing, relative_error: float | None, note: str) -> Contestant:
        samples = tuple(round(sample, 3) for sample in timing.samples)
        low, high = timing.interval
        return cls(samples, (round(low, 3), round(high, 3)), relative_error, note=note)

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples_us)


@dataclass(frozen=True)
class Record:
    """A case and everything found out about it. With an `error`, nothing was timed.

    `clocks` are the device's "before" and "after" the rounds, None where it does not tell.
    """

    workload: Workload
    measured: bool
    work: Work
    provenance: Mapping[str, Any]
    plan: Mapping[str, Any] | None = None
    contestants: Mapping[str, Contestant] = field(default_factory=dict)
    relative_error: float | None = None
    tolerance: float | None = None
    checked: str = ""
    floor_us: float | None = None
    standard_floor_us: float | None = None
    floor_basis: str = ""
    error: str = ""
    clocks: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ours_us(self) -> float | None:
        ours = self.contestants.get(OURS)
        return ours.median_us if ours and ours.samples_us else None

    def best(self, standard: bool) -> tuple[str, float] | None:
        """The fastest standard convolution, or else the fastest other library on the same operation; None if absent."""
        times = {
            name: contestant.median_us
            for name, contestant in self.contestants.items()
            if name not in (OURS, *LIMITS) and (name in STANDARD) == standard and contestant.samples_us
        }
        return min(times.items(), key=lambda item: item[1]) if times else None

    def speedup(self, standard: bool) -> float | None:
        """How many times faster than the best of the others we are; below one is a loss."""
        best = self.best(standard)
        return best[1] / self.ours_us if best and self.ours_us else None

    @property
    def unsteady(self) -> list[str]:
        """Who of ours and the fastest others has an interval too wide to compare by: something disturbed the rounds."""
        names = [OURS, *(best[0] for standard in (False, True) if (best := self.best(standard)))]
        found = [(name, self.contestants[name]) for name in names if name in self.contestants]
        return [
            name
            for name, one in found
            if one.interval_us and one.interval_us[1] - one.interval_us[0] > _UNSTEADY * one.median_us
        ]

    @property
    def share(self) -> float | None:
        """Share of the roofline limit that was reached."""
        return self.floor_us / self.ours_us if self.floor_us and self.ours_us else None

    @property
    def saving(self) -> float | None:
        """What the operation saves over the standard convolution by the count: the ratio of their floors."""
        return self.standard_floor_us / self.floor_us if self.standard_floor_us and self.floor_us else None

    def absent(self) -> dict[str, str]:
        """Baselines that were not timed, and why."""
        return {name: contestant.absent for name, contestant in self.contestants.items() if not contestant.samples_us}

    def to_json(self) -> dict[str, Any]:
        contestants = {}
        for name, contestant in self.contestants.items():
            median = {"median_us": contestant.median_us} if contestant.samples_us else {}
            contestants[name] = asdict(contestant) | median
        case = asdict(self.workload) | {"geometry": self.workload.problem().describe()}
        plain = asdict(self) | {"contestants": contestants}
        del plain["workload"]
        return {"schema": SCHEMA, "title": self.workload.title, "case": case} | plain

    @classmethod
    def from_json(cls, content: Any) -> Record:
        """Builds a record and checks it; raises `ResultError`, or what a missing or mistyped field raises."""
        sound.schema(content, SCHEMA)
        case = {name: value for name, value in content["case"].items() if name != "geometry"}
        workload = Workload(**case | {name: tuple(case[name]) for name in ("input", "weight")})
        fields = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        contestants = {name: contestant_of(name, raw) for name, raw in content["contestants"].items()}
        record = cls(**fields | {"workload": workload, "work": Work(**content["work"]), "contestants": contestants})
        _check(record)
        if not record.error and record.ours_us is None:
            raise ResultError("neither a time of triton_conv nor an error")
        return record


def _check(record: Record) -> None:
    """Raises `ResultError`, or what building the workload's problem raises, for what no figure can be drawn of."""
    workload = record.workload
    for what, value, known in (
        ("kind", workload.kind, KINDS + LECTURE_KINDS), ("part", workload.part, (*PARTS, STEP)),
    ):  # fmt: skip
        if value not in known:
            raise ResultError(f"case: {what} {value!r} is none of {', '.join(known)}")
    sound.text("case: name", workload.name)
    sound.text("case: origin", workload.origin)
    try:
        workload.problem()
    except Exception as error:  # whatever shapes and arguments that no layer has run into
        raise ResultError(f"case: no layer ({type(error).__name__}: {error})") from error
    for name in ("flops", "least_bytes", "standard_flops", "standard_bytes"):
        sound.number(f"work: {name}", getattr(record.work, name))
    for name in ("floor_us", "standard_floor_us", "tolerance"):
        sound.number(name, getattr(record, name))
    sound.number("relative_error", record.relative_error, zero=True)
    for name in ("error", "checked", "floor_basis"):
        sound.text(name, getattr(record, name))
    sound.plan(record.plan)
    sound.provenance(record.provenance)
    sound.clocks(record.clocks)


def contestant_of(name: str, raw: Mapping[str, Any]) -> Contestant:
    """A contestant from its file; raises `ResultError` for one that does not hold up."""
    sound.mapping(name, raw)
    fields = {key: raw[key] for key in Contestant.__dataclass_fields__ if key in raw}
    samples = sound.samples(name, raw["samples_us"])
    if not samples and not raw.get("absent"):
        raise ResultError(f"{name}: neither samples nor a reason for their absence")
    for key in ("absent", "note"):
        sound.text(f"{name}: {key}", raw.get(key, ""))
    sound.number(f"{name}: relative_error", raw.get("relative_error"), zero=True)
    interval = sound.interval(name, raw.get("interval_us"))
    return Contestant(**fields | {"samples_us": samples, "interval_us": interval})


def write(record: Record, folder: Path) -> Path:
    """Writes a record into a device's folder; refuses a rehearsal's among the committed results."""
    refuse_rehearsal(record.measured, folder)
    path = folder / f"{record.workload.title}.json"
    write_json(path, record.to_json())
    return path


def refuse_rehearsal(measured: bool, folder: Path) -> None:
    """Made-up times never lie among the committed results."""
    if not measured and folder.resolve().is_relative_to(COMMITTED.resolve()):
        raise ResultError(f"{folder}: a rehearsal is no measurement, and does not belong among the committed results")


def read(path: Path) -> Record:
    """Reads and checks one file; raises `ResultError` naming it."""
    try:
        return Record.from_json(sound.load_json(path))
    except sound.UNREADABLE as error:
        raise sound.refused(path, error) from error
