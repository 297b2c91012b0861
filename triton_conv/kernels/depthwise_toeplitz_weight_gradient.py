"""Weight gradient of a depthwise convolution of many images as products of whole rows, rank 1 and 2, for NCHW."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from ..target import Target
from .arguments import geometry_arguments
from .banded_sums import unsuited
from .common import aligned, dot, wide, within
from .kernel import Kernel, ProductTile, cdiv
from .toeplitz_blocks import hops, unsuited_rows, width_in, width_out


@triton.jit
def depthwise_toeplitz_weight_gradient_kernel(
    x_ptr, dy_ptr, dw_ptr,
    batch, c_out, h_in, w_in, h_out, w_out,
    stride_xn, stride_xc, stride_xh, stride_yn, stride_yc, stride_yh, stride_yw,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, BLOCK_S: tl.constexpr,
    WIDTH_IN: tl.constexpr, WIDTH_OUT: tl.constexpr, HOP: tl.constexpr, LAG: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[a, c, first + f - a LAG, s] = sum_t sums[(f, j(s, t)), (a, t)], sums = sum_k x[k, (f, j)] dy[k, (a, t)].

    One channel c at a time. A product takes whole rows: BLOCK_M // WIDTH_IN input rows f, a dilation apart, by
    BLOCK_N // WIDTH_OUT output rows a, HOP apart, over BLOCK_K images k. It goes down the image, all its output rows
    a step, so that each pair (f, a) meets at the same row of the filter throughout; steps with no input row inside the
    image are left out. At the end the tap s of column t, at column j(s, t) = t STRIDE_W + s DIL_W - PAD_W, is summed
    along its diagonal; the sums for other (j, t) are thrown away.

    The rows f of all programs are KH and those by which the last a lags: part a of the results, one for each output row
    of a product, has every row r once. Partial sums of float32, added up by the caller in a fixed order.

    Grid: one axis of blocks of rows f x c_out programs, rows fastest: they read the same rows from L2. Toeplitz
    products: Ku et al., StripedHyena 2, arXiv:2503.01868, there in one dimension.
    """
    ROWS_IN: tl.constexpr = BLOCK_M // WIDTH_IN
    ROWS_OUT: tl.constexpr = BLOCK_N // WIDTH_OUT
    # Output rows that a block of them spans, the rows between them included: HOP steps take it.
    SPAN: tl.constexpr = HOP * ROWS_OUT
    row_blocks: tl.constexpr = (KH + (ROWS_OUT - 1) * LAG + ROWS_IN - 1) // ROWS_IN
    first_r = tl.program_id(0) % row_blocks * ROWS_IN
    c = tl.program_id(0) // row_blocks
    if INDEX_INT64:
        stride_xh, stride_yh, stride_yw = wide(stride_xh), wide(stride_yh), wide(stride_yw)

    offs_k = tl.arange(0, BLOCK_K)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    dh = offs_m // WIDTH_IN * DIL_H
    offs_a = offs_n // WIDTH_OUT
    offs_t = offs_n % WIDTH_OUT
    x_offset = (offs_k * stride_xn)[:, None] + (dh * stride_xh + offs_m % WIDTH_IN)[None, :]
    x_offset = tl.max_contiguous(tl.multiple_of(x_offset, (1, X_VECTOR)), (1, X_VECTOR))
    y_offset = (offs_k * stride_yn)[:, None] + (offs_a * (HOP * stride_yh) + offs_t * stride_yw)[None, :]
    y_offset = tl.max_contiguous(tl.multiple_of(y_offset, (1, Y_VECTOR)), (1, Y_VECTOR))
    x_base = x_ptr + aligned(c * wide(stride_xc), X_VECTOR)
    y_base = dy_ptr + aligned(c * wide(stride_yc), Y_VECTOR)
    x_inside = offs_m // X_VECTOR % (WIDTH_IN // X_VECTOR) < w_in // X_VECTOR
    y_inside = offs_n // Y_VECTOR % (WIDTH_OUT // Y_VECTOR) < w_out // Y_VECTOR

    # Of output rows from `begin` on, and before `end`, some input row of the block is inside the image.
    begin = tl.cdiv(tl.maximum(PAD_H - (first_r + ROWS_IN - 1) * DIL_H, 0), STRIDE_H) // SPAN * HOP
    end = tl.minimum(tl.cdiv(tl.maximum(h_in + PAD_H - first_r * DIL_H, 0), STRIDE_H), h_out)
    chunks = tl.cdiv(batch, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    # At least one step, masked off where no row is read: a loop that may not run costs every wgmma its overlap.
    for step in range(tl.maximum((tl.cdiv(end, SPAN) * HOP - begin) * chunks, 1)):
        block = begin + step // chunks
        first = step % chunks * BLOCK_K
        h0 = block % HOP + block // HOP * SPAN
        i0 = h0 * STRIDE_H - PAD_H + first_r * DIL_H
        live = (offs_k < batch - first)[:, None]
        x_tile = tl.load(
            x_base + aligned(first * wide(stride_xn) + i0 * stride_xh, X_VECTOR) + x_offset,
            mask=live & (x_inside & within(i0 + dh, h_in))[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_M]
        dy_tile = tl.load(
            y_base + aligned(first * wide(stride_yn) + h0 * stride_yh, Y_VECTOR) + y_offset,
            mask=live & (y_inside & (h0 + offs_a * HOP < h_out))[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        acc = dot(tl.trans(x_tile), dy_tile, acc, PRECISION)

    # A gather among the columns of one row takes a shuffle an element, among all BLOCK_M as many as these are warps.
    offs_s = tl.arange(0, BLOCK_S)
    j = (offs_s * DIL_W)[:, None] + (offs_t * STRIDE_W - PAD_W)[None, :]
    met = (within(j, w_in) & (offs_t < w_out)[None, :])[None, :, :]
    column = tl.broadcast_to(tl.where(met, j[None, :, :], 0), (ROWS_IN, BLOCK_S, BLOCK_N))
    diagonal = tl.gather(tl.reshape(acc, (ROWS_IN, WIDTH_IN, BLOCK_N)), column, axis=1)
    diagonal = tl.reshape(tl.where(met, diagonal, 0.0), (ROWS_IN, BLOCK_S, ROWS_OUT, WIDTH_OUT))
    total = tl.reshape(tl.sum(diagonal, axis=3), (ROWS_IN * BLOCK_S, ROWS_OUT))
    offs = tl.arange(0, ROWS_IN * BLOCK_S)
    part = tl.arange(0, ROWS_OUT)
    r = (first_r + offs // BLOCK_S)[:, None] - (part * LAG)[None, :]
    row = (part.to(tl.int64) * c_out + c)[None, :] * KH + r
    tap = (offs % BLOCK_S)[:, None]
    tl.store(dw_ptr + row * KW + tap, total, mask=within(r, KH) & (tap < KW))


@dataclass(frozen=True)
class DepthwiseToeplitzWeightGradientTile(ProductTile):
    """BLOCK_M columns of whole input rows by BLOCK_N columns of whole output rows, BLOCK_K images a step."""

    def runs(self, problem: Problem) -> tuple[int, int]:
        return problem.x_run(16 // problem.itemsize), problem.y_run(16 // problem.itemsize)

    def parts(self, problem: Problem) -> int:
        return max(self.BLOCK_N // width_out(problem), 1)

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        # Sums pass through the same memory at the end, to be read along diagonals.
        sums = (self.BLOCK_M + 4) * (self.BLOCK_N + 4) * problem.accumulator_bytes
        return max(super().shared_bytes(problem, target), sums)

    def mismatch(self, problem: Problem) -> str | None:
        if min(self.BLOCK_M, self.BLOCK_N, self.BLOCK_K) < 16:
            return "a product takes at least 16 of each dimension"
        if (width := width_in(problem)) > self.BLOCK_M:
            return f"an input row of {width} columns does not fit in {self.BLOCK_M}"
        if (width := width_out(problem)) > self.BLOCK_N:
            return f"an output row of {width} columns does not fit in {self.BLOCK_N}"
        return None

    def steps(self, problem: Problem) -> float:
        """Steps of a program, the mean over the blocks of input rows."""
        g, hop = problem.geometry, hops(problem)[0]
        rows, span = self.BLOCK_M // width_in(problem), hop * self.parts(problem)
        total = 0
        for block in range(count := row_blocks(problem, self)):
            first, last = block * rows * g.dilation[1], ((block + 1) * rows - 1) * g.dilation[1]
            begin = cdiv(max(g.pad_before[1] - last, 0), g.stride[1]) // span
            end = min(cdiv(max(g.in_size[1] + g.pad_before[1] - first, 0), g.stride[1]), g.out_size[1])
            total += max((cdiv(end, span) - begin) * hop * cdiv(g.batch, self.BLOCK_K), 1)
        return total / count


def row_blocks(problem: Problem, tile: DepthwiseToeplitzWeightGradientTile) -> int:
    """Blocks of input rows, counted from the first that an output row reads."""
    rows = problem.geometry.kernel[1] + (tile.parts(problem) - 1) * hops(problem)[1]
    return cdiv(rows, tile.BLOCK_M // width_in(problem))


def _grid(problem: Problem, tile: DepthwiseToeplitzWeightGradientTile) -> int:
    return problem.geometry.c_out * row_blocks(problem, tile)


def _arguments(problem: Problem, tile: DepthwiseToeplitzWeightGradientTile) -> dict[str, object]:
    g = problem.geometry
    hop, lag = hops(problem)
    return (
        geometry_arguments(problem, tile.BLOCK_K * g.out_pixels)
        | tile.sizes()
        | dict(
            c_out=g.c_out,
            X_VECTOR=problem.x_run(16 // problem.itemsize),
            Y_VECTOR=problem.y_run(16 // problem.itemsize),
            BLOCK_S=triton.next_power_of_2(g.kernel[2]),
            WIDTH_IN=width_in(problem),
            WIDTH_OUT=width_out(problem),
            HOP=hop,
            LAG=lag,
        )
    )


def _unsuited(problem: Problem) -> str | None:
    return unsuited(problem) or unsuited_rows(problem)


KERNEL = Kernel(
    name="depthwise_toeplitz_weight_gradient",
    function=depthwise_toeplitz_weight_gradient_kernel,
    tile_type=DepthwiseToeplitzWeightGradientTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=DepthwiseToeplitzWeightGradientTile(num_warps=4, num_stages=1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
    pointers=("x_ptr", "dy_ptr", "dw_ptr"),
)
