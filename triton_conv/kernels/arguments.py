"""What a kernel takes besides tensors, as a plan keeps it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any


class Arguments(dict[str, Any]):
    """The arguments of a kernel that are no tensors, by name; and beside them what Triton compiled for these, and the
    launch that follows, if one does.
    """

    __slots__ = ("compiled", "second")

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        self.compiled: dict[tuple[Any, ...], Any] = {}
        self.second: Second | None = None

    @classmethod
    def of(cls, function: Any, known: dict[str, object]) -> Arguments:
        """Those of all that is known which a function takes, in its order."""
        return cls(
            (name, known[name]) for name in inspect.signature(function.fn).parameters if not name.endswith("_ptr")
        )


@dataclass(frozen=True)
class Second:
    """A second launch of one problem and tile, as `Join` explains."""

    numbers: int
    grid: int
    values: Arguments
