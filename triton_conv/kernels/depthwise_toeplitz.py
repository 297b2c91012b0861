"""Depthwise convolution of many images as one product a channel, for rows of contiguous pixels (NCHW), rank 1 and 2."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from .arguments import geometry_arguments
from .banded_rows import no_rows_of_pixels
from .common import activate, aligned, dot, narrow, wide, within
from .kernel import Ahead, Kernel, ProductTile, cdiv
from .toeplitz_blocks import BLOCK_ELEMENTS, hops, toeplitz_blocks_kernel, unsuited_rows, width_in, width_out


@triton.jit
def depthwise_toeplitz_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_out, h_in, w_in, h_out, w_out,
    stride_xn, stride_xc, stride_xh, stride_yn, stride_yc, stride_yh, stride_yw, stride_b,
    KH: tl.constexpr, STRIDE_H: tl.constexpr, PAD_H: tl.constexpr, DIL_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr,
    INDEX_INT64: tl.constexpr, MULTIPLIER: tl.constexpr, X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    WIDTH_IN: tl.constexpr, WIDTH_OUT: tl.constexpr, HOP: tl.constexpr, LAG: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """y[m, n] = activation(sum_r sum_j x_r[m, j] block_r[j, n] + b[c]), block_r[j, n] = w[c, r - a LAG, tap(j, t)].

    One channel c at a time. m runs over (group of output rows, image), n = (a, t) over ROWS output rows of the group,
    HOP apart, and all their columns. A step multiplies whole input rows, so that side padding costs nothing, by blocks
    of the filter that `toeplitz_blocks` laid out before: the weight of tap(j, t) at (j, t), else zero. r counts filter
    rows for the first row of each group, BLOCK_K // WIDTH_IN of them a step, and only those for which some group has a
    row inside the image. Both factors are copied ahead and read from shared memory as they are.

    A banded product of blocks of columns reads an input row for each filter row, and multiplies as many zeros as
    weights where a filter is as long as a block is wide. Here a step's input rows serve ROWS output rows each, and its
    blocks serve all images and GROUPS.

    Zeros of a block are multiplied: an infinity or NaN in the input makes NaN of whole rows of the outputs that read
    its row.

    Grid: one axis of blocks of GROUPS x ROWS output rows x blocks of images x c_out programs, rows fastest, so that the
    programs that share a channel's blocks run together. Toeplitz products: Ku et al., StripedHyena 2, arXiv:2503.01868,
    there in one dimension.
    """
    ROWS: tl.constexpr = BLOCK_N // WIDTH_OUT
    IMAGES: tl.constexpr = BLOCK_M // GROUPS
    TOGETHER: tl.constexpr = BLOCK_K // WIDTH_IN
    row_blocks = HOP * tl.cdiv(tl.cdiv(h_out, HOP), GROUPS * ROWS)
    pid = tl.program_id(0)
    row_block = pid % row_blocks
    image_blocks = tl.cdiv(batch, IMAGES)
    first = pid // row_blocks % image_blocks * IMAGES
    c = pid // row_blocks // image_blocks
    if INDEX_INT64:
        stride_xh, stride_yh, stride_yw = wide(stride_xh), wide(stride_yh), wide(stride_yw)

    # Rows of a block are HOP apart, so that a filter row more is LAG rows of the filter for the next of them.
    h_first = row_block % HOP + row_block // HOP * (HOP * GROUPS * ROWS)
    h_last = tl.minimum(h_first + (GROUPS - 1) * ROWS * HOP, h_out - 1)
    offs_m = tl.arange(0, BLOCK_M)
    image = offs_m % IMAGES
    h0 = h_first + offs_m // IMAGES * (ROWS * HOP)
    i0 = h0 * STRIDE_H - PAD_H
    live = first + image < batch
    offs_k = tl.arange(0, BLOCK_K)
    j = offs_k % WIDTH_IN
    later = offs_k // WIDTH_IN
    offs_n = tl.arange(0, BLOCK_N)
    offs_a = offs_n // WIDTH_OUT
    offs_t = offs_n % WIDTH_OUT

    x_offset = (image * stride_xn + i0 * stride_xh)[:, None] + (later * (DIL_H * stride_xh) + j)[None, :]
    x_offset = tl.max_contiguous(tl.multiple_of(x_offset, (1, X_VECTOR)), (1, X_VECTOR))
    x_base = x_ptr + aligned(c // MULTIPLIER * wide(stride_xc) + first * wide(stride_xn), X_VECTOR)
    x_inside = live[:, None] & (offs_k // X_VECTOR % (WIDTH_IN // X_VECTOR) < w_in // X_VECTOR)[None, :]
    # Blocks lie by (channel, input column, filter row, output column).
    w_row = later[:, None] - (offs_a * LAG)[None, :]
    w_offset = j[:, None] * (KH * WIDTH_OUT) + w_row * WIDTH_OUT + offs_t[None, :]
    w_base = w_ptr + tl.cast(c, tl.int64) * w_in * (KH * WIDTH_OUT)
    w_inside = (j < w_in)[:, None]

    begin = tl.cdiv(tl.maximum(PAD_H - h_last * STRIDE_H, 0), DIL_H)
    end = tl.minimum(tl.cdiv(tl.maximum(h_in + PAD_H - h_first * STRIDE_H, 0), DIL_H), KH + (ROWS - 1) * LAG)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    # At least one step, masked off where no row is read: a loop that may not run costs every wgmma its overlap.
    for step in range(tl.maximum(tl.cdiv(end - begin, TOGETHER), 1)):
        r = begin + step * TOGETHER
        inside = within((i0 + r * DIL_H)[:, None] + (later * DIL_H)[None, :], h_in)
        x_tile = tl.load(
            x_base + aligned(r * (DIL_H * stride_xh), X_VECTOR) + x_offset, mask=x_inside & inside, other=0.0
        )  # [BLOCK_M, BLOCK_K]
        w_tile = tl.load(
            w_base + r * WIDTH_OUT + w_offset, mask=w_inside & within(w_row + r, KH), other=0.0
        )  # [BLOCK_K, BLOCK_N]
        acc = dot(x_tile, w_tile, acc, PRECISION)

    if HAS_BIAS:
        acc += tl.load(b_ptr + c * wide(stride_b), mask=c < c_out, other=0.0).to(ACC_DTYPE)
    y_base = y_ptr + aligned(c * wide(stride_yc) + first * wide(stride_yn), Y_VECTOR)
    y_offset = (image * stride_yn + h0 * stride_yh)[:, None] + (offs_a * (HOP * stride_yh) + offs_t * stride_yw)[
        None, :
    ]
    y_offset = tl.max_contiguous(tl.multiple_of(y_offset, (1, Y_VECTOR)), (1, Y_VECTOR))
    y_inside = live[:, None] & (h0[:, None] + (offs_a * HOP)[None, :] < h_out)
    tl.store(
        y_base + y_offset,
        narrow(activate(acc, ACTIVATION), y_ptr.dtype.element_ty),
        mask=y_inside & (offs_n // Y_VECTOR % (WIDTH_OUT // Y_VECTOR) < w_out // Y_VECTOR)[None, :],
    )


_LEAST_BYTES = 4 << 20
"""Memory that may be taken however small the problem is: with two images, so that a first use can be checked."""


@dataclass(frozen=True)
class DepthwiseToeplitzTile(ProductTile):
    """BLOCK_M pairs of an image and one of GROUPS groups of output rows, by BLOCK_N columns of whole output rows, from
    BLOCK_K columns of whole input rows a step.
    """

    GROUPS: int = 1

    def runs(self, problem: Problem) -> tuple[int, int]:
        return problem.x_run(16 // problem.itemsize), width_out(problem)

    def mismatch(self, problem: Problem) -> str | None:
        if min(self.BLOCK_M, self.BLOCK_N, self.BLOCK_K) < 16:
            return "a product takes at least 16 of each dimension"
        if (width := width_in(problem)) > self.BLOCK_K:
            return f"an input row of {width} columns does not fit in a step of {self.BLOCK_K}"
        if (width := width_out(problem)) > self.BLOCK_N:
            return f"an output row of {width} columns does not fit in {self.BLOCK_N}"
        if self.GROUPS > self.BLOCK_M:
            return f"there are {self.GROUPS} groups of rows in {self.BLOCK_M}"
        return None

    def output_rows(self, problem: Problem) -> int:
        """Output rows of a group."""
        return self.BLOCK_N // width_out(problem)

    def steps(self, problem: Problem) -> float:
        """Steps of a program, the mean over the blocks of output rows."""
        g, hop, lag = problem.geometry, *hops(problem)
        rows = self.output_rows(problem)
        total = 0
        for block in range(count := _row_blocks(problem, self)):
            first = block % hop + block // hop * hop * self.GROUPS * rows
            last = min(first + (self.GROUPS - 1) * rows * hop, g.out_size[1] - 1)
            begin = cdiv(max(g.pad_before[1] - last * g.stride[1], 0), g.dilation[1])
            end = cdiv(max(g.in_size[1] + g.pad_before[1] - first * g.stride[1], 0), g.dilation[1])
            end = min(end, g.kernel[1] + (rows - 1) * lag)
            total += max(cdiv(end - begin, self.BLOCK_K // width_in(problem)), 1)
        return total / count


def _row_blocks(problem: Problem, tile: DepthwiseToeplitzTile) -> int:
    """Blocks of output rows."""
    hop, _ = hops(problem)
    return hop * cdiv(cdiv(problem.geometry.out_size[1], hop), tile.GROUPS * tile.output_rows(problem))


def block_numbers(problem: Problem) -> int:
    """Numbers of all blocks."""
    g = problem.geometry
    return g.c_out * g.in_size[2] * g.kernel[1] * width_out(problem)


def _block_rows(problem: Problem) -> int:
    """Rows of blocks that a program lays out."""
    return BLOCK_ELEMENTS // width_out(problem)


def _grid(problem: Problem, tile: DepthwiseToeplitzTile) -> int:
    g = problem.geometry
    return g.c_out * cdiv(g.batch, tile.BLOCK_M // tile.GROUPS) * _row_blocks(problem, tile)


def _arguments(problem: Problem, tile: DepthwiseToeplitzTile) -> dict[str, object]:
    g = problem.geometry
    hop, lag = hops(problem)
    return (
        geometry_arguments(problem, tile.BLOCK_M // tile.GROUPS * g.out_pixels)
        | tile.sizes()
        | dict(
            c_out=g.c_out,
            MULTIPLIER=g.c_out_group,
            X_VECTOR=problem.x_run(16 // problem.itemsize),
            Y_VECTOR=problem.y_run(16 // problem.itemsize),
            WIDTH_IN=width_in(problem),
            WIDTH_OUT=width_out(problem),
            HOP=hop,
            LAG=lag,
            BLOCK_R=_block_rows(problem),
        )
    )


def _unsuited(problem: Problem) -> str | None:
    if reason := no_rows_of_pixels(problem) or unsuited_rows(problem):
        return reason
    blocks = problem.itemsize * block_numbers(problem)
    if blocks > max(problem.itemsize * sum(problem.ends) // 2, _LEAST_BYTES):
        return f"the blocks of its filters take {blocks} bytes, more than half of input and output"
    return None


KERNEL = Kernel(
    name="depthwise_toeplitz",
    function=depthwise_toeplitz_kernel,
    tile_type=DepthwiseToeplitzTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=DepthwiseToeplitzTile(num_warps=4, num_stages=1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
    ahead=Ahead(
        function=toeplitz_blocks_kernel,
        numbers=block_numbers,
        grid=lambda problem: (
            problem.geometry.c_out
            * cdiv(problem.geometry.in_size[2] * problem.geometry.kernel[1], _block_rows(problem))
        ),
    ),
)
