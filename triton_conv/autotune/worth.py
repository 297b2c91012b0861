"""Which tiles of a space are worth a trial on a problem."""

from __future__ import annotations

from ..kernels import KERNELS, Tile
from ..kernels import depthwise_banded_transposed as transposed
from ..kernels.banded_rows import columns_read, row_columns
from ..kernels.depthwise_banded import DepthwiseBandedTile
from ..kernels.depthwise_banded_transposed import DepthwiseBandedTransposedTile
from ..kernels.depthwise_banded_weight_gradient import DepthwiseBandedWeightGradientTile
from ..kernels.depthwise_fused_weight_gradient import DepthwiseFusedWeightGradientTile
from ..kernels.depthwise_patch_weight_gradient import DepthwisePatchWeightGradientTile
from ..kernels.depthwise_toeplitz import DepthwiseToeplitzTile
from ..kernels.depthwise_toeplitz_weight_gradient import DepthwiseToeplitzWeightGradientTile
from ..kernels.grouped_slab import GroupedSlabTile
from ..kernels.grouped_slab_weight_gradient import GroupedSlabWeightGradientTile, groups_per_slab
from ..kernels.implicit_gemm_persistent import ImplicitGemmPersistentTile, partial_sums
from ..kernels.implicit_gemm_rolling import ImplicitGemmRollingTile
from ..kernels.implicit_gemm_rows import ImplicitGemmRowsTile, phases
from ..kernels.kernel import ProductTile, cdiv
from ..kernels.planes import RollingPatchTile, walked
from ..kernels.separable_whole import SeparableWholeTile
from ..kernels.strips import RollingTile
from ..kernels.toeplitz_blocks import width_in, width_out
from ..kernels.transposed_overlap import TransposedOverlapTile, image_columns
from ..kernels.weight_gradient_columns import WeightGradientColumnsTile
from ..kernels.weight_gradient_rows import WeightGradientRowsTile
from ..kernels.weight_gradient_windows import WeightGradientWindowsTile
from ..problem import Problem
from ..problem_lectures import LocalProblem, LocalWeightGradientProblem, SeparableProblem


def worthwhile(tile: Tile, problem: Problem) -> bool:
    """Whether no block is more than twice as large as the dimension it covers."""
    g, sizes = problem.geometry, tile.sizes()
    channels = max(g.c_in, g.c_out)
    widths = {"BLOCK_M": g.M, "BLOCK_N": max(g.c_out, 64), "BLOCK_K": max(g.K, channels, 16), "BLOCK_C": g.c_out}
    if (columns := _columns(tile, problem)) is not None:
        widths = {"BLOCK_T": max(g.out_size[2], 16), "BLOCK_K": max(columns, 16)}
        widths |= {"ROWS": g.out_size[1], "STEPS": max(g.batch, 1), "BLOCK_M": g.M, "TILES": g.out_pixels}
    if isinstance(tile, DepthwiseFusedWeightGradientTile):
        # No more rows than the filter has, nor than a product takes at least.
        if g.kernel[0] * g.kernel[1] < tile.FILTER_ROWS or (tile.FUSED > 1 and tile.FUSED * tile.BLOCK_K > 64):
            return False
    if isinstance(problem, LocalProblem):
        images, rows = max(g.batch, 16), max(g.c_out_group, 64)
        gradient = isinstance(problem, LocalWeightGradientProblem)
        widths |= {"BLOCK_M": rows, "BLOCK_K": images} if gradient else {"BLOCK_M": images}
    if isinstance(problem, SeparableProblem):
        widths["BLOCK_N"] = max(problem.c_final, 64)
    if isinstance(tile, TransposedOverlapTile):
        widths |= {"BLOCK_M": max(g.batch * image_columns(problem), 64), "BLOCK_N": max(g.c_out_group * g.taps, 64)}
    if isinstance(tile, SeparableWholeTile):
        # Vectors of 8 or 16 bytes; many pixels, since each program reads all weights, but not more than wgmma takes.
        if not 32 <= tile.pixels <= 256 or tile.values(32 * tile.num_warps) not in (4, 8):
            return False
    if isinstance(tile, ImplicitGemmPersistentTile) and tile.SPLIT and not partial_sums(problem, tile):
        return False
    if isinstance(tile, ImplicitGemmRollingTile):
        # What a row of the image has no pixels or channels for is multiplied in every step.
        strips = max(g.batch, 1) * g.out_size[2]
        widths |= {"BLOCK_M": strips, "BLOCK_N": max(g.c_out_group, 64), "BLOCK_K": max(g.c_in_group, 16)}
    if isinstance(tile, ImplicitGemmRowsTile):
        widths["BLOCK_T"] = max(cdiv(g.out_size[2], phases(problem)), 4)
    if isinstance(tile, DepthwiseToeplitzWeightGradientTile):
        rows_in, rows_out = tile.BLOCK_M // width_in(problem), tile.BLOCK_N // width_out(problem)
        if tile.accumulator_values() // tile.num_warps not in (2048, 4096):
            return False
        return rows_in < 2 * g.kernel[1] and rows_out < 2 * g.out_size[1] and 2 * max(g.batch, 16) > tile.BLOCK_K
    if isinstance(tile, DepthwiseToeplitzTile):
        # 64 or 128 sums a thread; few idle images, rows or columns.
        if tile.accumulator_values() // tile.num_warps not in (2048, 4096):
            return False
        rows, images = tile.GROUPS * tile.output_rows(problem), tile.BLOCK_M // tile.GROUPS
        return rows < 2 * g.out_size[1] and images < 2 * g.batch and 2 * max(width_in(problem), 32) >= tile.BLOCK_K
    if "COLS" in sizes:
        widths |= {"ROWS": g.out_size[1], "COLS": g.out_size[2]}
    if isinstance(tile, RollingPatchTile):
        depth, height = walked(problem)
        widths |= {"PLANES": g.out_size[depth], "ROWS": g.out_size[height]}
        # Threads share nothing: each has a patch.
        if 32 * tile.num_warps != tile.BLOCK_P:
            return False
    if isinstance(tile, DepthwisePatchWeightGradientTile):
        rows, held = g.kernel[0] * g.kernel[1], tile.ROWS * tile.LANES
        # Few rows past the filter's last; of one lane, rows in several programs would share nothing but L2. A thread
        # reads no single channel.
        if 5 * cdiv(rows, held) * held > 6 * rows or (tile.LANES == 1 and rows > tile.ROWS):
            return False
        widths["ROWS"] = rows
        if 64 * tile.num_warps > tile.BLOCK_P * tile.BLOCK_C:
            return False
    if isinstance(tile, RollingTile) and 32 * tile.num_warps > tile.BLOCK_P * tile.BLOCK_C:
        # A thread has a channel of its own.
        return False
    if isinstance(tile, GroupedSlabWeightGradientTile):
        widths["SLABS"] = cdiv(g.groups, groups_per_slab(problem))
        # Sums of a second slab leave no registers.
        if tile.num_warps != tile.SLABS:
            return False
    if isinstance(tile, GroupedSlabTile):
        widths = {"ROWS": g.out_size[1], "SLABS": 2 * tile.num_warps}
    if isinstance(tile, (WeightGradientColumnsTile, WeightGradientRowsTile, WeightGradientWindowsTile)):
        widths["BLOCK_N"] = max(g.c_in_group, 16)
        if isinstance(tile, WeightGradientColumnsTile):
            widths |= {"BLOCK_M": max(g.c_out_group, 64), "BLOCK_N": max(g.K, 16)}
        if not _fills(tile, problem):
            return False
    return all(int(str(sizes[name])) < 2 * width for name, width in widths.items() if name in sizes)


def _columns(tile: Tile, problem: Problem) -> int | None:
    """Input columns that a block of a banded form reads; None for others."""
    if isinstance(tile, DepthwiseBandedWeightGradientTile):
        # wgmma takes no fewer than 64 of a weight gradient's input.
        return max(columns_read(problem, tile.BLOCK_T), 64)
    if isinstance(tile, DepthwiseBandedTransposedTile):
        return transposed.columns_read(problem, tile) if tile.mismatch(problem) is None else 0
    if isinstance(tile, (DepthwiseBandedTile, DepthwiseFusedWeightGradientTile)):
        return row_columns(problem, tile.BLOCK_T)
    return None


def _fills(tile: ProductTile, problem: Problem) -> bool:
    """Whether taps are those of a row, threads have 64 to 128 sums each, and programs are enough but not too many."""
    taps = 1 << (problem.geometry.kernel[2] - 1).bit_length()
    if not min(taps, 4) <= getattr(tile, "TAPS", taps) <= taps:
        return False
    programs = next(kernel for kernel in KERNELS.values() if kernel.tile_type is type(tile)).grid(problem, tile)
    filled = programs >= 96 or problem.geometry.M <= 64 * tile.BLOCK_K
    return filled and (tile.parts(problem) == 1 or programs <= 288) and tile.accumulator_values() in (
        2048 * tile.num_warps, 4096 * tile.num_warps
    )  # fmt: skip
