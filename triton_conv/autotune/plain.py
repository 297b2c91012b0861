"""What the commands use of rich, in plain lines: for machines that have torch and triton and nothing else."""

from __future__ import annotations

import sys
from typing import Any


class Console:
    """Prints to stdout or stderr; styles are left out."""

    def __init__(self, stderr: bool = False, width: int | None = None) -> None:
        self._stderr = stderr

    def print(self, what: object = "", **style: Any) -> None:
        print(what, file=sys.stderr if self._stderr else sys.stdout, flush=True)


class Table:
    """Columns as wide as what is in them."""

    def __init__(self, **style: Any) -> None:
        self._right: list[bool] = []
        self._rows: list[list[str]] = [[]]

    def add_column(self, header: str, justify: str = "left", **style: Any) -> None:
        self._right.append(justify == "right")
        self._rows[0].append(" ".join(header.split()))

    def add_row(self, *cells: str, style: str = "") -> None:
        self._rows.append(list(cells))

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self._rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, self._right, strict=True)
            ).rstrip()
            for row in self._rows
        )


class Progress:
    """No bar; `disable` tells whoever asks to print lines instead."""

    disable = True

    def __init__(self, *columns: Any, **style: Any) -> None:
        pass

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def add_task(self, description: str, total: float | None = None) -> int:
        return 0

    def update(self, task: int, **changes: Any) -> None:
        pass

    def advance(self, task: int) -> None:
        pass


def column(*arguments: Any) -> None:
    """Stands for a column of a progress bar."""


BarColumn = TextColumn = TimeRemainingColumn = column
