"""Transposed convolution of rank 1 to 3 by output phases: no zero is ever inserted, none is ever multiplied."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import triton
import triton.language as tl

from ..problem import VECTOR_LIMIT, Problem
from ..target import Target
from .arguments import geometry_arguments
from .common import aligned, below, dot, epilogue, load_pixels, store_pixels, tap_offset, tile_pixels, wide
from .kernel import Kernel, ProductTile, cdiv
from .staging import Operand, staging_of
from .windows import first_tap


@triton.jit
def transposed_phase_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_in, c_out, c_in_group, c_out_group, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    stride_wo, stride_wi, stride_wd, stride_wh, stride_ww,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw, stride_b,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PERIOD_D: tl.constexpr, PERIOD_H: tl.constexpr, PERIOD_W: tl.constexpr,
    HOP_D: tl.constexpr, HOP_H: tl.constexpr, HOP_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr, PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr,
    X_VECTOR: tl.constexpr, W_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, N_VECTOR: tl.constexpr,
    GROUPS_PER_TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[q, n] = activation(sum_{k, c : q + PAD - k DIL = i STRIDE} x[i, c] w[c, n, k] + b[n]).

    Outputs q = phase + STRIDE t of one phase read the same taps k = k0 + j PERIOD, at inputs i = i0 + t - j HOP, with
    PERIOD = STRIDE / gcd(STRIDE, DIL) and HOP = DIL / gcd(STRIDE, DIL): each phase is a dense convolution of its own,
    here an implicit GEMM over pixels t, output channels n, and (input channel, tap). A phase without a tap stores the
    epilogue of zero. Weight: (c_in, c_out_group, *kernel).

    Grid: one axis of phases x slabs x cdiv(M of the largest phase, BLOCK_M) x cdiv(N, BLOCK_N) programs, N fastest. A
    slab is one group, or GROUPS_PER_TILE narrow ones in a block-diagonal tile.
    Dumoulin and Visin, arXiv:1603.07285, section 4; Shi et al., arXiv:1609.07009 for the phases.
    """
    tiles_n = tl.cdiv(GROUPS_PER_TILE * c_out_group, BLOCK_N)
    largest = tl.cast(batch, tl.int64) * tl.cdiv(d_out, STRIDE_D) * tl.cdiv(h_out, STRIDE_H) * tl.cdiv(w_out, STRIDE_W)
    tiles_m = tl.cdiv(largest, BLOCK_M).to(tl.int32)
    slabs = tl.cdiv(c_out, GROUPS_PER_TILE * c_out_group)
    pid = tl.program_id(0)
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n % tiles_m
    slab = pid // tiles_n // tiles_m % slabs
    phase = pid // tiles_n // tiles_m // slabs
    phase_w = phase % STRIDE_W
    phase_h = phase // STRIDE_W % STRIDE_H
    phase_d = phase // (STRIDE_W * STRIDE_H)

    # A phase that the output does not reach has no pixel; its programs run once over masked-off lanes.
    size_d = tl.cdiv(tl.maximum(d_out - phase_d, 0), STRIDE_D)
    size_h = tl.cdiv(tl.maximum(h_out - phase_h, 0), STRIDE_H)
    size_w = tl.cdiv(tl.maximum(w_out - phase_w, 0), STRIDE_W)
    reached = (size_d > 0) & (size_h > 0) & (size_w > 0)
    first, image, t_d, t_h, t_w, mask_m = tile_pixels(
        pid_m, batch, tl.maximum(size_d, 1), tl.maximum(size_h, 1), tl.maximum(size_w, 1), RANK, INDEX_INT64, BLOCK_M
    )
    mask_m = mask_m & (first + image < batch) & reached

    kd0 = first_tap(phase_d, KD, STRIDE_D, PAD_D, DIL_D)
    kh0 = first_tap(phase_h, KH, STRIDE_H, PAD_H, DIL_H)
    kw0 = first_tap(phase_w, KW, STRIDE_W, PAD_W, DIL_W)
    taps_d = tl.cdiv(KD - kd0, PERIOD_D)
    taps_h = tl.cdiv(KH - kh0, PERIOD_H)
    taps_w = tl.cdiv(KW - kw0, PERIOD_W)
    has_tap = (taps_d > 0) & (taps_h > 0) & (taps_w > 0)
    taps_d = tl.maximum(taps_d, 1)
    taps_h = tl.maximum(taps_h, 1)
    taps_w = tl.maximum(taps_w, 1)
    taps = taps_d * taps_h * taps_w
    d0 = (phase_d + PAD_D - kd0 * DIL_D) // STRIDE_D + t_d
    h0 = (phase_h + PAD_H - kh0 * DIL_H) // STRIDE_H + t_h
    w0 = (phase_w + PAD_W - kw0 * DIL_W) // STRIDE_W + t_w
    image_offset = image * stride_xn
    pixel_offset = d0 * stride_xd + h0 * stride_xh + w0 * stride_xw
    mask_x = mask_m & has_tap

    slab_in = GROUPS_PER_TILE * c_in_group
    slab_out = GROUPS_PER_TILE * c_out_group
    c_first = tl.cast(slab * slab_in, tl.int64)
    n_first = tl.cast(slab * slab_out, tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if INDEX_INT64:
        offs_k = offs_k.to(tl.int64)
        offs_n = offs_n.to(tl.int64)
        # A tap's offset is a product of scalars.
        stride_xd, stride_xh, stride_xw = wide(stride_xd), wide(stride_xh), wide(stride_xw)
        stride_wd, stride_wh, stride_ww = wide(stride_wd), wide(stride_wh), wide(stride_ww)
    mask_n = below(offs_n, tl.minimum(slab_out, c_out - n_first), N_VECTOR)
    x_base = x_ptr + first * stride_xn + aligned(c_first * stride_xc, X_VECTOR)
    w_base = w_ptr + aligned(c_first * stride_wo, W_VECTOR)
    w_column = (offs_n % c_out_group if GROUPS_PER_TILE > 1 else offs_n) * stride_wi

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    # Counted up rather than divided out of the step: a phase's taps are known at run time, and each of three divisions
    # by such a number would be a call, in a loop that waits for it.
    jd = 0
    jh = 0
    jw = 0
    block = 0
    for _ in range(tl.maximum(tl.cdiv(slab_in, BLOCK_K) * taps, 1)):
        channel = block * BLOCK_K + offs_k
        mask_k = below(channel, tl.minimum(slab_in, c_in - c_first), X_VECTOR)
        offset, inside = tap_offset(
            pixel_offset, d0, h0, w0, -jd * HOP_D, -jh * HOP_H, -jw * HOP_W,
            d_in, h_in, w_in, stride_xd, stride_xh, stride_xw, "zeros", RANK,
        )  # fmt: skip
        x_row = tl.multiple_of(image_offset + offset, X_VECTOR)
        x_tile = load_pixels(x_base, x_row, channel * stride_xc, inside & mask_x, mask_k, PIXELS_LAST)
        kd = kd0 + jd * PERIOD_D
        kh = kh0 + jh * PERIOD_H
        kw = kw0 + jw * PERIOD_W
        w_row = tl.multiple_of(channel * stride_wo + (kd * stride_wd + kh * stride_wh + kw * stride_ww), W_VECTOR)
        mask_w = mask_k[:, None] & mask_n[None, :] & has_tap
        if GROUPS_PER_TILE > 1:
            mask_w = mask_w & ((channel // c_in_group)[:, None] == (offs_n // c_out_group)[None, :])
        w_tile = tl.load(w_base + w_row[:, None] + w_column[None, :], mask=mask_w, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = dot(x_tile, w_tile, acc, PRECISION)
        jw += 1
        row_done = jw == taps_w
        jw = tl.where(row_done, 0, jw)
        jh = tl.where(row_done, jh + 1, jh)
        plane_done = jh == taps_h
        jh = tl.where(plane_done, 0, jh)
        jd = tl.where(plane_done, jd + 1, jd)
        all_done = jd == taps_d
        jd = tl.where(all_done, 0, jd)
        block = tl.where(all_done, block + 1, block)

    acc = epilogue(acc, b_ptr, stride_b, n_first + offs_n, mask_n, HAS_BIAS, ACTIVATION)
    d_o = phase_d + t_d * STRIDE_D
    h_o = phase_h + t_h * STRIDE_H
    w_o = phase_w + t_w * STRIDE_W
    y_base = y_ptr + first * stride_yn + aligned(n_first * stride_yc, Y_VECTOR)
    y_row = tl.multiple_of(image * stride_yn + d_o * stride_yd + h_o * stride_yh + w_o * stride_yw, Y_VECTOR)
    store_pixels(y_base, y_row, offs_n * stride_yc, acc, mask_m, mask_n, Y_PIXELS_LAST)


@dataclass(frozen=True)
class TransposedPhaseTile(ProductTile):
    """BLOCK_M pixels of a phase by BLOCK_N output channels, BLOCK_K input channels a step; narrow groups are packed."""

    gathered: ClassVar[int | None] = 0

    def runs(self, problem: Problem) -> tuple[int, int]:
        g = problem.geometry
        packed = self.groups_per_tile(problem)
        return problem.x_vector(packed * g.c_in_group, g.c_in), problem.w_vector(g.c_out_group)

    def factors(self, problem: Problem, target: Target | None) -> list[Operand]:
        x, weight = super().factors(problem, target)
        if staging_of(target).turns and problem.itemsize == 2 and self.groups_per_tile(problem) > 1:
            # On gfx942 a weight of several groups, mostly zeros, is not copied ahead.
            weight = replace(weight, run=0)
        return [x, weight]

    def groups_per_tile(self, problem: Problem) -> int:
        g = problem.geometry
        fitting = min(self.BLOCK_K // max(g.c_in_group, 1), self.BLOCK_N // max(g.c_out_group, 1), g.groups)
        return max(fitting, 1)


def _grid(problem: Problem, tile: TransposedPhaseTile) -> int:
    g = problem.geometry
    packed = tile.groups_per_tile(problem)
    largest = g.batch * math.prod(cdiv(size, s) for size, s in zip(g.out_size, g.stride, strict=True))
    return g.phases * cdiv(g.groups, packed) * cdiv(largest, tile.BLOCK_M) * cdiv(packed * g.N, tile.BLOCK_N)


def _arguments(problem: Problem, tile: TransposedPhaseTile) -> dict[str, object]:
    g = problem.geometry
    packed = tile.groups_per_tile(problem)
    arguments = geometry_arguments(problem, tile.BLOCK_M) | tile.sizes()
    for axis, stride, dilation in zip("DHW", g.stride, g.dilation, strict=True):
        common = math.gcd(stride, dilation)
        arguments |= {f"PERIOD_{axis}": stride // common, f"HOP_{axis}": dilation // common}
    return arguments | dict(
        c_in=g.c_in,
        c_out=g.c_out,
        c_in_group=g.c_in_group,
        c_out_group=g.c_out_group,
        X_VECTOR=problem.x_vector(packed * g.c_in_group, g.c_in),
        W_VECTOR=problem.w_vector(g.c_out_group),
        Y_VECTOR=problem.y_vector(packed * g.c_out_group, g.c_out),
        N_VECTOR=math.gcd(VECTOR_LIMIT, packed * g.c_out_group, g.c_out),
        GROUPS_PER_TILE=packed,
    )


def _unsuited(problem: Problem) -> str | None:
    return None if problem.geometry.transposed else "it is not transposed"


KERNEL = Kernel(
    name="transposed_phase",
    function=transposed_phase_kernel,
    tile_type=TransposedPhaseTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=TransposedPhaseTile(num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32),
)
