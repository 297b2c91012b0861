"""Implicit GEMM of few channels, channels-last images: the weights stay in shared memory, sums of rows in registers."""

# Device code grows tuples, whose every length is another type.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ..geometry import ConvGeometry
from ..problem import Problem
from ..target import Target
from .arguments import geometry_arguments, weight_arguments
from .boxes import boxes, covering_box, load_box, pixels_spanned, unboxable
from .common import activate, aligned, below, dot, narrow, wide
from .kernel import Kernel, ProductTile, cdiv

# Of more channels or taps a multiprocessor has no room for the weights beside rows of the input, nor a thread for its
# part of them on their way there.
_MOST_CHANNELS, _MOST_TAPS = 64, 9


@triton.jit
def add_taps(total, filter_row, x_tiles, KW: tl.constexpr, PRECISION: tl.constexpr):
    """total + the products of a filter row's taps with the input that each of them meets.

    Each product is added by instructions of its own. Summed up by the matrix unit they would follow from each other,
    and of such products the compiler lays all warps along the rows: eight warps would multiply 64 rows twice. A plain
    addition it makes such a sum of again, hence the multiplication by one.
    """
    for kw in tl.static_range(KW):
        product = dot(filter_row[kw], x_tiles[kw], tl.zeros_like(total), PRECISION)
        total = tl.fma(product, 1.0, total)
    return total


@triton.jit
def store_halves(
    y_row, y_place, tile, mask_m, first_run, runs, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes a [channels, pixels] tile, activated, in runs of eight channels: first the even ones, then the odd ones.

    Either half turns into the layout of its store in the same shared memory; for the whole there is none left beside
    three rows of the input.
    """
    halves = tl.split(tl.permute(tl.reshape(tile, (BLOCK_N // 16, 2, 8, BLOCK_M)), (3, 0, 2, 1)))
    run = tl.arange(0, BLOCK_N // 2) // 8 * 2
    place = y_place[:, None] + (run * 8 + tl.arange(0, BLOCK_N // 2) % 8)[None, :]
    for i in tl.static_range(2):
        half = tl.reshape(narrow(activate(halves[i], ACTIVATION), y_row.dtype.element_ty), (BLOCK_M, BLOCK_N // 2))
        mask_n = first_run + run + i < runs
        tl.store(y_row + i * 8 + place, half, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def implicit_gemm_rolling_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_in_group, c_out_group, groups, h_in, w_in, h_out, w_out,
    stride_xn, stride_xh, stride_xw,
    stride_wg, stride_wn, stride_wk, stride_wh, stride_ww,
    stride_yn, stride_yh, stride_yw, stride_b,
    KH: tl.constexpr, KW: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr, W_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    K_LAST: tl.constexpr, BOX_N: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """y[m, n] = activation(sum_k x[m, k] w[k, n] + b[n]), m = (image, pixel), n = output channel, k = (channel, tap).

    A strip is BOX_N images by BOX_W columns. A program goes down strips, row by row of the input, of which it copies a
    box for each column of the filter and multiplies it by the weights of every row of the filter: the input passes KW
    times through L2 instead of KH x KW times, the weights once a program. KH rows of the output meet a row of the
    input; the uppermost is complete then and stored, the sums of the others wait in registers. The product is w x^T,
    as in `implicit_gemm_boxed`.

    A program that begins in the middle of a strip meets the KH - 1 rows above for their share of its first rows; what
    it sums up before that is stored nowhere, as is what is left over from the strip before.

    TRANSPOSED: the filter is mirrored, and PAD that of the forward convolution which this is.

    Grid: one axis of shares of the rows of all strips x groups x cdiv(N, BLOCK_N) programs, at most PROGRAMS or one
    share; N fastest, then groups: together they read whole lines of memory. Sums of rows that stay: the row-stationary
    dataflow of Eyeriss (Chen et al., ISCA 2016, doi:10.1109/ISCA.2016.40).
    """
    tiles_n = tl.cdiv(c_out_group, BLOCK_N)
    pid = tl.program_id(0)
    first_n = pid % tiles_n * BLOCK_N
    group = pid // tiles_n % groups
    share = pid // tiles_n // groups
    x_boxes = boxes(
        x_ptr + tl.cast(group * c_in_group, tl.int64), batch, 1, h_in, w_in, c_in_group,
        stride_xn, 0, stride_xh, stride_xw, 2, BOX_N, 1, 1, BOX_W, BLOCK_K,
    )  # fmt: skip
    y_base = y_ptr + aligned(tl.cast(group * c_out_group + first_n, tl.int64), Y_VECTOR)
    if INDEX_INT64:
        stride_yn, stride_yw = wide(stride_yn), wide(stride_yw)
    at_n = tl.arange(0, BLOCK_M) // BOX_W
    at_w = tl.arange(0, BLOCK_M) % BOX_W
    y_place = tl.multiple_of(at_n * stride_yn + at_w * stride_yw, Y_VECTOR)

    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = below(offs_n, c_out_group, W_VECTOR)
    mask_k = below(offs_k, c_in_group, W_VECTOR)
    w_base = w_ptr + aligned(tl.cast(group, tl.int64) * stride_wg, W_VECTOR)
    weights = ()
    for kh in tl.static_range(KH):
        filter_row = ()
        for kw in tl.static_range(KW):
            place = kh * stride_wh + kw * stride_ww
            if TRANSPOSED:
                place = (KH - 1 - kh) * stride_wh + (KW - 1 - kw) * stride_ww
            w_tap = w_base + aligned(place, W_VECTOR)
            if K_LAST:
                w_tile = tl.load(
                    w_tap + (tl.multiple_of(offs_n * stride_wn, W_VECTOR)[:, None] + offs_k[None, :]),
                    mask=mask_n[:, None] & mask_k[None, :],
                    other=0.0,
                )  # [BLOCK_N, BLOCK_K]
            else:
                w_tile = tl.trans(
                    tl.load(
                        w_tap + (tl.multiple_of(offs_k * stride_wk, W_VECTOR)[:, None] + offs_n[None, :]),
                        mask=mask_k[:, None] & mask_n[None, :],
                        other=0.0,
                    )
                )
            filter_row += (w_tile,)
        weights += (filter_row,)

    # The rows of this share, counted from the first strip's on, and where they begin.
    shares = tl.maximum(PROGRAMS // (tiles_n * groups), 1)
    in_row = tl.cdiv(w_out, BOX_W)
    rows = tl.cast(tl.cdiv(batch, BOX_N) * in_row * h_out, tl.int64)
    first = (rows * share // shares).to(tl.int32)
    end = (rows * (share + 1) // shares).to(tl.int32)
    strip = first // h_out
    n = strip // in_row * BOX_N
    w = strip % in_row * BOX_W
    start = first % h_out
    h = start - (KH - 1)
    fresh = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC_DTYPE)
    if HAS_BIAS:
        bias = tl.load(b_ptr + (group * c_out_group + offs_n) * stride_b, mask=offs_n < c_out_group, other=0.0)
        fresh += bias.to(ACC_DTYPE)[:, None]
    sums = ()
    for _ in tl.static_range(KH - 1):
        sums += (fresh,)
    # At least one step, which stores nothing: a loop that may not run costs every wgmma its overlap.
    for _ in range(tl.maximum(end - first + (KH - 1) * (tl.cdiv(end, h_out) - strip), 1)):
        x_tiles = ()
        for kw in tl.static_range(KW):
            x_tile = load_box(
                x_boxes, n, 0, h + (KH - 1 - PAD_H), w + (kw * DIL_W - PAD_W), 0, 2, BLOCK_M, BLOCK_K
            )  # fmt: skip
            x_tiles += (tl.trans(x_tile),)
        done = add_taps(sums[0], weights[KH - 1], x_tiles, KW, PRECISION)
        corner = tl.cast(n, tl.int64) * stride_yn + tl.cast(h, tl.int64) * stride_yh + w * stride_yw
        mask_m = (at_w < w_out - w) & (at_n < batch - n) & (h >= start)
        store_halves(
            y_base + aligned(corner, Y_VECTOR), y_place, done, mask_m, first_n // 8, c_out_group // 8, ACTIVATION,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        left = sums[1:] + (fresh,)
        sums = ()
        for i in tl.static_range(KH - 1):
            sums += (add_taps(left[i], weights[KH - 2 - i], x_tiles, KW, PRECISION),)
        h += 1
        last = h == h_out
        h = tl.where(last, 1 - KH, h)
        start = tl.where(last, 0, start)
        w = tl.where(last, w + BOX_W, w)
        carry = w >= w_out
        w = tl.where(carry, 0, w)
        n = tl.where(carry, n + BOX_N, n)


@dataclass(frozen=True)
class ImplicitGemmRollingTile(ProductTile):
    """Rows of BLOCK_M output pixels by BLOCK_N output channels, from at most BLOCK_K channels; PROGRAMS as the kernel
    explains.
    """

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages", "PROGRAMS"})

    BLOCK_M: int = 128
    BLOCK_N: int = 64
    BLOCK_K: int = 64
    PROGRAMS: int = 132

    def load_bytes(self, problem: Problem, target: Target) -> int:
        """Of the weights, once; the copy engine brings the input."""
        return 2 * problem.w_vector(problem.geometry.c_in_group, problem.geometry.c_out_group)

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        """All weights, boxes of a row for every stage, barriers, and beside them half of the result on its way out."""
        _, height, width = problem.geometry.kernel
        weights = height * width * self.BLOCK_N * self.BLOCK_K
        copied = self.num_stages * width * self.BLOCK_M * self.BLOCK_K
        return problem.itemsize * (weights + copied + self.BLOCK_M * self.BLOCK_N // 2) + 128

    def mismatch(self, problem: Problem) -> str | None:
        g = problem.geometry
        return f"groups have {g.c_in_group} channels" if g.c_in_group > self.BLOCK_K else None

    def unfit(self, problem: Problem, target: Target) -> str | None:
        if reason := super().unfit(problem, target):
            return reason
        # Sums of a row of the output for each of the filter, and a product that is added to one.
        registers = (problem.geometry.kernel[1] + 1) * self.accumulator_values() // (self.num_warps * target.warp_size)
        if registers > 160 and not target.interpreted:
            return f"{registers} registers a thread for sums and a product"
        return None

    def shares(self, problem: Problem) -> int:
        """Parts that the rows of a group are divided into."""
        g = problem.geometry
        return max(self.PROGRAMS // (g.groups * cdiv(g.c_out_group, self.BLOCK_N)), 1)

    def strip(self, problem: Problem) -> dict[str, int]:
        """Images and columns of which a box is a row."""
        g = problem.geometry
        return covering_box((g.batch, 1, 1, g.out_size[2]), self.BLOCK_M)

    def steps(self, problem: Problem) -> int:
        """Rows of the input that the program which meets most of them does."""
        g, box, shares = problem.geometry, self.strip(problem), self.shares(problem)
        height, above = g.out_size[1], g.kernel[1] - 1
        rows = cdiv(g.batch, box["BOX_N"]) * cdiv(g.out_size[2], box["BOX_W"]) * height
        spans = itertools.pairwise(rows * share // shares for share in range(shares + 1))
        return max(end - first + above * (cdiv(end, height) - first // height) for first, end in spans)


def _grid(problem: Problem, tile: ImplicitGemmRollingTile) -> int:
    g = problem.geometry
    return cdiv(g.c_out_group, tile.BLOCK_N) * g.groups * tile.shares(problem)


def _forward(problem: Problem) -> ConvGeometry | None:
    """The forward convolution that the problem is, with mirrored filters if it is transposed."""
    return problem.geometry.flipped() if problem.geometry.transposed else problem.geometry


def _arguments(problem: Problem, tile: ImplicitGemmRollingTile) -> dict[str, object]:
    g, forward, sides = problem.geometry, _forward(problem), tile.strip(problem)
    assert forward is not None
    return (
        geometry_arguments(problem, pixels_spanned(problem, sides))
        | weight_arguments(problem)
        | tile.sizes()
        | sides
        | dict(
            PAD_H=forward.pad_before[1],
            PAD_W=forward.pad_before[2],
            Y_VECTOR=problem.y_vector(g.c_out_group),
        )
    )


def _unsuited(problem: Problem) -> str | None:
    g = problem.geometry
    if g.rank != 2 or g.kernel[1] == 1:
        return "there are no rows of a filter to go down an image with"
    if g.stride != (1, 1, 1) or g.dilation[1] != 1:
        return f"it does not meet row after row: its stride is {g.stride}, its dilation {g.dilation}"
    if g.c_in_group > _MOST_CHANNELS or g.taps > _MOST_TAPS:
        return f"the weights of {g.taps} taps of {g.c_in_group} channels do not stay in shared memory"
    if _forward(problem) is None:
        return "it is transposed, with more padding than its filter reaches"
    if reason := unboxable(problem):
        return reason
    if g.c_out_group * problem.itemsize % 16:
        return f"groups of {g.c_out_group} channels do not begin at a multiple of 16 bytes"
    return None if problem.w_strides[1] == 1 else "the second dimension of its weight is not contiguous"


KERNEL = Kernel(
    name="implicit_gemm_rolling",
    function=implicit_gemm_rolling_kernel,
    tile_type=ImplicitGemmRollingTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=ImplicitGemmRollingTile(num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_N=64, BLOCK_K=64),
    descriptors=True,
    products=True,
)
