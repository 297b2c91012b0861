"""The analytic default: a tile for any problem on any target, from rules alone.

Each rule states its reason. Where it gives no measured time it comes from counting registers and bytes, and from what
the compiler makes of the tile (`triton-conv inspect` shows no spill).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..kernels import Tile
from ..kernels.kernel import cdiv
from ..problem import Problem
from ..problem_lectures import LocalProblem
from ..target import Target
from . import depthwise, gradients, lectures, products, rolling, windows
from .common import power_of_two

RULES: dict[str, Callable[[Any, Target], Tile]] = {
    rule.__name__: rule
    for rule in (
        products.implicit_gemm,
        products.implicit_gemm_boxed,
        products.implicit_gemm_persistent,
        products.implicit_gemm_rolling,
        products.implicit_gemm_rows,
        windows.implicit_gemm_windows,
        products.strided_boxed,
        products.grouped_packed,
        products.grouped_slab,
        depthwise.depthwise,
        depthwise.depthwise_patch,
        rolling.depthwise_rolling,
        rolling.depthwise_rolling_patch,
        depthwise.depthwise_toeplitz,
        products.transposed_overlap,
        products.transposed_phase,
        products.deformable,
        gradients.weight_gradient,
        gradients.weight_gradient_boxed,
        gradients.weight_gradient_clipped,
        windows.weight_gradient_columns,
        gradients.weight_gradient_rows,
        gradients.weight_gradient_taps,
        windows.weight_gradient_windows,
        gradients.depthwise_weight_gradient,
        gradients.depthwise_patch_weight_gradient,
        rolling.depthwise_rolling_weight_gradient,
        rolling.depthwise_rolling_patch_weight_gradient,
        depthwise.depthwise_toeplitz_weight_gradient,
        gradients.grouped_packed_weight_gradient,
        rolling.grouped_slab_weight_gradient,
        depthwise.depthwise_banded,
        depthwise.depthwise_banded_transposed,
        gradients.depthwise_banded_weight_gradient,
        gradients.depthwise_fused_weight_gradient,
        gradients.deformable_input_gradient,
        gradients.deformable_weight_gradient,
        lectures.shuffle_gemm,
        lectures.separable,
        lectures.separable_whole,
        lectures.locally_connected,
        lectures.locally_connected_input_gradient,
        lectures.locally_connected_input_gradient_rolling,
        lectures.locally_connected_input_gradient_shifted,
        lectures.locally_connected_weight_gradient,
    )
}
# Tiles of images, or of pixels of a row, whose number the rules have seen to; those of a `LocalProblem` are too.
_SIZED = (
    "depthwise_toeplitz", "depthwise_toeplitz_weight_gradient", "implicit_gemm_rolling", "transposed_overlap",
    "weight_gradient_taps",
)  # fmt: skip


def default_tile(kernel: str, problem: Problem, target: Target) -> Tile:
    """The analytic default of a kernel for a problem on a target."""
    tile = RULES[kernel](problem, target)
    if target.vendor == "amd" and target.warp_size == 32 and problem.itemsize == 4:
        # Radeon has no matrix unit for float32: products are unrolled into registers, of which twice as many threads
        # have more. Of 52 defaults 13 spill on gfx1100; with the threads that others take 29 did.
        tile = replace(tile, num_warps=2 * tile.num_warps)
    if target.interpreted:
        # The interpreter pays about a millisecond for a step of a program, whatever the size of the step.
        along = {
            "weight_gradient": "BLOCK_K",
            "weight_gradient_boxed": "BLOCK_K",
            "weight_gradient_clipped": "BLOCK_K",
            "weight_gradient_columns": "BLOCK_K",
            "weight_gradient_rows": "BLOCK_K",
            "weight_gradient_windows": "BLOCK_K",
            "deformable_weight_gradient": "BLOCK_K",
            "depthwise_patch": "BLOCK_P",
            "depthwise_patch_weight_gradient": "BLOCK_P",
            "depthwise_rolling": "BLOCK_P",
            "depthwise_rolling_patch": "BLOCK_P",
            "depthwise_rolling_patch_weight_gradient": "BLOCK_P",
            "depthwise_rolling_weight_gradient": "BLOCK_P",
            "grouped_packed_weight_gradient": "BLOCK_K",
            "grouped_slab": "BLOCK_P",
            "grouped_slab_weight_gradient": "BLOCK_P",
            "separable_whole": "BLOCK_P",
        }.get(kernel, "BLOCK_M")
        pixels = cdiv(problem.geometry.M, problem.geometry.phases)
        if isinstance(problem, LocalProblem) or kernel in _SIZED:
            return tile
        tile = replace(tile, **{along: power_of_two(pixels, 16, 4096)})  # type: ignore[arg-type]
    return tile
