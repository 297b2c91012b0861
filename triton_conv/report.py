"""What was chosen for the layers of a model, or for the calls of a piece of code, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .amounts import counted
from .policy import Choice


@dataclass(frozen=True)
class Row:
    """One layer, or one functional call. `problem` is empty where the call's sizes are not known."""

    name: str
    layer: str
    choice: Choice
    problem: str = ""

    @classmethod
    def of(cls, name: str, layer: str, choice: Choice) -> Row:
        return cls(name, layer, choice, choice.plan.problem.describe() if choice.plan else "")

    @property
    def gain(self) -> str:
        """How many times as fast as torch ours is expected to be, in words."""
        return "unknown" if self.choice.gain is None else f"{self.choice.gain:.2f}x"

    @property
    def kernel(self) -> str:
        """The kernel of ours that runs it, or would."""
        return self.choice.plan.kernel.name if self.choice.plan else "-"


@dataclass
class Report:
    """One row for every layer and size, or every call; prints as a table."""

    title: str
    # In the order of their coming: a long run may have as many as it has sizes.
    _rows: dict[Row, None] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Adds a row, unless it is there."""
        self._rows[row] = None

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, name: str) -> Row:
        """The first row of that name."""
        for row in self:
            if row.name == name:
                return row
        raise KeyError(name)

    def __str__(self) -> str:
        ours = sum(row.choice.ours for row in self)
        lines = [f"{self.title}: {counted(len(self._rows), 'convolution')}, {ours} on our kernels"]
        table = [("name", "layer", "runs on", "expected gain", "kernel of ours", "why", "problem")]
        table += [
            (row.name, row.layer, row.choice.backend, row.gain, row.kernel, row.choice.reason, row.problem)
            for row in self
        ]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
        return "\n".join(lines)
