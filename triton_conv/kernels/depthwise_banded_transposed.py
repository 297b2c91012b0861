"""Transposed depthwise convolution as products with banded matrices, rank 1 to 3, for contiguous pixels (NCHW)."""

# Tuples grow in device code, which has no types of Python's.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem, vector_of
from ..target import Target
from .arguments import geometry_arguments
from .banded_rows import image_group, inside_row, load_row, run_read
from .common import activate, aligned, decode_pixel, dot, narrow, tap_at, wide, within
from .kernel import Kernel, Tile, cdiv
from .staging import staging_of
from .windows import first_tap


@triton.jit
def depthwise_banded_transposed_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, images, c_out, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh,
    stride_wo, stride_wi, stride_wd, stride_wh, stride_ww,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw, stride_b,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, PERIOD_D: tl.constexpr, HOP_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr, MULTIPLIER: tl.constexpr,
    X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, LEFT: tl.constexpr, WIDTH: tl.constexpr, ABOVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """y_a[m, t] = activation(sum_i sum_j x_i[m, j] band_r[j, t] + b[c]), band_r[j, t] = w[c, r(a, i), tap(j, t)].

    One channel c at a time. Output q meets input i with tap k where q + PAD - k DIL = i STRIDE. m runs over (image,
    output depth of one phase, block of HEIGHT output rows, block of WIDTH output columns), multiples of the stride; a
    block of a whole row may be of any width. a is an output row of the block, and x_i an input row, BLOCK_K columns of
    it from an aligned one on, LEFT before the one at which the block's phases begin; of a block of the whole row the
    whole row. Blocks begin where q + PAD is a multiple of the stride, so that r(a, i) is known when compiling, while
    tap(j, t) is where the band has its weights: outputs of all phases of a row come out of one product, side by side.
    No zero is inserted; those of the bands are multiplied, which is cheap on tensor cores.

    Grid: one axis of tiles x phases of depth x c_out x splits programs, tiles fastest: BLOCK_M of the m of a group of
    `images` images. A program takes STEPS groups one after the other: decoded once, its offsets stay and only the base
    moves. All bands are built once a program, and an input row is loaded once for all the outputs that meet it, ABOVE
    rows before the block's own on.

    Zeros of a band are multiplied: an infinity or NaN in the input makes NaN of all outputs of the blocks that read it.

    Dumoulin and Visin, arXiv:1603.07285, section 4; banded products: Ku et al., StripedHyena 2, arXiv:2503.01868.
    """
    HEIGHT: tl.constexpr = ROWS // STRIDE_H * STRIDE_H
    row_blocks = tl.cdiv(h_out + PAD_H % STRIDE_H, HEIGHT)
    column_blocks = tl.cdiv(w_out, WIDTH)
    depths = tl.cdiv(d_out, STRIDE_D)
    if INDEX_INT64:
        column_blocks = column_blocks.to(tl.int64)
    tiles = tl.cdiv(column_blocks * row_blocks * depths * images, BLOCK_M)
    pid = tl.program_id(0)
    pid_m = pid % tiles
    phase_d = pid // tiles % STRIDE_D
    c = pid // tiles // STRIDE_D % c_out
    first = (pid // tiles // STRIDE_D // c_out).to(tl.int64) * (STEPS * images)
    if INDEX_INT64:
        stride_xd, stride_xh = wide(stride_xd), wide(stride_xh)
        stride_yh, stride_yw = wide(stride_yh), wide(stride_yw)
        stride_wd, stride_wh, stride_ww = wide(stride_wd), wide(stride_wh), wide(stride_ww)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    image, t_d, block_h, block_w = decode_pixel(offs_m, depths, row_blocks, column_blocks, RANK)
    kd0 = first_tap(phase_d, KD, STRIDE_D, PAD_D, DIL_D)
    d_o = phase_d + t_d * STRIDE_D
    d0 = (phase_d + PAD_D - kd0 * DIL_D) // STRIDE_D + t_d
    h0 = PAD_H // STRIDE_H + block_h * (HEIGHT // STRIDE_H)
    h_o = block_h * HEIGHT - PAD_H % STRIDE_H
    w0 = block_w * (WIDTH // STRIDE_W)
    w_o = block_w * WIDTH
    offs_j = tl.arange(0, BLOCK_K)
    offs_t = tl.arange(0, BLOCK_T)

    inside_w = inside_row(w0, offs_j, w_in, LEFT, X_VECTOR)  # [BLOCK_M, BLOCK_K]
    x_offset = image * stride_xn + d0 * stride_xd + h0 * stride_xh + w0 - LEFT
    x_offset = x_offset[:, None] + offs_j[None, :]
    x_offset = tl.max_contiguous(tl.multiple_of(x_offset, (1, X_VECTOR)), (1, X_VECTOR))
    x_base = x_ptr + aligned(c // MULTIPLIER * wide(stride_xc), X_VECTOR)

    tap = offs_t[None, :] + (PAD_W + LEFT * STRIDE_W) - offs_j[:, None] * STRIDE_W
    mask_tap = (tap >= 0) & (tap < KW * DIL_W)
    if DIL_W > 1:
        mask_tap = mask_tap & (tap % DIL_W == 0)
        tap = tap // DIL_W
    w_base = w_ptr + (c // MULTIPLIER * wide(stride_wo) + c % MULTIPLIER * wide(stride_wi))
    w_offset = tap * stride_ww  # [BLOCK_K, BLOCK_T]
    TAPS_D: tl.constexpr = (KD + PERIOD_D - 1) // PERIOD_D
    bands = ()
    for r in tl.static_range(TAPS_D * KH):
        kd = kd0 + r // KH * PERIOD_D
        w_row = w_base + kd * stride_wd + r % KH * stride_wh
        bands += (tl.load(w_row + w_offset, mask=mask_tap & (kd < KD), other=0.0),)

    vector = offs_t // Y_VECTOR
    y_mask = (w_o // Y_VECTOR)[:, None] + vector[None, :] < w_out // Y_VECTOR  # [BLOCK_M, BLOCK_T]
    if WIDTH < BLOCK_T:
        y_mask = y_mask & (vector < WIDTH // Y_VECTOR)[None, :]
    y_offset = image * stride_yn + d_o * stride_yd + h_o * stride_yh + w_o * stride_yw
    y_offset = y_offset[:, None] + (offs_t * stride_yw)[None, :]
    y_base = y_ptr + aligned(c * wide(stride_yc), Y_VECTOR)

    bias = tl.zeros((), dtype=ACC_DTYPE)
    if HAS_BIAS:
        bias = tl.load(b_ptr + c * wide(stride_b), mask=c < c_out, other=0.0).to(ACC_DTYPE)

    SPAN: tl.constexpr = ABOVE + HEIGHT // STRIDE_H
    for _ in range(STEPS):
        live = (image < tl.minimum(images, batch - first)) & (d_o < d_out)
        x_group = x_base + aligned(first * stride_xn, X_VECTOR)
        sums = ()
        for _a in tl.static_range(HEIGHT):
            sums += (tl.zeros((BLOCK_M, BLOCK_T), dtype=ACC_DTYPE) + bias,)
        for q in tl.static_range(TAPS_D):
            live_d = live
            if RANK >= 3:
                live_d = live & within(d0 - q * HOP_D, d_in)
            # All loads first: their latencies overlap.
            x_rows = ()
            for i in tl.static_range(SPAN):
                if meets(i - ABOVE, HEIGHT, STRIDE_H, DIL_H, KH):
                    x_rows += (
                        load_row(
                            x_group, x_offset, -q * HOP_D * stride_xd, h0, i - ABOVE, stride_xh, h_in, inside_w,
                            live_d, RANK, X_VECTOR,
                        ),
                    )  # fmt: skip
            for i in tl.static_range(SPAN):
                if meets(i - ABOVE, HEIGHT, STRIDE_H, DIL_H, KH):
                    added = ()
                    for a in tl.static_range(HEIGHT):
                        if tap_at(a, i - ABOVE, STRIDE_H, DIL_H, KH) >= 0:
                            band = bands[q * KH + tap_at(a, i - ABOVE, STRIDE_H, DIL_H, KH)]
                            added += (dot(x_rows[0], band, sums[a], PRECISION),)
                        else:
                            added += (sums[a],)
                    sums = added
                    x_rows = x_rows[1:]

        y_group = y_base + aligned(first * stride_yn, Y_VECTOR)
        for a in tl.static_range(HEIGHT):
            y_row = tl.max_contiguous(tl.multiple_of(y_offset + a * stride_yh, (1, Y_VECTOR)), (1, Y_VECTOR))
            mask_row = (live & within(h_o + a, h_out))[:, None]
            y_tile = narrow(activate(sums[a], ACTIVATION), y_ptr.dtype.element_ty)
            tl.store(y_group + y_row, y_tile, mask=y_mask & mask_row)
        first += images


@triton.constexpr_function
def meets(i, HEIGHT, STRIDE, DIL, TAPS):
    """Whether any output row of a block meets input row `i`."""
    return any(tap_at(a, i, STRIDE, DIL, TAPS) >= 0 for a in range(HEIGHT))


@dataclass(frozen=True)
class DepthwiseBandedTransposedTile(Tile):
    """BLOCK_M blocks of up to ROWS output rows by BLOCK_T output columns, each from BLOCK_K input columns of its rows.

    A block has as many rows and columns of these as the stride divides. Blocks are counted over (image, depth, row,
    column) of a group of images; a program takes STEPS groups, one after the other.
    """

    BLOCK_M: int = 64
    BLOCK_T: int = 32
    BLOCK_K: int = 32
    ROWS: int = 4
    STEPS: int = 1

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        g = problem.geometry
        staging = staging_of(target)
        band, row = self.BLOCK_K * self.BLOCK_T, self.BLOCK_M * self.BLOCK_K
        bands = cdiv(g.kernel[0], period(problem)) * g.kernel[1]
        # Where bands and rows take turns, bands that are held are held in registers.
        operands = max(band, row) if staging.turns else bands * band + self.rows_read(problem) * row
        # A product is turned into the layout of its store in the same memory, with a little padding.
        turned = (
            self.BLOCK_M * (self.BLOCK_T + (0 if staging.turns else 8)) * min(problem.accumulator_bytes, staging.turned)
        )
        return max(operands * problem.itemsize, turned) + (0 if staging.turns else 2048)

    def accumulator_values(self) -> int:
        return self.ROWS * self.BLOCK_M * self.BLOCK_T

    def rows_read(self, problem: Problem) -> int:
        """Input rows that a block holds at a time, for one depth."""
        g, block = problem.geometry, block_of(problem, self)
        taps = range(0, g.kernel[1] * g.dilation[1], g.dilation[1])
        met = {a - tap for a in range(block["HEIGHT"]) for tap in taps if (a - tap) % g.stride[1] == 0}
        return len(met)

    def mismatch(self, problem: Problem) -> str | None:
        g = problem.geometry
        if min(self.BLOCK_M, self.BLOCK_T, self.BLOCK_K) < 16:
            return "a product takes at least 16 of each dimension"
        if g.stride[1] > self.ROWS or g.stride[2] > self.BLOCK_T:
            return f"{self.ROWS} x {self.BLOCK_T} outputs are not of all {g.stride[1]} x {g.stride[2]} phases"
        if (need := columns_read(problem, self)) > self.BLOCK_K:
            return f"{self.BLOCK_T} outputs of a row read {need} columns, more than {self.BLOCK_K}"
        products = cdiv(g.kernel[0], period(problem)) * g.kernel[1] * self.ROWS // g.stride[1]
        if products > 64:
            return f"{products} products are too many to unroll"
        return None


def period(problem: Problem) -> int:
    """Every how many planes of the filter one meets the same phase of depths."""
    g = problem.geometry
    return g.stride[0] // math.gcd(g.stride[0], g.dilation[0])


def block_of(problem: Problem, tile: DepthwiseBandedTransposedTile) -> dict[str, int]:
    """A block's outputs, and where its input lies: from an aligned column on, or the whole row."""
    g = problem.geometry
    height, reach = tile.ROWS // g.stride[1] * g.stride[1], [extent - 1 for extent in g.extent]
    x_vector, y_vector = run_read(problem), problem.y_run(16 // problem.itemsize)
    width, left = tile.BLOCK_T, 0
    if width < g.out_size[2]:
        # Whole vectors of both.
        x_vector = vector_of(x_vector, 1 << (width // g.stride[2]).bit_length() - 1)
        width = width // (g.stride[2] * x_vector) * g.stride[2] * x_vector
        y_vector = vector_of(y_vector, width)
        left = cdiv((reach[2] - g.pad_before[2]) // g.stride[2], x_vector) * x_vector
    return dict(
        HEIGHT=height,
        WIDTH=width,
        X_VECTOR=x_vector,
        Y_VECTOR=y_vector,
        LEFT=left,
        ABOVE=reach[1] // g.stride[1],
    )


def columns_read(problem: Problem, tile: DepthwiseBandedTransposedTile) -> int:
    """Input columns that a block reads, from an aligned one on."""
    g, block = problem.geometry, block_of(problem, tile)
    last = (min(block["WIDTH"], g.out_size[2]) - 1 + g.pad_before[2]) // g.stride[2] + 1
    return min(last, g.in_size[2]) if block["WIDTH"] >= g.out_size[2] else last + block["LEFT"]


def images_of_tile(problem: Problem, tile: DepthwiseBandedTransposedTile) -> int:
    """How many images share the blocks of a tile."""
    return image_group(problem.geometry.batch, _blocks(problem, tile), tile.BLOCK_M)


def _blocks(problem: Problem, tile: DepthwiseBandedTransposedTile) -> int:
    """Blocks of an image, of one phase of depths."""
    g, block = problem.geometry, block_of(problem, tile)
    rows = g.out_size[1] + g.pad_before[1] % g.stride[1]
    return cdiv(g.out_size[0], g.stride[0]) * cdiv(rows, block["HEIGHT"]) * cdiv(g.out_size[2], block["WIDTH"])


def _grid(problem: Problem, tile: DepthwiseBandedTransposedTile) -> int:
    g, images = problem.geometry, images_of_tile(problem, tile)
    tiles = cdiv(images * _blocks(problem, tile), tile.BLOCK_M)
    return cdiv(g.batch, tile.STEPS * images) * g.c_out * g.stride[0] * tiles


def _arguments(problem: Problem, tile: DepthwiseBandedTransposedTile) -> dict[str, object]:
    g = problem.geometry
    images = images_of_tile(problem, tile)
    return (
        geometry_arguments(problem, images * g.out_pixels)
        | tile.sizes()
        | dict(
            images=images,
            c_out=g.c_out,
            MULTIPLIER=g.c_out_group,
            PERIOD_D=period(problem),
            HOP_D=g.dilation[0] // math.gcd(g.stride[0], g.dilation[0]),
        )
        | block_of(problem, tile)
    )


def _unsuited(problem: Problem) -> str | None:
    g = problem.geometry
    if not g.transposed:
        return "it is not transposed"
    if g.c_in_group != 1:
        return f"a group has {g.c_in_group} input channels, not 1"
    if problem.x_strides[4] != 1:
        return "neighbouring pixels are not contiguous"
    if max(g.stride[1:]) > 8:
        return f"{g.stride[1]} x {g.stride[2]} phases do not fit in a block"
    return None


KERNEL = Kernel(
    name="depthwise_banded_transposed",
    function=depthwise_banded_transposed_kernel,
    tile_type=DepthwiseBandedTransposedTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=DepthwiseBandedTransposedTile(num_warps=4, num_stages=1, BLOCK_M=64, BLOCK_T=16, BLOCK_K=64, ROWS=8),
)
