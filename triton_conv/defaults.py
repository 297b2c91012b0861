"""The analytic default: a tile for any problem on any target, from rules alone.

Each rule states its reason. None of the numbers has been measured yet: they come from counting registers and bytes, and
from what the compiler makes of them (`triton-conv inspect` shows no spill at any of them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .kernels import Tile
from .kernels.deformable import DeformableTile
from .kernels.depthwise import DepthwiseTile
from .kernels.grouped_packed import GroupedPackedTile
from .kernels.implicit_gemm import ImplicitGemmTile
from .kernels.kernel import cdiv
from .kernels.transposed_phase import TransposedPhaseTile
from .problem import DeformProblem, Problem
from .target import Target

# Programs a multiprocessor should have before larger tiles pay: below it, smaller tiles fill the machine better.
_WAVES = 1


def power_of_two(n: int, least: int, most: int) -> int:
    """The smallest power of two of at least `n`, within bounds that are powers of two themselves."""
    return min(max(1 << max(n - 1, 0).bit_length(), least), most)


def warps(target: Target, threads: int) -> int:
    """Warps (AMD: waves of 64) that make up so many threads."""
    return threads // target.warp_size


def implicit_gemm(problem: Problem, target: Target) -> ImplicitGemmTile:
    """128 x 128 x 64 for half precision on aligned channels: 64 accumulator registers of a thread at 256 threads."""
    g, itemsize = problem.geometry, problem.itemsize
    flat = _flat_k(problem)
    # Loads narrower than 4 bytes pass through registers, with an address each: a smaller tile leaves room for them.
    narrow = flat or problem.x_vector(g.c_in_group) * itemsize < 4
    if itemsize == 8:
        # sm_100 has no matrix unit for float64: its products are unrolled into registers.
        return ImplicitGemmTile(
            BLOCK_M=32,
            BLOCK_N=power_of_two(g.N, 16, 32),
            BLOCK_K=16,
            FLAT_K=flat,
            num_warps=warps(target, 256),
            num_stages=1,
        )
    block_n = power_of_two(g.N, 16, 64 if narrow else 128)
    block_m = 128
    if narrow or cdiv(g.M, block_m) * cdiv(g.N, block_n) * g.groups < _WAVES * target.sms:
        block_m = 64
    # Bytes of K a step: a whole swizzled row where wgmma reads it from shared memory, half where the operands pass
    # through registers (narrow loads, and sm_80, whose 128-byte step spills).
    depth = 64 if narrow or target.arch == "sm_80" else 128
    block_k = power_of_two(g.K if flat else g.c_in_group, 16, depth // itemsize)
    return ImplicitGemmTile(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        FLAT_K=flat,
        # Rank 3 keeps a third coordinate of every pixel in registers.
        num_warps=warps(target, 256 if narrow or g.rank == 3 or block_m * block_n > 64 * 128 else 128),
        # Narrow loads cannot be asynchronous: more stages would only cost registers.
        num_stages=2 if narrow else _stages(problem, target, (block_m + block_n) * block_k),
    )


def _flat_k(problem: Problem) -> bool:
    g = problem.geometry
    if g.taps == 1:
        return False
    # NCHW with a default weight: reading it tap by tap would touch one sector for each of its elements.
    return (problem.pixels_last and problem.weight_flat) or g.c_in_group < 16


def _stages(problem: Problem, target: Target, values: int) -> int:
    """As many stages as half of the shared memory holds, so that two blocks share a multiprocessor; at most three."""
    return max(1, min(3, target.shared_bytes // 2 // (values * problem.itemsize)))


def grouped_packed(problem: Problem, target: Target) -> GroupedPackedTile:
    """Slabs of 32 channels stay memory-bound; groups of more than 16 need 64 for two of them to fit."""
    g = problem.geometry
    widest = max(g.c_in_group, g.c_out_group)
    slab = 32 if widest <= 16 else 64
    if problem.itemsize == 8:
        slab = 16 if widest <= 16 else 32
    packed = min(slab // widest, g.groups)
    return GroupedPackedTile(
        BLOCK_M=512 // slab if problem.itemsize == 8 else 64 if slab == 64 or problem.pixels_last else 128,
        # An output slab may be narrower than an input slab, or the reverse.
        BLOCK_N=power_of_two(packed * g.c_out_group, 16, slab),
        BLOCK_K=power_of_two(packed * g.c_in_group, 16, slab),
        num_warps=warps(target, 256 if slab * problem.itemsize >= 128 else 128),
        # Taps come from L1, which pipelined loads bypass.
        num_stages=1,
    )


def depthwise(problem: Problem, target: Target) -> DepthwiseTile:
    """One 16-byte vector of channels a thread (NHWC), or four pixels of one channel a thread (NCHW)."""
    g = problem.geometry
    threads = 128
    if problem.pixels_last:
        block_m, block_c = power_of_two(g.M, 64, 4 * threads), 1
    else:
        block_c = power_of_two(g.c_out, 8, 64)
        block_m = power_of_two(threads * 16 // problem.itemsize // block_c, 4, 128)
    return DepthwiseTile(
        BLOCK_M=block_m, BLOCK_C=block_c, UNROLL=g.kernel[2] * problem.itemsize <= 32, num_warps=warps(target, threads), num_stages=1
    )


def transposed_phase(problem: Problem, target: Target) -> TransposedPhaseTile:
    """As implicit GEMM, with smaller tiles: a phase has 1 / stride^d of the pixels."""
    g, itemsize = problem.geometry, problem.itemsize
    slab = 32 if g.groups > 1 and max(g.c_in_group, g.c_out_group) <= 16 else 128
    if itemsize == 8:
        return TransposedPhaseTile(
            BLOCK_M=32, BLOCK_N=power_of_two(g.N, 16, 32), BLOCK_K=16, num_warps=warps(target, 256)
        )
    block_n = slab if slab == 32 else power_of_two(g.N, 16, 128)
    block_k = slab if slab == 32 else power_of_two(g.c_in_group, 16, 64 // itemsize)
    pixels = g.M // max(g.phases, 1)
    block_m = 128 if cdiv(pixels, 128) * g.phases * cdiv(g.N, block_n) * g.groups >= 2 * target.sms else 64
    return TransposedPhaseTile(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps(target, 256 if block_m * block_n > 64 * 128 or problem.pixels_last else 128),
        num_stages=_stages(problem, target, (block_m + block_n) * block_k) if not problem.pixels_last else 2,
    )


def deformable(problem: DeformProblem, target: Target) -> DeformableTile:
    """64 pixels by all output channels up to 128: a gather is repeated for every further block of channels."""
    g, itemsize = problem.geometry, problem.itemsize
    if itemsize == 8:
        return DeformableTile(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, num_warps=warps(target, 128))
    return DeformableTile(
        BLOCK_M=64,
        # The channels are the left operand's rows: wgmma takes no fewer than 64.
        BLOCK_N=power_of_two(g.N, 64 if itemsize == 2 else 16, 128),
        # Narrow loads (NCHW) keep more addresses in registers: half the depth.
        BLOCK_K=power_of_two(problem.segment, 16, 32 if itemsize == 4 or problem.pixels_last else 64),
        num_warps=warps(target, 256 if g.N > 64 else 128),
        num_stages=1,
    )


_RULES: dict[str, Callable[[Any, Target], Tile]] = {
    rule.__name__: rule for rule in (implicit_gemm, grouped_packed, depthwise, transposed_phase, deformable)
}


def default_tile(kernel: str, problem: Problem, target: Target) -> Tile:
    """The analytic default of a kernel for a problem on a target."""
    tile = _RULES[kernel](problem, target)
    if target.interpreted:
        # The interpreter pays about a millisecond for a step of a program, whatever the size of the step.
        pixels = cdiv(problem.geometry.M, problem.geometry.phases)
        tile = replace(tile, BLOCK_M=power_of_two(pixels, 16, 1024))  # type: ignore[call-arg]
    return tile
