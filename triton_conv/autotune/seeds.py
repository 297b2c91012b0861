"""Tiles that counting speaks for, and that nobody timed yet: tried first where other tiles of a problem are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..kernels import KERNELS, Tile
from ..problem import Problem
from ..target import Target
from .worth import worthwhile

_EIGHT_WARPS = {"BLOCK_K": 64, "num_warps": 8}
_TALL, _WIDE = ({"BLOCK_M": m, "BLOCK_N": 384 - m, **_EIGHT_WARPS} for m in (256, 128))
_ONE_STAGE = {"num_stages": 1}

SEEDS: Mapping[str, Sequence[Mapping[str, int | bool]]] = {
    "implicit_gemm_persistent": [
        {**sides, "num_stages": 3, "PROGRAMS": 132, "SPLIT": split}
        for split in (False, True)
        for sides in (_TALL, _WIDE)
    ],
    "strided_boxed": [
        {**_TALL, "num_stages": stages, "TOGETHER": together} for stages in (3, 4) for together in (False, True)
    ],
    "grouped_slab": [
        {"ROWS": 8, "SLABS": 4, "STEPS": 8, "BLOCK_P": 8, "BLOCK_K": 8, "num_warps": 4, **_ONE_STAGE},
        {"ROWS": 7, "SLABS": 8, "STEPS": 8, "BLOCK_P": 8, "BLOCK_K": 8, "num_warps": 4, **_ONE_STAGE},
        {"ROWS": 14, "SLABS": 1, "STEPS": 4, "BLOCK_P": 8, "BLOCK_K": 8, "num_warps": 1, **_ONE_STAGE},
        {"ROWS": 4, "SLABS": 4, "STEPS": 8, "BLOCK_P": 8, "BLOCK_K": 32, "num_warps": 4, **_ONE_STAGE},
    ],
    # A program a multiprocessor or nearly two, of dilated layers with 2048 channels.
    "weight_gradient_clipped": [
        {**sides, "num_stages": stages, "SPLITS": splits}
        for sides, stages in ((_TALL, 3), (_WIDE, 4))
        for splits in (3, 5, 7)
    ],
    # A program a multiprocessor of dcgan_t2d and vocoder_t1d_s8, or two that take turns at the tensor cores.
    "implicit_gemm_windows": [
        {"BLOCK_M": m, "BLOCK_N": 64, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for m, k, warps, stages in (
            (128, 128, 4, 3),
            (128, 128, 8, 3),
            (128, 64, 4, 4),
            (64, 128, 4, 3),
            (32, 128, 4, 4),
        )
    ],
    "weight_gradient_windows": [
        {"BLOCK_M": m, "BLOCK_N": 8, "BLOCK_K": k, "ROWS": 4, "TAPS": 4, "SPLITS": 1, "num_warps": m // 16}
        | {"num_stages": stages}
        for m, k, stages in ((128, 128, 3), (128, 64, 4), (64, 64, 3))
    ],
    # 165 us of convnext_dw7 predicted, where 207 is the best measured.
    "depthwise_patch_weight_gradient": [
        {"ROWS": 7, "COLS": 14, "LANES": 1, "BLOCK_P": 4, "BLOCK_C": 64, "SPLITS": splits, "num_warps": 4, **_ONE_STAGE}
        for splits in (88, 132)
    ],
    # Of conformer_dw1d twice the steps of what won, 7% less by the model.
    "depthwise_banded": [
        {"BLOCK_M": 64, "BLOCK_T": 32, "BLOCK_K": 64, "ROWS": 1, "FUSED": 1, "STEPS": 4, "RESIDENT": True}
        | {"num_warps": 4, **_ONE_STAGE}
    ],
}


def seeds(kernel: str, problem: Problem, target: Target) -> Iterator[Tile]:
    """Those of a kernel that are worth a trial on a problem."""
    for values in SEEDS.get(kernel, ()):
        tile = KERNELS[kernel].tile_type(**values)
        if tile.unfit(problem, target) is None and worthwhile(tile, problem):
            yield tile
