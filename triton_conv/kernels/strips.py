"""What the depthwise forms share whose rows roll down the image: strips of columns, what a thread holds."""

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
from .common import tile_pixels, within
from .kernel import Tile, cdiv
from .patches import no_patches

# Of 255 registers a thread, some 30 are for addresses and masks. A step's products are all unrolled, and 700 of them
# take the compiler half a minute.
_MOST_REGISTERS = 224
_MOST_PRODUCTS = 512


@triton.constexpr_function
def width(COLS, STRIDE, KW, DIL):
    """Input columns that so many columns of outputs read."""
    return (COLS - 1) * STRIDE + (KW - 1) * DIL + 1


@triton.constexpr_function
def place(tap, column, KW, STRIDE_H, STRIDE_W, DIL_W, COLS):
    """Where, in what `load_rows` gives, the input lies that a tap joins to a strip's column."""
    row = tap // KW % STRIDE_H
    return row * width(COLS, STRIDE_W, KW, DIL_W) + column * STRIDE_W + tap % KW * DIL_W


@triton.jit
def take_strips(
    pid_p, x_channel, y_channel, channel_in, channel_out, mask_c, batch, w_in, w_out, stride_xn, stride_yn,
    STRIDE_XW: tl.constexpr, STRIDE_YW: tl.constexpr, STRIDE_W: tl.constexpr, PAD_W: tl.constexpr,
    X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, INDEX_INT64: tl.constexpr,
    COLS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """BLOCK_P strips: pointers to row 0 of their input and output [BLOCK_P, BLOCK_C], the input's first column, and how
    many columns from there each has left, which is all that masks one, in a single comparison with a constant.
    """
    first, image, _, _, w_o, mask_p = tile_pixels(pid_p, batch, 1, 1, tl.cdiv(w_out, COLS), 1, INDEX_INT64, BLOCK_P)
    w_o *= COLS
    w0 = w_o * STRIDE_W - PAD_W
    x_corner = tl.multiple_of(image * stride_xn + w0 * STRIDE_XW, X_VECTOR)
    y_corner = tl.multiple_of(image * stride_yn + w_o * STRIDE_YW, Y_VECTOR)
    x_strip = x_channel + first * stride_xn + (x_corner[:, None] + channel_in[None, :])
    y_strip = y_channel + first * stride_yn + (y_corner[:, None] + channel_out[None, :])
    mask = mask_p[:, None] & mask_c[None, :]
    x_inside = tl.where(mask, (w_in - w0)[:, None], 0)
    y_inside = tl.where(mask, (w_out - w_o)[:, None], 0)
    return x_strip, y_strip, w0[:, None], x_inside, y_inside


@triton.jit
def load_rows(
    x_strip, h, h_in, w0, x_inside, stride_xh, STRIDE_XW: tl.constexpr,
    KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_W: tl.constexpr, DIL_W: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """What strips read of STRIDE_H input rows from `h` on, zero outside the image: column by column, row by row."""
    tiles = ()
    for s in tl.static_range(STRIDE_H):
        inside = tl.where(within(h + s, h_in), x_inside, 0)
        x_row = x_strip + (h + s) * stride_xh
        for k in tl.static_range(width(COLS, STRIDE_W, KW, DIL_W)):
            mask = k < inside
            if k < PAD_W:
                mask = mask & (w0 >= -k)
            tiles += (tl.load(x_row + k * STRIDE_XW, mask=mask, other=0.0),)
    return tiles


@dataclass(frozen=True)
class RollingTile(Tile):
    """BLOCK_P strips of COLS columns by BLOCK_C channels, ROWS rows of each at a time."""

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages", "ROWS", "COLS"})

    ROWS: int = 28
    COLS: int = 7
    BLOCK_P: int = 4
    BLOCK_C: int = 64

    def accumulator_values(self) -> int:
        # Without the taps, which `unfit` counts.
        return self.BLOCK_P * self.BLOCK_C

    def load_bytes(self, problem: Problem, target: Target) -> int:
        values = self.BLOCK_P * self.BLOCK_C // (self.num_warps * target.warp_size)
        return min(max(values, 1) * problem.itemsize, 16)

    def on_the_way(self, problem: Problem) -> int:
        """Numbers of a channel that a thread has asked for and not yet converted."""
        return numbers_read(problem, self.COLS)

    def mismatch(self, problem: Problem) -> str | None:
        products = problem.geometry.taps * self.COLS
        return f"{products} products are too many to unroll" if products > _MOST_PRODUCTS else None

    def unfit(self, problem: Problem, target: Target) -> str | None:
        if reason := super().unfit(problem, target):
            return reason
        values = max(self.BLOCK_P * self.BLOCK_C // (self.num_warps * target.warp_size), 1)
        registers = _registers(problem, self.COLS, values, self.on_the_way(problem))
        if registers > _MOST_REGISTERS and not target.interpreted:
            return f"{registers} registers a thread for sums and weights"
        return None


def _registers(problem: Problem, columns: int, values: int, on_the_way: int) -> int:
    """Registers of a thread with so many values of a tile, of `columns` outputs each."""
    held = problem.geometry.taps + rows_alive(problem) * columns
    # Neighbouring channels are loaded together: two halves lie in one register.
    return (values * held * problem.accumulator_bytes + on_the_way * max(values * problem.itemsize, 4)) // 4


def rows_alive(problem: Problem) -> int:
    """Output rows that the input rows of a step belong to."""
    g = problem.geometry
    return cdiv(g.kernel[1], g.stride[1])


def numbers_read(problem: Problem, columns: int) -> int:
    """Input elements of a channel that so many columns of outputs read in a step."""
    g = problem.geometry
    wide = min((columns - 1) * g.stride[2] + g.extent[2], columns * g.kernel[2])
    return wide * min(g.stride[1], g.kernel[1])


def strip_blocks(problem: Problem, columns: int, block_p: int) -> int:
    """Blocks of so many strips of so many columns."""
    g = problem.geometry
    return cdiv(g.batch * cdiv(g.out_size[2], columns), block_p)


def arguments(problem: Problem, tile: RollingTile) -> dict[str, object]:
    """What both rolling kernels take."""
    g = problem.geometry
    return (
        geometry_arguments(problem, tile.BLOCK_P * tile.COLS * g.out_size[1])
        | tile.sizes()
        | dict(
            c_out=g.c_out,
            X_VECTOR=problem.x_vector(g.c_out, tile.BLOCK_C),
            Y_VECTOR=problem.y_vector(g.c_out, tile.BLOCK_C),
            STRIDE_XW=problem.x_strides[4],
            STRIDE_YW=problem.y_strides[4],
        )
    )


def not_rolling(problem: Problem) -> str | None:
    """Why the rows of a problem cannot roll past each other, or None."""
    g = problem.geometry
    if g.rank != 2:
        return f"its rank is {g.rank}, not 2"
    if g.dilation[1] > 1:
        return f"filter rows lie {g.dilation[1]} input rows apart"
    if _registers(problem, 1, 1, numbers_read(problem, 1)) > _MOST_REGISTERS:
        return f"{g.taps} taps do not fit in registers"
    return no_patches(problem, g.kernel[2])
