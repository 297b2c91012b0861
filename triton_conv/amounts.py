"""Amounts of things: how messages and files say them, and how commands are given them."""

from __future__ import annotations

import argparse
import math
from typing import Any


def counted(number: int, thing: str) -> str:
    """`1 tile`, `2 tiles`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def finite(value: Any) -> Any:
    """Content for JSON, which has no NaN: where there is no number there is none."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(text: str) -> int:
    """A count of at least one, for argparse, which says this function's name of what is no number at all."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {value}")
    return value


def seconds(text: str) -> float:
    """A time to spend, likewise."""
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text}")
    return value
