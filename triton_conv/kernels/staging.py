"""How much shared memory a pipelined product takes, as compilers lay its operands out on each architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..problem import Problem
from ..problem_deform import DeformProblem
from ..target import Target


@dataclass(frozen=True)
class Operand:
    """One factor of a product in a loop: bytes of it that a step reads, and how many of them lie side by side.

    A `corner` is no factor itself: it is blended into one, in registers, when its copy has arrived.
    """

    size: int
    run: int = 16
    corner: bool = False


@dataclass(frozen=True)
class Staging:
    """How the compiler keeps the operands of a pipelined product in shared memory on one architecture.

    A product of at least `rows` rows in whole groups of four warps reads them there, and a copy that is under way has a
    buffer of its own, one a stage; otherwise they pass through registers, and there is a buffer less. Copies are of
    `copied` bytes side by side at least. What is narrower is loaded into registers first, and takes `passed` buffers of
    a product that reads from shared memory and one of any other; where operands take `turns`, all of them share one.
    Sums turn into the layout of their store in the same memory, `turned` bytes of each at a time. `barriers` are bytes
    besides.
    """

    rows: int
    copied: int = 4
    passed: int = 1
    turns: bool = False
    turned: int = 8
    barriers: int = 128

    def taken(self, operands: Sequence[Operand], rows: int, num_warps: int, stages: int) -> int:
        """Bytes that the operands of a product of so many rows take."""
        direct = rows >= self.rows and num_warps % 4 == 0
        staged, passed = 0, [0]
        for operand in operands:
            if stages > 1 and operand.run >= self.copied:
                staged += operand.size * (stages if direct and not operand.corner else stages - 1)
            elif not operand.corner:
                passed.append(operand.size * (self.passed if direct and stages > 1 else 1))
        return staged + (max(passed) if self.turns else sum(passed)) + self.barriers


_NEVER = 1 << 30
STAGING = {
    "sm_80": Staging(_NEVER),
    "sm_90": Staging(64),
    "sm_100": Staging(64, passed=2),
    "gfx942": Staging(_NEVER, turns=True, turned=4, barriers=0),
    "gfx950": Staging(_NEVER, copied=0, turns=True, turned=4, barriers=0),
    "gfx1100": Staging(_NEVER, copied=0, barriers=0),
}
"""Fitted by `python -m perf_plots.shared_memory`, by architecture or family; what is not here gets the most of all."""
_MOST = Staging(0, copied=0, passed=2)


def sampled_operands(elements: int, problem: Problem) -> list[Operand]:
    """A factor of so many samples, and the four corners that each is made of."""
    assert isinstance(problem, DeformProblem)
    size = elements * problem.itemsize
    corner = Operand(size, problem.x_vector(problem.segment) * problem.itemsize, corner=True)
    return [Operand(size, 0), *[corner] * 4]


def staging_of(target: Target | None) -> Staging:
    """The constants of a target or its family; without a target, or where neither is known, those that take most."""
    return STAGING.get(target.arch, STAGING.get(target.family, _MOST)) if target else _MOST


def address_bytes(rows: int, columns: int, side: int, num_warps: int) -> int:
    """Bytes that the addresses of a tile, loaded along its columns, take on gfx942 where they are turned for a product
    that takes four rows at once.

    A load lays `side` columns beside each other in a thread, 64 threads along what is left of them and then along rows,
    and warps likewise; the product wants up to four neighbouring rows in a thread. Addresses of 8 bytes, two at once,
    change threads in shared memory, in as many turns as there are pairs that a thread holds before and after.
    """
    side = min(side, max(1, rows * columns // (64 * num_warps)))
    lanes = min(64, columns // side)
    warps = min(num_warps, columns // (side * lanes))
    # Rows that threads of different places have; how many of them a thread holds.
    apart = 64 // lanes * (num_warps // warps)
    held = rows // apart
    if apart == 1 or held < 2:
        return 0
    together = min(4, held)
    kept = columns // (lanes * warps) * (held // together) * max(1, together // apart)
    return 8 * rows * columns * min(2, kept) // kept


def partial_bytes(problem: Problem, target: Target | None) -> int:
    """Bytes of a weight gradient's sum as it turns into the layout of its store: where operands take turns, the matrix
    unit's own layout is stored."""
    return 0 if staging_of(target).turns else problem.accumulator_bytes


def staged_bytes(
    operands: Sequence[Operand], rows: int, num_warps: int, stages: int, sums: tuple[int, int], target: Target | None
) -> int:
    """An upper bound of what a pipelined product takes: buffers of its operands and barriers, or later its `sums`, so
    many of so many bytes each. Without a target, of whichever architecture takes most.
    """
    staging = staging_of(target)
    taken = staging.taken(operands, rows, num_warps, stages)
    return max(taken, sums[0] * min(sums[1], staging.turned))
