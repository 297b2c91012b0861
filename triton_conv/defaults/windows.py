"""Default tiles of the forms that read windows of rows, and of the one that gathers columns of them."""

from __future__ import annotations

import math

from ..kernels.implicit_gemm_windows import ImplicitGemmWindowsTile
from ..kernels.kernel import cdiv
from ..kernels.row_vectors import one_vector, y_vector
from ..kernels.row_windows import vector
from ..kernels.weight_gradient_columns import WeightGradientColumnsTile
from ..kernels.weight_gradient_windows import WeightGradientWindowsTile
from ..problem import Problem, WeightGradientProblem
from ..target import Target
from .common import THREADS, power_of_two, splits_of_waves, staged, warps


def implicit_gemm_windows(problem: Problem, target: Target) -> ImplicitGemmWindowsTile:
    """128 pixels by 64 channels, or fewer pixels where that leaves multiprocessors without a program. With few programs
    the wait for a step's loads binds: steps are long and four of them in flight.
    """
    g, hopper = problem.geometry, target.arch == "sm_90"

    def programs(pixels: int) -> int:
        return cdiv(g.M, pixels) * cdiv(g.c_out_group, 64) * g.groups

    block_m = 128 if hopper else 64
    while block_m > 32 and programs(block_m) < target.sms * 3 // 4:
        block_m //= 2
    few = programs(block_m) <= 2 * target.sms
    tile = ImplicitGemmWindowsTile(
        BLOCK_M=block_m,
        # wgmma takes no fewer than 64 rows.
        BLOCK_N=64,
        BLOCK_K=max(g.taps, (128 if few else 64) if hopper else 32),
        num_warps=warps(target, THREADS),
        num_stages=(4 if few else 3) if hopper else 2,
    )
    return staged(tile, problem, target)


def weight_gradient_windows(problem: WeightGradientProblem, target: Target) -> WeightGradientWindowsTile:
    """All filter rows of filters that have two or four of them, so that nothing is multiplied twice; 128 columns."""
    g = problem.geometry
    # Taps a stride apart are elements of one vector.
    taps = power_of_two(g.kernel[2], 1, min(max(4, 2 * power_of_two(g.stride[2], 1, 8)), 16))
    rows = g.kernel[1] if g.kernel[1] in (2, 4) else 1
    hopper = target.arch == "sm_90"
    columns = 128 if hopper else 64
    # wgmma takes no fewer than 64 rows. Rows of the result that are not aligned have an address for each element, of
    # which those of 128 rows spill 576 bytes; and elsewhere those of four warps 36.
    unaligned = g.c_in_group % 8 > 0
    block_m = power_of_two(g.c_out_group, 64, 64 if unaligned else columns)
    block_n = power_of_two(g.c_in_group, max(cdiv(16, rows * taps), 1), max(columns // (rows * taps), 1))
    programs = cdiv(g.c_in_group, block_n) * g.kernel[0] * cdiv(g.kernel[1], rows) * cdiv(g.kernel[2], taps)
    programs *= cdiv(g.c_out_group, block_m) * g.groups
    # Of rows of three taps, an address for each element too: Triton 3.6 spills 576 bytes of four warps.
    wide = unaligned or g.kernel[2] < taps or block_m * block_n * rows * taps > 64 * 128
    # Elsewhere volumes, and rows in parts, spill 24 and 72 bytes of four warps.
    wide = wide or (not hopper and (g.rank == 3 or g.kernel[2] > taps))
    tile = WeightGradientWindowsTile(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        # Of rows that are read once, 218 registers for dcgan_t2d; of others 64 pixels take as many.
        BLOCK_K=(128 if one_vector(problem, vector(problem)) else 64) if hopper else 32,
        ROWS=rows,
        TAPS=taps,
        SPLITS=splits_of_waves(programs, 64, problem, target),
        num_warps=warps(target, 2 * THREADS if wide else THREADS),
        num_stages=3 if hopper else 2,
    )
    return staged(tile, problem, target)


def weight_gradient_columns(problem: WeightGradientProblem, target: Target) -> WeightGradientColumnsTile:
    """256 output channels by 128 columns, which read a column's pixels half as often as 128 x 128; half as many
    where that leaves multiprocessors without a program. 64 columns where rows of the result are not aligned: of 128
    stored one by one, 112 bytes spill.
    """
    g, hopper = problem.geometry, target.arch == "sm_90"
    columns = g.c_in_group * g.taps
    block_n = power_of_two(columns, 16, 128 if hopper and columns % 4 == 0 else 64)

    def programs(block_m: int) -> tuple[int, int]:
        count = cdiv(columns, block_n) * cdiv(g.c_out_group, block_m) * g.groups
        return count, splits_of_waves(count, 64, problem, target)

    # wgmma takes no fewer than 64 rows; those of an output whose pixels are not aligned pass through registers too.
    most = (256 if y_vector(problem) > 1 else 128) if hopper else 64
    block_m = power_of_two(g.c_out_group, 64, most)
    while block_m > 64 and math.prod(programs(block_m)) < target.sms * 3 // 4:
        block_m //= 2
    tile = WeightGradientColumnsTile(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=64 if hopper else 32,
        SPLITS=programs(block_m)[1],
        num_warps=warps(target, 2 * THREADS if block_m * block_n > 64 * 64 else THREADS),
        num_stages=3 if hopper else 2,
    )
    return staged(tile, problem, target)
