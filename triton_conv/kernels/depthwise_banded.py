"""Depthwise convolution as products with banded matrices, rank 1 to 3, for inputs with contiguous pixels (NCHW)."""

# Tuples grow in device code, which has no types of Python's.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from ..target import Target
from .arguments import geometry_arguments
from .banded_rows import image_group, inside_row, load_row, no_rows_of_pixels, row_columns, row_left, run_read
from .common import activate, aligned, decode_pixel, dot, narrow, wide
from .kernel import Kernel, Tile, cdiv
from .staging import staging_of


@triton.jit
def depthwise_banded_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, images, c_out, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh,
    stride_wo, stride_wd, stride_wh, stride_ww,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw, stride_b,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr, MULTIPLIER: tl.constexpr,
    X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, LEFT: tl.constexpr,
    SPAN: tl.constexpr, HOP: tl.constexpr, NEXT_P: tl.constexpr, NEXT_I: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, FUSED: tl.constexpr,
    STEPS: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """y[m, n] = activation(sum_i sum_j x_i[m, j] band_i[j, n] + b[c]), band_i[j, n] = w[c, r(i, a), tap(j, t)].

    One channel c at a time. m runs over (image, output depth, block of ROWS output rows, block of BLOCK_T columns). A
    product makes FUSED of the rows at once: n is (a, t), output row a and column t of the block. x_i is one input row,
    BLOCK_K columns of it from an aligned one on, LEFT before the block's own. The band holds the weight of
    tap(j, t) = (j - t STRIDE_W - (LEFT - PAD_W)) / DIL_W in filter row r(i, a) = (i HOP - a STRIDE_H) / DIL_H where
    these are whole and inside the filter, else zero. Most of it is zeros: cheap on tensor cores, while a channel's own
    products are more than the CUDA cores have time for from 5x5 up (and tensor cores have none for ieee float32).

    Grid: one axis of tiles x c_out x splits programs, tiles fastest: BLOCK_M of the m of a group of `images` images.
    A program takes STEPS groups one after the other: decoded once, its offsets stay and only the base moves.

    RESIDENT: all SPAN bands are built once a program, and an input row is loaded once for all the products that need it
    (product p and row i of it need the same as p + NEXT_P and i - NEXT_I). Otherwise a band is built a row, in a loop,
    so that large filters neither unroll nor spill. Neighbouring blocks read the same rows from L1: hence
    num_stages = 1, since a pipelined load bypasses L1.

    Zeros of a band are multiplied: an infinity or NaN in the input makes NaN of all outputs of the blocks that read it.

    Banded (Toeplitz) products for convolution: Ku et al., StripedHyena 2, arXiv:2503.01868, there in one dimension.
    """
    PRODUCTS: tl.constexpr = ROWS // FUSED
    BLOCK_N: tl.constexpr = FUSED * BLOCK_T
    row_blocks = tl.cdiv(h_out, ROWS)
    column_blocks = tl.cdiv(w_out, BLOCK_T)
    if INDEX_INT64:
        column_blocks = column_blocks.to(tl.int64)
    tiles = tl.cdiv(column_blocks * row_blocks * d_out * images, BLOCK_M)
    pid = tl.program_id(0)
    pid_m = pid % tiles
    c = pid // tiles % c_out
    first = (pid // tiles // c_out).to(tl.int64) * (STEPS * images)
    if INDEX_INT64:
        stride_xd, stride_xh = wide(stride_xd), wide(stride_xh)
        stride_yh, stride_yw = wide(stride_yh), wide(stride_yw)
        stride_wd, stride_wh, stride_ww = wide(stride_wd), wide(stride_wh), wide(stride_ww)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    image, d_o, h_o, w_o = decode_pixel(offs_m, d_out, row_blocks, column_blocks, RANK)
    h_o *= ROWS
    w_o *= BLOCK_T
    d0 = d_o * STRIDE_D - PAD_D
    h0 = h_o * STRIDE_H - PAD_H
    offs_j = tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    offs_a = offs_n // BLOCK_T
    offs_t = offs_n % BLOCK_T

    inside_w = inside_row(w_o * STRIDE_W, offs_j, w_in, LEFT, X_VECTOR)  # [BLOCK_M, BLOCK_K]
    x_offset = image * stride_xn + d0 * stride_xd + h0 * stride_xh + w_o * STRIDE_W - LEFT
    x_offset = x_offset[:, None] + offs_j[None, :]
    x_offset = tl.max_contiguous(tl.multiple_of(x_offset, (1, X_VECTOR)), (1, X_VECTOR))
    x_base = x_ptr + aligned(c // MULTIPLIER * wide(stride_xc), X_VECTOR)

    tap = offs_j[:, None] - offs_t[None, :] * STRIDE_W - (LEFT - PAD_W)
    mask_tap = (tap >= 0) & (tap < KW * DIL_W)
    if DIL_W > 1:
        mask_tap = mask_tap & (tap % DIL_W == 0)
        tap = tap // DIL_W
    w_base = w_ptr + c * wide(stride_wo)
    w_offset = tap * stride_ww  # [BLOCK_K, BLOCK_N]
    bands = ()
    if RESIDENT:
        for i in tl.static_range(KD * SPAN):
            bands += (
                load_band(
                    w_base + i // SPAN * stride_wd, w_offset, i % SPAN, offs_a, stride_wh, mask_tap,
                    KH, STRIDE_H, DIL_H, HOP, FUSED,
                ),
            )  # fmt: skip

    vector = (w_o // Y_VECTOR)[:, None] + (offs_n // Y_VECTOR % (BLOCK_T // Y_VECTOR))[None, :]
    y_mask = vector < w_out // Y_VECTOR  # [BLOCK_M, BLOCK_N]
    y_offset = image * stride_yn + d_o * stride_yd + h_o * stride_yh + w_o * stride_yw
    y_offset = y_offset[:, None] + (offs_a * stride_yh + offs_t * stride_yw)[None, :]
    y_offset = tl.max_contiguous(tl.multiple_of(y_offset, (1, Y_VECTOR)), (1, Y_VECTOR))
    y_base = y_ptr + aligned(c * wide(stride_yc), Y_VECTOR)

    bias = tl.zeros((), dtype=ACC_DTYPE)
    if HAS_BIAS:
        bias = tl.load(b_ptr + c * wide(stride_b), mask=c < c_out, other=0.0).to(ACC_DTYPE)

    for _ in range(STEPS):
        live = image < tl.minimum(images, batch - first)
        x_group = x_base + aligned(first * stride_xn, X_VECTOR)
        sums = ()
        for _p in tl.static_range(PRODUCTS):
            sums += (tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE) + bias,)
        if RESIDENT:
            for kd in tl.static_range(KD):
                live_d = live
                if RANK >= 3:
                    live_d = live & (d0 + kd * DIL_D >= 0) & (d0 + kd * DIL_D < d_in)
                # All loads first: their latencies overlap.
                x_rows = ()
                for p in tl.static_range(PRODUCTS):
                    for i in tl.static_range(SPAN):
                        if p < NEXT_P or i + NEXT_I >= SPAN:
                            x_rows += (
                                load_row(
                                    x_group, x_offset, kd * DIL_D * stride_xd, h0, p * FUSED * STRIDE_H + i * HOP,
                                    stride_xh, h_in, inside_w, live_d, RANK, X_VECTOR,
                                ),
                            )  # fmt: skip
                for p in tl.static_range(PRODUCTS):
                    for i in tl.static_range(SPAN):
                        if p < NEXT_P or i + NEXT_I >= SPAN:
                            added = ()
                            for q in tl.static_range(PRODUCTS):
                                if q >= p and (q - p) % NEXT_P == 0 and (q - p) // NEXT_P * NEXT_I <= i:
                                    band = bands[kd * SPAN + i - (q - p) // NEXT_P * NEXT_I]
                                    added += (dot(x_rows[0], band, sums[q], PRECISION),)
                                else:
                                    added += (sums[q],)
                            sums = added
                            x_rows = x_rows[1:]
        else:
            for row in range(KD * SPAN):
                kd = row // SPAN
                i = row % SPAN
                live_d = live
                if RANK >= 3:
                    live_d = live & (d0 + kd * DIL_D >= 0) & (d0 + kd * DIL_D < d_in)
                band = load_band(
                    w_base + kd * stride_wd, w_offset, i, offs_a, stride_wh, mask_tap, KH, STRIDE_H, DIL_H, HOP, FUSED
                )
                x_rows = ()
                for p in tl.static_range(PRODUCTS):
                    x_rows += (
                        load_row(
                            x_group, x_offset, kd * DIL_D * stride_xd, h0, p * FUSED * STRIDE_H + i * HOP,
                            stride_xh, h_in, inside_w, live_d, RANK, X_VECTOR,
                        ),
                    )  # fmt: skip
                added = ()
                for p in tl.static_range(PRODUCTS):
                    added += (dot(x_rows[p], band, sums[p], PRECISION),)
                sums = added

        y_group = y_base + aligned(first * stride_yn, Y_VECTOR)
        for p in tl.static_range(PRODUCTS):
            y_row = y_offset + p * FUSED * stride_yh
            y_row = tl.max_contiguous(tl.multiple_of(y_row, (1, Y_VECTOR)), (1, Y_VECTOR))
            mask_row = live[:, None] & (h_o[:, None] + (p * FUSED + offs_a)[None, :] < h_out)
            y_tile = narrow(activate(sums[p], ACTIVATION), y_ptr.dtype.element_ty)
            tl.store(y_group + y_row, y_tile, mask=y_mask & mask_row)
        first += images


@triton.jit
def load_band(
    base, offset, i, offs_a, stride_wh, mask_tap,
    KH: tl.constexpr, STRIDE_H: tl.constexpr, DIL_H: tl.constexpr, HOP: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """The band of input row `i`: [BLOCK_K, BLOCK_N], filter row r(i, a) for output row a."""
    if FUSED > 1:
        lag = i * HOP - offs_a * STRIDE_H
        mask_row = (lag >= 0) & (lag < KH * DIL_H)
        if HOP != DIL_H:
            mask_row = mask_row & (lag % DIL_H == 0)
        mask_tap = mask_tap & mask_row[None, :]
    if HOP == DIL_H:
        # Filter rows follow input rows: the offsets of the last one serve again.
        base += i * stride_wh
        offset -= (offs_a * (STRIDE_H // DIL_H) * stride_wh)[None, :]
    else:
        offset += (lag // DIL_H * stride_wh)[None, :]
    return tl.load(base + offset, mask=mask_tap, other=0.0)


@dataclass(frozen=True)
class DepthwiseBandedTile(Tile):
    """BLOCK_M blocks of ROWS output rows by BLOCK_T output columns, each from BLOCK_K input columns of its rows.

    Blocks are counted over (image, depth, row, column) of a group of images; a program takes STEPS groups, one after
    the other. A product makes FUSED of the rows. RESIDENT holds the bands of all input rows and unrolls these; without
    it they are a loop.
    """

    BLOCK_M: int = 64
    BLOCK_T: int = 16
    BLOCK_K: int = 32
    ROWS: int = 4
    FUSED: int = 1
    STEPS: int = 1
    RESIDENT: bool = True

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        span = _rows(problem, self)["SPAN"]
        bands = problem.geometry.kernel[0] * span if self.RESIDENT else 1
        block_n = self.FUSED * self.BLOCK_T
        staging = staging_of(target)
        band, row = self.BLOCK_K * block_n, self.BLOCK_M * self.BLOCK_K
        # Where bands and rows take turns, bands that are held are held in registers.
        operands = max(band, row) if staging.turns else bands * band + self.rows_read(problem) * row
        # A product is turned into the layout of its store in the same memory, with a little padding.
        padded = block_n if staging.turns else block_n + 8
        turned = self.BLOCK_M * padded * (problem.itemsize if staging.turns else problem.accumulator_bytes)
        return max(operands * problem.itemsize, turned) + (0 if staging.turns else 2048)

    def accumulator_values(self) -> int:
        return self.ROWS * self.BLOCK_M * self.BLOCK_T

    def rows_read(self, problem: Problem) -> int:
        """Input rows that a block holds at a time, for one depth."""
        products, rows = self.ROWS // self.FUSED, _rows(problem, self)
        if not self.RESIDENT:
            return products
        fresh = [
            p < rows["NEXT_P"] or i + rows["NEXT_I"] >= rows["SPAN"]
            for p in range(products)
            for i in range(rows["SPAN"])
        ]
        return sum(fresh)

    def mismatch(self, problem: Problem) -> str | None:
        if min(self.BLOCK_M, self.BLOCK_T, self.BLOCK_K) < 16:
            return "a product takes at least 16 of each dimension"
        if self.FUSED > self.ROWS:
            return f"a product cannot make {self.FUSED} of {self.ROWS} rows"
        if (need := row_columns(problem, self.BLOCK_T)) > self.BLOCK_K:
            return f"{self.BLOCK_T} outputs of a row read {need} columns, more than {self.BLOCK_K}"
        products = problem.geometry.kernel[0] * _rows(problem, self)["SPAN"] * self.ROWS // self.FUSED
        if self.RESIDENT and products > 64:
            return f"{products} products are too many to unroll"
        return None


def images_of_tile(problem: Problem, tile: DepthwiseBandedTile) -> int:
    """How many images share the blocks of a tile."""
    return image_group(problem.geometry.batch, _blocks(problem, tile), tile.BLOCK_M)


def tile_count(problem: Problem, tile: DepthwiseBandedTile) -> int:
    """Tiles of one channel of a group of images."""
    return cdiv(images_of_tile(problem, tile) * _blocks(problem, tile), tile.BLOCK_M)


def _blocks(problem: Problem, tile: DepthwiseBandedTile) -> int:
    """Blocks of an image."""
    g = problem.geometry
    return g.out_size[0] * cdiv(g.out_size[1], tile.ROWS) * cdiv(g.out_size[2], tile.BLOCK_T)


def _rows(problem: Problem, tile: DepthwiseBandedTile) -> dict[str, int]:
    """How the input rows of the products lie: a product reads SPAN of them, HOP apart, and the next one begins FUSED
    strides further down, so that row i of product p is row i - NEXT_I of product p + NEXT_P.
    """
    g = problem.geometry
    stride, dilation = g.stride[1], g.dilation[1]
    hop = math.gcd(stride, dilation) if tile.FUSED > 1 else dilation
    common = math.gcd(tile.FUSED * stride, hop)
    return dict(
        SPAN=((tile.FUSED - 1) * stride + (g.kernel[1] - 1) * dilation) // hop + 1,
        HOP=hop,
        NEXT_P=hop // common,
        NEXT_I=tile.FUSED * stride // common,
    )


def _grid(problem: Problem, tile: DepthwiseBandedTile) -> int:
    g = problem.geometry
    splits = cdiv(g.batch, tile.STEPS * images_of_tile(problem, tile))
    return splits * g.c_out * tile_count(problem, tile)


def _arguments(problem: Problem, tile: DepthwiseBandedTile) -> dict[str, object]:
    g = problem.geometry
    images = images_of_tile(problem, tile)
    return (
        geometry_arguments(problem, images * g.out_pixels)
        | tile.sizes()
        | dict(
            images=images,
            c_out=g.c_out,
            MULTIPLIER=g.c_out_group,
            X_VECTOR=run_read(problem),
            Y_VECTOR=problem.y_run(16 // problem.itemsize),
            LEFT=row_left(problem, tile.BLOCK_T),
        )
        | _rows(problem, tile)
    )


KERNEL = Kernel(
    name="depthwise_banded",
    function=depthwise_banded_kernel,
    tile_type=DepthwiseBandedTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=no_rows_of_pixels,
    safe_tile=DepthwiseBandedTile(
        num_warps=4, num_stages=1, BLOCK_M=64, BLOCK_T=16, BLOCK_K=64, ROWS=1, RESIDENT=False
    ),
)
