"""Switches of the library: variables of a module that a call sets at once, or a `with` block until its end."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Setting:
    """Sets a variable among a module's `variables`; as a context manager, puts back what it was."""

    def __init__(self, variables: dict[str, Any], name: str, value: Any) -> None:
        self._variables, self._name, self._before = variables, name, variables[name]
        variables[name] = value

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._variables[self._name] = self._before
