"""Addresses of every thread of a program, followed through the text of PTX.

The machine code does not say which lanes meet in a bank or in a sector, but the PTX tells how each address follows from
the thread's number, and is short enough to be followed for all threads at once: in the order of the text, so that loops
are in their first trip and of branches both sides count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[np.int64]]
"""One number of each thread."""

_INSTRUCTION = re.compile(r"\s*(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s+([^\s;].*?)\s*;")
_OPERAND = re.compile(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{\[])+")
_THREADS = re.compile(r"\.reqntid (\d+)")
_ARGUMENT = re.compile(r"_param_(\d+)")
_TYPE = re.compile(r"\.([bsu])(8|16|32|64)\b")
_REGISTER = re.compile(r"%\w+(?:\.[xyz])?")
_SPACES = (".shared", ".global")


@dataclass(frozen=True)
class Access:
    """An instruction on memory: its name with all suffixes; the address in its first brackets, in bytes, by thread,
    None if that follows from data; which threads take part, None for all; and all operands.
    """

    name: str
    address: Numbers | None
    active: Numbers | None
    operands: tuple[str, ...]


def accesses(text: str, arguments: Sequence[int], program: int) -> Iterator[Access]:
    """Every access of shared and global memory, in the order of the text; a pointer among `arguments` is 0."""
    size = _THREADS.search(text)
    threads = np.arange(int(size[1]) if size else 32)
    known: dict[str, Numbers] = {f"%{name}.{axis}": 0 * threads for name in ("tid", "ctaid") for axis in "xyz"}
    known |= {"%tid.x": threads, "%ctaid.x": 0 * threads + program, "%laneid": threads % 32}
    for line in text.splitlines():
        if (found := _INSTRUCTION.match(line)) is None:
            continue
        negated, guard, name, rest = found.groups()
        operands = [operand.strip() for operand in _OPERAND.findall(rest)]
        if any(space in name for space in _SPACES):
            active = known.get(guard)
            place = next((operand for operand in operands if operand.startswith("[")), "")
            active = 1 - active if active is not None and negated else active
            yield Access(name, _address(place, known), active, tuple(operands))
        target, *sources = operands
        if target.startswith("["):
            continue
        value = _argument(sources[0], arguments, threads) if name.startswith("ld.param") else None
        if value is None:
            value = _followed(name, sources, known)
        for register in _REGISTER.findall(target):
            known.pop(register, None)
        if value is not None:
            known[target.partition("|")[0]] = value


def _argument(source: str, arguments: Sequence[int], threads: Numbers) -> Numbers:
    # Behind the kernel's own come memory that Triton asks for, and its profiler's.
    found = _ARGUMENT.search(source)
    index = int(found[1]) if found else len(arguments)
    return 0 * threads + (arguments[index] if index < len(arguments) else 0)


def _number(operand: str, known: dict[str, Numbers]) -> Numbers | None:
    if operand in known:
        return known[operand]
    if operand == "global_smem":
        operand = "0"
    try:
        return 0 * known["%tid.x"] + int(operand, 0)
    except ValueError:
        return None


def _address(operand: str, known: dict[str, Numbers]) -> Numbers | None:
    base, _, offset = operand.strip("[]").replace(" ", "").partition("+")
    start = _number(base, known)
    return None if start is None else start + int(offset or 0)


def _followed(name: str, sources: list[str], known: dict[str, Numbers]) -> Numbers | None:
    """What an instruction on integers gives, None if an operand is not known or the instruction is another one."""
    operation, *suffixes = name.split(".")
    if name.startswith("shfl.sync.idx"):
        # How a warp agrees on its own number.
        value, lane = (_number(source, known) for source in sources[:2])
        return None if value is None or lane is None else value[np.arange(len(value)) // 32 * 32 + lane % 32]
    compared = operation == "setp"
    result = (_COMPARISONS if compared else _OPERATIONS).get(suffixes[0] if compared else operation)
    values = [_number(source, known) for source in sources]
    if result is None or any(value is None for value in values):
        return None
    types = [(kind, int(bits)) for kind, bits in _TYPE.findall(name)]
    kind, bits = types[-1] if types else ("b", 64)
    into = 2 * bits if "wide" in suffixes else types[0][1] if operation == "cvt" else bits
    # The third factor of a wide product has as many bits as the result; what is selected by is a condition.
    exact = [value for value in values if value is not None]
    inputs = [_low(kind, bits, value) for value in exact[:2]] + exact[2:]
    found = result(*inputs)
    return found.astype(np.int64) if compared else _low("s", into, found)


def _low(kind: str, bits: int, value: Numbers) -> Numbers:
    """The lowest bits of a number, as one with a sign unless its kind is unsigned."""
    if bits == 64:
        return value
    low = value & ((1 << bits) - 1)
    return low if kind == "u" else low - ((low >> (bits - 1)) << bits)


def _divided(a: Numbers, b: Numbers) -> Numbers:
    """Towards zero, as machines do."""
    divisor = np.where(b == 0, 1, b)
    return np.sign(a) * np.sign(divisor) * (abs(a) // abs(divisor))


def _selected(a: Numbers, b: Numbers, condition: Numbers) -> Numbers:
    chosen: Numbers = np.where(condition != 0, a, b)
    return chosen


_OPERATIONS: dict[str, Callable[..., Numbers]] = {
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "cvta": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "div": _divided,
    "rem": lambda a, b: a - _divided(a, b) * b,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "abs": abs,
    "min": np.minimum,
    "max": np.maximum,
    "selp": _selected,
    "bfe": lambda a, start, length: (a >> start) & ((1 << length) - 1),
}
_COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
