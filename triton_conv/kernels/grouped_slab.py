"""Grouped convolution, few channels a group: rows of slabs stay in registers, just as matrix units take them."""

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
from .arguments import geometry_arguments, weight_arguments
from .common import LAST_IS_FASTEST, activate, dot, is_read, load_spread, narrow, tap_at, tile_pixels, wide, within
from .kernel import Kernel, Tile, cdiv

# Of a warp's product on tensor cores: rows of the left operand, products a step of two instructions, and the channels
# of a step that a thread holds, 16 bytes of them.
_ROWS, _STEP, _VECTOR = 16, 32, 8
# Registers for weights: what is left beside the sums and the rows of a patch.
_MOST_WEIGHTS = 96


@triton.constexpr_function
def rows_before(row, ROWS, STRIDE, DIL, TAPS):
    """How many rows of a patch's input are read before this one."""
    return sum(is_read(above, ROWS, STRIDE, DIL, TAPS) for above in range(row))


@triton.jit
def grouped_slab_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, groups, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xd, stride_xh, stride_xw,
    stride_wg, stride_wn, stride_wk, stride_wd, stride_wh, stride_ww,
    stride_yn, stride_yd, stride_yh, stride_yw, stride_b,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, INDEX_INT64: tl.constexpr,
    C_IN_GROUP: tl.constexpr, C_OUT_GROUP: tl.constexpr, GROUPS_PER_TILE: tl.constexpr,
    HOP: tl.constexpr, POSITIONS: tl.constexpr, COLS: tl.constexpr,
    ROWS: tl.constexpr, SLABS: tl.constexpr, STEPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[p, n] = activation(sum_tap sum_k x_tap[p, k] W_tap[k, n] + b[n]) for SLABS slabs of GROUPS_PER_TILE groups.

    A patch is ROWS x COLS outputs of an image. Each row of its input is loaded once, POSITIONS columns HOP apart of a
    slab's channels, and multiplied by the weights of every output row that it belongs to: products of [COLS outputs x
    BLOCK_N channels, columns x BLOCK_K channels] by [columns x BLOCK_K channels, BLOCK_P patches]. Weights are zero
    where a tap or a group does not reach; they are put together once, and stay for STEPS tiles of patches.

    Which channel is which row or column of a product is free. Here a thread loads the eight channels of a pixel, and
    four neighbours the 32 that two instructions sum over, just as these hold them: nothing passes through shared memory
    on the way, in or out, and no warp waits for another. A warp has slabs of its own, side by side in memory.

    TRANSPOSED, of stride 1: the filter is mirrored, and PAD that of the forward convolution which this is.

    Grid: one axis of slabs (and, of wide ones, parts of their outputs) by tiles of patches, slabs fastest: together
    they read whole lines of memory. Grouped convolution: Xie et al., arXiv:1611.05431.
    """
    BLOCK_N: tl.constexpr = 16 // COLS
    VECTORS: tl.constexpr = BLOCK_K // 8
    SIDE: tl.constexpr = 4 // VECTORS
    PARTS: tl.constexpr = (POSITIONS + SIDE - 1) // SIDE
    TILES: tl.constexpr = BLOCK_P // 8
    SLAB_IN: tl.constexpr = GROUPS_PER_TILE * C_IN_GROUP
    SLAB_OUT: tl.constexpr = GROUPS_PER_TILE * C_OUT_GROUP
    TILES_N: tl.constexpr = (SLAB_OUT + BLOCK_N - 1) // BLOCK_N
    programs = tl.cdiv(tl.cdiv(groups, GROUPS_PER_TILE) * TILES_N, SLABS)
    patches_h = tl.cdiv(h_out, ROWS)
    patches_w = tl.cdiv(w_out, COLS)
    pid = tl.program_id(0)
    unit = pid % programs * SLABS + tl.arange(0, SLABS)
    slab = unit // TILES_N
    n_first = unit % TILES_N * BLOCK_N
    if INDEX_INT64:
        slab = slab.to(tl.int64)
        # A position's offset is a product of scalars.
        stride_xd, stride_xh, stride_xw = wide(stride_xd), wide(stride_xh), wide(stride_xw)
        stride_wd, stride_wh, stride_ww = wide(stride_wd), wide(stride_wh), wide(stride_ww)
        stride_yh, stride_yw = wide(stride_yh), wide(stride_yw)

    weights = ()
    for kd in tl.static_range(KD):
        for kh in tl.static_range(KH):
            for part in tl.static_range(PARTS):
                row = kd * stride_wd + kh * stride_wh
                if TRANSPOSED:
                    row = (KD - 1 - kd) * stride_wd + (KH - 1 - kh) * stride_wh
                weights += (
                    load_weights(
                        w_ptr + row, slab, n_first, groups, stride_wg, stride_wn, stride_wk, stride_ww, part * SIDE,
                        KW, STRIDE_W, DIL_W, TRANSPOSED, C_IN_GROUP, C_OUT_GROUP, GROUPS_PER_TILE, HOP,
                        SLABS, BLOCK_N, BLOCK_K,
                    ),
                )  # fmt: skip

    # A thread's row pairs are pairs of channels, which it stores at once: row i * 8 + g is channel g * 2 + i.
    start = tl.zeros((SLABS, 16, BLOCK_P), dtype=tl.float32)
    if HAS_BIAS:
        place = tl.arange(0, 16) % 8 * 2 + tl.arange(0, 16) // 8
        n = n_first[:, None] + (place % BLOCK_N)[None, :]
        channel = slab[:, None] * SLAB_OUT + n
        mask_b = (n < SLAB_OUT) & (channel < groups * C_OUT_GROUP)
        bias = tl.load(b_ptr + channel * stride_b, mask=mask_b, other=0.0)
        start += bias.to(tl.float32)[:, :, None]

    lane = tl.arange(0, 4)
    vector = lane % VECTORS * 8
    channel_in = slab[:, None] * SLAB_IN + vector[None, :]
    mask_in = (vector < SLAB_IN)[None, :] & (channel_in < groups * C_IN_GROUP)  # [SLABS, 4]
    x_channel = tl.multiple_of(channel_in, (8, 8))[:, :, None] + tl.arange(0, 8)[None, None, :]
    pair = tl.arange(0, 8) * 2
    n_out = n_first[:, None] + (pair % BLOCK_N)[None, :]
    channel_out = slab[:, None] * SLAB_OUT + n_out
    mask_out = (n_out < SLAB_OUT) & (channel_out < groups * C_OUT_GROUP)  # [SLABS, 8]
    y_channel = tl.multiple_of(channel_out, (2, 2))[:, :, None] + tl.arange(0, 2)[None, None, :]
    column_out = pair // BLOCK_N

    for step in range(STEPS):
        first, image, d_o, h_o, w_o, mask_p = tile_pixels(
            pid // programs * STEPS + step, batch, d_out, patches_h, patches_w, RANK, INDEX_INT64, BLOCK_P
        )
        h_o *= ROWS
        w_o *= COLS
        d0 = d_o * STRIDE_D - PAD_D
        h0 = h_o * STRIDE_H - PAD_H
        w0 = w_o * STRIDE_W - PAD_W
        corner = image * stride_xn + d0 * stride_xd + h0 * stride_xh + w0 * stride_xw
        corner = tl.reshape(corner, (TILES, 8))[:, :, None]
        w0 = tl.reshape(w0, (TILES, 8))[:, :, None]
        mask_x = tl.reshape(mask_p, (TILES, 8))[:, :, None]
        acc = ()
        for _ in tl.static_range(ROWS):
            acc += (start,)
        for kd in tl.static_range(KD):
            mask_plane = mask_x
            if RANK >= 3:
                mask_plane = mask_plane & tl.reshape(within(d0 + kd * DIL_D, d_in), (TILES, 8))[:, :, None]
            # All rows before the first product, so that their loads are under way together.
            rows = ()
            for h in tl.static_range((ROWS - 1) * STRIDE_H + (KH - 1) * DIL_H + 1):
                if is_read(h, ROWS, STRIDE_H, DIL_H, KH):
                    mask_row = mask_plane & tl.reshape(within(h0 + h, h_in), (TILES, 8))[:, :, None]
                    x_row = x_ptr + first * stride_xn + (kd * DIL_D * stride_xd + h * stride_xh)
                    for part in tl.static_range(PARTS):
                        position = part * SIDE + lane // VECTORS
                        mask = mask_row & within(w0 + (position * HOP)[None, None, :], w_in)
                        if PARTS * SIDE > POSITIONS:
                            mask = mask & (position < POSITIONS)[None, None, :]
                        pixel = tl.multiple_of(corner + (position * HOP * stride_xw)[None, None, :], (8, 8, 8))
                        tile = load_spread(
                            x_row + (pixel[:, None, :, :, None] + x_channel[None, :, None, :, :]),
                            mask[:, None, :, :, None] & mask_in[None, :, None, :, None],
                            (3, 2, 1, 0, 4),
                        )  # fmt: skip
                        # [tiles, slabs, patch, lane, step x half x 2] -> [slabs, step x half x lane x 2, tiles x patch]
                        tile = tl.permute(tl.reshape(tile, (TILES, SLABS, 8, 4, 4, 2)), (1, 4, 3, 5, 0, 2))
                        rows += (tl.reshape(tile, (SLABS, 32, BLOCK_P)),)
            for h in tl.static_range((ROWS - 1) * STRIDE_H + (KH - 1) * DIL_H + 1):
                for part in tl.static_range(PARTS):
                    new = ()
                    for i in tl.static_range(ROWS):
                        if tap_at(h, i, STRIDE_H, DIL_H, KH) >= 0:
                            new += (
                                dot(
                                    weights[(kd * KH + tap_at(h, i, STRIDE_H, DIL_H, KH)) * PARTS + part],
                                    rows[rows_before(h, ROWS, STRIDE_H, DIL_H, KH) * PARTS + part],
                                    acc[i], "ieee",
                                ),
                            )  # fmt: skip
                        else:
                            new += (acc[i],)
                    acc = new

        y_corner = image * stride_yn + d_o * stride_yd + h_o * stride_yh + w_o * stride_yw
        y_pixel = spread_patches(y_corner, TILES) + (column_out * stride_yw)[None, None, :, None]
        y_pixel = tl.multiple_of(y_pixel, (2, 2, 2, 2))[:, :, None, :, :, None]
        mask_y = spread_patches(mask_p, TILES) & (spread_patches(w_o, TILES) + column_out[None, None, :, None] < w_out)
        for i in tl.static_range(ROWS):
            mask = (mask_y & spread_patches(h_o + i < h_out, TILES))[:, :, None, :, :, None]
            mask = mask & mask_out[None, None, :, :, None, None]
            tile = narrow(activate(acc[i], ACTIVATION), y_ptr.dtype.element_ty)
            # [slabs, 2 x 8 pairs, tiles x 4 lanes x 2] -> [tiles, 2, slabs, pairs, lanes, 2]
            tile = tl.permute(tl.reshape(tile, (SLABS, 2, 8, TILES, 4, 2)), (3, 5, 0, 2, 4, 1))
            pointers = y_ptr + first * stride_yn + i * stride_yh + (y_pixel + y_channel[None, None, :, :, None, :])
            if LAST_IS_FASTEST:
                tl.store(pointers, tile, mask=mask)
            else:
                tl.store(
                    tl.permute(pointers, (4, 3, 2, 1, 0, 5)),
                    tl.permute(tile, (4, 3, 2, 1, 0, 5)),
                    mask=tl.permute(mask, (4, 3, 2, 1, 0, 5)),
                )


@triton.jit
def spread_patches(values, TILES: tl.constexpr):
    """One value a patch as [tiles, 2, 1, 4]: sums of a product's neighbouring columns are one thread's."""
    return tl.permute(tl.reshape(values, (TILES, 4, 2)), (0, 2, 1))[:, :, None, :]


@triton.jit
def load_weights(
    w_base, slab, n_first, groups, stride_wg, stride_wn, stride_wk, stride_ww,
    FIRST: tl.constexpr, KW: tl.constexpr, STRIDE_W: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr,
    C_IN_GROUP: tl.constexpr, C_OUT_GROUP: tl.constexpr, GROUPS_PER_TILE: tl.constexpr, HOP: tl.constexpr,
    SLABS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The weights of a filter row for the columns from the FIRST position on: [slabs, 16, 32].

    Row i * 8 + g is output g * 2 + i, of BLOCK_N channels by columns of a patch; column r * 8 + lane * 2 + e is element
    r * 2 + e of what a thread loaded.
    """
    VECTORS: tl.constexpr = BLOCK_K // 8
    i = tl.arange(0, 2)[:, None, None, None, None, None]
    r = tl.arange(0, 4)[None, :, None, None, None, None]
    e = tl.arange(0, 2)[None, None, :, None, None, None]
    g = tl.arange(0, 8)[None, None, None, None, :, None]
    lane = tl.arange(0, 4)[None, None, None, None, None, :]
    output = g * 2 + i
    k = lane % VECTORS * 8 + r * 2 + e
    n = n_first[None, None, None, :, None, None] + output % BLOCK_N
    group = slab[None, None, None, :, None, None] * GROUPS_PER_TILE + n // C_OUT_GROUP
    ahead = (FIRST + lane // VECTORS) * HOP - output // BLOCK_N * STRIDE_W
    kw = ahead // DIL_W
    mask = (ahead >= 0) & (kw * DIL_W == ahead) & (kw < KW)
    mask = mask & (n < GROUPS_PER_TILE * C_OUT_GROUP) & (k // C_IN_GROUP == n // C_OUT_GROUP) & (group < groups)
    if TRANSPOSED:
        kw = KW - 1 - kw
    offset = group * stride_wg + n % C_OUT_GROUP * stride_wn + k % C_IN_GROUP * stride_wk + kw * stride_ww
    # Without a vector, which would come between the threads and the places where they need their elements.
    offset = tl.max_contiguous(offset, (1, 1, 1, 1, 1, 1))
    tile = load_spread(w_base + offset, mask, (5, 4, 3, 2, 1, 0))
    return tl.reshape(tl.permute(tile, (3, 0, 4, 1, 5, 2)), (SLABS, 16, 32))


@dataclass(frozen=True)
class GroupedSlabTile(Tile):
    """SLABS slabs of as many whole groups as fit in BLOCK_K channels by BLOCK_P patches of ROWS rows, STEPS times."""

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages", "ROWS"})

    ROWS: int = 4
    SLABS: int = 4
    STEPS: int = 8
    BLOCK_P: int = 8
    BLOCK_K: int = 8

    def groups_per_tile(self, problem: Problem) -> int:
        """As many as begin at whole vectors of the input, and at pairs of outputs."""
        g = problem.geometry
        least = math.lcm(_VECTOR // math.gcd(g.c_in_group, _VECTOR), 2 // math.gcd(g.c_out_group, 2))
        return min(self.BLOCK_K // max(g.c_in_group, 1), g.groups) // least * least

    def cols(self, problem: Problem) -> int:
        """Columns of a patch: two where a slab's outputs fill no more than half of a product's rows."""
        return 2 if 2 * self.groups_per_tile(problem) * problem.geometry.c_out_group <= _ROWS else 1

    def hop(self, problem: Problem) -> int:
        """Input columns from one that a patch reads to the next."""
        g = problem.geometry
        return g.dilation[2] if self.cols(problem) == 1 else math.gcd(g.stride[2], g.dilation[2])

    def positions(self, problem: Problem) -> int:
        """Input columns that a patch reads."""
        g = problem.geometry
        return ((self.cols(problem) - 1) * g.stride[2] + g.extent[2] - 1) // self.hop(problem) + 1

    def products(self, problem: Problem) -> int:
        """Products of an input row of a patch with a filter row."""
        return cdiv(self.positions(problem) * self.BLOCK_K, _STEP)

    def weight_registers(self, problem: Problem) -> int:
        """Registers of a thread for weights, two to a register."""
        depth, height, _ = problem.geometry.kernel
        return depth * height * self.products(problem) * self.SLABS // self.num_warps * _ROWS * _STEP // 64

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        # A bound, should an operand or a row of sums change its layout: as compiled, none does.
        operand = _STEP * max(_ROWS, self.BLOCK_P) * problem.itemsize
        return self.SLABS * max(operand, _ROWS * self.BLOCK_P * problem.accumulator_bytes)

    def accumulator_values(self) -> int:
        return self.SLABS * _ROWS * self.BLOCK_P * self.ROWS

    def mismatch(self, problem: Problem) -> str | None:
        g = problem.geometry
        if self.groups_per_tile(problem) < 1:
            return f"no groups of {g.c_in_group} to {g.c_out_group} channels are whole vectors of {self.BLOCK_K}"
        if self.BLOCK_K not in (8, 16, 32) or self.BLOCK_P < 8:
            return f"a product has 8, 16 or 32 channels of 8 patches, not {self.BLOCK_K} of {self.BLOCK_P}"
        if self.num_warps > self.SLABS:
            return f"{self.SLABS} slabs are not one for each of {self.num_warps} warps"
        weights = self.weight_registers(problem)
        return f"weights of {g.taps} taps take {weights} registers" if weights > _MOST_WEIGHTS else None

    def unfit(self, problem: Problem, target: Target) -> str | None:
        if reason := super().unfit(problem, target):
            return reason
        g = problem.geometry
        rows = (self.ROWS - 1) * g.stride[1] + g.extent[1]
        loaded = rows * self.products(problem) * self.SLABS * self.BLOCK_P * _STEP // 2
        threads = self.num_warps * target.warp_size
        registers = (self.accumulator_values() + loaded) // threads + self.weight_registers(problem)
        if registers > 200 and not target.interpreted:
            return f"{registers} registers a thread for weights, rows and sums"
        return None


def narrowest(problem: Problem) -> GroupedSlabTile:
    """One warp's tile with slabs as narrow as groups allow."""
    tiles = [GroupedSlabTile(num_warps=1, ROWS=1, SLABS=1, STEPS=1, BLOCK_K=size) for size in (8, 16, 32)]
    return next((tile for tile in tiles if tile.groups_per_tile(problem)), tiles[-1])


def _grid(problem: Problem, tile: GroupedSlabTile) -> int:
    g = problem.geometry
    d, h, w = g.out_size
    packed, cols = tile.groups_per_tile(problem), tile.cols(problem)
    units = cdiv(g.groups, packed) * cdiv(packed * g.c_out_group, _ROWS // cols)
    patches = g.batch * d * cdiv(h, tile.ROWS) * cdiv(w, cols)
    return cdiv(units, tile.SLABS) * cdiv(patches, tile.BLOCK_P * tile.STEPS)


def _arguments(problem: Problem, tile: GroupedSlabTile) -> dict[str, object]:
    g = problem.geometry
    flipped = g.flipped() if g.transposed else g
    assert flipped is not None
    cols = tile.cols(problem)
    arguments = geometry_arguments(problem, tile.BLOCK_P * tile.ROWS * cols) | weight_arguments(problem) | tile.sizes()
    arguments |= {f"PAD_{axis}": pad for axis, pad in zip("DHW", flipped.pad_before, strict=True)}
    return arguments | dict(
        C_IN_GROUP=g.c_in_group,
        C_OUT_GROUP=g.c_out_group,
        GROUPS_PER_TILE=tile.groups_per_tile(problem),
        HOP=tile.hop(problem),
        POSITIONS=tile.positions(problem),
        COLS=cols,
    )


def _unsuited(problem: Problem) -> str | None:
    g = problem.geometry
    if isinstance(problem, WeightGradientProblem):
        return "it is a weight gradient"
    if problem.itemsize != 2:
        return "only 16-bit numbers are held as matrix units take them"
    if g.groups == 1 or g.c_in_group == 0:
        return "there are no groups to pack"
    if g.padding_mode != "zeros":
        return f"its border is {g.padding_mode}, not zero"
    if g.transposed and g.flipped() is None:
        return "it is transposed, with a stride or more padding than its filter reaches"
    if problem.x_vector(g.c_in) < _VECTOR or problem.y_vector(g.c_out) < 2:
        return "its channels are not contiguous, in whole vectors of 16 bytes"
    return narrowest(problem).mismatch(problem)


KERNEL = Kernel(
    name="grouped_slab",
    function=grouped_slab_kernel,
    tile_type=GroupedSlabTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=GroupedSlabTile(num_warps=1, num_stages=1, ROWS=1, SLABS=1, STEPS=1, BLOCK_K=32),
    fragments=True,
)
