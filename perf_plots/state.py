"""What a run on a GPU has done so far, on disk: the next call goes on from it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from .record import write_bytes, write_json

STATE = "run.json"
ARCHIVE, SUMMARY, TESTS, TUNING = "results.tar.gz", "summary.txt", "tests.txt", "tuning.json"
FAILURES, PASSED, TRIALS = "failures.txt", "passed.txt", "trials.jsonl"
# Ends of the tracebacks of the failures, and the user's folder that the tests have: what the check of first uses found.
TRACEBACKS, TESTS_HOME = "tracebacks.txt", "tests_home"


def load_json(path: Path) -> dict[str, Any]:
    """An object from a file; empty where there is none, or none that can be read: that work is then done again."""
    try:
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def load_state(out: Path) -> dict[str, Any]:
    """By stage, what it reported."""
    return load_json(out / STATE)


def save_stage(out: Path, stage: str, report: dict[str, Any]) -> None:
    """Replaces one stage's report."""
    write_json(out / STATE, load_state(out) | {stage: report})


def adopt(committed: Path, results: Path, trials: Path) -> int:
    """Begins a run with a device's committed results and trials, where it has none yet of that name; how many files."""
    pairs = [(path, results / path.relative_to(committed)) for path in sorted(committed.rglob("*.json"))]
    new = [
        (path, place) for path, place in [*pairs, (committed / TRIALS, trials)] if path.exists() and not place.exists()
    ]
    for path, place in new:
        write_bytes(place, path.read_bytes())
    return len(new)


def bundle(out: Path, folder: Path, summary: list[str]) -> None:
    """Writes the summary, and one archive of everything else, into `folder`, each atomically."""
    write_bytes(folder / SUMMARY, ("\n".join(summary) + "\n").encode())
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path in sorted(out.rglob("*")):
            # A temporary file of an atomic write under way has a name that starts with a dot.
            if path.is_file() and path.name != ARCHIVE and not path.name.startswith("."):
                archive.add(path, arcname=str(path.relative_to(out)))
    write_bytes(folder / ARCHIVE, buffer.getvalue())
    for overview in sorted((out / "figures").glob("*/overview.png")):
        write_bytes(folder / overview.name, overview.read_bytes())
