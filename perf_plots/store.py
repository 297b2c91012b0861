"""The results folder: every device's records, its measured ceilings, and complaints about files that do not hold up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from triton_conv.amounts import counted
from triton_conv.target import Target, board, datasheet

from . import sound
from .floors import Limits
from .model_record import FOLDER, ModelRecord, read_models
from .record import CEILINGS, COLD_START, SANITIZER, Record, read
from .sound import ResultError
from .trials import Times, read_trials

REHEARSAL = "rehearsal"


@dataclass(frozen=True)
class DeviceResults:
    """The records of one device, in the order of their file names."""

    name: str
    records: tuple[Record, ...]
    ceilings: Mapping[str, Any] | None = None
    trials: Times = field(default_factory=dict)
    cold_start: Mapping[str, Any] | None = None
    models: tuple[ModelRecord, ...] = ()

    @property
    def measured(self) -> bool:
        return all(record.measured for record in self.records)

    @property
    def title(self) -> str:
        """The device as its maker calls it."""
        return str(self.records[0].provenance.get("device", self.name))

    @property
    def target(self) -> Target | None:
        """What the results were measured on; None for a board whose datasheet is not known, or a rehearsal."""
        known = datasheet(str(self.records[0].provenance.get("arch")), board(self.title))
        return replace(known, sms=self.records[0].provenance.get("sms", known.sms)) if known else None

    @property
    def limits(self) -> Limits | None:
        """The measured ceilings, or the datasheet's; None where neither is known."""
        return Limits.of(self.target, self.ceilings) if self.target else None

    def by_title(self) -> dict[str, Record]:
        return {record.workload.title: record for record in self.records}


def device_folder(target: Target) -> str:
    """The name of a device's folder: "h100-80gb-hbm3-132sm"."""
    return REHEARSAL if target.interpreted else target.config_folder.split("/")[-1]


def read_ceilings(folder: Path) -> dict[str, Any] | None:
    """The ceilings measured on a device, or None if there are none; raises `ResultError`."""
    path = folder / CEILINGS
    if not path.is_file():
        return None
    try:
        content = sound.load_json(path)
        rates = {"bytes_per_s": content["bytes_per_s"], **sound.mapping("flops_per_s", content["flops_per_s"])}
        for name, rate in rates.items():
            if rate is None:
                raise ResultError(f"{name}: no rate")
            sound.number(name, rate)
        return content
    except sound.UNREADABLE as error:
        raise sound.refused(path, error) from error


def load(results: Path) -> tuple[list[DeviceResults], list[str]]:
    """Every device with at least one sound record, and a line for everything that was left out."""
    devices, complaints = [], []
    if results.exists() and not results.is_dir():
        complaints.append(f"{results} is no folder of results")
    elif any(path.name != CEILINGS and _is_record(path) for path in results.glob("*.json")):
        complaints.append(f"{results} holds results itself: name the folder above it, which has one folder a device")
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        device, left_out = _load(folder)
        devices += [device] if device else []
        complaints += left_out
    return devices, complaints


def _load(folder: Path) -> tuple[DeviceResults | None, list[str]]:
    records, complaints = [], []
    for path in sorted(folder.glob("*.json")):
        if path.name in (CEILINGS, COLD_START, SANITIZER):
            continue
        try:
            record = read(path)
            if path.stem != record.workload.title:
                raise ResultError(f"{path}: it holds {record.workload.title}, whose file has that name")
            records.append(record)
        except ResultError as error:
            complaints.append(f"left out: {error}")
    records, foreign = _of_one_device(records, folder)
    complaints += foreign
    if not records:
        if (folder / FOLDER).is_dir():
            complaints.append(f"left out: {folder / FOLDER}: models alone, without the result of a single layer")
        return None, complaints
    device, measured = str(records[0].provenance["device"]), records[0].measured
    beside: list[dict[str, Any] | None] = []
    for reader, name in ((read_ceilings, CEILINGS), (read_cold_start, COLD_START)):
        try:
            content = reader(folder)
            _of_the_same(content, folder / name, device, measured)
        except ResultError as error:
            content = None
            complaints.append(f"left out: {error}")
        beside.append(content)
    trials, broken = read_trials(folder)
    models, left_out = read_models(folder, device, measured)
    return DeviceResults(folder.name, tuple(records), beside[0], trials, beside[1], models), [
        *complaints, *broken, *left_out,
    ]  # fmt: skip


def _of_the_same(content: dict[str, Any] | None, path: Path, device: str, measured: bool) -> None:
    """Raises `ResultError` for what was measured elsewhere than the cases of a folder, or made up."""
    if content is None:
        return
    if content.get("measured", measured) != measured:
        raise ResultError(f"{path}: {'measured' if content['measured'] else 'a rehearsal'}, unlike the cases beside it")
    its = (content.get("provenance") or {}).get("device", device)
    if its != device:
        raise ResultError(f"{path}: of {its} among results of {device}")


def _of_one_device(records: list[Record], folder: Path) -> tuple[list[Record], list[str]]:
    """The records of the device that most are of, measured ones if any is; and what was left out for it."""
    complaints = []
    if len({record.measured for record in records}) > 1:
        rehearsed = [record.workload.title for record in records if not record.measured]
        complaints.append(f"left out: {folder}: a rehearsal among measurements: {', '.join(rehearsed)}")
        records = [record for record in records if record.measured]
    names = Counter(str(record.provenance["device"]) for record in records)
    for name, count in names.most_common()[1:]:
        complaints.append(
            f"left out: {folder}: {counted(count, 'result')} of {name} among {names.most_common()[0][1]} of "
            f"{names.most_common()[0][0]}; a folder holds one device"
        )
    device = names.most_common()[0][0] if names else ""
    return [record for record in records if record.provenance["device"] == device], complaints


def _is_record(path: Path) -> bool:
    try:
        read(path)
    except ResultError:
        return False
    return True


def read_cold_start(folder: Path) -> dict[str, Any] | None:
    """What first calls took on a device, or None; raises `ResultError`."""
    path = folder / COLD_START
    if not path.is_file():
        return None
    try:
        content = sound.load_json(path)
        if not isinstance(content["measured"], bool):
            raise ResultError("it is not said whether these times were measured")
        sound.provenance(content["provenance"])
        for case in content["cases"]:
            for name in ("title", "kind", "error"):
                sound.text(name, sound.mapping("case", case)[name])
            for what, seconds in sound.mapping("seconds", case["seconds"]).items():
                sound.samples(what, [seconds])
        return content
    except sound.UNREADABLE as error:
        raise sound.refused(path, error) from error
