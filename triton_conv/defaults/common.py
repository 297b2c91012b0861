"""What several rules share: powers of two, threads, wide tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from ..kernels import Tile
from ..kernels.kernel import cdiv
from ..problem import Problem, WeightGradientProblem
from ..target import Target

AnyTile = TypeVar("AnyTile", bound=Tile)


def power_of_two(n: int, least: int, most: int) -> int:
    """The smallest power of two of at least `n`, within bounds that are powers of two themselves."""
    return min(max(1 << max(n - 1, 0).bit_length(), least), most)


def warps(target: Target, threads: int) -> int:
    """Warps (AMD: waves of 64) that make up so many threads."""
    return threads // target.warp_size


# Four warps on NVIDIA, unless a rule says why. Triton has miscompiled loops over (tap, channel) with eight (pytorch
# issue 173068, triton issue 1254), with grossly wrong results; all of 364 tiles of eight warps that an H100 tried, with
# Triton 3.6, were right.
THREADS = 128


def aligned(problem: Problem, target: Target, tiles: Callable[[int, int], int]) -> tuple[int, int, int, int] | None:
    """(BLOCK_M, BLOCK_N, BLOCK_K, threads) where half precision is loaded in whole vectors on sm_90, for more channels
    than 64: the widest of which half of the multiprocessors have one of the `tiles`; else None.

    128 x 256 has half as many bytes a product as 128 x 64: on an H100, bfloat16, 1.3 to 1.5 times as fast as that with
    four warps for dilated_d4, d12, d36, decoder_t2d and their input gradients, and 128 x 128 1.2 times. With few tiles
    the wait for a step's loads binds: 128 channels are half as many steps.
    """
    g = problem.geometry
    if target.arch != "sm_90" or problem.itemsize != 2 or g.N <= 64 or problem.x_vector(g.c_in_group) < 8:
        return None
    for block_m, block_n in ((128, 256) if g.N > 128 else (256, 128), (128, 128), (128, 64), (64, 64)):
        if tiles(block_m, block_n) >= target.sms // 2:
            break
    few = block_n == 64
    return block_m, block_n, power_of_two(g.c_in_group, 16, 128 if few else 64), THREADS if few else 2 * THREADS


def gathered(
    problem: Problem, target: Target, weight_vector: int, tiles: Callable[[int, int], int]
) -> tuple[int, int, int, int] | None:
    """(BLOCK_M, BLOCK_N, BLOCK_K, threads) where half precision is loaded pixel by pixel; elsewhere than on sm_90, and
    where the weight is loaded so too (which leaves no registers), None.

    The loads bind, and each further block of channels repeats them: 64 pixels by up to 256 channels, of less only what
    gives most multiprocessors one of the `tiles`. 16 KB of pixels are to be under way in a multiprocessor: with one
    program or two to each that is 128 channels a step in twice as many warps, with more 64 (wide tiles) or 32. On an
    H100 ten NCHW layers and gradients take at most 1.06 times their best measured time so, with 64 x 64 x 32 in
    four warps up to 2.7.
    """
    g = problem.geometry
    if target.arch != "sm_90" or problem.itemsize != 2 or problem.x_vector(g.c_in_group) >= 4 or weight_vector < 4:
        return None
    # These of 128 sums a thread spill.
    widest = 128 if problem.activation in ("gelu", "silu") else 256
    for block_m, most in ((64, widest), (64, 128), (64, 64), (32, 64)):
        block_n = power_of_two(g.N, 16, most)
        count = tiles(block_m, block_n)
        if count >= target.sms * 3 // 4:
            break
    few = count <= 2 * target.sms
    depth = 128 if few else 64 if block_n == 256 else 32
    return block_m, block_n, power_of_two(g.c_in_group, 16, depth), 2 * THREADS if few else THREADS


def stages(problem: Problem, target: Target, values: int) -> int:
    """As many stages as half of the shared memory holds, so that two blocks share a multiprocessor; at most three."""
    return max(1, min(3, target.shared_bytes // 2 // (values * problem.itemsize)))


def first_fit(tiles: Sequence[AnyTile], problem: Problem, target: Target) -> AnyTile:
    """The first of the tiles that the target has room for; the last where it has for none."""
    return next((tile for tile in tiles if tile.unfit(problem, target) is None), tiles[-1])


def staged(tile: AnyTile, problem: Problem, target: Target) -> AnyTile:
    """The tile with as many of its stages as fit: sm_120 copies boxes as sm_90 does, into 99 KiB instead of 227."""
    return first_fit([replace(tile, num_stages=n) for n in range(tile.num_stages, 0, -1)], problem, target)


def splits_of_waves(programs: int, block: int, problem: WeightGradientProblem, target: Target) -> int:
    """Partial sums of programs that fill a multiprocessor each: for the shortest time, by count, of full and part-full
    waves of them and of writing and reading the sums, at two thirds of the rates, which is what products reach. On
    an H100 weight_gradient_boxed is fastest with 5 for dilated_d12, 3 for decoder_t2d and 11 for wide_groups_56, as it
    says, and with 5 for dilated_d4, where it says 3.
    """
    partial = max(problem.partial_bytes, 1)
    dtype = str(problem.dtype).removeprefix("torch.")
    rate, bandwidth = target.rate(dtype, problem.precision) or 1e15, target.bandwidth or 3e12
    whole = problem.flops / (rate * 2 / 3) * target.sms / max(programs, 1)

    def seconds(count: int) -> float:
        passes = 2 * partial * count / (bandwidth * 2 / 3) if count > 1 else 0.0
        return cdiv(programs * count, target.sms) / count * whole + passes

    most = max(min(problem.geometry.M // (8 * block), problem.most_partial_bytes // partial, 64), 1)
    return min(range(1, most + 1), key=lambda count: (seconds(count), count))
