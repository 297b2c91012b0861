"""Weight gradient of a depthwise convolution by banded matrices of whole rows, rank 1 to 3, for NCHW."""

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
from .banded_rows import row_columns, row_left, run_read
from .banded_sums import BandedSumsTile, filter_rows, grid, images_of_tile, unsuited
from .common import aligned, decode_pixel, dot, wide, within
from .kernel import Kernel
from .staging import Operand, staged_bytes, staging_of


@triton.jit
def depthwise_fused_weight_gradient_kernel(
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
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    HOP: tl.constexpr, STEP: tl.constexpr, LEAST: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, FUSED: tl.constexpr,
    FILTER_ROWS: tl.constexpr, TILES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dw[split, c, r, s] = sum_{f, t} sums_k[(f, j(s, t)), t], k + f HOP = r DIL_H, sums_k = sum_m x_g[m] dy_a[m].

    One channel c at a time, as in `depthwise_banded_weight_gradient`: m runs over the split's (image, output depth,
    output row, block of BLOCK_T columns), one row a of ROWS at a time of BLOCK_M blocks; the tap s meets column t at
    column j(s, t) = t STRIDE_W + s DIL_W + LEFT - PAD_W of the BLOCK_K that are read of an input row, and the sums for
    other (j, t) are thrown away.

    A block of an output's whole row reads the input's whole row and nothing beside it: where j(s, t) is outside, the
    image is zero. x_g are FUSED input rows HOP apart, side by side, since wgmma takes 64 columns at least: of 28 two
    rows. Groups lie FUSED HOP apart, so that g is at k = g FUSED HOP - a STRIDE_H from output row a, a multiple of
    STEP: there is a sum for each such k that meets a row of the filter, of COUNT from LEAST on. Partial sums of
    float32, added up by the caller in a fixed order.

    Grid: one axis of c_out x SPLITS x groups of filter rows (DEPTH planes of HEIGHT rows each), groups fastest: they
    read the same rows from L2. m is that of a group of `images` images; a split has TILES times BLOCK_M of them, of
    STEPS groups one after the other: decoded once, their offsets stay and only the base moves.

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
    offs_n = tl.arange(0, FUSED * BLOCK_K)
    offs_f = offs_n // BLOCK_K
    offs_t = tl.arange(0, BLOCK_T)
    # Vectors, in a form that shows that one truth holds for each: of BLOCK_K columns no more than these meet an output.
    x_vector = offs_n // X_VECTOR % (BLOCK_K // X_VECTOR)
    read = (x_vector < (COLUMNS + X_VECTOR - 1) // X_VECTOR)[None, :]
    x_channel = x_ptr + aligned(c * wide(stride_xc), X_VECTOR)
    y_channel = dy_ptr + aligned(c * wide(stride_yc), Y_VECTOR)

    sums = ()
    for _n in tl.static_range(DEPTH * COUNT):
        sums += (tl.zeros((FUSED * BLOCK_K, BLOCK_T), dtype=ACC_DTYPE),)
    for tile in range(TILES):
        offs_m = (tile_first + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        image, d_o, h_o, w_o = decode_pixel(offs_m, d_out, row_blocks, column_blocks, RANK)
        h_o *= ROWS
        w_o *= BLOCK_T
        d0 = d_o * STRIDE_D - PAD_D + kd_first * DIL_D
        h0 = h_o * STRIDE_H - PAD_H + r_first * DIL_H
        rows_x = h0[:, None] + (offs_f * HOP)[None, :]  # [BLOCK_M, FUSED * BLOCK_K]

        vector = (w_o * STRIDE_W // X_VECTOR)[:, None] + x_vector[None, :]
        x_inside = read & (vector >= LEFT // X_VECTOR) & (vector < (LEFT + w_in) // X_VECTOR)
        x_offset = image * stride_xn + d0 * stride_xd + h0 * stride_xh + w_o * STRIDE_W - LEFT
        x_offset = x_offset[:, None] + (offs_f * HOP * stride_xh + offs_n % BLOCK_K)[None, :]
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
                for g in tl.static_range(((ROWS - 1) * STRIDE_H + (HEIGHT - 1) * DIL_H) // (FUSED * HOP) + 1):
                    if is_met(g * FUSED * HOP, ROWS, STRIDE_H, FUSED, HOP, DIL_H, HEIGHT):
                        x_row = x_base + aligned(kd * DIL_D * stride_xd + g * FUSED * HOP * stride_xh, X_VECTOR)
                        mask_x = x_inside & live_d[:, None]
                        if RANK >= 2:
                            mask_x = mask_x & within(rows_x + g * FUSED * HOP, h_in)
                        x_tile = tl.load(x_row + x_offset, mask=mask_x, other=0.0)
                        added = ()
                        for n in tl.static_range(DEPTH * COUNT):
                            # The group is at k from output row a, if there is such a row.
                            if (
                                n // COUNT == kd
                                and row_at(g * FUSED * HOP - LEAST - n % COUNT * STEP, STRIDE_H, ROWS) >= 0
                                and is_met(LEAST + n % COUNT * STEP, 1, STRIDE_H, FUSED, HOP, DIL_H, HEIGHT)
                            ):
                                dy_row = dy_rows[row_at(g * FUSED * HOP - LEAST - n % COUNT * STEP, STRIDE_H, ROWS)]
                                added += (dot(tl.trans(x_tile), dy_row, sums[n], PRECISION),)
                            else:
                                added += (sums[n],)
                        sums = added

    offs_s = tl.arange(0, BLOCK_S)
    column = offs_s[:, None] * DIL_W + offs_t[None, :] * STRIDE_W + (LEFT - PAD_W)  # [BLOCK_S, BLOCK_T]
    met = (column >= 0) & (column < BLOCK_K)
    column = tl.where(met, column, 0)
    for q in tl.static_range(DEPTH * HEIGHT):
        total = tl.zeros((BLOCK_S,), dtype=ACC_DTYPE)
        for n in tl.static_range(COUNT):
            for f in tl.static_range(FUSED):
                if row_at(LEAST + n * STEP + f * HOP, DIL_H, HEIGHT) == q % HEIGHT:
                    diagonal = tl.gather(sums[q // HEIGHT * COUNT + n], column + f * BLOCK_K, axis=0)
                    total += tl.sum(tl.where(met, diagonal, 0.0), axis=1)
        r = r_first + q % HEIGHT
        row = ((tl.cast(split, tl.int64) * c_out + c) * KD + kd_first + q // HEIGHT) * KH + r
        tl.store(dw_ptr + row * KW + offs_s, total, mask=(offs_s < KW) & (r < KH))


@triton.constexpr_function
def row_at(distance, STEP, ROWS):
    """The row, of ROWS that lie STEP apart, that is so far from the first; or -1."""
    row, rest = divmod(distance, STEP)
    return row if rest == 0 and 0 <= row < ROWS else -1


@triton.constexpr_function
def is_met(first, ROWS, STRIDE, FUSED, HOP, DIL, HEIGHT):
    """Whether a filter row meets one of the group's rows, the `first` of them so far from the first output row's."""
    return any(row_at(first - a * STRIDE + f * HOP, DIL, HEIGHT) >= 0 for a in range(ROWS) for f in range(FUSED))


@dataclass(frozen=True)
class DepthwiseFusedWeightGradientTile(BandedSumsTile):
    """BLOCK_M blocks of ROWS output rows by BLOCK_T output columns a step, each with BLOCK_K input columns of its rows,
    of which a product takes FUSED.

    Blocks are counted over (image, depth, row, column) of a group of images; a program takes TILES times BLOCK_M of
    them, of STEPS groups. It sums FILTER_ROWS rows of the filter: some of one depth, or all rows of a few depths.
    """

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages", "FILTER_ROWS"})

    FUSED: int = 2

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        # Rows that are not fetched ahead pass one after the other.
        stages = self.num_stages if self.STEPS * self.TILES > 1 else 1
        read = self.groups_read(problem) if stages > 1 else 2
        fused = self.FUSED * self.BLOCK_K
        rows = [Operand(count * self.BLOCK_M * problem.itemsize) for count in (read * fused, self.ROWS * self.BLOCK_T)]
        staged = staged_bytes(rows, fused, self.num_warps, stages, (0, 0), target)
        if target is not None and target.family == "sm_100" and stages > 1 and min(self.ROWS, self.FILTER_ROWS) > 1:
            # Rows that were fetched ahead for several products are turned for its matrix unit: half as many buffers.
            staged += 3 * rows[0].size // 2
        # The sums pass through the same memory at the end, to be read along diagonals.
        sums = (fused + 4) * (self.BLOCK_T + 4) * problem.accumulator_bytes
        # And then those of a diagonal, from every warp.
        return max(staged, sums) + (0 if staging_of(target).turns else 512 * self.num_warps)

    def accumulator_values(self) -> int:
        # Where groups of rows begin at every row of the filter, and before it.
        return (self.FILTER_ROWS + self.FUSED - 1) * self.FUSED * self.BLOCK_K * self.BLOCK_T

    def groups_read(self, problem: Problem) -> int:
        """Groups of input rows that a step reads."""
        g, rows = problem.geometry, filter_rows(problem, self)
        hop = math.gcd(g.stride[1], g.dilation[1])
        met = {
            (a * g.stride[1] + r * g.dilation[1]) // (self.FUSED * hop)
            for a in range(self.ROWS)
            for r in range(rows["HEIGHT"])
        }
        return rows["DEPTH"] * len(met)

    def columns(self, problem: Problem) -> int:
        return row_columns(problem, self.BLOCK_T)

    def mismatch(self, problem: Problem) -> str | None:
        if self.FUSED > self.ROWS:
            return f"{self.ROWS} output rows do not meet the rows of a filter with {self.FUSED} a product"
        return super().mismatch(problem)


def _sums(problem: Problem, tile: DepthwiseFusedWeightGradientTile) -> dict[str, int]:
    """Where the sums of a plane lie: how far apart input rows are, and groups of them from output rows."""
    g = problem.geometry
    hop = math.gcd(g.stride[1], g.dilation[1])
    step = math.gcd(tile.FUSED * hop, g.stride[1])
    least = -((tile.FUSED - 1) * hop // step) * step
    most = (filter_rows(problem, tile)["HEIGHT"] - 1) * g.dilation[1]
    return dict(HOP=hop, STEP=step, LEAST=least, COUNT=(most - least) // step + 1)


def _arguments(problem: Problem, tile: DepthwiseFusedWeightGradientTile) -> dict[str, object]:
    g = problem.geometry
    images = images_of_tile(problem, tile)
    return (
        geometry_arguments(problem, images * g.out_pixels)
        | tile.sizes()
        | dict(
            images=images,
            c_out=g.c_out,
            SPLITS=tile.parts(problem),
            X_VECTOR=run_read(problem),
            Y_VECTOR=problem.y_run(16 // problem.itemsize),
            LEFT=row_left(problem, tile.BLOCK_T),
            COLUMNS=row_columns(problem, tile.BLOCK_T),
            BLOCK_S=1 << (g.kernel[2] - 1).bit_length(),
        )
        | _sums(problem, tile)
    )


KERNEL = Kernel(
    name="depthwise_fused_weight_gradient",
    function=depthwise_fused_weight_gradient_kernel,
    tile_type=DepthwiseFusedWeightGradientTile,
    grid=grid,
    arguments=_arguments,
    unsuited=unsuited,
    safe_tile=DepthwiseFusedWeightGradientTile(
        num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_T=16, BLOCK_K=64, ROWS=1, FUSED=1, FILTER_ROWS=1
    ),
    pointers=("x_ptr", "dy_ptr", "dw_ptr"),
)
