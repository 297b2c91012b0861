"""The hand-written kernels, one file each; `KERNELS` by name."""

from __future__ import annotations

from . import (
    common,
    deformable,
    deformable_input_gradient,
    deformable_weight_gradient,
    depthwise,
    depthwise_banded,
    depthwise_banded_transposed,
    depthwise_banded_weight_gradient,
    depthwise_fused_weight_gradient,
    depthwise_patch,
    depthwise_patch_weight_gradient,
    depthwise_weight_gradient,
    grouped_packed,
    grouped_packed_weight_gradient,
    grouped_slab,
    implicit_gemm,
    implicit_gemm_boxed,
    implicit_gemm_persistent,
    implicit_gemm_rolling,
    implicit_gemm_rows,
    locally_connected,
    locally_connected_input_gradient,
    locally_connected_input_gradient_rolling,
    locally_connected_input_gradient_shifted,
    locally_connected_weight_gradient,
    separable,
    separable_whole,
    shuffle_gemm,
    strided_boxed,
    transposed_overlap,
    transposed_phase,
    weight_gradient,
    weight_gradient_boxed,
    weight_gradient_clipped,
    weight_gradient_rows,
    weight_gradient_taps,
)
from .arguments import Arguments
from .kernel import Kernel, Tile
from .launching import launch, launches

KERNELS: dict[str, Kernel] = {
    module.KERNEL.name: module.KERNEL
    for module in (
        implicit_gemm,
        implicit_gemm_boxed,
        implicit_gemm_persistent,
        implicit_gemm_rolling,
        implicit_gemm_rows,
        strided_boxed,
        grouped_packed,
        grouped_slab,
        depthwise,
        depthwise_patch,
        transposed_overlap,
        transposed_phase,
        deformable,
        weight_gradient,
        weight_gradient_boxed,
        weight_gradient_clipped,
        weight_gradient_rows,
        weight_gradient_taps,
        depthwise_weight_gradient,
        depthwise_patch_weight_gradient,
        grouped_packed_weight_gradient,
        depthwise_banded,
        depthwise_banded_transposed,
        depthwise_banded_weight_gradient,
        depthwise_fused_weight_gradient,
        deformable_input_gradient,
        deformable_weight_gradient,
        shuffle_gemm,
        separable,
        separable_whole,
        locally_connected,
        locally_connected_input_gradient,
        locally_connected_input_gradient_rolling,
        locally_connected_input_gradient_shifted,
        locally_connected_weight_gradient,
    )
}

__all__ = ["KERNELS", "Arguments", "Kernel", "Tile", "common", "launch", "launches"]
