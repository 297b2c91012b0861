"""One result file a model, memory format, mode and pass: who took how long, from the call to its end.

`<results>/<device>/models/<title>.json`. Like those of single layers, readers check what they use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import sound
from .record import SCHEMA, Contestant, contestant_of, refuse_rehearsal, write_json
from .sound import ResultError

FOLDER = "models"
PLAIN, CONVERTED, FORCED = "torch", "converted", "forced"
GRAPH, COMPILED = " graph", " compiled"
CONTESTANTS = (
    PLAIN, CONVERTED, FORCED, PLAIN + GRAPH, FORCED + GRAPH, PLAIN + COMPILED, CONVERTED + COMPILED, FORCED + COMPILED,
)  # fmt: skip
WRONG = "WRONG"
"""How the reason begins for which a contestant that computes something else is absent."""


@dataclass(frozen=True)
class Unit:
    """What one file is of. A compiled one also times the plain model, so that both modes have one scale."""

    model: str
    channels_last: bool
    compiled: bool
    training: bool

    @property
    def title(self) -> str:
        words = self.model, "nhwc" if self.channels_last else "nchw"
        return "-".join((*words, "compiled" if self.compiled else "eager", "training" if self.training else "forward"))


@dataclass(frozen=True)
class ModelRecord:
    """What was found out about a unit. With an `error`, nothing was timed.

    `layers` are how many convolutions the model has, and how many of them the converted one runs on our kernels;
    `batch` inputs of `input` at a time; errors are relative to `reference`;
    `seconds` are what the unit itself took, by what they went to.
    """

    unit: Unit
    measured: bool
    provenance: Mapping[str, Any]
    batch: int = 0
    input: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    contestants: Mapping[str, Contestant] = field(default_factory=dict)
    layers: Mapping[str, int] = field(default_factory=dict)
    reference: str = ""
    clocks: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    error: str = ""

    def us(self, name: str) -> float | None:
        """The median time of a contestant."""
        found = self.contestants.get(name)
        return found.median_us if found and found.samples_us else None

    def gain(self, ours: str, other: str) -> float | None:
        """How many times as fast as the other."""
        mine, its = self.us(ours), self.us(other)
        return its / mine if mine and its else None

    def to_json(self) -> dict[str, Any]:
        contestants = {
            name: asdict(each) | ({"median_us": each.median_us} if each.samples_us else {})
            for name, each in self.contestants.items()
        }
        return {"schema": SCHEMA, "title": self.unit.title} | asdict(self) | {"contestants": contestants}

    @classmethod
    def from_json(cls, content: Any) -> ModelRecord:
        """Builds a record and checks it; raises `ResultError`, or what a missing or mistyped field raises."""
        sound.schema(content, SCHEMA)
        contestants = {name: contestant_of(name, raw) for name, raw in content["contestants"].items()}
        fields = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        fields |= {"unit": Unit(**content["unit"]), "contestants": contestants, "input": tuple(content["input"])}
        record = cls(**fields)
        _check(record)
        if not record.error and record.us(PLAIN) is None:
            raise ResultError("neither a time of the plain model nor an error")
        return record


def _check(record: ModelRecord) -> None:
    """Raises `ResultError` for what no figure can be drawn of."""
    unit = record.unit
    sound.text("unit: model", unit.model)
    if not all(isinstance(flag, bool) for flag in (unit.channels_last, unit.compiled, unit.training)):
        raise ResultError("unit: channels_last, compiled and training are each true or false")
    if unknown := [name for name in record.contestants if name not in CONTESTANTS]:
        raise ResultError(f"contestant {unknown[0]!r} is none of {', '.join(CONTESTANTS)}")
    if record.layers:
        for name in ("convolutions", "ours"):
            sound.number(f"layers: {name}", sound.mapping("layers", record.layers)[name], zero=True)
    for name in ("dtype", "reference", "error"):
        sound.text(name, getattr(record, name))
    sound.provenance(record.provenance)
    sound.clocks(record.clocks)


def path(folder: Path, unit: Unit) -> Path:
    """The file of a unit in a device's folder."""
    return folder / FOLDER / f"{unit.title}.json"


def write(record: ModelRecord, folder: Path) -> Path:
    """Writes a record into a device's folder; refuses a rehearsal's among the committed results."""
    refuse_rehearsal(record.measured, folder)
    write_json(path(folder, record.unit), record.to_json())
    return path(folder, record.unit)


def read(file: Path) -> ModelRecord:
    """Reads and checks one file; raises `ResultError` naming it."""
    try:
        return ModelRecord.from_json(sound.load_json(file))
    except sound.UNREADABLE as error:
        raise sound.refused(file, error) from error


def read_models(folder: Path, device: str, measured: bool) -> tuple[tuple[ModelRecord, ...], list[str]]:
    """The records of models in a device's folder, and complaints about what was left out."""
    found, complaints = [], []
    for file in sorted((folder / FOLDER).glob("*.json")):
        try:
            record = read(file)
            if file.stem != record.unit.title:
                raise ResultError(f"{file}: it holds {record.unit.title}, whose file has that name")
        except ResultError as error:
            complaints.append(f"left out: {error}")
            continue
        if record.measured != measured or record.provenance.get("device") != device:
            what = str(record.provenance.get("device")) if record.measured else "a rehearsal"
            complaints.append(f"left out: {file}: of {what} among results of {device}")
            continue
        found.append(record)
    return tuple(found), complaints
