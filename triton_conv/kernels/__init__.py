"""The hand-written kernels, one file each; `KERNELS` by name."""

from __future__ import annotations

from . import common, deformable, depthwise, grouped_packed, implicit_gemm, transposed_phase
from .kernel import Kernel, Tile, launch, launches

KERNELS: dict[str, Kernel] = {
    module.KERNEL.name: module.KERNEL
    for module in (implicit_gemm, grouped_packed, depthwise, transposed_phase, deformable)
}

__all__ = ["KERNELS", "Kernel", "Tile", "common", "launch", "launches"]
