"""Weight gradient of a depthwise convolution by banded matrices, rank 1 to 3, for contiguous pixels (NCHW)."""

# Tuples grow in device code, which has no types of Python's.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ..problem import Problem
from ..target import Target
from .arguments import geometry_arguments
from .banded_rows import columns_left, columns_read, inside_row, load_row, run_read
from .banded_sums import BandedSumsTile, filter_rows, grid, images_of_tile, unsuited
from .common import aligned, decode_pixel, dot, wide, within
from .kernel import Kernel
from .staging import Operand, staged_bytes, staging_of


@triton.jit
def depthwise_banded_weight_gradient_kernel(
    x_ptr, dy_ptr, dw_ptr,
    batch, images, c_out, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, LEFT: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, NEXT_A: tl.constexpr, NEXT_R: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    FILTER_ROWS: tl.constexpr, TILES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dw[split, c, r, s] = sum_t sums_r[j(s, t), t], sums_r[j, t] = sum over the split's m of x_r[m, j] dy[m, t].

    One channel c at a time. m runs over (image, output depth, output row, block of BLOCK_T columns): one row of ROWS at
    a time of BLOCK_M blocks of rows and columns. dy has the block's columns t; x_r is the input row that filter row r
    meets there, BLOCK_K columns of it from an aligned one on, LEFT before the block's own. Its tap s meets column t at
    j(s, t) = t STRIDE_W + s DIL_W + LEFT - PAD_W. The sums for other (j, t) are thrown away: cheap on tensor cores,
    while each tensor is read once for all taps. Partial sums of float32, added up by the caller in a fixed order.

    Grid: one axis of c_out x SPLITS x groups of filter rows (DEPTH planes of HEIGHT rows each), groups fastest: they
    read the same rows from L2. m is that of a group of `images` images; a split has TILES times BLOCK_M of them, of
    STEPS groups one after the other: decoded once, their offsets stay and only the base moves. A product of input row
    a STRIDE_H + r DIL_H serves all (a, r) where that is the same: (a, r) and (a + NEXT_A, r - NEXT_R).

    Banded (Toeplitz) products for convolution: Ku et al., StripedHyena 2, arXiv:2503.01868, there in one dimension.
    """
    HEIGHT: tl.constexpr = FILTER_ROWS if FILTER_ROWS < KH else KH
    DEPTH: tl.constexpr = FILTER_ROWS // KH if FILTER_ROWS > KH else 1
    ROW_GROUPS: tl.constexpr = (KH + HEIGHT - 1) // HEIGHT
    GROUPS: tl.constexpr = KD // DEPTH * ROW_GROUPS
    row_blocks = tl.cdiv(h_out, ROWS)
    column_blocks = tl.cdiv(w_out, BLOCK_T)
    if INDEX_INT64:
        column_blocks = column_blocks.to(tl.int64)
    tile_groups = tl.cdiv(tl.cdiv(column_blocks * row_blocks * d_out * images, BLOCK_M), TILES)
    pid = tl.program_id(0)
    group = pid % GROUPS
    split = pid // GROUPS % SPLITS
    c = pid // GROUPS // SPLITS
    tile_first = split % tile_groups * TILES
    image_first = (split // tile_groups).to(tl.int64) * (STEPS * images)
    kd_first = group // ROW_GROUPS * DEPTH
    r_first = group % ROW_GROUPS * HEIGHT
    if INDEX_INT64:
        stride_xd, stride_xh = wide(stride_xd), wide(stride_xh)
        stride_yh, stride_yw = wide(stride_yh), wide(stride_yw)
    offs_j = tl.arange(0, BLOCK_K)
    offs_t = tl.arange(0, BLOCK_T)
    # Of BLOCK_K columns no more than these meet an output.
    read = (offs_j // X_VECTOR < (COLUMNS + X_VECTOR - 1) // X_VECTOR)[None, :]
    x_channel = x_ptr + aligned(c * wide(stride_xc), X_VECTOR)
    y_channel = dy_ptr + aligned(c * wide(stride_yc), Y_VECTOR)

    sums = ()
    for _r in tl.static_range(DEPTH * HEIGHT):
        sums += (tl.zeros((BLOCK_K, BLOCK_T), dtype=ACC_DTYPE),)
    for tile in range(TILES):
        offs_m = (tile_first + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        image, d_o, h_o, w_o = decode_pixel(offs_m, d_out, row_blocks, column_blocks, RANK)
        h_o *= ROWS
        w_o *= BLOCK_T
        d0 = d_o * STRIDE_D - PAD_D + kd_first * DIL_D
        h0 = h_o * STRIDE_H - PAD_H + r_first * DIL_H

        x_inside = read & inside_row(w_o * STRIDE_W, offs_j, w_in, LEFT, X_VECTOR)  # [BLOCK_M, BLOCK_K]
        x_offset = image * stride_xn + d0 * stride_xd + h0 * stride_xh + w_o * STRIDE_W - LEFT
        x_offset = x_offset[:, None] + offs_j[None, :]
        x_offset = tl.max_contiguous(tl.multiple_of(x_offset, (1, X_VECTOR)), (1, X_VECTOR))

        y_inside = (w_o // Y_VECTOR)[:, None] + (offs_t // Y_VECTOR)[None, :] < w_out // Y_VECTOR
        y_offset = image * stride_yn + d_o * stride_yd + h_o * stride_yh + w_o * stride_yw
        y_offset = y_offset[:, None] + (offs_t * stride_yw)[None, :]
        y_offset = tl.max_contiguous(tl.multiple_of(y_offset, (1, Y_VECTOR)), (1, Y_VECTOR))

        for step in range(STEPS):
            first = image_first + step * images
            live = image < tl.minimum(images, batch - first)
            x_base = x_channel + aligned(first * stride_xn, X_VECTOR)
            y_base = y_channel + aligned(first * stride_yn, Y_VECTOR)
            dy_rows = ()
            for a in tl.static_range(ROWS):
                y_row = y_base + aligned(a * stride_yh, Y_VECTOR)
                dy_rows += (tl.load(y_row + y_offset, mask=y_inside & (live & (h_o + a < h_out))[:, None], other=0.0),)

            for kd in tl.static_range(DEPTH):
                live_d = live
                if RANK >= 3:
                    live_d = live & within(d0 + kd * DIL_D, d_in)
                for a in tl.static_range(ROWS):
                    for r in tl.static_range(HEIGHT):
                        if a < NEXT_A or r + NEXT_R >= HEIGHT:
                            x_row = load_row(
                                x_base, x_offset, kd * DIL_D * stride_xd, h0, a * STRIDE_H + r * DIL_H, stride_xh, h_in,
                                x_inside, live_d, RANK, X_VECTOR,
                            )  # fmt: skip
                            added = ()
                            for q in tl.static_range(DEPTH * HEIGHT):
                                # Filter row r - n NEXT_R of this depth, for output row a + n NEXT_A.
                                if (
                                    q // HEIGHT == kd
                                    and r >= q % HEIGHT
                                    and (r - q % HEIGHT) % NEXT_R == 0
                                    and a + (r - q % HEIGHT) // NEXT_R * NEXT_A < ROWS
                                ):
                                    dy_row = dy_rows[a + (r - q % HEIGHT) // NEXT_R * NEXT_A]
                                    added += (dot(tl.trans(x_row), dy_row, sums[q], PRECISION),)
                                else:
                                    added += (sums[q],)
                            sums = added

    offs_s = tl.arange(0, BLOCK_S)
    diagonal = offs_s[:, None] * DIL_W + offs_t[None, :] * STRIDE_W + (LEFT - PAD_W)
    diagonal = tl.minimum(diagonal, BLOCK_K - 1)  # [BLOCK_S, BLOCK_T]
    for q in tl.static_range(DEPTH * HEIGHT):
        total = tl.sum(tl.gather(sums[q], diagonal, axis=0), axis=1)
        r = r_first + q % HEIGHT
        row = ((tl.cast(split, tl.int64) * c_out + c) * KD + kd_first + q // HEIGHT) * KH + r
        tl.store(dw_ptr + row * KW + offs_s, total, mask=(offs_s < KW) & (r < KH))


@dataclass(frozen=True)
class DepthwiseBandedWeightGradientTile(BandedSumsTile):
    """BLOCK_M blocks of ROWS output rows by BLOCK_T output columns a step, each with BLOCK_K input columns of its rows.

    Blocks are counted over (image, depth, row, column) of a group of images; a program takes TILES times BLOCK_M of
    them, of STEPS groups. It sums FILTER_ROWS rows of the filter: some of one depth, or all rows of a few depths.
    """

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages", "FILTER_ROWS"})

    BLOCK_K: int = 64

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        # Rows that are not fetched ahead pass one after the other.
        stages = self.num_stages if self.STEPS * self.TILES > 1 else 1
        read = self.rows_read(problem) if stages > 1 else 2
        rows = [
            Operand(count * self.BLOCK_M * problem.itemsize)
            for count in (read * self.BLOCK_K, self.ROWS * self.BLOCK_T)
        ]
        staged = staged_bytes(rows, self.BLOCK_K, self.num_warps, stages, (0, 0), target)
        if target is not None and target.family == "sm_100" and stages > 1 and min(self.ROWS, self.FILTER_ROWS) > 1:
            # Rows that were fetched ahead for several products are turned for its matrix unit: half as many buffers.
            staged += 3 * rows[0].size // 2
        # The sums pass through the same memory at the end, to be read along diagonals.
        sums = (self.BLOCK_K + 4) * (self.BLOCK_T + 4) * problem.accumulator_bytes
        return max(staged, sums) + (0 if staging_of(target).turns else 2048)

    def accumulator_values(self) -> int:
        return self.FILTER_ROWS * self.BLOCK_K * self.BLOCK_T

    def rows_read(self, problem: Problem) -> int:
        """Input rows that a step reads."""
        rows = filter_rows(problem, self)
        next_a, next_r = _next(problem)
        pairs = ((a, r) for a in range(self.ROWS) for r in range(rows["HEIGHT"]))
        return rows["DEPTH"] * sum(a < next_a or r + next_r >= rows["HEIGHT"] for a, r in pairs)

    def columns(self, problem: Problem) -> int:
        return columns_read(problem, self.BLOCK_T)


def _next(problem: Problem) -> tuple[int, int]:
    """Output rows forward and filter rows back, after which the same input row comes again."""
    stride, dilation = problem.geometry.stride[1], problem.geometry.dilation[1]
    common = math.gcd(stride, dilation)
    return dilation // common, stride // common


def _arguments(problem: Problem, tile: DepthwiseBandedWeightGradientTile) -> dict[str, object]:
    g = problem.geometry
    images = images_of_tile(problem, tile)
    next_a, next_r = _next(problem)
    return (
        geometry_arguments(problem, images * g.out_pixels)
        | tile.sizes()
        | dict(
            images=images,
            c_out=g.c_out,
            SPLITS=tile.parts(problem),
            X_VECTOR=run_read(problem),
            Y_VECTOR=problem.y_run(16 // problem.itemsize),
            LEFT=columns_left(problem),
            COLUMNS=columns_read(problem, tile.BLOCK_T),
            NEXT_A=next_a,
            NEXT_R=next_r,
            BLOCK_S=1 << (g.kernel[2] - 1).bit_length(),
        )
    )


KERNEL = Kernel(
    name="depthwise_banded_weight_gradient",
    function=depthwise_banded_weight_gradient_kernel,
    tile_type=DepthwiseBandedWeightGradientTile,
    grid=grid,
    arguments=_arguments,
    unsuited=unsuited,
    safe_tile=DepthwiseBandedWeightGradientTile(
        num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_T=16, BLOCK_K=64, ROWS=1, FILTER_ROWS=1
    ),
    pointers=("x_ptr", "dy_ptr", "dw_ptr"),
)
