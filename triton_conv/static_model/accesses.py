"""What the accesses of a kernel cost: passes through the banks of shared memory, and sectors of the memory beyond.

The 32 banks of shared memory hold neighbouring words of 4 bytes and give one word each a clock: lanes that want
different words of one bank wait for each other. L2 is written in sectors of 32 bytes: lanes that store few bytes of
many sectors fill them all. Layouts are the compiler's choice; `ptx` says which addresses they come to.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .ptx import Access, Numbers, accesses

Kind = tuple[str, int]
"""A machine instruction's name, and bytes of a lane."""

_SECTOR = 32
_PLAIN = {"ld.shared": "LDS", "st.shared": "STS", "st.global": "STG"}
_SIZE = re.compile(r"(?:\.v(\d))?\.[bfsu](\d+)$")


@dataclass(frozen=True)
class Cost:
    """Of an access by a warp: passes through L1 and shared memory; of a store beyond, bytes of sectors for each lane.

    What a load takes of a sector the next load of its neighbours finds in L1, and how many lines its lanes touch does
    not count either: one pass each would make 946 us of deepface_local's input gradient, measured at 322.
    """

    passes: float
    stored: float = 0.0


def costs(text: str, arguments: Sequence[int], program: int) -> dict[Kind, list[Cost]]:
    """What every access costs but loads into registers, by kind in the order of the text, in the given program.

    An access whose addresses follow from data costs what it would without a conflict.
    """
    found: dict[Kind, list[Cost]] = {}
    for access in accesses(text, arguments, program):
        if (kind := _kind(access)) is not None:
            found.setdefault(kind, []).append(_cost(kind, access))
    return found


def free(kind: Kind) -> float:
    """Passes of a warp without a conflict: a word of all lanes takes one."""
    return max(kind[1] / 4, 1.0)


def _kind(access: Access) -> Kind | None:
    name = access.name
    if name.startswith("cp.async.c"):
        return "LDGSTS", int(access.operands[2], 0)
    if matrix := re.match(r"(ld|st)matrix\S*\.x(\d)", name):
        return "LDSM" if matrix[1] == "ld" else "STSM", 4 * int(matrix[2])
    size = _SIZE.search(name)
    instruction = next((made for start, made in _PLAIN.items() if name.replace("::cta", "").startswith(start)), None)
    if size is None or instruction is None:
        return None
    return instruction, int(size[1] or 1) * int(size[2]) // 8


def _cost(kind: Kind, access: Access) -> Cost:
    name, width = kind
    addresses, active = access.address, access.active
    if addresses is None:
        return Cost(free(kind), width if name == "STG" else 0.0)
    if name in ("LDS", "STS", "LDSM", "STSM"):
        return Cost(_passes(kind, addresses, active))
    if name == "LDGSTS":
        return Cost(_passes(kind, addresses, None))
    return Cost(free(kind), _sectors(addresses, width, active if active is not None and active.any() else None))


def _sectors(addresses: Numbers, width: int, active: Numbers | None) -> float:
    """How many sectors the lanes of a warp write to, in the mean of the warps: as many bytes for each of 32 lanes."""
    taking = np.ones_like(addresses) if active is None else active
    warps = zip(addresses.reshape(-1, 32), taking.reshape(-1, 32), strict=True)
    written = [lanes[takes != 0] for lanes, takes in warps]
    return sum(len({*(at // _SECTOR), *((at + width - 1) // _SECTOR)}) for at in written) / len(written)


def _passes(kind: Kind, addresses: Numbers, active: Numbers | None) -> float:
    """Passes of a warp, in the mean of them: 128 bytes at a time, different words of one bank one after the other."""
    name, width = kind
    # Of matrices every 8 lanes hold the addresses of one's rows, of 16 bytes.
    words, lanes = (4, 2 * width) if name in ("LDSM", "STSM") else (max(width // 4, 1), 32)
    taking = np.ones_like(addresses) if active is None else active
    total = 0
    for group, takes in zip(_split(addresses, lanes, words), _split(taking, lanes, words), strict=True):
        wanted = {int(address) // 4 + word for address in group[takes != 0] for word in range(words)}
        total += max(Counter(word % 32 for word in wanted).values(), default=0)
    return total / (len(addresses) // 32)


def _split(numbers: Numbers, lanes: int, words: int) -> Numbers:
    """Of the first lanes of every warp those whose words fill the banks once, a row for each such."""
    return numbers.reshape(-1, 32)[:, :lanes].reshape(-1, min(lanes, 32 // words))
