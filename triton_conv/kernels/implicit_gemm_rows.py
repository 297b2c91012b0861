"""Implicit GEMM where rows of pixels are contiguous (NCHW), rank 1 to 3: each vector is read once for all taps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from ..target import Target
from .arguments import geometry_arguments, weight_arguments
from .common import aligned, below, dot, epilogue, narrow, tile_pixels, wide
from .kernel import Kernel, ProductTile, cdiv
from .staging import Operand, staged_bytes, staging_of
from .windows import chosen, elements, first_tap, load_segments

# Elements of 16 bits that a thread loads at once.
_VECTOR = 8
# Vectors of a window and taps of a filter row: each is code of its own.
_MOST_VECTORS = 24
_MOST_TAPS = 16


@triton.jit
def implicit_gemm_rows_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_in_group, c_out_group, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh,
    stride_wg, stride_wn, stride_wk, stride_wd, stride_wh, stride_ww,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw, stride_b,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr,
    PERIOD_D: tl.constexpr, PERIOD_H: tl.constexpr, HOP_D: tl.constexpr, HOP_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr,
    INDEX_INT64: tl.constexpr, X_VECTOR: tl.constexpr, W_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    K_VECTOR: tl.constexpr, N_VECTOR: tl.constexpr, K_LAST: tl.constexpr,
    WIDTH: tl.constexpr, FIRST: tl.constexpr, VECTORS: tl.constexpr, ALONE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """y[m, n] = activation(sum_k x[m, k] w[k, n] + b[n]), m = (image, pixel), n = output channel, k = (channel, tap).

    A row of outputs is cut into segments. The input of one is a window of VECTORS vectors of WIDTH columns, from the
    FIRST on, of BLOCK_K channels: each is loaded once, parted into its columns in the registers of the thread that
    loaded it, and the tile of every tap of a filter row is put together of those that the tap reads, BLOCK_T a segment
    and STRIDE_W apart. Where a segment is a row by itself, ALONE is how many vectors that row has: what lies beside it
    is zero. Read tap by tap, an element of a row that is not aligned would be an instruction of its own, once to load
    it and once to pass it on to shared memory.

    TRANSPOSED: a segment is BLOCK_T inputs, the column phases of their outputs have a sum each, and are stored side by
    side. A program has one phase of rows and depths, of which it reads the taps k = k0 + j PERIOD, HOP rows apart.
    The product is computed as w x^T: a right operand may come from registers.

    Grid: one axis of cdiv(N, BLOCK_N) x tiles of segments x row and depth phases x groups programs, N fastest, so that
    programs which read the same pixels run together. The implicit precomputed GEMM of cuDNN (Chetlur et al. 2014,
    arXiv:1410.0759); Dumoulin and Visin, arXiv:1603.07285, section 4, for the phases.
    """
    PHASES_D: tl.constexpr = STRIDE_D if TRANSPOSED else 1
    PHASES_H: tl.constexpr = STRIDE_H if TRANSPOSED else 1
    PHASES_W: tl.constexpr = STRIDE_W if TRANSPOSED else 1
    STEP: tl.constexpr = 1 if TRANSPOSED else STRIDE_W
    WRITTEN: tl.constexpr = BLOCK_T * PHASES_W
    READ: tl.constexpr = BLOCK_T * STEP
    SEGMENTS: tl.constexpr = BLOCK_M // WRITTEN
    in_row = tl.cdiv(w_out, WRITTEN)
    tiles_n = tl.cdiv(c_out_group, BLOCK_N)
    largest = tl.cast(batch, tl.int64) * tl.cdiv(d_out, PHASES_D) * tl.cdiv(h_out, PHASES_H) * in_row
    tiles_m = tl.cdiv(largest, SEGMENTS).to(tl.int32)
    pid = tl.program_id(0)
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n % tiles_m
    phase = pid // tiles_n // tiles_m % (PHASES_D * PHASES_H)
    group = pid // tiles_n // tiles_m // (PHASES_D * PHASES_H)
    phase_h = phase % PHASES_H
    phase_d = phase // PHASES_H

    # A phase that the output does not reach has no row; its programs run once over masked-off lanes.
    size_d = tl.cdiv(tl.maximum(d_out - phase_d, 0), PHASES_D)
    size_h = tl.cdiv(tl.maximum(h_out - phase_h, 0), PHASES_H)
    first, image, t_d, t_h, segment, mask_r = tile_pixels(
        pid_m, batch, tl.maximum(size_d, 1), tl.maximum(size_h, 1), in_row, RANK, INDEX_INT64, SEGMENTS
    )
    mask_r = mask_r & (first + image < batch) & (size_d > 0) & (size_h > 0)

    if TRANSPOSED:
        kd0 = first_tap(phase_d, KD, STRIDE_D, PAD_D, DIL_D)
        kh0 = first_tap(phase_h, KH, STRIDE_H, PAD_H, DIL_H)
        d0 = (phase_d + PAD_D - kd0 * DIL_D) // STRIDE_D + t_d
        h0 = (phase_h + PAD_H - kh0 * DIL_H) // STRIDE_H + t_h
    else:
        kd0 = phase_d
        kh0 = phase_h
        d0 = t_d * STRIDE_D - PAD_D
        h0 = t_h * STRIDE_H - PAD_H
    taps_d = tl.cdiv(KD - kd0, PERIOD_D)
    taps_h = tl.cdiv(KH - kh0, PERIOD_H)
    has_tap = (taps_d > 0) & (taps_h > 0)
    taps_d = tl.maximum(taps_d, 1)
    taps_h = tl.maximum(taps_h, 1)

    offs_k = tl.arange(0, BLOCK_K)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if INDEX_INT64:
        offs_k = offs_k.to(tl.int64)
        offs_n = offs_n.to(tl.int64)
        # A tap's offset is a product of scalars.
        stride_xd, stride_xh = wide(stride_xd), wide(stride_xh)
        stride_wd, stride_wh, stride_ww = wide(stride_wd), wide(stride_wh), wide(stride_ww)
    mask_n = below(offs_n, c_out_group, N_VECTOR)
    x_base = x_ptr + first * stride_xn + aligned(tl.cast(group * c_in_group, tl.int64) * stride_xc, X_VECTOR)
    w_base = w_ptr + aligned(tl.cast(group, tl.int64) * stride_wg, W_VECTOR)
    corner = image * stride_xn + d0 * stride_xd + h0 * stride_xh + segment * READ
    lanes = tl.arange(0, WIDTH)
    # Columns are counted in vectors that lie inside the image or outside of it as a whole.
    vector = (segment * (READ // X_VECTOR))[:, None] + (lanes // X_VECTOR)[None, :]

    N: tl.constexpr = SEGMENTS * BLOCK_T
    acc = tl.zeros((BLOCK_N, N), dtype=ACC_DTYPE)
    # The odd columns of a transposed convolution of stride 2; otherwise unused, and the compiler drops it.
    odd = tl.zeros((BLOCK_N, N), dtype=ACC_DTYPE)
    jd = 0
    jh = 0
    block = 0
    for _ in range(tl.maximum(tl.cdiv(c_in_group, BLOCK_K), 1) * (taps_d * taps_h)):
        channel = block * BLOCK_K + offs_k
        mask_c = channel < c_in_group
        mask_row = mask_r & has_tap
        if RANK >= 2:
            mask_row = mask_row & (h0 + jh * HOP_H >= 0) & (h0 + jh * HOP_H < h_in)
        if RANK >= 3:
            mask_row = mask_row & (d0 + jd * HOP_D >= 0) & (d0 + jd * HOP_D < d_in)
        x_row = tl.multiple_of(corner + (jd * HOP_D * stride_xd + jh * HOP_H * stride_xh), X_VECTOR)
        x_channel = tl.multiple_of(channel * stride_xc, X_VECTOR)
        columns = ()
        for i in tl.static_range(VECTORS):
            if ALONE and (FIRST + i < 0 or FIRST + i >= ALONE):
                for _ in tl.static_range(WIDTH):
                    columns = columns + (tl.zeros((BLOCK_K, SEGMENTS), dtype=tl.int16),)  # type: ignore[assignment]
            else:
                at = vector + (FIRST + i) * (WIDTH // X_VECTOR)
                inside = (at >= 0) & (at < w_in // X_VECTOR) & mask_row[:, None]
                tile = load_segments(x_base + (FIRST + i) * WIDTH, x_channel, x_row, lanes, mask_c, inside)
                # As integers: the compiler (Triton 3.6) fails on a product whose operand is a reshaped tile itself.
                columns = columns + elements(tile.to(tl.int16, bitcast=True), BLOCK_K, SEGMENTS, WIDTH)

        mask_k = below(channel, c_in_group, K_VECTOR)
        w_row = w_base + aligned((kd0 + jd * PERIOD_D) * stride_wd + (kh0 + jh * PERIOD_H) * stride_wh, W_VECTOR)
        for kw in tl.static_range(KW):
            w_tap = w_row + aligned(kw * stride_ww, W_VECTOR)
            if K_LAST:
                w_tile = tl.load(
                    w_tap + (tl.multiple_of(offs_n * stride_wn, W_VECTOR)[:, None] + channel[None, :]),
                    mask=mask_n[:, None] & mask_k[None, :] & has_tap,
                    other=0.0,
                )  # [BLOCK_N, BLOCK_K]
            else:
                w_tile = tl.trans(
                    tl.load(
                        w_tap + (tl.multiple_of(channel * stride_wk, W_VECTOR)[:, None] + offs_n[None, :]),
                        mask=mask_k[:, None] & mask_n[None, :] & has_tap,
                        other=0.0,
                    )
                )
            if not TRANSPOSED:
                x_tile = chosen(columns, BLOCK_K, SEGMENTS, kw * DIL_W - PAD_W - FIRST * WIDTH, STRIDE_W, BLOCK_T)
                acc = dot(w_tile, x_tile.to(x_ptr.dtype.element_ty, bitcast=True), acc, PRECISION)
            elif (PAD_W - kw * DIL_W) % STRIDE_W == 0:
                x_tile = chosen(
                    columns, BLOCK_K, SEGMENTS, (PAD_W - kw * DIL_W) // STRIDE_W - FIRST * WIDTH, 1, BLOCK_T
                )
                acc = dot(w_tile, x_tile.to(x_ptr.dtype.element_ty, bitcast=True), acc, PRECISION)
            else:
                x_tile = chosen(
                    columns, BLOCK_K, SEGMENTS, (1 + PAD_W - kw * DIL_W) // STRIDE_W - FIRST * WIDTH, 1, BLOCK_T
                )
                odd = dot(w_tile, x_tile.to(x_ptr.dtype.element_ty, bitcast=True), odd, PRECISION)
        jh += 1
        plane_done = jh == taps_h
        jh = tl.where(plane_done, 0, jh)
        jd = tl.where(plane_done, jd + 1, jd)
        all_done = jd == taps_d
        jd = tl.where(all_done, 0, jd)
        block = tl.where(all_done, block + 1, block)

    channel_out = group * c_out_group + offs_n
    result = tl.trans(epilogue(tl.trans(acc), b_ptr, stride_b, channel_out, mask_n, HAS_BIAS, ACTIVATION))
    result = narrow(result, y_ptr.dtype.element_ty)
    if PHASES_W == 2:
        other = tl.trans(epilogue(tl.trans(odd), b_ptr, stride_b, channel_out, mask_n, HAS_BIAS, ACTIVATION))
        result = tl.join(result, narrow(other, y_ptr.dtype.element_ty))
    result = tl.reshape(result, (BLOCK_N, SEGMENTS, WRITTEN))
    d_o = phase_d + t_d * PHASES_D
    h_o = phase_h + t_h * PHASES_H
    if INDEX_INT64:
        stride_yw = wide(stride_yw)
    outputs = tl.arange(0, WRITTEN)
    y_base = y_ptr + first * stride_yn + aligned(tl.cast(group * c_out_group, tl.int64) * stride_yc, Y_VECTOR)
    y_row = tl.multiple_of(
        image * stride_yn + d_o * stride_yd + h_o * stride_yh + segment * WRITTEN * stride_yw, Y_VECTOR
    )
    y_channel = tl.multiple_of(offs_n * stride_yc, Y_VECTOR)
    y_place = y_base + y_channel[:, None, None] + y_row[None, :, None] + (outputs * stride_yw)[None, None, :]
    inside = (segment * (WRITTEN // Y_VECTOR))[:, None] + (outputs // Y_VECTOR)[None, :] < w_out // Y_VECTOR
    inside = inside & mask_r[:, None]
    tl.store(y_place, result, mask=mask_n[:, None, None] & inside[None, :, :])


@dataclass(frozen=True)
class ImplicitGemmRowsTile(ProductTile):
    """BLOCK_M output pixels by BLOCK_N output channels, BLOCK_K channels a step; segments of BLOCK_T pixels a phase."""

    BLOCK_T: int = 4

    def rows(self) -> int:
        return self.BLOCK_N

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        g, size = problem.geometry, problem.itemsize
        segments = self.BLOCK_M // (self.BLOCK_T * phases(problem))
        width = window(problem, self.BLOCK_T)[0]
        run = problem.x_run(width, read(problem, self.BLOCK_T)) * size
        w_run = problem.w_vector(g.c_in_group, g.c_out_group) * size
        turns = staging_of(target).turns
        # gfx942 copies no vectors that are taken apart.
        vectors = 0 if turns else vectors_read(problem, self.BLOCK_T)
        operands = [
            *[Operand(self.BLOCK_K * segments * width * size, run, corner=True)] * vectors,
            *[Operand(self.BLOCK_N * self.BLOCK_K * size, w_run)] * g.kernel[2],
            # Taps take turns in the memory that their tiles pass through.
            Operand(self.BLOCK_K * segments * self.BLOCK_T * size, 0),
        ]
        sums = self.BLOCK_M * self.BLOCK_N, size
        # Three dimensions of sums turn into the layout of their store in rows that are padded by a quarter, elsewhere.
        turned = self.BLOCK_M * self.BLOCK_N * size * (4 if turns else 5) // 4
        return max(staged_bytes(operands, self.rows(), self.num_warps, self.num_stages, sums, target), turned)

    def mismatch(self, problem: Problem) -> str | None:
        if self.BLOCK_T > 8:
            return f"a thread holds segments of at most 8 pixels, not {self.BLOCK_T}"
        if 16 * self.num_warps > self.BLOCK_N:
            return f"{self.num_warps} warps have no 16 channels of {self.BLOCK_N} each"
        if 16 * phases(problem) > self.BLOCK_M:
            return f"{self.BLOCK_M} pixels are no product of 16 columns"
        vectors = window(problem, self.BLOCK_T)[2]
        return None if vectors <= _MOST_VECTORS else f"a window of {vectors} vectors is not unrolled"


def phases(problem: Problem) -> int:
    """Column phases that a program computes side by side."""
    g = problem.geometry
    return g.stride[2] if g.transposed else 1


def window(problem: Problem, block_t: int) -> tuple[int, int, int]:
    """Columns of a vector, the first vector counted from a segment's first column, and how many there are."""
    g = problem.geometry
    taps, stride, pad, dilation = g.kernel[2], g.stride[2], g.pad_before[2], g.dilation[2]
    if g.transposed:
        width = math.gcd(_VECTOR, block_t)
        low, high = (pad - (taps - 1) * dilation) // stride, (stride - 1 + pad) // stride + block_t - 1
    else:
        width = math.gcd(_VECTOR, block_t * stride)
        low, high = -pad, (block_t - 1) * stride + (taps - 1) * dilation - pad
    return width, low // width, high // width - low // width + 1


def read(problem: Problem, block_t: int) -> int:
    """Input columns from one segment to the next."""
    g = problem.geometry
    return block_t * (1 if g.transposed else g.stride[2])


def alone(problem: Problem, block_t: int) -> int:
    """How many vectors an input row has if a segment of outputs is a whole row, else 0."""
    g = problem.geometry
    whole = g.out_size[2] <= block_t * phases(problem)
    return cdiv(g.in_size[2], window(problem, block_t)[0]) if whole else 0


def vectors_read(problem: Problem, block_t: int) -> int:
    """Vectors of a window of which a column is read: the compiler drops the others."""
    g = problem.geometry
    stride, pad, dilation = g.stride[2], g.pad_before[2], g.dilation[2]
    width, row = window(problem, block_t)[0], alone(problem, block_t)
    if g.transposed:
        offsets = [divmod(phase + pad - k * dilation, stride) for k in range(g.kernel[2]) for phase in range(stride)]
        columns = {offset + t for offset, rest in offsets if rest == 0 for t in range(block_t)}
    else:
        columns = {t * stride + k * dilation - pad for k in range(g.kernel[2]) for t in range(block_t)}
    found = {column // width for column in columns}
    return sum(0 <= vector < row for vector in found) if row else len(found)


def window_values(problem: Problem, tile: ImplicitGemmRowsTile) -> int:
    """Numbers of the input that a program holds in registers at a time."""
    segments = tile.BLOCK_M // (tile.BLOCK_T * phases(problem))
    width = window(problem, tile.BLOCK_T)[0]
    return vectors_read(problem, tile.BLOCK_T) * width * segments * tile.BLOCK_K


def _grid(problem: Problem, tile: ImplicitGemmRowsTile) -> int:
    g = problem.geometry
    steps = g.stride[:2] if g.transposed else (1, 1)
    written = tile.BLOCK_T * phases(problem)
    rows = math.prod(cdiv(size, step) for size, step in zip(g.out_size[:2], steps, strict=True))
    tiles = cdiv(g.batch * rows * cdiv(g.out_size[2], written), tile.BLOCK_M // written)
    return cdiv(g.c_out_group, tile.BLOCK_N) * tiles * math.prod(steps) * g.groups


def _arguments(problem: Problem, tile: ImplicitGemmRowsTile) -> dict[str, object]:
    g = problem.geometry
    width, first, vectors = window(problem, tile.BLOCK_T)
    arguments = geometry_arguments(problem, tile.BLOCK_M) | weight_arguments(problem) | tile.sizes()
    for axis, stride, dilation in zip("DH", g.stride, g.dilation, strict=False):
        common = math.gcd(stride, dilation)
        period, hop = (stride // common, -dilation // common) if g.transposed else (1, dilation)
        arguments |= {f"PERIOD_{axis}": period, f"HOP_{axis}": hop}
    return arguments | dict(
        X_VECTOR=problem.x_run(width, read(problem, tile.BLOCK_T)),
        Y_VECTOR=problem.y_run(tile.BLOCK_T * phases(problem)),
        K_VECTOR=problem.w_vector(g.c_in_group),
        N_VECTOR=problem.w_vector(g.c_out_group),
        WIDTH=width,
        FIRST=first,
        VECTORS=vectors,
        ALONE=alone(problem, tile.BLOCK_T),
    )


def _unsuited(problem: Problem) -> str | None:
    g = problem.geometry
    if not g.M:
        return "it has no pixel"
    if problem.itemsize != 2:
        return "only 16-bit numbers are multiplied with pixels innermost"
    if problem.x_strides[4] != 1:
        return "neighbouring pixels are not contiguous"
    if g.padding_mode != "zeros":
        return f"its border is {g.padding_mode}, not zero"
    if min(g.c_in_group, g.c_out_group) < 16:
        return "a group has fewer than 16 channels"
    if problem.w_strides[1] != 1:
        return "the second dimension of its weight is not contiguous"
    if g.transposed and g.stride[2] > 2:
        return f"a row has {g.stride[2]} phases, not one or two"
    if g.kernel[2] > _MOST_TAPS:
        return f"{g.kernel[2]} taps of a filter row are not unrolled"
    vectors = window(problem, KERNEL.safe_tile.asdict()["BLOCK_T"])[2]
    return None if vectors <= _MOST_VECTORS else f"a window of {vectors} vectors is not unrolled"


KERNEL = Kernel(
    name="implicit_gemm_rows",
    function=implicit_gemm_rows_kernel,
    tile_type=ImplicitGemmRowsTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=ImplicitGemmRowsTile(num_warps=4, num_stages=1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, BLOCK_T=8),
)
