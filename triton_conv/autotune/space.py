"""The tiles worth trying for a problem, nearest to the analytic default first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from ..defaults import default_tile
from ..kernels import KERNELS, Tile
from ..kernels import depthwise_banded_transposed as transposed
from ..kernels.banded_rows import columns_read, row_columns
from ..kernels.depthwise_banded import DepthwiseBandedTile
from ..kernels.depthwise_banded_transposed import DepthwiseBandedTransposedTile
from ..kernels.depthwise_banded_weight_gradient import DepthwiseBandedWeightGradientTile
from ..kernels.depthwise_fused_weight_gradient import DepthwiseFusedWeightGradientTile
from ..kernels.depthwise_patch_weight_gradient import DepthwisePatchWeightGradientTile
from ..kernels.grouped_slab import GroupedSlabTile
from ..kernels.implicit_gemm_persistent import ImplicitGemmPersistentTile, partial_sums
from ..kernels.implicit_gemm_rolling import ImplicitGemmRollingTile
from ..kernels.implicit_gemm_rows import ImplicitGemmRowsTile, phases
from ..kernels.kernel import cdiv
from ..kernels.planes import RollingPatchTile, walked
from ..kernels.separable_whole import SeparableWholeTile
from ..kernels.strips import RollingTile
from ..kernels.transposed_overlap import TransposedOverlapTile, image_columns
from ..kernels.weight_gradient_rows import WeightGradientRowsTile
from ..kernels.weight_gradient_windows import WeightGradientWindowsTile
from ..problem import Problem
from ..problem_lectures import LocalProblem, LocalWeightGradientProblem, SeparableProblem
from ..target import Target

_DOT: dict[str, Sequence[int | bool]] = {
    "BLOCK_M": (32, 64, 128, 256),
    "BLOCK_N": (16, 32, 64, 128, 256),
    "BLOCK_K": (16, 32, 64, 128),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),
}

_TAPS: dict[str, Sequence[int | bool]] = {
    "BLOCK_M": (64, 128),
    "BLOCK_K": (64, 128),
    "TAPS": (1, 2, 4, 16),
    "SPLITS": (1, 4, 8, 16, 32, 64),
    "num_warps": (4, 8),
}

_BOXES: dict[str, Sequence[int | bool]] = {
    "BLOCK_M": (64, 128, 256),
    "BLOCK_N": (64, 128, 256),
    "BLOCK_K": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}

# What a tile reads goes as the sum of its sides, its products as their area: nothing small. SPLITS fill the last
# wave of programs.
_BOXES_OF_PIXELS: dict[str, Sequence[int | bool]] = {
    "BLOCK_M": (64, 128, 256),
    "BLOCK_N": (64, 128, 256),
    "BLOCK_K": (64, 128),
    "SPLITS": (1, 2, 3, 4, 5, 7, 11, 16, 32),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}

SPACES: Mapping[str, Mapping[str, Sequence[int | bool]]] = {
    "implicit_gemm": _DOT | {"FLAT_K": (False, True)},
    "implicit_gemm_boxed": _BOXES,
    "strided_boxed": _BOXES | {"TOGETHER": (False, True)},
    # One program a multiprocessor of an H100, or two: the memory of either has room for no more stages.
    "implicit_gemm_persistent": _BOXES | {"BLOCK_K": (64, 128), "PROGRAMS": (132, 264), "SPLIT": (False, True)},
    "implicit_gemm_rolling": _BOXES
    | {"BLOCK_M": (32, 64, 128), "BLOCK_N": (64, 128), "BLOCK_K": (16, 32, 64), "num_stages": (1, 2, 3)}
    | {"PROGRAMS": (132, 264)},
    # Rows of the product are channels, 16 a warp; a segment of fewer than four pixels is stored in pieces.
    "implicit_gemm_rows": {
        "BLOCK_M": (32, 64, 128, 256),
        "BLOCK_N": (64, 128),
        "BLOCK_K": (16, 32, 64, 128),
        "BLOCK_T": (4, 8),
        "num_warps": (4, 8),
        "num_stages": (1, 2),
    },
    # A slab wider than 64 channels is a wide group's business; taps come from L1, which stages bypass.
    "grouped_packed": _DOT | {"BLOCK_N": (16, 32, 64), "BLOCK_K": (16, 32, 64), "num_stages": (1, 2)},
    # Wider slabs than groups ask for multiply more zeros, but read longer runs; a warp has one or two of its own.
    "grouped_slab": {
        "ROWS": (2, 4, 7, 8, 14),
        "SLABS": (1, 2, 4, 8),
        "STEPS": (1, 4, 8, 16),
        "BLOCK_P": (8, 16),
        "BLOCK_K": (8, 16, 32),
        "num_warps": (1, 2, 4),
        "num_stages": (1,),
    },
    "depthwise": {
        "BLOCK_M": (4, 8, 16, 32, 64, 128, 256, 512, 1024),
        "BLOCK_C": (1, 2, 4, 8, 16, 32, 64, 128),
        "UNROLL": (False, True),
        "num_warps": (2, 4, 8),
        "num_stages": (1,),
    },
    # Warps of eight need products of 128 rows to divide among them.
    "depthwise_banded": {
        "BLOCK_M": (64, 128, 256),
        "BLOCK_T": (16, 32, 64),
        "BLOCK_K": (16, 32, 64, 128, 256),
        "ROWS": (1, 2, 4, 8),
        "FUSED": (1, 2, 4),
        "STEPS": (1, 2, 4, 8, 16),
        "RESIDENT": (False, True),
        "num_warps": (4, 8),
        "num_stages": (1,),
    },
    "depthwise_banded_transposed": {
        "BLOCK_M": (64, 128),
        "BLOCK_T": (16, 32, 64),
        "BLOCK_K": (16, 32, 64),
        "ROWS": (1, 2, 4, 8),
        "STEPS": (1, 2, 4, 8, 16),
        "num_warps": (4, 8),
        "num_stages": (1,),
    },
    # 7 and 14 columns waste nothing of images of 56, 28, 14 and 7.
    "depthwise_patch": {
        "UNROLL": (False, True),
        "ROWS": (1, 2, 4),
        "COLS": (4, 7, 8, 14),
        "BLOCK_P": (8, 16, 32),
        "BLOCK_C": (16, 32, 64),
        "num_warps": (2, 4),
        "num_stages": (1,),
    },
    # Rows of the product are images first; groups of rows fill up what few images leave.
    "depthwise_toeplitz": {
        "BLOCK_M": (64, 128, 256),
        "BLOCK_N": (64, 128, 256),
        "BLOCK_K": (16, 32, 64, 128),
        "GROUPS": (1, 2, 4, 8),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    # 7 columns fit images of 56, 28, 14 and 7, and leave registers for 49 taps.
    "depthwise_rolling": {
        "ROWS": (7, 14, 28, 56),
        "COLS": (4, 7, 8, 14),
        "BLOCK_P": (2, 4, 8),
        "BLOCK_C": (16, 32, 64),
        "AHEAD": (False, True),
        "num_warps": (2, 4),
        "num_stages": (1,),
    },
    # 7 and 14 columns fit images of 28, 14 and 7, and 8 those of 56 in whole vectors.
    "depthwise_rolling_patch": {
        "PLANES": (4, 8, 16, 32, 64),
        "ROWS": (1, 2, 4),
        "COLS": (4, 7, 8, 14),
        "BLOCK_P": (64, 128),
        "num_warps": (2, 4),
        "num_stages": (1,),
    },
    # Whole images, and sums that must lie in shared memory: of 256 x 128 they take half of it.
    "transposed_overlap": _BOXES | {"num_warps": (4, 8, 16)},
    "transposed_phase": _DOT,
    "deformable": _DOT | {"num_stages": (1, 2)},
    # At most 64 splits beyond what fills the machine: partial sums are written and read again.
    "weight_gradient": _DOT
    | {"BLOCK_M": (16, 32, 64, 128), "FLAT_N": (False, True), "SPLITS": (1, 4, 16, 64), "num_stages": (1, 2, 3)},
    "weight_gradient_boxed": _BOXES_OF_PIXELS,
    "weight_gradient_clipped": _BOXES_OF_PIXELS,
    # One program a multiprocessor: SPLITS are what few groups leave of 132.
    "weight_gradient_taps": {
        "BLOCK_M": (64, 128),
        "BLOCK_N": (32, 64),
        "BLOCK_K": (32, 64, 128),
        "SPLITS": (1, 2, 4, 8, 16, 33, 66, 132),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    # BLOCK_N times TAPS columns; what suits a filter row, and a device, see `_fills`.
    "weight_gradient_rows": _TAPS | {"BLOCK_N": (8, 16, 32, 64, 128, 256), "num_stages": (1, 3)},
    "implicit_gemm_windows": _DOT | {"BLOCK_K": (64, 128), "num_stages": (2, 3, 4)},
    # BLOCK_N times ROWS times TAPS columns, likewise.
    "weight_gradient_windows": _TAPS | {"BLOCK_N": (4, 8, 16, 32, 64), "ROWS": (1, 2, 4), "num_stages": (2, 3, 4)},
    # Channels times taps: no fewer rows than wgmma takes, nor more taps than 3 x 3 has.
    "grouped_packed_weight_gradient": {
        "ROWS": (1, 4),
        "COLS": (1, 4),
        "BLOCK_M": (64, 128),
        "BLOCK_N": (64, 128),
        "BLOCK_K": (64, 128),
        "SPLITS": (32, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 3),
    },
    "depthwise_weight_gradient": {
        "BLOCK_M": (8, 16, 32, 64, 128, 256, 512, 1024),
        "BLOCK_C": (1, 2, 4, 8, 16, 32, 64, 128),
        "SPLITS": (1, 4, 16, 64, 256),
        "num_warps": (2, 4, 8),
        "num_stages": (1,),
    },
    # ROWS times LANES cover 3, 5 and 7 filter rows with little left over; SPLITS fill 132 multiprocessors evenly.
    "depthwise_patch_weight_gradient": {
        "ROWS": (1, 2, 3, 5, 7, 9),
        "COLS": (4, 7, 8, 14),
        "LANES": (1, 4, 8),
        "BLOCK_P": (4, 8, 16),
        "BLOCK_C": (32, 64),
        "SPLITS": (44, 88, 132),
        "num_warps": (4,),
        "num_stages": (1,),
    },
    "depthwise_rolling_weight_gradient": {
        "ROWS": (7, 14, 28, 56),
        "COLS": (4, 7, 8, 14),
        "BLOCK_P": (2, 4, 8),
        "BLOCK_C": (16, 32, 64),
        "SPLITS": (22, 44, 88, 132, 176),
        "num_warps": (2, 4),
        "num_stages": (1,),
    },
    # Sixteen programs of a warp a multiprocessor are 7 to 33 splits of 64 to 240 channels.
    "depthwise_rolling_patch_weight_gradient": {
        "PLANES": (8, 16, 32, 64),
        "ROWS": (1, 2, 4),
        "COLS": (2, 4, 8),
        "BLOCK_P": (32, 64),
        "STEPS": (1, 2, 4),
        "SPLITS": (1, 4, 7, 14, 33),
        "num_warps": (1, 2),
        "num_stages": (1,),
    },
    "depthwise_banded_weight_gradient": {
        "BLOCK_M": (32, 64),
        "BLOCK_T": (16, 32),
        "BLOCK_K": (64, 128),
        "ROWS": (1, 4),
        "FILTER_ROWS": (1, 3, 8, 9),
        "TILES": (1, 4),
        "STEPS": (1, 8),
        "num_warps": (4,),
        "num_stages": (1, 2),
    },
    "depthwise_fused_weight_gradient": {
        "BLOCK_M": (32, 64),
        "BLOCK_T": (16, 32, 64),
        "BLOCK_K": (16, 32, 64),
        "ROWS": (1, 2, 4),
        "FUSED": (1, 2, 4),
        "FILTER_ROWS": (1, 3, 5, 8, 9),
        "TILES": (1, 4),
        "STEPS": (1, 4, 8, 16),
        "num_warps": (4, 8),
        "num_stages": (1, 2),
    },
    "deformable_input_gradient": _DOT | {"BLOCK_N": (16, 32, 64, 128), "num_stages": (1, 2)},
    "deformable_weight_gradient": _DOT | {"SPLITS": (1, 4, 16, 64), "num_stages": (1, 2)},
    "shuffle_gemm": _DOT
    | {"BLOCK_M": (32, 64, 128), "BLOCK_K": (32, 64, 128), "num_warps": (4, 8), "WHOLE": (False, True)},
    # Taps come from L1, which stages bypass.
    "separable": _DOT | {"BLOCK_K": (16, 32, 64), "num_stages": (1,)},
    # Patches of more pixels read less of their neighbours'; a thread holds four channels of one, or eight.
    "separable_whole": {
        "ROWS": (1, 2, 4),
        "COLS": (2, 4, 8),
        "BLOCK_P": (2, 4, 8, 16, 32),
        "BLOCK_N": (64, 128, 256),
        "BLOCK_K": (32, 64, 128, 256),
        "num_warps": (4, 8),
        "num_stages": (1, 2),
    },
    # BLOCK_M counts images: no more than share a filter.
    "locally_connected": _DOT,
    "locally_connected_input_gradient": _DOT,
    # Weights come two bytes at a time, which no stages carry.
    "locally_connected_input_gradient_rolling": {
        "BLOCK_M": (16, 32, 64),
        "BLOCK_N": (16, 32, 64),
        "BLOCK_K": (64, 128, 256),
        "COLUMNS": (32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (1,),
    },
    # One warp exchanges nothing with others.
    "locally_connected_input_gradient_shifted": {
        "BLOCK_M": (16, 32, 64),
        "BLOCK_N": (8, 16),
        "BLOCK_K": (16, 32),
        "COLUMNS": (8, 12, 16, 24, 36, 72),
        "TOGETHER": (1, 2, 3, 5),
        "num_warps": (1, 2, 4),
        "num_stages": (1,),
    },
    "locally_connected_weight_gradient": _DOT | {"BLOCK_M": (16, 32, 64, 128), "num_stages": (1, 2)},
}
"""Values of each tile parameter, by kernel. A missing value was left out for a reason stated here or by `unfit`."""


def candidates(kernel: str, problem: Problem, target: Target) -> list[Tile]:
    """Every fitting tile of the kernel's space, the analytic default first, then by distance from it.

    The distance counts doublings, so that the first few candidates are the default's neighbours.
    """
    default = default_tile(kernel, problem, target)
    space = SPACES[kernel]
    tiles = {default: 0.0}
    for values in itertools.product(*space.values()):
        tile = KERNELS[kernel].tile_type(**dict(zip(space, values, strict=True)))
        if tile not in tiles and worthwhile(tile, problem) and tile.unfit(problem, target) is None:
            tiles[tile] = distance(tile, default)
    # Ties in the order of the values: the same list everywhere.
    return sorted(tiles, key=lambda tile: (tiles[tile], tuple(tile.asdict().values())))


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
    if isinstance(tile, GroupedSlabTile):
        widths = {"ROWS": g.out_size[1], "SLABS": 2 * tile.num_warps}
    if isinstance(tile, (WeightGradientRowsTile, WeightGradientWindowsTile)):
        widths["BLOCK_N"] = max(g.c_in_group, 16)
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


def _fills(tile: WeightGradientRowsTile | WeightGradientWindowsTile, problem: Problem) -> bool:
    """Whether taps are those of a row, threads have 64 to 128 sums each, and programs are enough but not too many."""
    taps = 1 << (problem.geometry.kernel[2] - 1).bit_length()
    if not min(taps, 4) <= tile.TAPS <= taps:
        return False
    kernel = "weight_gradient_rows" if isinstance(tile, WeightGradientRowsTile) else "weight_gradient_windows"
    programs = KERNELS[kernel].grid(problem, tile)
    filled = programs >= 96 or problem.geometry.M <= 64 * tile.BLOCK_K
    return filled and (tile.SPLITS == 1 or programs <= 288) and tile.accumulator_values() in (
        2048 * tile.num_warps, 4096 * tile.num_warps
    )  # fmt: skip


def distance(tile: Tile, other: Tile) -> float:
    """Doublings between two tiles of a kernel; a stage or a flag counts as one."""
    total = 0.0
    for (name, a), b in zip(tile.asdict().items(), other.asdict().values(), strict=True):
        total += abs(a - b) if name == "num_stages" or isinstance(a, bool) else abs(math.log2(a) - math.log2(b))
    return total
