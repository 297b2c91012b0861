"""Default tiles of the depthwise forms whose rows roll down the image."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from ..kernels import depthwise_rolling_patch as patch
from ..kernels import grouped_slab_weight_gradient as slab_gradient
from ..kernels.depthwise_rolling import KERNEL, DepthwiseRollingTile
from ..kernels.depthwise_rolling_patch import DepthwiseRollingPatchTile
from ..kernels.depthwise_rolling_patch_weight_gradient import (
    DepthwiseRollingPatchWeightGradientTile,
    patch_blocks,
    steps_down,
)
from ..kernels.depthwise_rolling_weight_gradient import DepthwiseRollingWeightGradientTile, steps
from ..kernels.grouped_slab_weight_gradient import GroupedSlabWeightGradientTile
from ..kernels.kernel import cdiv
from ..kernels.planes import row_pieces, rows_read, walked
from ..kernels.strips import RollingTile, numbers_read, strip_blocks
from ..problem import Problem, WeightGradientProblem
from ..target import Target
from .common import THREADS, power_of_two, warps

_Rolling = TypeVar("_Rolling", bound=RollingTile)

# Loads of a step: the masks of 84 (4 x 4 filters, stride 2, 16 columns) take 24 bytes of memory.
_MOST_LOADS = 64
# Threads of a program of patches, which share nothing: small programs fill the last wave. What a patch holds of
# registers with some 60 for all else leaves room for twelve warps of a multiprocessor.
_PATCHES = 64
_FEW_REGISTERS = 112
# Bytes that a store fills of L2 at least, and instructions of a thread in the time of one of these.
_SECTOR, _SLOTS_A_BYTE = 32, 4


def depthwise_rolling(problem: Problem, target: Target) -> DepthwiseRollingTile:
    """Whole images, of which no row is read twice, unless they are too few: then parts of twice the filter's rows."""
    g = problem.geometry
    tile = _strips(DepthwiseRollingTile, problem, target)
    while KERNEL.grid(problem, tile) < 2 * target.sms and 4 * g.kernel[1] <= tile.ROWS:
        tile = replace(tile, ROWS=cdiv(tile.ROWS, 2))
    return tile


def depthwise_rolling_patch(problem: Problem, target: Target) -> DepthwiseRollingPatchTile:
    """The patch that takes the fewest instructions an output, of those that leave registers for twelve warps of a
    multiprocessor or more: products, elements to widen, and loads, each with a mask and a zero of its own; and what
    its stores take of L2, of which a byte costs the time of four instructions of a thread. A row of a patch that is
    stored in pieces fills sectors of L2 one piece at a time: rows of 14 in seven, mobile_dw5's, take 57 us of 77.

    Whole images, of which no plane is read twice, unless they are too few: then parts of twice the filter's planes.
    """
    g = problem.geometry
    depth, height = walked(problem)
    tiles = [
        DepthwiseRollingPatchTile(
            PLANES=max(g.out_size[depth], 1),
            ROWS=rows,
            COLS=columns,
            BLOCK_P=_PATCHES,
            num_warps=warps(target, _PATCHES),
            num_stages=1,
        )
        for rows in ((1, 2) if g.out_size[height] > 1 else (1,))
        # Of four of float64 sm_100 spills.
        for columns in ((1, 2) if problem.itemsize == 8 else (1, 2, 4, 7, 8, 14, 16))
    ]

    def slots(tile: DepthwiseRollingPatchTile) -> tuple[bool, int]:
        read = row_pieces(problem, tile)
        rows, columns = cdiv(g.out_size[height], tile.ROWS), cdiv(g.out_size[2], tile.COLS)
        loads = rows_read(problem, tile) * (sum(read) + 4 * len(read))
        pieces = cdiv(tile.COLS, problem.y_run(16 // problem.itemsize))
        stored = tile.ROWS * (_SECTOR * pieces if pieces > 1 else tile.COLS * problem.itemsize)
        many = tile.held(problem) > _FEW_REGISTERS
        return many, rows * columns * (tile.ROWS * tile.COLS * g.taps + loads + _SLOTS_A_BYTE * stored)

    tile = min((tile for tile in tiles if tile.unfit(problem, target) is None), key=slots, default=tiles[0])
    while patch.KERNEL.grid(problem, tile) * _PATCHES < 8 * 32 * target.sms and 4 * g.kernel[depth] <= tile.PLANES:
        tile = replace(tile, PLANES=cdiv(tile.PLANES, 2))
    return tile


def depthwise_rolling_weight_gradient(
    problem: WeightGradientProblem, target: Target
) -> DepthwiseRollingWeightGradientTile:
    """As many programs as registers let be resident, and segments that give each nearly as many steps."""
    g = problem.geometry
    tile = _strips(DepthwiseRollingWeightGradientTile, problem, target)
    resident = (2 if g.taps > 9 else 3) * target.sms
    most = problem.most_partial_bytes // max(problem.partial_bytes, 1)
    blocks, rows = strip_blocks(problem, tile.COLS, tile.BLOCK_P), max(steps(problem), 1)
    splits = max(min(resident // cdiv(g.c_out, tile.BLOCK_C), most, blocks * cdiv(rows, g.kernel[1])), 1)
    # A segment begins with rows of the gradient alone, for as long as about a step takes.
    parts = [part for part in (1, 2, 4, 8) if part == 1 or rows >= part * g.kernel[1]]
    part = min(parts, key=lambda part: cdiv(blocks * part, splits) * (cdiv(rows, part) + 1))
    return replace(tile, ROWS=cdiv(rows, part), SPLITS=splits)


def grouped_slab_weight_gradient(problem: WeightGradientProblem, target: Target) -> GroupedSlabWeightGradientTile:
    """A warp for each of up to four slabs side by side, which together read whole lines of memory. Of columns as many
    as registers hold, so that the fewest are read. Eight warps a multiprocessor, and segments that give each program
    nearly as many steps.
    """
    g = problem.geometry
    slabs = power_of_two(cdiv(g.groups, slab_gradient.groups_per_slab(problem)), 1, 4)
    tiles = [
        GroupedSlabWeightGradientTile(COLS=columns, SLABS=slabs, num_warps=slabs, num_stages=1) for columns in (4, 2, 1)
    ]
    tile = min(
        [tile for tile in tiles if tile.unfit(problem, target) is None] or tiles[-1:],
        key=lambda tile: cdiv(g.out_size[2], tile.COLS) * (slab_gradient.width(problem, tile.COLS) + tile.COLS),
    )
    most = problem.most_partial_bytes // max(problem.partial_bytes, 1)
    most = max(min(8 // slabs * target.sms // slab_gradient.KERNEL.grid(problem, tile), most), 1)
    blocks, rows = max(strip_blocks(problem, tile.COLS, tile.BLOCK_P), 1), max(slab_gradient.steps(problem), 1)
    # A segment begins with rows of the gradient alone, for as long as about a step takes.
    parts = [part for part in (1, 2, 4, 8) if part == 1 or rows >= part * g.kernel[1]]
    part = min(parts, key=lambda part: cdiv(blocks * part, most) * (cdiv(rows, part) + 1))
    items = blocks * cdiv(rows, cdiv(rows, part))
    return replace(tile, ROWS=cdiv(rows, part), SPLITS=cdiv(items, cdiv(items, most)))


def depthwise_rolling_patch_weight_gradient(
    problem: WeightGradientProblem, target: Target
) -> DepthwiseRollingPatchWeightGradientTile:
    """The patch that takes the fewest instructions an output, of those that leave registers for sixteen warps of a
    multiprocessor or more: products, elements to widen, loads with their masks, gradients that move on to their next
    age after each trip of the loop, and what else a trip takes.

    As many programs of a warp as registers let be resident, and segments that give each nearly as many steps.
    """
    g = problem.geometry
    depth, height = walked(problem)
    rows_out, columns_out = g.out_size[height], g.out_size[2]
    alive = cdiv(g.kernel[depth], g.stride[depth])
    tiles = [
        DepthwiseRollingPatchWeightGradientTile(
            PLANES=max(g.out_size[depth], 1),
            ROWS=rows,
            COLS=columns,
            BLOCK_P=target.warp_size,
            STEPS=count,
            num_warps=1,
            num_stages=1,
        )
        for rows in ((1, 2, 4) if rows_out > 1 else (1,))
        for columns in ((1, 2) if problem.itemsize == 8 else (1, 2, 4, 7, 8, 14, 16))
        for count in (1, 2, 3, 4)
    ]

    def slots(tile: DepthwiseRollingPatchWeightGradientTile) -> tuple[bool, float]:
        read = row_pieces(problem, tile)
        outputs, vector = tile.ROWS * tile.COLS, problem.y_run(16 // problem.itemsize, tile.COLS)
        loads = rows_read(problem, tile) * (sum(read) + 4 * len(read)) + outputs * (1 + 4 / vector)
        moved = max(alive - tile.STEPS, 0) * outputs
        patches = cdiv(rows_out, tile.ROWS) * cdiv(columns_out, tile.COLS)
        many = tile.held(problem) > _FEW_REGISTERS
        return many, patches * (outputs * g.taps + loads + (moved + 16) / tile.STEPS)

    tile = min((tile for tile in tiles if tile.unfit(problem, target) is None), key=slots, default=tiles[0])
    held = tile.held(problem)
    registers = 128 if held <= _FEW_REGISTERS else held + 24
    resident = max(target.registers // (target.warp_size * registers), 1) * target.sms
    most = max(problem.most_partial_bytes // max(problem.partial_bytes, 1), 1)
    blocks, count = max(patch_blocks(problem, tile), 1), max(steps_down(problem), 1)

    def split(part: int, turns: int) -> tuple[int, int, int]:
        """Steps of a program, times waves of programs; splits and planes of a segment."""
        planes = cdiv(count, part)
        splits = cdiv(blocks * cdiv(count, planes), turns)
        # A segment begins with planes of the gradient alone, and a program ends with the sums of its threads: each
        # takes about as long as a step.
        each = turns * (cdiv(planes, tile.STEPS) * tile.STEPS + 1) + 1
        return cdiv(splits * g.c_out, resident) * each, splits, planes

    parts = [part for part in (1, 2, 4, 8) if part == 1 or count >= part * max(g.kernel[depth], tile.STEPS)]
    least = {part: cdiv(blocks * part, min(most, max(4 * resident // max(g.c_out, 1), 1))) for part in parts}
    _, splits, planes = min(split(part, least[part] + more) for part in parts for more in range(8))
    return replace(tile, PLANES=planes, SPLITS=splits)


def _strips(tile_type: type[_Rolling], problem: Problem, target: Target) -> _Rolling:
    """Two channels a thread of half precision, so that a load of a warp is whole sectors, and strips of the width that
    takes the fewest instructions, of those that fit: products and stores of each column, loads and conversions of what
    they read.
    """
    g, size = problem.geometry, problem.itemsize
    # Most images are 7 or 8 columns wide, or twice that again and again.
    widths = (1, 2, 4, 7, 14) if g.out_size[2] % 7 == 0 else (1, 2, 4, 8, 16)
    pairs = (2, 1) if size == 2 else (1,)
    tiles = [
        tile_type(
            ROWS=max(g.out_size[1], 1),
            COLS=columns,
            BLOCK_P=THREADS * channels // block_c,
            BLOCK_C=block_c,
            num_warps=warps(target, THREADS),
            # Rows that strips share come from L1, which pipelined loads bypass.
            num_stages=1,
        )
        for channels in pairs
        # A warp's channels, or half of them where that leaves fewer idle.
        for block_c in [min((32 * channels, 16 * channels), key=lambda block: (cdiv(g.c_out, block) * block, -block))]
        for columns in widths
    ]

    def slots(tile: _Rolling) -> float:
        channels = tile.BLOCK_P * tile.BLOCK_C / THREADS
        loads = numbers_read(problem, tile.COLS) * (1 + 3 / channels)
        return cdiv(g.out_size[2], tile.COLS) * (tile.COLS * (g.taps + 3) + loads)

    fitting = [tile for tile in tiles if tile.on_the_way(problem) <= _MOST_LOADS and not tile.unfit(problem, target)]
    return min(fitting, key=slots, default=tiles[-len(widths)])
