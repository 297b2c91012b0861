"""What a result file must be like: all that figures, tables and comparisons use is checked once, when it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

_CLOCKS = ("sm_mhz", "memory_mhz", "celsius", "watts")


class ResultError(ValueError):
    """A result file is unreadable, malformed or of another schema, or may not be written where it was asked to be."""


UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip
"""What reading a file that does not hold up raises."""


def load_json(path: Path) -> dict[str, Any]:
    """The object in a file; raises one of `UNREADABLE`."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ResultError("not a JSON object")
    return content


def refused(path: Path, error: BaseException) -> ResultError:
    """Why a file does not hold up, in words that name it."""
    if isinstance(error, ResultError):
        why = str(error)
    elif isinstance(error, json.JSONDecodeError):
        why = f"not JSON, or cut short: {error}"
    elif isinstance(error, OSError):
        why = f"cannot be read: {error.strerror}"
    else:
        why = f"nothing under {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
    return ResultError(f"{path}: {why}")


def schema(content: Mapping[str, Any], known: int) -> None:
    """Of this version, and says whether it is a measurement."""
    if content["schema"] != known:
        raise ResultError(f"schema {content['schema']!r}, expected {known}")
    if not isinstance(content["measured"], bool):
        raise ResultError(f"measured: expected true or false, got {content['measured']!r}")


def number(what: str, value: Any, zero: bool = False) -> None:
    """Nothing, or a positive finite number; none at all only where `zero` says so."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ResultError(f"{what}: expected a number, got {value!r}")
    if value < 0 or (not zero and value == 0):
        raise ResultError(f"{what}: {value!r} is not positive")


def text(what: str, value: Any) -> None:
    """A string."""
    if not isinstance(value, str):
        raise ResultError(f"{what}: expected a text, got {value!r}")


def mapping(what: str, value: Any) -> Mapping[str, Any]:
    """An object, whose names are strings as JSON has them."""
    if not isinstance(value, Mapping):
        raise ResultError(f"{what}: expected an object, got {value!r}")
    return value


def samples(name: str, values: Any) -> tuple[float, ...]:
    """Times, every one positive and finite."""
    if isinstance(values, str) or not all(isinstance(each, Real) for each in values):
        raise ResultError(f"{name}: a time is not a number")
    if not all(math.isfinite(each) and each > 0 for each in values):
        raise ResultError(f"{name}: a time is not a positive number")
    return tuple(float(each) for each in values)


def interval(name: str, values: Any) -> tuple[float, float] | None:
    """The lower and the upper end, or none."""
    if not values:
        return None
    low, high = samples(f"{name}: interval", values)
    if low > high:
        raise ResultError(f"{name}: the interval from {low:g} to {high:g} is upside down")
    return low, high


def provenance(found: Any) -> None:
    """It names the device; what figures print is plain."""
    device = mapping("provenance", found).get("device")
    if not isinstance(device, str) or not device:
        raise ResultError("provenance: no device")
    for name in ("date", "commit", "source"):
        text(f"provenance: {name}", found.get(name, ""))
    if (sms := found.get("sms")) is not None and (isinstance(sms, bool) or not isinstance(sms, int) or sms < 1):
        raise ResultError(f"provenance: sms: expected a count, got {sms!r}")


def clocks(found: Any) -> None:
    """The device before and after; either may be unknown."""
    for when, state in mapping("clocks", found).items():
        if state is None:
            continue
        for name in _CLOCKS:
            number(f"clocks: {when}: {name}", mapping(f"clocks: {when}", state)[name], zero=True)
        if not isinstance(state["throttled"], list):
            raise ResultError(f"clocks: {when}: throttled: expected a list, got {state['throttled']!r}")


def plan(found: Any) -> None:
    """Which kernel ran with which tile; nothing where no kernel was chosen."""
    if found is None:
        return
    for name in ("kernel", "kernel_hash", "source"):
        text(f"plan: {name}", mapping("plan", found).get(name, ""))
    mapping("plan: tile", found.get("tile", {}))
