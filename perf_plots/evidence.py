"""What the compiler made of every kernel, from the JSON of `triton-conv inspect`: evidence that needs no device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVIDENCE = Path(__file__).parent / "evidence" / "sm_90.json"
_FIELDS = {
    "kernel": str, "label": str, "target": str, "dtype": str, "tile": str, "registers": int, "spill_bytes": int,
    "shared_bytes": int, "occupancy": float, "wgmma": int, "mma": int, "vector_loads": int,
}  # fmt: skip


class EvidenceError(ValueError):
    """The file is not what `triton-conv inspect --json` writes."""


@dataclass(frozen=True)
class Evidence:
    """The rows as the page shows them, and where they come from."""

    rows: tuple[dict[str, Any], ...]
    source: str
    path: str


def read_evidence(path: Path) -> Evidence | None:
    """The rows of a file, None where there is none; raises `EvidenceError` naming it.

    Beside "kernels", what `triton-conv inspect` writes, the file may say in "source" with what it was compiled.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        rows = tuple(_row(raw) for raw in content["kernels"])
        return Evidence(rows, str(content.get("source", "")), path.name)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EvidenceError(f"{path}: {type(error).__name__}: {error}") from error


def _row(raw: dict[str, Any]) -> dict[str, Any]:
    row = {name: kind(raw[name]) for name, kind in _FIELDS.items()}
    matrix = f"{row['wgmma']} wgmma" if row["wgmma"] else f"{row['mma']} mma" if row["mma"] else "none"
    error = str(raw.get("error", ""))
    return row | {"matrix": matrix, "occupancy": f"{row['occupancy']:.0%}", "error": error}
