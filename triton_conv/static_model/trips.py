"""How often a program goes round each loop of its kernel: counted from the geometry, as the kernel itself does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..kernels import KERNELS, Tile
from ..kernels import grouped_slab_weight_gradient as slab_gradient
from ..kernels.boxes import box
from ..kernels.depthwise_rolling_patch_weight_gradient import patch_blocks, steps_down
from ..kernels.depthwise_rolling_weight_gradient import steps
from ..kernels.implicit_gemm_persistent import groups
from ..kernels.kernel import cdiv
from ..kernels.planes import walked
from ..kernels.strips import strip_blocks
from ..kernels.weight_gradient_clipped import spans
from ..problem import Problem
from ..problem_deform import DeformInputGradientProblem, DeformProblem

Counts = tuple[float, ...]


def _channels_by_taps(problem: Problem, tile: Any) -> Counts:
    g = problem.geometry
    if getattr(tile, "FLAT_K", False) or getattr(problem, "flat", False):
        return (max(cdiv(g.c_in_group * g.taps, tile.BLOCK_K), 1),)
    return (max(cdiv(g.c_in_group, tile.BLOCK_K), 1) * g.taps,)


def _phases(problem: Problem, tile: Any) -> Counts:
    """The mean over the phases, whose taps differ."""
    g = problem.geometry
    taps = 1.0
    for kernel, stride, pad, dilation in zip(g.kernel, g.stride, g.pad_before, g.dilation, strict=True):
        counts = [sum((phase + pad - k * dilation) % stride == 0 for k in range(kernel)) for phase in range(stride)]
        taps *= sum(max(count, 1) for count in counts) / stride
    return (cdiv(tile.groups_per_tile(problem) * g.c_in_group, tile.BLOCK_K) * taps,)


def _strided(problem: Problem, tile: Any) -> Counts:
    """Of all phases of an output together, or their mean; one without a tap counts for nothing."""
    g = problem.geometry
    return (max(cdiv(g.c_in_group, tile.BLOCK_K) * g.taps / (1 if tile.TOGETHER else g.phases), 1),)


def _rows(problem: Problem, tile: Any) -> Counts:
    """Without the taps of a filter row, which are unrolled; of phases of rows the mean."""
    g = problem.geometry
    taps = math.prod(g.kernel[:2]) / (math.prod(g.stride[:2]) if g.transposed else 1)
    return (max(cdiv(g.c_in_group, tile.BLOCK_K), 1) * taps,)


def _turns(problem: Problem, tile: Any) -> Counts:
    """Of the programs that have most to do: a part of a tile is that part of a turn."""
    longest = max(groups(problem, tile), key=lambda group: group.longest(tile.SPLIT))
    return (longest.longest(tile.SPLIT) / longest.steps, longest.steps)


def _pixels(block: str) -> Callable[[Problem, Any], Counts]:
    return lambda problem, tile: (max(cdiv(problem.geometry.M, tile.SPLITS * getattr(tile, block)), 1),)


def _boxes_of_pixels(problem: Problem, tile: Any) -> Counts:
    sides = box(problem, tile.BLOCK_K).values()
    sizes = (problem.geometry.batch, *problem.geometry.out_size)
    return (max(cdiv(math.prod(cdiv(size, side) for size, side in zip(sizes, sides, strict=True)), tile.SPLITS), 1),)


def _boxes_of_spans(problem: Problem, tile: Any) -> Counts:
    """The mean over the taps."""
    first, *sides = box(problem, tile.BLOCK_K).values()
    boxes = float(cdiv(problem.geometry.batch, first))
    for axis, side in enumerate(sides):
        taps = spans(problem, axis)
        boxes *= sum(max(cdiv(span, side), 1) for span in taps) / len(taps)
    return (max(boxes / tile.SPLITS, 1),)


def _packed_rows(problem: Problem, tile: Any) -> Counts:
    # The rows of the padded input that a tap reads are not those of the output.
    rows = int(KERNELS["grouped_packed_weight_gradient"].arguments(problem, tile)["rows"])  # type: ignore[call-overload]
    g = problem.geometry
    return (max(cdiv(g.batch * g.out_size[0] * rows * g.out_size[2], tile.SPLITS * tile.BLOCK_K), 1),)


def _filter_rows(problem: Problem, tile: Any) -> Counts:
    depth, height, width = problem.geometry.kernel
    return (depth * height,) if tile.UNROLL else (depth * height, width)


def _band_rows(problem: Problem, tile: Any) -> Counts:
    if tile.RESIDENT:
        return (tile.STEPS,)
    span = int(KERNELS["depthwise_banded"].arguments(problem, tile)["SPAN"])  # type: ignore[call-overload]
    return (tile.STEPS, problem.geometry.kernel[0] * span)


def _patches(problem: Problem, tile: Any) -> Counts:
    g = problem.geometry
    patches = g.batch * g.out_size[0] * g.out_size[1] * cdiv(g.out_size[2], tile.COLS)
    return (cdiv(patches, tile.SPLITS * (tile.BLOCK_P // tile.LANES)),)


def _rolled(problem: Problem, axis: int, length: int) -> Counts:
    """The mean over the segments of an axis: the first begins, and the last ends, where the image does."""
    g = problem.geometry
    stride, alive, total = g.stride[axis], cdiv(g.kernel[axis], g.stride[axis]), 0
    firsts = range(0, g.out_size[axis], length)
    for first in firsts:
        outputs, corner = min(length, g.out_size[axis] - first), first * stride - g.pad_before[axis]
        end = max(min(outputs + alive - 1, cdiv(g.in_size[axis] - corner, stride)), outputs)
        total += end - min(max(-corner, 0) // stride, alive - 1)
    return (total / len(firsts),)


def _rolling_gradient(problem: Problem, tile: Any) -> Counts:
    segments = cdiv(steps(problem), tile.ROWS)
    return (strip_blocks(problem, tile.COLS, tile.BLOCK_P) * segments / tile.SPLITS, steps(problem) / segments)


def _slab_gradient(problem: Problem, tile: Any) -> Counts:
    count = slab_gradient.steps(problem)
    segments = max(cdiv(count, tile.ROWS), 1)
    return (strip_blocks(problem, tile.COLS, tile.BLOCK_P) * segments / tile.SPLITS, count / segments)


def _rolling_patch_gradient(problem: Problem, tile: Any) -> Counts:
    count = steps_down(problem)
    segments = max(cdiv(count, tile.PLANES), 1)
    trips = sum(cdiv(min(tile.PLANES, count - first), tile.STEPS) for first in range(0, count, tile.PLANES))
    return (patch_blocks(problem, tile) * segments / tile.SPLITS, trips / segments)


def _samples(problem: DeformProblem, tile: Any) -> Counts:
    g = problem.geometry
    return (g.taps, g.c_in_group // problem.segment, max(cdiv(problem.segment, tile.BLOCK_K), 1))


def _scattered(problem: DeformInputGradientProblem, tile: Any) -> Counts:
    g = problem.geometry
    parts = g.c_in // problem.offset_groups // problem.segment
    return (parts, max(cdiv(problem.segment, tile.BLOCK_N), 1), max(cdiv(g.c_out_group, tile.BLOCK_K), 1))


def _outputs_of_runs(problem: Problem, columns: int) -> float:
    """The mean over the runs of so many columns that an input row is cut into: each meets the outputs that read it."""
    g = problem.geometry
    pad, taps, width = g.pad_before[2], g.kernel[2], g.in_size[2]
    firsts = range(0, width, columns)
    met = [min(min(first + columns, width) + pad, g.out_size[2]) - max(first + pad - taps + 1, 0) for first in firsts]
    return sum(max(count, 0) for count in met) / len(met)


_TRIPS: dict[str, Callable[[Any, Any], Counts]] = {
    "implicit_gemm": _channels_by_taps,
    "implicit_gemm_boxed": _channels_by_taps,
    "implicit_gemm_persistent": _turns,
    "implicit_gemm_rolling": lambda problem, tile: (tile.steps(problem),),
    "implicit_gemm_rows": _rows,
    "implicit_gemm_windows": lambda problem, tile: (
        max(cdiv(problem.geometry.c_in_group, tile.BLOCK_K // problem.geometry.taps), 1),
    ),
    "strided_boxed": _strided,
    "shuffle_gemm": lambda problem, tile: (
        max(cdiv(problem.geometry.c_in if tile.WHOLE else problem.geometry.c_in_group, tile.BLOCK_K), 1)
        * problem.geometry.taps,
    ),
    "locally_connected": _channels_by_taps,
    "transposed_overlap": lambda problem, tile: (max(cdiv(problem.geometry.c_in_group, tile.BLOCK_K), 1),),
    "transposed_phase": _phases,
    "grouped_packed": lambda problem, tile: (problem.geometry.taps,),
    "grouped_slab": lambda problem, tile: (tile.STEPS,),
    "weight_gradient": _pixels("BLOCK_K"),
    "deformable_weight_gradient": _pixels("BLOCK_K"),
    "depthwise_weight_gradient": _pixels("BLOCK_M"),
    "weight_gradient_boxed": _boxes_of_pixels,
    "weight_gradient_clipped": _boxes_of_spans,
    "weight_gradient_columns": _pixels("BLOCK_K"),
    "weight_gradient_rows": _pixels("BLOCK_K"),
    "weight_gradient_taps": lambda problem, tile: (tile.steps(problem),),
    "weight_gradient_windows": _pixels("BLOCK_K"),
    "grouped_packed_weight_gradient": _packed_rows,
    "grouped_slab_weight_gradient": _slab_gradient,
    "depthwise": _filter_rows,
    "depthwise_banded": _band_rows,
    "depthwise_banded_transposed": lambda problem, tile: (tile.STEPS,),
    "depthwise_banded_weight_gradient": lambda problem, tile: (tile.TILES, tile.STEPS),
    "depthwise_fused_weight_gradient": lambda problem, tile: (tile.TILES, tile.STEPS),
    "depthwise_patch": lambda problem, tile: (problem.geometry.kernel[0] * tile.row_steps(problem),),
    "depthwise_patch_weight_gradient": _patches,
    "depthwise_rolling": lambda problem, tile: _rolled(problem, 1, tile.ROWS),
    "depthwise_rolling_patch": lambda problem, tile: _rolled(problem, walked(problem)[0], tile.PLANES),
    "depthwise_rolling_weight_gradient": _rolling_gradient,
    "depthwise_toeplitz_weight_gradient": lambda problem, tile: (tile.steps(problem),),
    "depthwise_toeplitz": lambda problem, tile: (tile.steps(problem),),
    "depthwise_rolling_patch_weight_gradient": _rolling_patch_gradient,
    "deformable": _samples,
    "deformable_input_gradient": _scattered,
    "separable": lambda problem, tile: (
        max(cdiv(problem.geometry.c_out, tile.BLOCK_K), 1),
        problem.geometry.taps,
    ),
    "separable_whole": lambda problem, tile: (max(cdiv(problem.c_final, tile.BLOCK_N), 1),),
    "locally_connected_input_gradient": lambda problem, tile: (
        max(cdiv(problem.geometry.c_out_group, tile.BLOCK_K), 1) * problem.geometry.taps,
    ),
    "locally_connected_input_gradient_rolling": lambda problem, tile: (
        _outputs_of_runs(problem, tile.COLUMNS)
        * cdiv(problem.geometry.c_out_group * problem.geometry.kernel[0] * problem.geometry.kernel[1], tile.BLOCK_K),
    ),
    "locally_connected_input_gradient_shifted": lambda problem, tile: (
        _outputs_of_runs(problem, tile.COLUMNS),
        tile.steps(problem),
    ),
    "locally_connected_weight_gradient": lambda problem, tile: (max(cdiv(problem.geometry.batch, tile.BLOCK_K), 1),),
}


def trips(kernel: str, problem: Problem, tile: Tile) -> Counts:
    """Trips of the kernel's loops that lie inside each other, the outermost first."""
    return _TRIPS[kernel](problem, tile)
