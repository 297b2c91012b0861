"""What a kernel's machine code is made of: its loops, and what the instructions of each occupy.

Read from the text of NVIDIA's `nvdisasm`, which Triton ships. Loops are what a branch backwards spans; a branch
forwards is taken for not taken, so that both sides of a condition count; where results are stored behind one, a loop
says how much that is of it. Code after the kernel's last exit, such as a division's slow path, is left out.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from .accesses import Cost, Kind, free

PIPES: dict[str, tuple[str, ...]] = {
    "fma": ("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2"),
    "imad": ("IMAD", "IDP"),
    "xu": ("MUFU", "I2F", "I2FP", "F2I", "F2F", "FRND", "POPC", "FLO"),
    "fp64": ("DFMA", "DMUL", "DADD", "DSETP"),
    "memory": (
        "LDG", "STG", "LDGSTS", "LDS", "STS", "LDSM", "STSM", "LDL", "STL", "RED", "REDG", "ATOM", "ATOMG", "ATOMS",
        "SHFL", "LD", "ST",
    ),
    "tensor": ("HGMMA", "HMMA", "QGMMA", "IGMMA", "DMMA"),
    "control": (
        "BRA", "BAR", "EXIT", "NOP", "BSYNC", "BSSY", "WARPSYNC", "WARPGROUP", "DEPBAR", "LDGDEPBAR", "MEMBAR", "FENCE",
        "SYNCS", "ERRBAR", "CCTL", "YIELD", "CALL", "RET", "ELECT", "LDC", "LDCU", "S2R", "CS2R", "MOV", "R2P", "P2R",
        "VOTE",
    ),
}  # fmt: skip
"""Instructions by the pipe that runs them; what is named nowhere, and not uniform, runs in the integer pipe, "alu"."""

_PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names}
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P[T\d]\s+)?(.*?)\s*;")
_TARGET = re.compile(r"BRA.*?`\((\.L_x_\d+)\)")
_BITS = re.compile(r"\.(U8|S8|U16|S16|64|128)(?=\.|$)")
_MATRICES = re.compile(r"(?:LDSM|STSM)\.(?:.*\.([24])$)?")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_SHARED_LOADS, _SHARED_STORES = ("LDS", "LDSM"), ("STS", "STSM")
_ACCESSES = (*_SHARED_LOADS, *_SHARED_STORES, "LDGSTS", "STG")
_REGISTER, _DESTINATION = re.compile(r"\bR(\d+)\b"), re.compile(r"R\d+\b")
_LOADS, _STORES, _SPILLS = ("LDG", "LD"), ("STG", "ST", "RED", "REDG", "ATOMG", "ATOM"), ("LDL", "STL")


@dataclass(frozen=True)
class Slots:
    """What one warp's instructions occupy, summed over a stretch of code; add and multiply them by trips.

    `loaded`, `copied` and `stored` are bytes of a thread: through L1 into registers, past it into shared memory, and
    out, in whole sectors. `wavefronts` counts passes through the 128 bytes a clock of L1 and shared memory, of whose
    banks lanes may wait for one. `products` are multiplications of matrix instructions, `tensor` the clocks that these
    keep the units of a multiprocessor busy, both a warp's share. `boxes` counts bulk copies, of which one thread of a
    program does each; `chain` the loads through registers that come one after the other, because each one's address is
    made of what the last one brought.
    """

    issued: float = 0.0
    fma: float = 0.0
    imad: float = 0.0
    alu: float = 0.0
    xu: float = 0.0
    fp64: float = 0.0
    memory: float = 0.0
    uniform: float = 0.0
    control: float = 0.0
    products: float = 0.0
    tensor: float = 0.0
    wavefronts: float = 0.0
    loaded: float = 0.0
    copied: float = 0.0
    stored: float = 0.0
    spilled: float = 0.0
    boxes: float = 0.0
    barriers: float = 0.0
    chain: float = 0.0

    def __add__(self, other: Slots) -> Slots:
        return Slots(*(getattr(self, name) + getattr(other, name) for name in _FIELDS))

    def __mul__(self, trips: float) -> Slots:
        return Slots(*(getattr(self, name) * trips for name in _FIELDS))


_FIELDS = tuple(entry.name for entry in fields(Slots))
_NOTHING = Slots()
Line = tuple[str, Slots]
"""An instruction, and what it costs beyond what its opcode says."""


@dataclass(frozen=True)
class Loop:
    """A stretch of code run again and again, or the whole kernel: what is its own, and the loops inside it.

    `storing` is the part of `own` that a condition guards and that stores: a loop over several results does not in
    every trip.
    """

    own: Slots = field(default_factory=Slots)
    inner: tuple[Loop, ...] = ()
    storing: Slots = field(default_factory=Slots)

    @property
    def depth(self) -> int:
        """Loops inside each other below this one."""
        return max((1 + loop.depth for loop in self.inner), default=0)

    def innermost(self) -> Loop:
        """The loop that the kernel spends its time in: at every level the one of most instructions."""
        loop = self
        while loop.inner:
            loop = max(loop.inner, key=lambda inner: inner.once().issued)
        return loop

    def once(self) -> Slots:
        """Every instruction once."""
        return sum((loop.once() for loop in self.inner), self.own)


def disassemble(cubin: bytes) -> str:
    """The text of a binary's code; raises `OSError` or `CalledProcessError` where the tool is missing or fails."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True, timeout=60).stdout


def parse(text: str, asked: Mapping[Kind, Sequence[Cost]] | None = None) -> Loop:
    """The kernel's loops, from the disassembler's text; `asked` is what each access costs, which see `costs`."""
    labels: dict[str, int] = {}
    code: list[str] = []
    end = 0
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append(found[2])
            if found[2] == "EXIT" and not found[1]:
                end = len(code)
            if _spins(found[2], labels, len(code) - 1):
                # Of what follows, an endless loop and subroutines, nothing belongs to the kernel.
                break
    # Behind the last exit stands what is jumped to when a copy is waited for; it jumps back.
    code = code[: end or None]
    lines = list(zip(code, _beyond(code, asked or {}), strict=True))
    loops: dict[int, int] = {}
    skips: list[tuple[int, int]] = []
    for index, instruction in enumerate(code):
        target = _TARGET.match(instruction)
        start = labels.get(target[1], index) if target else index
        if start < index:
            # Several branches to one place are one loop.
            loops[start] = max(loops.get(start, 0), index)
        elif any(skipped.startswith("STG") for skipped in code[index:start]):
            skips.append((index + 1, start))
    return _nested(lines, 0, len(lines), sorted(loops.items()), skips)


def _spins(instruction: str, labels: dict[str, int], index: int) -> bool:
    target = _TARGET.match(instruction)
    return target is not None and labels.get(target[1]) == index


def _beyond(code: list[str], asked: Mapping[Kind, Sequence[Cost]]) -> list[Slots]:
    """What each instruction costs beyond what its opcode says: the accesses of a kind come in the order of the PTX, in
    which the assembler may have multiplied them.
    """
    kinds = [_kind(instruction) for instruction in code]
    totals: Counter[Kind | None] = Counter(kinds)
    seen: Counter[Kind | None] = Counter()
    found = []
    for kind in kinds:
        costs = asked.get(kind, ()) if kind else ()
        if kind is None or not costs:
            found.append(_NOTHING)
            continue
        cost = costs[seen[kind] * len(costs) // totals[kind]]
        seen[kind] += 1
        found.append(Slots(wavefronts=cost.passes - free(kind), stored=cost.stored - kind[1] if cost.stored else 0.0))
    return found


def _kind(instruction: str) -> Kind | None:
    opcode = instruction.partition(" ")[0]
    name = opcode.partition(".")[0]
    if name not in _ACCESSES:
        return None
    return name, _width(opcode)


def _nested(
    code: list[Line], start: int, end: int, loops: list[tuple[int, int]], skips: list[tuple[int, int]]
) -> Loop:  # fmt: skip
    own, inner, position = Slots(), [], start
    outermost = [
        (a, z) for a, z in loops
        if start <= a and z < end and not any(b <= a and z <= y and (a, z) != (b, y) for b, y in loops)
    ]  # fmt: skip
    for a, z in outermost:
        own += _count(code[position:a])
        inner.append(
            _nested(code, a, z + 1, [loop for loop in loops if a <= loop[0] and loop[1] <= z and loop[0] != a], skips)
        )
        position = z + 1
    storing = max(((a, z) for a, z in skips if start <= a and z <= end), key=lambda s: s[1] - s[0], default=(0, 0))
    return Loop(own + _count(code[position:end]), tuple(inner), _count(code[slice(*storing)]))


def _count(lines: list[Line]) -> Slots:
    kinds: Counter[tuple[str, bool]] = Counter()
    code = [instruction for instruction, _ in lines]
    for instruction in code:
        opcode, *operands = instruction.split(maxsplit=3)
        # The sum comes first, then the left operand.
        kinds[opcode, len(operands) > 1 and operands[1].startswith("R")] += 1
    total: Counter[str] = Counter()
    for (opcode, from_registers), count in kinds.items():
        for name, amount in _occupied(opcode, from_registers):
            total[name] += amount * count  # type: ignore[assignment]
    chain = _chain(code) if total["loaded"] else 0.0
    return sum((more for _, more in lines if more is not _NOTHING), Slots(**total, chain=chain))


def _chain(code: list[str]) -> int:
    """How many loads follow from each other at most: data is followed through registers and through shared memory."""
    depth: dict[int, int] = {}
    shared = longest = 0
    for instruction in code:
        opcode, _, operands = instruction.partition(" ")
        name = opcode.split(".")[0]
        numbers = [int(number) for number in _REGISTER.findall(operands)]
        if name in _SHARED_STORES or name in _STORES or name in _SPILLS[1:]:
            if name in _SHARED_STORES:
                shared = max([shared, *(depth.get(number, 0) for number in numbers)])
            continue
        if not _DESTINATION.match(operands):
            continue
        first, *sources = numbers
        # Of a pair or a quadruple of registers the first is named: an address is one.
        reach = max((depth.get(number, 0) for number in sources), default=0)
        if name in _LOADS:
            reach += 1
            longest = max(longest, reach)
        elif name in _SHARED_LOADS:
            reach = max(reach, shared)
        width = max(_width(opcode) // 4, 1) if name in (*_LOADS, *_SHARED_LOADS) else 2 if ".WIDE" in opcode else 1
        for number in range(first, first + width):
            depth[number] = reach
    return longest


@functools.cache
def _occupied(opcode: str, from_registers: bool) -> tuple[tuple[str, float], ...]:
    return tuple(_of(opcode, from_registers))


def _of(opcode: str, from_registers: bool) -> Iterator[tuple[str, float]]:
    """What one instruction occupies."""
    name = opcode.split(".")[0]
    yield "issued", 1
    if name.startswith("U") or name in ("R2UR", "S2UR"):
        yield "uniform", 1
        if name.startswith(("UTMALDG", "UBLKCP")):
            yield "boxes", 1
        return
    pipe = _PIPE_OF.get(name, "alu")
    if pipe == "tensor":
        yield from _matrix(opcode, from_registers)
        return
    yield pipe, 1
    if name == "BAR":
        yield "barriers", 1
    if pipe != "memory" or name == "SHFL":
        return
    width = _width(opcode)
    yield "wavefronts", free((name, width))
    if name in _LOADS:
        yield "loaded", width
    elif name == "LDGSTS":
        yield "copied", width
    elif name in _STORES:
        yield "stored", width
    elif name in _SPILLS:
        yield "spilled", width


def _width(opcode: str) -> int:
    """Bytes of a lane; of a matrix it holds one word."""
    if matrices := _MATRICES.match(opcode):
        return 4 * int(matrices[1] or 1)
    found = _BITS.search(opcode)
    return _WIDTHS[found[1]] if found else 4


def _matrix(opcode: str, from_registers: bool) -> Iterator[tuple[str, float]]:
    """Multiplications and clocks of a matrix instruction, a warp's share.

    A warp group's units multiply 64 x 8 x 16 halves in 4 clocks; they also wait for shared memory, whose 128 bytes a
    clock bring a left operand of 64 rows in 16 clocks, unless it comes from registers, and a right one of n columns in
    n / 4: hence a third of the rate at n = 16 and all of it from n = 64 (measured by Luo et al., arXiv:2402.13499).
    """
    if opcode.startswith("HGMMA"):
        m, n, k = (int(size) for size in re.findall(r"(\d+)x(\d+)x(\d+)", opcode)[0])
        wide = 2 if ".TF32" in opcode else 1
        clocks = max(m * n * k * wide / 2048, (0 if from_registers else 16) + n / 4)
        yield "products", m * n * k / 4
        yield "tensor", clocks / 4
        return
    m, n, k = (16, 8, 16) if ".16816" in opcode else (16, 8, 8) if ".1688" in opcode else (8, 8, 4)
    wide = 2 if ".TF32" in opcode else 1
    yield "products", m * n * k
    # The older instructions reach 62% of the rate of Hopper's own (Luo et al.).
    yield "tensor", m * n * k * wide / 2048 / 0.62
