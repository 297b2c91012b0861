"""Where the commands print: tables and results to stdout, progress and complaints to stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..amounts import finite

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError:  # installed from setup.cfg it is there; run from a checkout on a GPU machine it may not be
    from .plain import (  # type: ignore[assignment]
        BarColumn,
        Console,
        Progress,
        Table,
        TextColumn,
        TimeRemainingColumn,
    )

__all__ = [
    "ERR",
    "OUT",
    "BarColumn",
    "Progress",
    "Table",
    "TextColumn",
    "TimeRemainingColumn",
    "complain",
    "say",
    "write_json",
]

# A file or a pipe has no width to fit in.
OUT = Console(width=None if sys.stdout.isatty() else 160)
ERR = Console(stderr=True)


def say(line: str) -> None:
    """One line to stdout, as it is."""
    OUT.print(line, highlight=False, markup=False, soft_wrap=True)


def complain(line: str) -> None:
    """One line to stderr, as it is: whatever reads a log finds all of it."""
    ERR.print(f"triton-conv: {line}", highlight=False, markup=False, soft_wrap=True)


def write_json(path: Path | None, content: Any) -> None:
    """Writes a command's result where `--json` says, if it says so."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(finite(content), indent=1) + "\n")
        say(f"wrote {path}")
