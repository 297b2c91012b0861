"""The tiles worth trying for a problem, nearest to the analytic default first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from ..defaults import default_tile
from ..kernels import KERNELS, Tile
from ..problem import Problem
from ..target import Target
from .worth import worthwhile

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
    "grouped_slab_weight_gradient": {
        "ROWS": (7, 14, 28, 56),
        "COLS": (2, 4, 6),
        "SLABS": (1, 2, 4, 8),
        "BLOCK_P": (16,),
        "SPLITS": (16, 33, 66, 99, 132),
        "num_warps": (1, 2, 4, 8),
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
    # Eight columns a warp at least.
    "weight_gradient_columns": {
        "BLOCK_M": (64, 128, 256),
        "BLOCK_N": (64, 128),
        "BLOCK_K": (64, 128),
        "SPLITS": (1, 4, 8, 16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    # One program a multiprocessor: SPLITS are what few groups leave of 132.
    "weight_gradient_taps": {
        "BLOCK_M": (64, 128),
        "BLOCK_N": (32, 64),
        "BLOCK_K": (32, 64, 128),
        "SPLITS": (1, 2, 4, 8, 16, 33, 66, 132),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    # BLOCK_N times TAPS columns; what suits a filter row, and a device, see `worth._fills`.
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
    "depthwise_toeplitz_weight_gradient": {
        "BLOCK_M": (64, 128, 256),
        "BLOCK_N": (64, 128, 256),
        "BLOCK_K": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
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


def distance(tile: Tile, other: Tile) -> float:
    """Doublings between two tiles of a kernel; a stage or a flag counts as one."""
    total = 0.0
    for (name, a), b in zip(tile.asdict().items(), other.asdict().values(), strict=True):
        total += abs(a - b) if name == "num_stages" or isinstance(a, bool) else abs(math.log2(a) - math.log2(b))
    return total
