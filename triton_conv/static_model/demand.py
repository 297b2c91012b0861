"""What a launch asks of a device, counted: from the loops of its machine code, how often they run, and its geometry."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from ..aot import Compiled, Job, compile_binary, signature
from ..kernels import KERNELS, Tile
from ..kernels.boxed_sums import BoxedSumsTile
from ..kernels.implicit_gemm_boxed import ImplicitGemmBoxedTile
from ..kernels.implicit_gemm_persistent import ImplicitGemmPersistentTile
from ..kernels.implicit_gemm_rolling import ImplicitGemmRollingTile
from ..kernels.kernel import cdiv
from ..kernels.strided_boxed import StridedBoxedTile
from ..kernels.weight_gradient_rows import WeightGradientRowsTile
from ..kernels.weight_gradient_taps import WeightGradientTapsTile
from ..kernels.weight_gradient_windows import WeightGradientWindowsTile
from ..problem import Problem, WeightGradientProblem
from ..target import Target
from .accesses import Cost, Kind, costs
from .sass import Loop, Slots, disassemble, parse
from .trips import Counts, trips


@dataclass(frozen=True)
class Counted(Compiled):
    """A compiled kernel with the loops of its machine code; without them where the compiler failed."""

    loop: Loop | None = None


class CountedJob(Job):
    """Compiles for an NVIDIA target, and reads the machine code too."""

    def run(self) -> Counted:
        row, binary = compile_binary(self)
        loop = None if binary is None else parse(disassemble(binary.asm["cubin"]), self._asked(binary.asm["ptx"]))
        return Counted(**row.__dict__, loop=loop)

    def _asked(self, ptx: str) -> dict[Kind, list[Cost]]:
        """What every access costs in a program in the midst of the launch, tensors at addresses that all suit."""
        kernel = KERNELS[self.kernel]
        values = kernel.values(self.problem, self.tile, self.target)
        arguments = [values.get(name, 0) for name, kind in signature(self)[0].items() if kind != "constexpr"]
        return costs(ptx, arguments, kernel.grid(self.problem, self.tile) // 2)


@dataclass(frozen=True)
class Demand:
    """What the busiest multiprocessor has to do for a launch, and what crosses the memories in all.

    In clocks of a multiprocessor that did nothing else: `issued` (four instructions a clock), `integer` and `special`
    (two, and one in two, a clock), `memory` instructions and their `wavefronts` (one a clock), `tensor` products. In
    trips one after the other: `waits` for loads through registers, `fetches` that overlap with those of other stages,
    `barriers`. In bytes: `device_bytes` each operand once, with partial sums; `l2_bytes` asked of L2 at most, as if L1
    never hit; `ahead_bytes` what a launch before this one writes, if there is one.
    """

    issued: float
    integer: float
    special: float
    memory: float
    wavefronts: float
    tensor: float
    waits: float
    fetches: float
    barriers: float
    device_bytes: float
    l2_bytes: float
    ahead_bytes: float = 0.0

    def astuple(self) -> tuple[float, ...]:
        return tuple(getattr(self, entry.name) for entry in fields(self))


@dataclass(frozen=True)
class Launch:
    """A launch taken apart: its demand, its programs, how many share a multiprocessor, waves of them, and the
    innermost loop, `slots` a warp and trip, `outputs` a trip of all its lanes.
    """

    demand: Demand
    programs: int
    resident: int
    waves: float
    innermost: Slots
    outputs: float

    def slots_per_output(self) -> float:
        """Instruction slots of a thread that an output takes in the innermost loop."""
        return 32 * self.innermost.issued / self.outputs if self.outputs else math.nan


def matched(loop: Loop, counts: Counts) -> Counts:
    """The trips of the loops that the compiler left: one of a single trip is gone, an innermost one may be unrolled."""
    depth = loop.depth
    left = counts if len(counts) == depth else tuple(count for count in counts if count != 1)
    if len(left) < depth:
        left = counts
    return (*left, *(1.0,) * depth)[:depth]


def total(loop: Loop, counts: Counts) -> Slots:
    """All that a warp does in a program."""
    return sum((total(inner, counts[1:]) * counts[0] for inner in loop.inner), loop.own)


def _waits(loop: Loop, counts: Counts, times: float = 1.0) -> tuple[float, float]:
    """Loads into registers that are waited for, one after the other, and trips that only copy ahead."""
    own = loop.own
    waits = times * own.chain
    fetches = times if not own.loaded and (own.copied or own.boxes) else 0.0
    for inner in loop.inner:
        more = _waits(inner, counts[1:], times * counts[0])
        waits, fetches = waits + more[0], fetches + more[1]
    return waits, fetches


def _box_bytes(problem: Problem, tile: Tile, counts: Counts) -> float:
    """Bytes that bulk copies move for a program, which the code does not tell."""
    each = 0
    if isinstance(tile, (ImplicitGemmBoxedTile, StridedBoxedTile)):
        each = tile.BLOCK_M * tile.BLOCK_K
    elif isinstance(tile, WeightGradientTapsTile):
        each = tile.BLOCK_K * problem.geometry.kernel[2] * min(problem.geometry.c_in_group, tile.BLOCK_N)
    elif isinstance(tile, BoxedSumsTile):
        each = tile.BLOCK_N * tile.BLOCK_K
    elif isinstance(tile, ImplicitGemmRollingTile):
        # What lies past a group's last channel is zero without being read.
        each = tile.BLOCK_M * problem.geometry.kernel[2] * problem.geometry.c_in_group
    elif isinstance(tile, ImplicitGemmPersistentTile):
        stored = counts[0] * tile.BLOCK_M * tile.BLOCK_N
        return problem.itemsize * (math.prod(counts) * (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K + stored)
    return problem.itemsize * math.prod(counts) * each


def _partial_bytes(name: str, problem: Problem, tile: Tile) -> float:
    """Bytes of partial sums, written once."""
    kernel = KERNELS[name]
    if kernel.join is not None:
        return float(problem.accumulator_bytes * kernel.join.numbers(problem, tile))
    partial = kernel.partial(problem, tile)
    return float(problem.accumulator_bytes * math.prod(partial[0])) if partial else 0.0


def _ahead_bytes(name: str, problem: Problem) -> float:
    """Bytes that the launch before a kernel's own writes, which the kernel reads."""
    ahead = KERNELS[name].ahead
    return float(problem.itemsize * ahead.numbers(problem)) if ahead else 0.0


def launch(kernel: str, problem: Problem, tile: Tile, target: Target, compiled: Counted) -> Launch:
    """Takes a launch apart; `compiled` must have its loops."""
    assert compiled.loop is not None
    warps, loop = tile.num_warps, compiled.loop
    if isinstance(tile, (WeightGradientRowsTile, WeightGradientWindowsTile)):
        # A loop for each part of a filter row, of which a program runs one.
        loop = replace(loop, inner=loop.inner[:1])
    programs = KERNELS[kernel].grid(problem, tile)
    counts = matched(loop, trips(kernel, problem, tile))
    slots = total(loop, counts)
    if isinstance(tile, StridedBoxedTile) and tile.TOGETHER:
        # It stores once a phase, not in every trip.
        slots += loop.innermost().storing * (problem.geometry.phases - counts[0])
    resident = max(1, round(compiled.occupancy * target.threads_per_sm / (warps * target.warp_size)))
    each = warps * cdiv(programs, target.sms)
    waves = cdiv(programs, target.sms * resident)
    waits, fetches = _waits(loop, counts)
    # What is spilled goes by way of L1, which a tile's worth of it does not fit in.
    moved = (slots.copied + slots.loaded + slots.stored + slots.spilled) * warps * target.warp_size + _box_bytes(
        problem, tile, counts
    )
    demand = Demand(
        issued=each * slots.issued / 4,
        integer=each * max(slots.alu / 2, slots.imad / 2, (slots.fma + slots.imad) / 4),
        special=each * slots.xu * 2,
        memory=each * slots.memory,
        wavefronts=each * slots.wavefronts,
        tensor=each * slots.tensor,
        waits=waves * waits,
        fetches=waves * fetches / max(tile.num_stages - 1, 1),
        barriers=waves * slots.barriers,
        device_bytes=problem.least_bytes + _partial_bytes(kernel, problem, tile) + _ahead_bytes(kernel, problem),
        l2_bytes=programs * moved,
        ahead_bytes=_ahead_bytes(kernel, problem),
    )
    # A weight gradient's instructions go by the pixels that it sums over.
    shape = problem.geometry.out_shape if isinstance(problem, WeightGradientProblem) else problem.result_shape
    outputs = math.prod(shape) / (programs * warps * math.prod(counts))
    return Launch(demand, programs, resident, programs / (target.sms * resident), loop.innermost().own, outputs)


def of_row(row: Any, job: Job) -> Launch | None:
    """The launch of a compiled job, or None where the compiler failed."""
    if row.error or getattr(row, "loop", None) is None:
        return None
    return launch(job.kernel, job.problem, job.tile, job.target, row)
