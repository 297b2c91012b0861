"""What the depthwise forms share whose patches roll down the depth, or the height: input rows, what a thread holds."""

# Device code grows tuples, whose every length is another type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ..problem import Problem
from ..target import Target
from .arguments import geometry_arguments
from .banded_rows import no_rows_of_pixels
from .common import aligned, within
from .kernel import Tile, cdiv
from .windows import elements

# Of 255 registers a thread, some 60 are for addresses, masks and elements of a row. All products of a step are
# unrolled: of 864 the compiler makes code in six seconds.
_MOST_REGISTERS = 192
_MOST_PRODUCTS = 896


@triton.constexpr_function
def pieces(first, count, VECTOR):
    """So many columns from the `first` one on, cut into the widest vectors that are aligned: (column, length) each."""
    found = []
    while count > 0:
        length = VECTOR
        while first % length or length > count:
            length //= 2
        found.append((first, length))
        first, count = first + length, count - length
    return found


@triton.constexpr_function
def piece_count(first, count, VECTOR):
    """How many they are."""
    return len(pieces(first, count, VECTOR))


@triton.constexpr_function
def piece_at(i, first, count, VECTOR):
    """Where the i-th of them begins."""
    return pieces(first, count, VECTOR)[i][0]


@triton.constexpr_function
def piece_length(i, first, count, VECTOR):
    """Its length."""
    return pieces(first, count, VECTOR)[i][1]


@triton.jit
def load_planes(
    x_patch, d, d_in, h_first, h_in, w_first, x_inside, stride_xd, stride_xh,
    DEPTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PAD_W: tl.constexpr, X_VECTOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """What patches read of DEPTH input planes from `d` on, zero outside the image: element by element, row by row."""
    tiles = ()
    for s in tl.static_range(DEPTH):
        inside_d = tl.where(within(d + s, d_in), x_inside, 0)
        x_plane = x_patch + aligned((d + s) * stride_xd, X_VECTOR)
        for h in tl.static_range(HEIGHT):
            inside = tl.where(within(h_first + h, h_in), inside_d, 0)
            x_row = x_plane + aligned(h * stride_xh, X_VECTOR)
            for i in tl.static_range(piece_count(-PAD_W, WIDTH, X_VECTOR)):
                tiles += load_piece(
                    x_row, w_first, inside, PAD_W,
                    piece_at(i, -PAD_W, WIDTH, X_VECTOR), piece_length(i, -PAD_W, WIDTH, X_VECTOR), BLOCK_P,
                )  # fmt: skip
    return tiles


@triton.jit
def load_piece(
    x_row, w_first, inside, PAD_W: tl.constexpr, FIRST: tl.constexpr, LENGTH: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """LENGTH columns of an input row from FIRST on: an image ends where such a vector does, so that one truth holds for
    all. `inside` columns are left of the image, counted from the first one that the patch reads.
    """
    mask = inside > FIRST + PAD_W
    if FIRST < 0:
        mask = mask & (w_first >= -FIRST)
    vectors = tl.load(x_row + (FIRST + tl.arange(0, LENGTH)[None, None, :]), mask=mask, other=0.0)
    return elements(vectors, BLOCK_P, 1, LENGTH)


@dataclass(frozen=True)
class RollingPatchTile(Tile):
    """BLOCK_P patches of ROWS x COLS outputs, PLANES planes of each: a patch for each thread."""

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages", "PLANES", "ROWS", "COLS"})

    PLANES: int = 32
    ROWS: int = 2
    COLS: int = 8
    BLOCK_P: int = 64

    def accumulator_values(self) -> int:
        # Without the planes and the taps, which `unfit` counts.
        return self.BLOCK_P * self.ROWS * self.COLS

    def load_bytes(self, problem: Problem, target: Target) -> int:
        return x_vector(problem, self) * problem.itemsize

    def products(self, problem: Problem) -> int:
        """Products of a patch in a trip of the loop."""
        return problem.geometry.taps * self.ROWS * self.COLS

    def held(self, problem: Problem) -> int:
        """Registers of a patch: for what rolls past, what stays, and what a trip loads."""
        g = problem.geometry
        depth, _ = walked(problem)
        rolling = cdiv(g.kernel[depth], g.stride[depth]) * self.ROWS * self.COLS
        row = sum(max(length * problem.itemsize, 4) for length in row_pieces(problem, self))
        return ((rolling + g.taps) * problem.accumulator_bytes + rows_read(problem, self) * row) // 4

    def mismatch(self, problem: Problem) -> str | None:
        products = self.products(problem)
        return f"{products} products are too many to unroll" if products > _MOST_PRODUCTS else None

    def unfit(self, problem: Problem, target: Target) -> str | None:
        if reason := super().unfit(problem, target):
            return reason
        patches = cdiv(self.BLOCK_P, self.num_warps * target.warp_size)
        registers = patches * self.held(problem)
        if registers > _MOST_REGISTERS and not target.interpreted:
            return f"{registers} registers a thread for sums, weights and rows"
        return None


def walked(problem: Problem) -> tuple[int, int]:
    """The axis along which patches roll, and the one along which they have rows."""
    return (0, 1) if problem.geometry.rank == 3 else (1, 0)


def row_pieces(problem: Problem, tile: RollingPatchTile) -> list[int]:
    """Lengths of the vectors as which a patch's row of input is loaded."""
    g = problem.geometry
    columns = (tile.COLS - 1) * g.stride[2] + g.extent[2]
    return [length for _, length in pieces(-g.pad_before[2], columns, x_vector(problem, tile))]


def rows_read(problem: Problem, tile: RollingPatchTile) -> int:
    """Rows of the input that a patch reads in a step."""
    g = problem.geometry
    depth, height = walked(problem)
    return g.stride[depth] * ((tile.ROWS - 1) * g.stride[height] + g.extent[height])


def x_vector(problem: Problem, tile: RollingPatchTile) -> int:
    """Elements of the input's rows that a patch reads at once."""
    return problem.x_run(16 // problem.itemsize, tile.COLS * problem.geometry.stride[2])


# What of an image's depth and height changes places where the height is walked along.
_LOWER = ("{}_in", "{}_out", "stride_x{}", "stride_y{}", "stride_w{}")
_UPPER = ("K{}", "STRIDE_{}", "PAD_{}", "DIL_{}")
_TURNED = {form.format(a): form.format(b) for form in _LOWER for a, b in ("dh", "hd")} | {
    form.format(a): form.format(b) for form in _UPPER for a, b in ("DH", "HD")
}


def arguments(problem: Problem, tile: RollingPatchTile, block: int) -> dict[str, object]:
    """What both kernels take, of tiles that see `block` pixels."""
    common = geometry_arguments(problem, block)
    if walked(problem)[0] == 1:
        common = {_TURNED.get(name, name): value for name, value in common.items()}
    return (
        common
        | tile.sizes()
        | dict(
            c_out=problem.geometry.c_out,
            MULTIPLIER=problem.geometry.c_out_group,
            X_VECTOR=x_vector(problem, tile),
            Y_VECTOR=problem.y_run(16 // problem.itemsize, tile.COLS),
        )
    )


def not_rolling(problem: Problem, least: RollingPatchTile) -> str | None:
    """Why the patches of a problem cannot roll, of which `least` holds the fewest registers, or None."""
    g = problem.geometry
    if reason := no_rows_of_pixels(problem):
        return reason
    if g.rank == 1:
        return "its rank is 1: there is nothing to walk along but a row"
    if (apart := g.dilation[walked(problem)[0]]) > 1:
        what = "planes" if g.rank == 3 else "rows"
        return f"filter {what} lie {apart} input {what} apart"
    if least.held(problem) > _MOST_REGISTERS:
        return f"{g.taps} taps do not fit in registers"
    return None
