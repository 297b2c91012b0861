"""Weight gradient of a grouped convolution with few channels a group: several groups and taps share one product."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import INT32_LIMIT, Problem, WeightGradientProblem
from ..target import Target
from .arguments import geometry_arguments
from .common import aligned, dot, load_turned, next_tile, tap_offset, tile_digits, tile_pixels, wide
from .kernel import Kernel, Tile, cdiv
from .staging import Operand, partial_bytes, staged_bytes


@triton.jit
def grouped_packed_weight_gradient_kernel(
    x_ptr, dy_ptr, dw_ptr,
    batch, c_in, c_out, d_in, h_in, w_in, d_out, h_out, w_out, rows, row_first,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PADDING_MODE: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr, X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    C_IN_GROUP: tl.constexpr, C_OUT_GROUP: tl.constexpr, GROUPS_PER_TILE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[split, n, c, kh, kw] = sum over the split's (input row v, output column w) of dy_kh[v, w, n] x_kw[v, w, c].

    dy_kh is the output's gradient shifted by rows, so that tap kh of it reads input row v; x_kw is the input shifted by
    columns. Stacked, ROWS of the one by COLS of the other for a slab of GROUPS_PER_TILE groups are a single product
    [BLOCK_M, pixels] x [pixels, BLOCK_N], of which the block diagonal is stored: all 9 taps of a 3 x 3 filter for 6
    loads, and with 16 channels a slab it fills the 64 rows that wgmma takes at least.

    Partial sums are float32 (float64), in the weight's own order; the caller adds them up in a fixed order.
    Grid: one axis of SPLITS x KD x cdiv(KH, ROWS) x cdiv(KW, COLS) x cdiv(groups, GROUPS_PER_TILE), slabs fastest: they
    share cache lines of channels-last operands. Grouped convolution: Xie et al., arXiv:1611.05431.
    """
    SLAB_IN: tl.constexpr = GROUPS_PER_TILE * C_IN_GROUP
    SLAB_OUT: tl.constexpr = GROUPS_PER_TILE * C_OUT_GROUP
    TILES_W: tl.constexpr = (KW + COLS - 1) // COLS
    TILES_H: tl.constexpr = (KH + ROWS - 1) // ROWS
    slabs = tl.cdiv(c_in, SLAB_IN)
    pid = tl.program_id(0)
    slab = pid % slabs
    pid_w = pid // slabs % TILES_W
    pid_h = pid // slabs // TILES_W % TILES_H
    kd = pid // slabs // (TILES_W * TILES_H) % KD
    split = pid // slabs // (TILES_W * TILES_H * KD)

    stacked_m = tl.arange(0, BLOCK_M)
    stacked_n = tl.arange(0, BLOCK_N)
    kh = pid_h * ROWS + stacked_m // (BLOCK_M // ROWS)
    kw = pid_w * COLS + stacked_n // (BLOCK_N // COLS)
    offs_m = stacked_m % (BLOCK_M // ROWS)
    offs_n = stacked_n % (BLOCK_N // COLS)
    # In whole vectors, counted before the remainder is taken: of a remainder's quotients the compiler does not see that
    # neighbours are equal, and would load two bytes at a time.
    vector_m = stacked_m // Y_VECTOR % (BLOCK_M // ROWS // Y_VECTOR)
    vector_n = stacked_n // X_VECTOR % (BLOCK_N // COLS // X_VECTOR)
    mask_m = (kh < KH) & (vector_m < tl.minimum(SLAB_OUT, c_out - slab * SLAB_OUT) // Y_VECTOR)
    mask_n = (kw < KW) & (vector_n < tl.minimum(SLAB_IN, c_in - slab * SLAB_IN) // X_VECTOR)
    same_group = (offs_m // C_OUT_GROUP)[:, None] == (offs_n // C_IN_GROUP)[None, :]
    row = (tl.cast(split, tl.int64) * c_out + slab * SLAB_OUT + offs_m) * C_IN_GROUP
    dw_row = dw_ptr + (row * KD + kd) * (KH * KW) + kh * KW
    dw_column = offs_n % C_IN_GROUP * (KD * KH * KW) + kw
    if INDEX_INT64:
        offs_m = offs_m.to(tl.int64)
        offs_n = offs_n.to(tl.int64)
        # A tap's offset is a product of scalars.
        stride_xd, stride_xh, stride_xw = wide(stride_xd), wide(stride_xh), wide(stride_xw)
        stride_yh = wide(stride_yh)
    x_slab = x_ptr + aligned(tl.cast(slab * SLAB_IN, tl.int64) * stride_xc, X_VECTOR)
    y_slab = dy_ptr + aligned(tl.cast(slab * SLAB_OUT, tl.int64) * stride_yc, Y_VECTOR)
    channel_n = (offs_n * stride_xc)[None, :]
    channel_m = (offs_m * stride_yc)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    blocks = tl.cdiv(tl.cast(batch, tl.int64) * d_out * rows * w_out, SPLITS * BLOCK_K).to(tl.int32)
    block = split * blocks
    first, image, d_o, row_index, w_o, mask_k = tile_pixels(
        block, batch, d_out, rows, w_out, RANK, INDEX_INT64, BLOCK_K
    )
    rest = (tl.cast(block, tl.int64) * BLOCK_K - first * d_out * rows * w_out).to(w_o.dtype)
    digits = tile_digits(d_out, rows, w_out, RANK, BLOCK_K)
    for _ in range(tl.maximum(blocks, 1)):
        v = row_first + row_index
        d0 = d_o * STRIDE_D - PAD_D
        h0 = v - PAD_H
        w0 = w_o * STRIDE_W - PAD_W
        pixel_offset = d0 * stride_xd + h0 * stride_xh + w0 * stride_xw
        offset, inside = tap_offset(
            pixel_offset[:, None], d0[:, None], h0[:, None], w0[:, None], kd * DIL_D, 0, (kw * DIL_W)[None, :],
            d_in, h_in, w_in, stride_xd, stride_xh, stride_xw, PADDING_MODE, RANK,
        )  # fmt: skip
        x_offset = tl.multiple_of((image * stride_xn)[:, None] + offset, (1, X_VECTOR))
        x_tile = load_turned(
            x_slab + first * stride_xn + (x_offset + channel_n),
            inside & mask_k[:, None] & mask_n[None, :],
            PIXELS_LAST,
        )  # [BLOCK_K, BLOCK_N]

        ahead = v[:, None] - (kh * DIL_H)[None, :]
        h_o = ahead // STRIDE_H
        mask_y = (ahead >= 0) & (h_o < h_out) & mask_k[:, None] & mask_m[None, :]
        if STRIDE_H > 1:
            mask_y = mask_y & (h_o * STRIDE_H == ahead)
        y_offset = (image * stride_yn + d_o * stride_yd + w_o * stride_yw)[:, None] + h_o * stride_yh
        y_offset = tl.multiple_of(y_offset, (1, Y_VECTOR))
        dy_tile = load_turned(
            y_slab + first * stride_yn + (y_offset + channel_m), mask_y, Y_PIXELS_LAST
        )  # [BLOCK_K, BLOCK_M]
        acc = dot(tl.trans(dy_tile), x_tile, acc, PRECISION)
        first, rest, image, d_o, row_index, w_o, mask_k = next_tile(
            digits, first, rest, image, d_o, row_index, w_o, batch, d_out, rows, w_out, RANK
        )

    tl.store(dw_row[:, None] + dw_column[None, :], acc, mask=same_group & mask_m[:, None] & mask_n[None, :])


@dataclass(frozen=True)
class GroupedPackedWeightGradientTile(Tile):
    """BLOCK_M: a slab's output channels, once for each of ROWS taps of a filter's column; BLOCK_N: its input channels,
    once for each of COLS taps of a filter's row; BLOCK_K pixels a step, SPLITS partial sums."""

    ROWS: int = 4
    COLS: int = 4
    BLOCK_M: int = 64
    BLOCK_N: int = 64
    BLOCK_K: int = 64
    SPLITS: int = 1

    def groups_per_tile(self, problem: Problem) -> int:
        g = problem.geometry
        fit_in = self.BLOCK_N // self.COLS // max(g.c_in_group, 1)
        return min(fit_in, self.BLOCK_M // self.ROWS // g.c_out_group, g.groups)

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        g, itemsize = problem.geometry, problem.itemsize
        packed = self.groups_per_tile(problem)
        factors = [
            Operand(
                self.BLOCK_M * self.BLOCK_K * itemsize, problem.y_vector(packed * g.c_out_group, g.c_out) * itemsize
            ),
            Operand(self.BLOCK_N * self.BLOCK_K * itemsize, problem.x_vector(packed * g.c_in_group, g.c_in) * itemsize),
        ]
        sums = self.BLOCK_M * self.BLOCK_N, partial_bytes(problem, target)
        return staged_bytes(factors, self.BLOCK_M, self.num_warps, self.num_stages, sums, target)

    def accumulator_values(self) -> int:
        return self.BLOCK_M * self.BLOCK_N

    def mismatch(self, problem: Problem) -> str | None:
        g = problem.geometry
        if self.groups_per_tile(problem) < 1:
            return (
                f"a group of {g.c_in_group} to {g.c_out_group} channels does not fit in {self.BLOCK_N} / {self.COLS} x "
                f"{self.BLOCK_M} / {self.ROWS}"
            )
        return None


def _grid(problem: Problem, tile: GroupedPackedWeightGradientTile) -> int:
    g = problem.geometry
    taps = g.kernel[0] * cdiv(g.kernel[1], tile.ROWS) * cdiv(g.kernel[2], tile.COLS)
    return tile.SPLITS * taps * cdiv(g.groups, tile.groups_per_tile(problem))


def _rows(problem: Problem) -> tuple[int, int]:
    """The rows of the padded input that a tap reads: how many, and the first; those of zeros are left out."""
    g = problem.geometry
    read = (g.out_size[1] - 1) * g.stride[1] + g.extent[1]
    if g.padding_mode != "zeros":
        return read, 0
    return max(min(read - g.pad_before[1], g.in_size[1]), 1), g.pad_before[1]


def _arguments(problem: Problem, tile: GroupedPackedWeightGradientTile) -> dict[str, object]:
    g = problem.geometry
    packed = tile.groups_per_tile(problem)
    rows, row_first = _rows(problem)
    pixels = g.batch * g.out_size[0] * rows * g.out_size[2] + tile.SPLITS * tile.BLOCK_K
    # Fewer rows than the output has make smaller images, of which a tile touches more.
    arguments = geometry_arguments(problem, tile.BLOCK_K * cdiv(g.out_size[1], rows))
    return (
        arguments
        | tile.sizes()
        | dict(
            c_in=g.c_in,
            c_out=g.c_out,
            rows=rows,
            row_first=row_first,
            INDEX_INT64=arguments["INDEX_INT64"] or pixels > INT32_LIMIT,
            X_VECTOR=problem.x_vector(packed * g.c_in_group, g.c_in),
            Y_VECTOR=problem.y_vector(packed * g.c_out_group, g.c_out),
            C_IN_GROUP=g.c_in_group,
            C_OUT_GROUP=g.c_out_group,
            GROUPS_PER_TILE=packed,
        )
    )


def _unsuited(problem: Problem) -> str | None:
    g = problem.geometry
    if not isinstance(problem, WeightGradientProblem):
        return "it is no weight gradient"
    if g.groups == 1 or g.c_in_group == 0:
        return "there are no groups to pack"
    if max(g.c_in_group, g.c_out_group) > 64:
        return f"a group has {g.c_in_group} to {g.c_out_group} channels, more than 64"
    return None


KERNEL = Kernel(
    name="grouped_packed_weight_gradient",
    function=grouped_packed_weight_gradient_kernel,
    tile_type=GroupedPackedWeightGradientTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=GroupedPackedWeightGradientTile(num_warps=4, num_stages=1, ROWS=1, COLS=1, BLOCK_K=16),
    pointers=("x_ptr", "dy_ptr", "dw_ptr"),
)
