"""What weight gradients that sum over boxes of pixels have in common besides their code: tile, grid and arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..problem import INT32_LIMIT, Problem, WeightGradientProblem
from ..target import Target
from .arguments import geometry_arguments
from .boxes import box, pixels_spanned, unboxable
from .kernel import Kernel, ProductTile, cdiv
from .staging import partial_bytes


@dataclass(frozen=True)
class BoxedSumsTile(ProductTile):
    """BLOCK_M output by BLOCK_N input channels of one tap, BLOCK_K pixels a step, SPLITS partial sums."""

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages", "SPLITS"})

    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 64
    SPLITS: int = 1

    def taps_apart(self, problem: Problem) -> int:
        """Taps that have programs of their own."""
        return problem.geometry.taps

    def stored_bytes(self, problem: Problem, target: Target | None) -> int:
        return partial_bytes(problem, target)

    def sides(self, problem: Problem) -> dict[str, int]:
        """Those of the box of pixels that a step sums over."""
        return box(problem, self.BLOCK_K)


def _grid(problem: Problem, tile: BoxedSumsTile) -> int:
    g = problem.geometry
    tiles = cdiv(g.c_in_group, tile.BLOCK_N) * cdiv(g.c_out_group, tile.BLOCK_M)
    return tiles * tile.taps_apart(problem) * g.groups * tile.SPLITS


def _arguments(problem: Problem, tile: BoxedSumsTile) -> dict[str, object]:
    g = problem.geometry
    channels = dict(
        c_in_group=g.c_in_group,
        c_out_group=g.c_out_group,
        groups=g.groups,
        X_VECTOR=problem.x_vector(g.c_in_group),
        Y_VECTOR=problem.y_vector(g.c_out_group),
    )
    sides = tile.sides(problem)
    return geometry_arguments(problem, pixels_spanned(problem, sides)) | tile.sizes() | channels | sides


def boxed_sums(
    name: str,
    function: Any,
    tile_type: type[BoxedSumsTile],
    unsuited: Callable[[Problem], str | None] = lambda problem: None,
) -> Kernel:
    """The kernel of this code; `unsuited` says what it does not take of what boxes can be summed over for."""

    def why(problem: Problem) -> str | None:
        if not isinstance(problem, WeightGradientProblem):
            return "it is no weight gradient"
        g = problem.geometry
        if any(size < step for size, step in zip(g.in_size, g.stride, strict=True)):
            return f"the stride {g.stride} is larger than the input"
        steps = zip(g.stride, problem.x_strides[2:], strict=True)
        if max(stride * step for stride, step in steps) > INT32_LIMIT:
            return "pixels that a tap reads lie 2^31 elements apart"
        return unboxable(problem) or unsuited(problem)

    return Kernel(
        name=name,
        function=function,
        tile_type=tile_type,
        grid=_grid,
        arguments=_arguments,
        unsuited=why,
        safe_tile=tile_type(num_warps=4, num_stages=1, BLOCK_M=64, BLOCK_N=32, BLOCK_K=32),
        pointers=("x_ptr", "dy_ptr", "dw_ptr"),
        descriptors=True,
        channels_last_result=True,
    )
