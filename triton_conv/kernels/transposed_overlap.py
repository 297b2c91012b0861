"""Transposed convolution in NCHW of small images, or of rows: a product for every tap, added up where taps overlap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from ..layout import one_run, span
from ..problem import INT32_LIMIT, VECTOR_LIMIT, Problem, vector_of
from ..target import Target
from .arguments import geometry_arguments
from .common import aligned, below, dot, epilogue, narrow
from .kernel import Kernel, ProductTile, cdiv


@triton.jit
def met_tap(q, j, STRIDE: tl.constexpr, PAD: tl.constexpr):
    """The j-th tap that output `q` of an axis meets, and the input that it meets there."""
    return (q + PAD) % STRIDE + j * STRIDE, (q + PAD) // STRIDE - j


@triton.jit
def transposed_overlap_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_in_group, c_out_group, pixels_in, pixels_out, windows,
    stride_xn, stride_xc, stride_wo, stride_yn, stride_yc, stride_b,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    IN_D: tl.constexpr, IN_H: tl.constexpr, IN_W: tl.constexpr,
    OUT_D: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr,
    X_VECTOR: tl.constexpr, W_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    WINDOW: tl.constexpr, STEP: tl.constexpr, BEFORE: tl.constexpr, CHANNELS: tl.constexpr, MET: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[q, n] = activation(sum_{k, i : q + PAD - k = i STRIDE} p[n, k, i] + b[n]).

    p[n, k, i] = sum_c w[c, n, k] x[c, i] is one product of the weight and the input as they lie in memory, both in long
    runs: its rows are pairs of an output channel and a tap, CHANNELS whole channels a program, its columns the pixels
    of whole images, or of windows of one row, WINDOW each. Nothing is packed, no pixel is read for a single tap. Where
    taps overlap in an output, p is read back from shared memory, once a program: MET elements for each output, for
    PIECE of them at a time.

    The outputs of a window begin STEP strides after those of the one before, and its pixels BEFORE earlier: what its
    outputs overlap with. Of whole images there is one window each.

    Grid: one axis of cdiv(N, CHANNELS) x cdiv(windows, those of a tile) x groups programs, N fastest, so that programs
    which read the same pixels run together. The columns of Caffe (Jia et al. 2014, arXiv:1408.5093), which never leave
    the program; Dumoulin and Visin, arXiv:1603.07285, section 4, for what an output meets.
    """
    TAPS: tl.constexpr = KD * KH * KW
    OUT: tl.constexpr = OUT_D * OUT_H * OUT_W
    HELD: tl.constexpr = BLOCK_M // WINDOW
    MET_H: tl.constexpr = (KH + STRIDE_H - 1) // STRIDE_H
    MET_W: tl.constexpr = (KW + STRIDE_W - 1) // STRIDE_W
    tiles_n = tl.cdiv(c_out_group, CHANNELS)
    tiles_m = tl.cdiv(batch * windows, HELD)
    pid = tl.program_id(0)
    first_n = pid % tiles_n * CHANNELS
    first_m = pid // tiles_n % tiles_m * HELD
    first = first_m // windows
    group = pid // tiles_n // tiles_m

    channel = tl.cast(group * c_in_group, tl.int64)
    x_base = x_ptr + tl.cast(first, tl.int64) * stride_xn + aligned(channel * stride_xc, X_VECTOR)
    w_base = w_ptr + aligned(channel * stride_wo, W_VECTOR)
    offs_m = tl.arange(0, BLOCK_M)
    window = first_m + offs_m // WINDOW
    image = window // windows - first
    pixel = window % windows * STEP + (offs_m % WINDOW - BEFORE)
    mask_m = tl.max_constancy((pixel >= 0) & (pixel < pixels_in) & (image < batch - first), X_VECTOR)
    x_place = tl.max_contiguous(tl.multiple_of(image * stride_xn + pixel, X_VECTOR), X_VECTOR)
    pair = first_n * TAPS + tl.arange(0, BLOCK_N)
    mask_n = below(pair, c_out_group * TAPS, W_VECTOR)
    offs_k = tl.arange(0, BLOCK_K)

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC_DTYPE)
    # At least one step, masked off where there is no channel: a loop that may not run costs every wgmma its overlap.
    for step in range(tl.maximum(tl.cdiv(c_in_group, BLOCK_K), 1)):
        c = step * BLOCK_K + offs_k
        mask_k = c < c_in_group
        x_tile = tl.load(
            x_base + tl.multiple_of(c * stride_xc, X_VECTOR)[:, None] + x_place[None, :],
            mask=mask_k[:, None] & mask_m[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_M]
        w_tile = tl.load(
            w_base + tl.multiple_of(c * stride_wo, W_VECTOR)[:, None] + pair[None, :],
            mask=mask_k[:, None] & mask_n[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        acc = dot(tl.trans(w_tile), x_tile, acc, PRECISION)

    # The j-th parts of a piece lie PIECE after the ones before, so that those of an output are a thread's own.
    sums = tl.reshape(acc, (BLOCK_N * BLOCK_M,))
    entry = tl.arange(0, MET * PIECE)
    j = entry // PIECE
    channel = group * c_out_group + first_n
    y_base = y_ptr + tl.cast(first, tl.int64) * stride_yn + aligned(tl.cast(channel, tl.int64) * stride_yc, Y_VECTOR)
    for piece in tl.static_range(PIECES):
        offs_y = piece * PIECE + entry % PIECE
        q = offs_y % OUT
        n = offs_y // (OUT * HELD)
        k_d, i_d = met_tap(q // (OUT_H * OUT_W), j // (MET_H * MET_W), STRIDE_D, PAD_D)
        k_h, i_h = met_tap(q // OUT_W % OUT_H, j // MET_W % MET_H, STRIDE_H, PAD_H)
        k_w, i_w = met_tap(q % OUT_W, j % MET_W, STRIDE_W, PAD_W)
        i_w += BEFORE
        met = (n < CHANNELS) & (k_d < KD) & (i_d >= 0) & (i_d < IN_D)
        met = met & (k_h < KH) & (i_h >= 0) & (i_h < IN_H) & (k_w < KW) & (i_w >= 0) & (i_w < IN_W)
        row = n * TAPS + (k_d * KH + k_h) * KW + k_w
        column = offs_y // OUT % HELD * WINDOW + (i_d * IN_H + i_h) * IN_W + i_w
        parts = tl.where(met, tl.gather(sums, tl.where(met, row * BLOCK_M + column, 0), 0), 0.0)
        total = tl.sum(tl.reshape(parts, (MET, PIECE)), axis=0)

        offs_y = piece * PIECE + tl.arange(0, PIECE)
        window = first_m + offs_y // OUT % HELD
        image = window // windows - first
        pixel = window % windows * OUT + offs_y % OUT
        n = offs_y // (OUT * HELD)
        mask_y = (n < CHANNELS) & (n < c_out_group - first_n) & (image < batch - first) & (pixel < pixels_out)
        result = epilogue(total[None, :], b_ptr, stride_b, channel + n, mask_y, HAS_BIAS, ACTIVATION)
        y_place = image * stride_yn + n * stride_yc + pixel
        tl.store(
            y_base + tl.max_contiguous(tl.multiple_of(y_place, Y_VECTOR), Y_VECTOR)[None, :],
            narrow(result, y_ptr.dtype.element_ty),
            mask=tl.max_constancy(mask_y, Y_VECTOR)[None, :],
        )


# Parts of outputs that a thread reads back at once, and all threads of a program: half of the registers that they have.
_MOST_PARTS = (128, 1 << 15)
# Each piece of the outputs is code of its own.
_MOST_PIECES = 8
_MOST_PIXELS = 256


@dataclass(frozen=True)
class TransposedOverlapTile(ProductTile):
    """BLOCK_M pixels of whole input images by BLOCK_N pairs of an output channel and a tap, BLOCK_K channels a step."""

    def runs(self, problem: Problem) -> tuple[int, int]:
        return x_vector(problem), w_vector(problem, self)

    def rows(self) -> int:
        return self.BLOCK_N

    def mismatch(self, problem: Problem) -> str | None:
        g = problem.geometry
        if g.taps > self.BLOCK_N:
            return f"{g.taps} taps do not fit in {self.BLOCK_N} pairs"
        window = windows(problem, self)
        if window.step < 1:
            return f"an image of {g.in_pixels} pixels does not fit in {self.BLOCK_M}"
        if (count := pieces(problem, self)[1]) > _MOST_PIECES:
            return f"{count} pieces of outputs are not unrolled"
        images = held(problem, self)[0] + 1
        spans = (
            span(problem.x_strides, (images, g.c_in, *g.in_size)),
            span(problem.y_strides, (images, g.c_out, *g.out_size)),
            span((problem.stride_b,), (g.c_out,)),
            g.c_in * g.c_out_group * g.taps,
            g.batch * window.count,
        )
        return "offsets inside a tile pass 2^31" if max(spans) > INT32_LIMIT else None

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        # The sums lie there as a whole, when the operands are gone.
        sums = self.accumulator_values() * problem.accumulator_bytes
        return max(super().shared_bytes(problem, target), sums)


@dataclass(frozen=True)
class Windows:
    """How images lie in a tile: `count` windows each, of `columns` columns, `step` pixels apart, beginning `before` the
    pixel that their first output's stride has, of `outputs` outputs.
    """

    count: int
    columns: int
    step: int
    before: int
    outputs: int


def image_columns(problem: Problem) -> int:
    """Columns of the product that an input image takes as a whole."""
    return 1 << max(problem.geometry.in_pixels - 1, 0).bit_length()


def one_row(problem: Problem) -> bool:
    """Whether images are one row, of which a part can be a window."""
    g = problem.geometry
    return g.in_size[:2] == g.out_size[:2] == (1, 1)


def windows(problem: Problem, tile: TransposedOverlapTile) -> Windows:
    """Whole images where they fit; else as much of a row as fits, from an aligned pixel on. Without a step, neither."""
    g = problem.geometry
    if (columns := image_columns(problem)) <= tile.BLOCK_M:
        return Windows(1, columns, columns, 0, g.out_pixels)
    if not one_row(problem):
        return Windows(1, columns, 0, 0, g.out_pixels)
    taps, stride, pad, vector = g.kernel[2], g.stride[2], g.pad_before[2], x_vector(problem)
    before = cdiv(max(cdiv(taps, stride) - 1 - pad // stride, 0), vector) * vector
    after = (pad - 1) // stride + 1
    step = (tile.BLOCK_M - before - after) // vector * vector
    outputs = max(step, 1) * stride
    return Windows(cdiv(g.out_pixels, outputs), tile.BLOCK_M, step, before, outputs)


def held(problem: Problem, tile: TransposedOverlapTile) -> tuple[int, int]:
    """Windows and output channels of a program."""
    return tile.BLOCK_M // windows(problem, tile).columns, tile.BLOCK_N // problem.geometry.taps


def met(problem: Problem) -> int:
    """Taps that an output meets at most, up to a power of two."""
    g = problem.geometry
    taps = math.prod(cdiv(taps, step) for taps, step in zip(g.kernel, g.stride, strict=True))
    return 1 << (taps - 1).bit_length()


def pieces(problem: Problem, tile: TransposedOverlapTile) -> tuple[int, int]:
    """Outputs of a program that are put together at once, a power of two, and how often."""
    outputs = math.prod(held(problem, tile)) * windows(problem, tile).outputs
    piece = max(min(_MOST_PARTS[0] * 32 * tile.num_warps, _MOST_PARTS[1]) // met(problem), 1)
    piece = min(piece, 1 << (outputs - 1).bit_length())
    return piece, cdiv(outputs, piece)


def x_vector(problem: Problem) -> int:
    """Pixels of an image that lie side by side at an aligned place."""
    return vector_of(*problem.x_strides[:2], problem.geometry.in_pixels)


def w_vector(problem: Problem, tile: TransposedOverlapTile) -> int:
    """Pairs of a program that do."""
    g = problem.geometry
    return math.gcd(VECTOR_LIMIT, held(problem, tile)[1] * g.taps, g.c_out_group * g.taps)


def _grid(problem: Problem, tile: TransposedOverlapTile) -> int:
    g = problem.geometry
    count, channels = held(problem, tile)
    return cdiv(g.batch * windows(problem, tile).count, count) * cdiv(g.c_out_group, channels) * g.groups


def _arguments(problem: Problem, tile: TransposedOverlapTile) -> dict[str, object]:
    g, window = problem.geometry, windows(problem, tile)
    piece, count = pieces(problem, tile)
    # The code divides by the sizes of a window, for every output; that of a row is as large as a tile has it.
    ends = (("IN", g.in_size), ("OUT", g.out_size))
    sizes = {f"{end}_{axis}": s for end, size in ends for axis, s in zip("DHW", size, strict=True)}
    if window.count > 1:
        sizes |= {"IN_W": window.columns, "OUT_W": window.outputs}
    return (
        geometry_arguments(problem, tile.BLOCK_M)
        | tile.sizes()
        | sizes
        | dict(
            c_in_group=g.c_in_group,
            c_out_group=g.c_out_group,
            pixels_in=g.in_pixels,
            pixels_out=g.out_pixels,
            windows=window.count,
            stride_wo=g.c_out_group * g.taps,
            X_VECTOR=x_vector(problem),
            W_VECTOR=w_vector(problem, tile),
            Y_VECTOR=vector_of(*problem.y_strides[:2], g.out_pixels, window.outputs),
            WINDOW=window.columns,
            STEP=window.step,
            BEFORE=window.before,
            CHANNELS=held(problem, tile)[1],
            MET=met(problem),
            PIECE=piece,
            PIECES=count,
        )
    )


def _unsuited(problem: Problem) -> str | None:
    g = problem.geometry
    if not g.transposed:
        return "it is not transposed"
    if not g.M or not g.in_pixels:
        return "it has no pixel"
    if problem.itemsize != 2:
        return "only 16-bit numbers are multiplied with pixels innermost"
    if g.dilation != (1, 1, 1):
        return f"its dilation is {g.dilation}, not 1"
    if min(g.c_in_group, g.c_out_group) < 16:
        return "a group has fewer than 16 channels"
    if g.in_pixels > _MOST_PIXELS and not one_row(problem):
        return f"an image of {g.in_pixels} pixels does not fit in a tile"
    for name, size, strides in (("input", g.in_size, problem.x_strides), ("output", g.out_size, problem.y_strides)):
        if not one_run(size, strides[2:]):
            return f"an image of the {name} is not one run of pixels"
    return None


KERNEL = Kernel(
    name="transposed_overlap",
    function=transposed_overlap_kernel,
    tile_type=TransposedOverlapTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=TransposedOverlapTile(num_warps=4, num_stages=1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
    contiguous_weight=True,
)
