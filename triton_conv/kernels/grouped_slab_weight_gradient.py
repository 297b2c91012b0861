"""Weight gradient of a grouped convolution, few channels a group: rows of slabs roll past each other in registers."""

# Device code grows tuples, whose every length is another type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ..problem import Problem, WeightGradientProblem
from ..target import Target
from .arguments import geometry_arguments
from .common import dot, load_spread, narrow, tile_pixels, wide, within
from .kernel import Kernel, Tile, cdiv

# Channels of a slab, and of a vector of 16 bytes; strips that an instruction sums over.
_SLAB, _VECTOR, _STRIPS = 16, 8, 16
# Registers of a thread that are left beside addresses and masks.
_MOST_REGISTERS = 216


@triton.jit
def grouped_slab_weight_gradient_kernel(
    x_ptr, dy_ptr, dw_ptr,
    batch, groups, h_in, w_in, h_out, w_out, stride_xn, stride_xh, stride_yn, stride_yh,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_W: tl.constexpr, INDEX_INT64: tl.constexpr,
    STRIDE_XW: tl.constexpr, STRIDE_YW: tl.constexpr,
    C_IN_GROUP: tl.constexpr, C_OUT_GROUP: tl.constexpr, GROUPS_PER_TILE: tl.constexpr, HOP: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SLABS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dw[split, n, tap, c] = sum over the split's pixels m of dy[m, n] x_tap[m, c], for SLABS slabs of GROUPS_PER_TILE
    groups, of rank 1 or 2. Partial sums are float32, channels innermost; the caller adds them up in a fixed order.

    A strip is COLS columns of an image's outputs. BLOCK_P of them go down together: each step loads STRIDE_H input rows
    and one row of the output's gradient, each element once, and multiplies them with the ALIVE rows of the gradient
    that they belong to, which stay in registers beside the sums of all taps. Input rows count for their steps alone, so
    that segments of ROWS steps share no products; each begins with the rows of the gradient that are alive before it.

    A product sums over one column of BLOCK_P strips, [16 outputs x strips] by [strips x 16 inputs], of which the block
    diagonal is stored: a tap is a pair of columns, and none is loaded or shifted for it. Matrix units take pairs of
    neighbours along what is summed over, strips, where memory has channels: `turn_row` multiplies a column with ones,
    and its sums stand as the next product takes them. No row passes through shared memory, and no warp waits for
    another; each has slabs of its own, side by side in memory.

    Beside the ones are zeros: an infinity or NaN of either tensor makes NaN of all channels of its slab, in all taps
    that its row meets, those among them that join it to rows of the gradient that do not exist.

    Grid: one axis of SPLITS x cdiv(slabs, SLABS) programs, slabs fastest: together they read whole lines of memory. A
    program takes every SPLITS-th of the segments of BLOCK_P strips. Grouped convolution: Xie et al., arXiv:1611.05431.
    """
    ALIVE: tl.constexpr = (KH + STRIDE_H - 1) // STRIDE_H
    WIDTH: tl.constexpr = ((COLS - 1) * STRIDE_W + (KW - 1) * DIL_W) // HOP + 1
    TILES: tl.constexpr = BLOCK_P // 8
    SLAB_IN: tl.constexpr = GROUPS_PER_TILE * C_IN_GROUP
    SLAB_OUT: tl.constexpr = GROUPS_PER_TILE * C_OUT_GROUP
    programs = tl.cdiv(tl.cdiv(groups, GROUPS_PER_TILE), SLABS)
    pid = tl.program_id(0)
    slab = pid % programs * SLABS + tl.arange(0, SLABS)
    split = pid // programs
    if INDEX_INT64:
        slab = slab.to(tl.int64)
        stride_xh, stride_yh = wide(stride_xh), wide(stride_yh)

    # A thread loads a vector of a strip's column; of four neighbours two have one column's, and two the next one's.
    lane = tl.arange(0, 4)
    side = lane // 2
    vector = lane % 2 * 8
    channel_in = slab[:, None] * SLAB_IN + vector[None, :]
    channel_out = slab[:, None] * SLAB_OUT + vector[None, :]
    mask_in = (vector < SLAB_IN)[None, :] & (channel_in < groups * C_IN_GROUP)  # [SLABS, 4]
    mask_out = (vector < SLAB_OUT)[None, :] & (channel_out < groups * C_OUT_GROUP)
    x_channel = tl.multiple_of(channel_in + (side * HOP * STRIDE_XW)[None, :], (8, 8))
    y_channel = tl.multiple_of(channel_out + (side * STRIDE_YW)[None, :], (8, 8))

    zero = tl.zeros((SLABS, 16, 16), dtype=tl.float32)
    sums = ()
    for _ in tl.static_range(KH * KW):
        sums += (zero,)
    begin = PAD_H // STRIDE_H
    end = tl.minimum(h_out + ALIVE - 1, tl.cdiv(h_in + PAD_H, STRIDE_H))
    segments = tl.cdiv(tl.maximum(end - begin, 0), ROWS)
    items = tl.cdiv(batch * tl.cdiv(w_out, COLS), BLOCK_P) * segments
    for turn in range(tl.cdiv(tl.maximum(items - split, 0), SPLITS)):
        item = split + turn * SPLITS
        image0, image, _d, _h, w_o, mask_p = tile_pixels(
            item // segments, batch, 1, 1, tl.cdiv(w_out, COLS), 1, INDEX_INT64, BLOCK_P
        )
        w_o *= COLS
        w0 = w_o * STRIDE_W - PAD_W
        x_strip = strips(x_ptr + image0 * stride_xn, image * stride_xn + w0 * STRIDE_XW, x_channel, TILES)
        y_strip = strips(dy_ptr + image0 * stride_yn, image * stride_yn + w_o * STRIDE_YW, y_channel, TILES)
        # Far outside where a strip does not exist.
        x_column = columns(tl.where(mask_p, w0, -(2**30)), side * HOP, mask_in, TILES, SLABS)
        y_column = columns(tl.where(mask_p, w_o, -(2**30)), side, mask_out, TILES, SLABS)
        first = begin + item % segments * ROWS
        older = ()
        for age in tl.static_range(1, ALIVE):
            loaded = load_row(y_strip, y_column, first - age, h_out, w_out, stride_yh, STRIDE_YW, 1, COLS)
            older += turn_row(loaded, COLS, TILES, SLABS)
        for step in range(first, tl.minimum(first + ROWS, end)):
            # All loads before the first product, so that they are under way together.
            rows = ()
            for s in tl.static_range(STRIDE_H):
                h = step * STRIDE_H + (s - PAD_H)
                rows += (load_row(x_strip, x_column, h, h_in, w_in, stride_xh, STRIDE_XW, HOP, WIDTH),)
            loaded = load_row(y_strip, y_column, step, h_out, w_out, stride_yh, STRIDE_YW, 1, COLS)
            alive = turn_row(loaded, COLS, TILES, SLABS) + older
            for s in tl.static_range(STRIDE_H):
                row = turn_row(rows[s], WIDTH, TILES, SLABS)
                for j in tl.static_range(COLS):
                    new = ()
                    for tap in tl.static_range(KH * KW):
                        if tap // KW % STRIDE_H == s:
                            x_tile = row[(j * STRIDE_W + tap % KW * DIL_W) // HOP]
                            dy_tile = alive[tap // KW // STRIDE_H * COLS + j]
                            new += (dot(dy_tile, tl.permute(x_tile, (0, 2, 1)), sums[tap], "ieee"),)
                        else:
                            new += (sums[tap],)
                    sums = new
            older = alive[: (ALIVE - 1) * COLS]

    # The channels as `turn_row` leaves them.
    order = tl.arange(0, 16) // 4 % 2 * 8 + tl.arange(0, 16) // 8 * 4 + tl.arange(0, 16) % 4
    m = order[None, :, None]
    n = order[None, None, :]
    channel = slab[:, None, None] * SLAB_OUT + m
    mask = (m < SLAB_OUT) & (n < SLAB_IN) & (m // C_OUT_GROUP == n // C_IN_GROUP) & (channel < groups * C_OUT_GROUP)
    place = (channel * (KH * KW * C_IN_GROUP) + n % C_IN_GROUP).to(tl.int64)
    dw_base = dw_ptr + tl.cast(split, tl.int64) * groups * (C_OUT_GROUP * C_IN_GROUP * KH * KW)
    for tap in tl.static_range(KH * KW):
        tl.store(dw_base + place + tap * C_IN_GROUP, sums[tap], mask=mask)


@triton.jit
def strips(base, corner, channel, TILES: tl.constexpr):
    """Pointers to a vector of row 0 of each strip: [tiles, slabs, 8, 4, 8]."""
    corner = tl.multiple_of(tl.reshape(corner, (TILES, 8)), (8, 8))[:, None, :, None, None]
    return base + (corner + channel[None, :, None, :, None]) + tl.arange(0, 8)[None, None, None, None, :]


@triton.jit
def columns(w, side, mask, TILES: tl.constexpr, SLABS: tl.constexpr):
    """The column of each vector, far outside where there is none: [tiles, slabs, 8, 4, 1]."""
    w = tl.reshape(w, (TILES, 8))[:, None, :, None] + side[None, None, None, :]
    return tl.where(mask[None, :, None, :], w, -(2**30))[:, :, :, :, None]


@triton.jit
def load_row(
    strip, column, h, height, width, stride_h, STRIDE_W: tl.constexpr, HOP: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Row `h` of strips, WIDTH columns HOP apart, two at a time, zero outside: each [tiles, slabs, 8, 4, 8]."""
    found = ()
    for pair in tl.static_range((WIDTH + 1) // 2):
        mask = within(column + pair * 2 * HOP, width) & within(h, height)
        place = h * stride_h + pair * 2 * HOP * STRIDE_W
        found += (load_spread(strip + place, mask, (3, 2, 1, 0, 4)),)
    return found


@triton.jit
def turn_row(pairs, WIDTH: tl.constexpr, TILES: tl.constexpr, SLABS: tl.constexpr):
    """The columns of pairs that `load_row` gave, each [slabs, 16 channels, strips], neighbouring strips a thread's: a
    product with ones, which is exact. Of both vectors' channels the lower halves come first.
    """
    m = tl.arange(0, 16)[None, :, None]
    k = tl.arange(0, 16)[None, None, :]
    same = k // 4 % 2 * 8 + k // 2 % 2 * 4 + k // 8 * 2 + k % 2 == m
    pick = tl.broadcast_to(tl.where(same, 1.0, 0.0), (2 * SLABS, 16, 16)).to(pairs[0].dtype)
    zero = tl.zeros((2 * SLABS, 16, TILES * 8), dtype=tl.float32)
    found = ()
    for pair in tl.static_range((WIDTH + 1) // 2):
        # [tiles, slabs, strip, lane, half x 2 x 2] -> [half x slabs, 2 x lane x 2, tiles x strip]
        tile = tl.permute(tl.reshape(pairs[pair], (TILES, SLABS, 8, 4, 2, 2, 2)), (4, 1, 5, 3, 6, 0, 2))
        tile = tl.reshape(tile, (2 * SLABS, 16, TILES * 8))
        tile = narrow(dot(pick, tile, zero, "ieee"), pairs[0].dtype)
        # [half x slabs, column x 8, strips] -> [slabs, half x 8, strips] of each column
        tile = tl.permute(tl.reshape(tile, (2, SLABS, 2, 8, TILES * 8)), (1, 0, 3, 4, 2))
        found += tl.split(tl.reshape(tile, (SLABS, 16, TILES * 8, 2)))
    return found[:WIDTH]


@dataclass(frozen=True)
class GroupedSlabWeightGradientTile(Tile):
    """SLABS slabs of as many whole groups as fit in 16 channels by BLOCK_P strips of COLS columns, in segments of ROWS
    steps; SPLITS partial sums.
    """

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages", "ROWS", "COLS", "SPLITS"})

    ROWS: int = 28
    COLS: int = 4
    SLABS: int = 4
    BLOCK_P: int = 16
    SPLITS: int = 1

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        # A bound, should a row of sums change its layout: as compiled, none does.
        return self.SLABS * _SLAB * max(_SLAB, self.BLOCK_P) * problem.accumulator_bytes

    def accumulator_values(self) -> int:
        # Without the taps, which `registers` counts.
        return self.SLABS * _SLAB * _SLAB

    def registers(self, problem: Problem) -> int:
        """Of a warp's thread: sums of all taps, columns of both tensors that are alive or on their way."""
        g = problem.geometry
        alive = cdiv(g.kernel[1], g.stride[1]) * self.COLS
        columns = alive + 2 * width(problem, self.COLS) + self.COLS
        slabs = self.SLABS // self.num_warps
        return slabs * (g.taps * _SLAB * _SLAB + columns * _SLAB * self.BLOCK_P // 2) // 32

    def mismatch(self, problem: Problem) -> str | None:
        if self.BLOCK_P < _STRIPS:
            return f"a product sums over 16 strips, not {self.BLOCK_P}"
        if self.num_warps > self.SLABS:
            return f"{self.SLABS} slabs are not one for each of {self.num_warps} warps"
        return None

    def unfit(self, problem: Problem, target: Target) -> str | None:
        if reason := super().unfit(problem, target):
            return reason
        registers = self.registers(problem)
        if registers > _MOST_REGISTERS and not target.interpreted:
            return f"{registers} registers a thread for sums and columns"
        return None


def groups_per_slab(problem: Problem) -> int:
    """As many as fit, beginning at whole vectors of both tensors."""
    g = problem.geometry
    least = math.lcm(*(_VECTOR // math.gcd(size, _VECTOR) for size in (g.c_in_group, g.c_out_group)))
    return min(_SLAB // max(g.c_in_group, g.c_out_group, 1), g.groups) // least * least


def hop(problem: Problem) -> int:
    """Input columns from one that a strip reads to the next."""
    g = problem.geometry
    return math.gcd(g.stride[2], g.dilation[2])


def width(problem: Problem, columns: int) -> int:
    """Input columns that so many columns of outputs read."""
    g = problem.geometry
    return ((columns - 1) * g.stride[2] + g.extent[2] - 1) // hop(problem) + 1


def steps(problem: Problem) -> int:
    """Steps down an image, each of a stride's input rows."""
    g = problem.geometry
    alive = cdiv(g.kernel[1], g.stride[1])
    end = min(g.out_size[1] + alive - 1, cdiv(g.in_size[1] + g.pad_before[1], g.stride[1]))
    return max(end - g.pad_before[1] // g.stride[1], 0)


def _grid(problem: Problem, tile: GroupedSlabWeightGradientTile) -> int:
    return cdiv(cdiv(problem.geometry.groups, groups_per_slab(problem)), tile.SLABS) * tile.SPLITS


def _arguments(problem: Problem, tile: GroupedSlabWeightGradientTile) -> dict[str, object]:
    g = problem.geometry
    return (
        geometry_arguments(problem, tile.BLOCK_P * tile.COLS * g.out_size[1])
        | tile.sizes()
        | dict(
            groups=g.groups,
            C_IN_GROUP=g.c_in_group,
            C_OUT_GROUP=g.c_out_group,
            GROUPS_PER_TILE=groups_per_slab(problem),
            HOP=hop(problem),
            STRIDE_XW=problem.x_strides[4],
            STRIDE_YW=problem.y_strides[4],
        )
    )


def _unsuited(problem: Problem) -> str | None:
    g = problem.geometry
    if not isinstance(problem, WeightGradientProblem):
        return "it is no weight gradient"
    if problem.itemsize != 2:
        return "only 16-bit numbers are held as matrix units take them"
    if g.rank > 2:
        return f"its rank is {g.rank}, not 1 or 2"
    if g.groups == 1 or g.c_in_group == 0:
        return "there are no groups to pack"
    if g.padding_mode != "zeros":
        return f"its border is {g.padding_mode}, not zero"
    if g.dilation[1] > 1:
        return f"filter rows lie {g.dilation[1]} input rows apart"
    if not groups_per_slab(problem):
        return f"no groups of {g.c_in_group} to {g.c_out_group} channels are whole vectors of 16 channels"
    if problem.x_vector(g.c_in) < _VECTOR or problem.y_vector(g.c_out) < _VECTOR:
        return "its channels are not contiguous, in whole vectors of 16 bytes"
    least = GroupedSlabWeightGradientTile(num_warps=1, COLS=1, SLABS=1).registers(problem)
    return f"{g.taps} taps do not fit in registers" if least > _MOST_REGISTERS else None


KERNEL = Kernel(
    name="grouped_slab_weight_gradient",
    function=grouped_slab_weight_gradient_kernel,
    tile_type=GroupedSlabWeightGradientTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=GroupedSlabWeightGradientTile(num_warps=1, num_stages=1, ROWS=16, COLS=1, SLABS=1),
    pointers=("x_ptr", "dy_ptr", "dw_ptr"),
    channels_last_result=True,
    fragments=True,
)
