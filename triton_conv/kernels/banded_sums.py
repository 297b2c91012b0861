"""What the banded weight gradients of depthwise convolutions have in common besides their code."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..problem import Problem, WeightGradientProblem
from .banded_rows import image_group
from .kernel import Tile, cdiv


@dataclass(frozen=True)
class BandedSumsTile(Tile):
    """BLOCK_M blocks of BLOCK_T outputs and BLOCK_K input columns of a row, ROWS output rows, FILTER_ROWS rows of the
    filter; STEPS groups of images, of each TILES tiles.
    """

    BLOCK_M: int = 64
    BLOCK_T: int = 32
    BLOCK_K: int = 32
    ROWS: int = 4
    FILTER_ROWS: int = 1
    TILES: int = 1
    STEPS: int = 1

    def columns(self, problem: Problem) -> int:
        """Input columns that a block reads."""
        raise NotImplementedError

    def parts(self, problem: Problem) -> int:
        return max(split_count(problem, self), 1)

    def mismatch(self, problem: Problem) -> str | None:
        depth, height, _ = problem.geometry.kernel
        if min(self.BLOCK_M, self.BLOCK_T, self.BLOCK_K) < 16:
            return "a product takes at least 16 of each dimension"
        if (need := self.columns(problem)) > self.BLOCK_K:
            return f"{self.BLOCK_T} outputs of a row read {need} columns, more than {self.BLOCK_K}"
        planes, rest = divmod(self.FILTER_ROWS, height)
        if planes > 0 and (depth % planes or (planes > 1 and rest)):
            return f"{self.FILTER_ROWS} rows are no whole part of a filter of {depth} x {height} rows"
        if (products := self.FILTER_ROWS * self.ROWS) > 64:
            return f"{products} products are too many to unroll"
        return None


def filter_rows(problem: Problem, tile: BandedSumsTile) -> dict[str, int]:
    """The filter rows of a program: DEPTH planes of HEIGHT rows each."""
    height = problem.geometry.kernel[1]
    return dict(HEIGHT=min(tile.FILTER_ROWS, height), DEPTH=max(tile.FILTER_ROWS // height, 1))


def _blocks(problem: Problem, tile: BandedSumsTile) -> int:
    """Blocks of an image."""
    g = problem.geometry
    return g.out_size[0] * cdiv(g.out_size[1], tile.ROWS) * cdiv(g.out_size[2], tile.BLOCK_T)


def images_of_tile(problem: Problem, tile: BandedSumsTile) -> int:
    """How many images share the blocks of a tile."""
    return image_group(problem.geometry.batch, _blocks(problem, tile), tile.BLOCK_M)


def split_count(problem: Problem, tile: BandedSumsTile) -> int:
    """How many partial sums there are: parts of the tiles of a group of images, by parts of the groups."""
    images = images_of_tile(problem, tile)
    tiles = cdiv(images * _blocks(problem, tile), tile.BLOCK_M)
    return cdiv(tiles, tile.TILES) * cdiv(problem.geometry.batch, tile.STEPS * images)


def filter_parts(problem: Problem, tile: BandedSumsTile) -> int:
    """In how many programs the rows of a filter are."""
    depth, height, _ = problem.geometry.kernel
    rows = filter_rows(problem, tile)
    return depth // rows["DEPTH"] * cdiv(height, rows["HEIGHT"])


def grid(problem: Problem, tile: BandedSumsTile) -> int:
    """Programs: of parts of the filter, channels and partial sums."""
    return filter_parts(problem, tile) * problem.geometry.c_out * split_count(problem, tile)


def unsuited(problem: Problem) -> str | None:
    """Why a problem is for neither, or None."""
    if not isinstance(problem, WeightGradientProblem):
        return "it is no weight gradient"
    g = problem.geometry
    if g.c_in_group != 1 or g.c_out_group != 1:
        return f"a group has {g.c_in_group} input and {g.c_out_group} output channels, not one each"
    if g.padding_mode != "zeros":
        return f"its border is {g.padding_mode}, not zero"
    if problem.x_strides[4] != 1:
        return "neighbouring pixels are not contiguous"
    if problem.dtype == torch.float64 or (problem.dtype == torch.float32 and problem.precision == "ieee"):
        return "tensor cores have no exact products of its dtype"
    return None
