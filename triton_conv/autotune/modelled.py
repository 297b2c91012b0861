"""What the static model expects of candidates, read from their machine code where they are compiled.

A disassembly takes 0.27 s, beside 0.2 to 1.2 s for the compilation itself. Where the model does not know the target, or
the disassembler is missing or fails, nothing is expected, and the count of work ranks as it did.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..aot import Compiled, Job, WarmJob, compile_binary, occupancy
from ..static_model.demand import Counted, launch
from ..static_model.machine import MACHINES
from ..static_model.sass import disassemble, parse
from ..target import Target

_REGISTER = re.compile(r"\bR(\d+)\b")


@dataclass(frozen=True)
class Modelled(Compiled):
    """A compiled candidate and the microseconds that its launch should take; None where that is not known."""

    expected_us: float | None = None


def known(target: Target) -> bool:
    """Whether the static model has the constants of a target."""
    return target.vendor == "nvidia" and target.arch in MACHINES


class ModelledJob(Job):
    """Compiles, and says what the model expects."""

    def run(self) -> Modelled:
        row, binary = compile_binary(self)
        text = None if binary is None else _disassembled(binary.asm["cubin"])
        return Modelled(**row.__dict__, expected_us=None if text is None else _expected(self, row, text))


class ModelledWarmJob(WarmJob):
    """The same, compiled as a launch would, into Triton's cache: what the tuner measures next."""

    def run(self) -> Modelled:
        import triton

        made: list[tuple[Mapping[str, Any], Mapping[str, str]]] = []

        def listen(*, metadata: Mapping[str, Any], metadata_group: Mapping[str, str], **rest: Any) -> None:
            made.append((metadata, metadata_group))

        before, triton.knobs.compilation.listener = triton.knobs.compilation.listener, listen
        try:
            row = super().run()
        finally:
            triton.knobs.compilation.listener = before
        expected = None
        # Of a kernel that this process has compiled before nothing is heard.
        if made and not row.error:
            metadata, files = made[-1]
            cubin = next((path for name, path in files.items() if name.endswith(".cubin")), None)
            if cubin and (text := _disassembled(Path(cubin).read_bytes())) is not None:
                row = replace(row, registers=_registers(text), shared_bytes=int(metadata["shared"]))
                share = occupancy(self.target, self.tile.num_warps, row.registers, row.shared_bytes)
                row = replace(row, occupancy=share)
                expected = _expected(self, row, text)
        return Modelled(**row.__dict__, expected_us=expected)


def _disassembled(cubin: bytes) -> str | None:
    try:
        return disassemble(cubin)
    except (OSError, subprocess.SubprocessError):
        return None


def _registers(text: str) -> int:
    """Registers of a thread: as many as the code names."""
    return 1 + max(map(int, _REGISTER.findall(text)), default=0)


def _expected(job: Job, row: Compiled, text: str) -> float | None:
    try:
        counted = Counted(**row.__dict__, loop=parse(text))
        demand = launch(job.kernel, job.problem, job.tile, job.target, counted).demand
        return 1e6 * MACHINES[job.target.arch].predict(demand)[0]
    except (LookupError, ValueError, ArithmeticError):  # code that the model cannot read
        return None
