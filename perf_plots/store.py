"""The results folder: every device's records, its measured ceilings, and complaints about files that do not hold up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_conv.target import Target

from .record import CEILINGS, Record, ResultError, read

REHEARSAL = "rehearsal"


@dataclass(frozen=True)
class DeviceResults:
    """The records of one device, in the order of their file names."""

    name: str
    records: tuple[Record, ...]
    ceilings: Mapping[str, Any] | None = None

    @property
    def measured(self) -> bool:
        return all(record.measured for record in self.records)

    @property
    def title(self) -> str:
        """The device as its maker calls it."""
        return str(self.records[0].provenance.get("device", self.name))

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
        content: dict[str, Any] = json.loads(path.read_text())
        if not content["bytes_per_s"] > 0 or not all(rate > 0 for rate in content["flops_per_s"].values()):
            raise ResultError(f"{path}: a rate is not positive")
        return content
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ResultError(f"{path}: {type(error).__name__}: {error}") from error


def load(results: Path) -> tuple[list[DeviceResults], list[str]]:
    """Every device with at least one sound record, and a line for every file that was left out."""
    devices, complaints = [], []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        records = []
        for path in sorted(folder.glob("*.json")):
            try:
                if path.name != CEILINGS:
                    records.append(read(path))
            except ResultError as error:
                complaints.append(f"left out: {error}")
        try:
            ceilings = read_ceilings(folder)
        except ResultError as error:
            ceilings = None
            complaints.append(f"left out: {error}")
        if records:
            devices.append(DeviceResults(folder.name, tuple(records), ceilings))
    return devices, complaints
