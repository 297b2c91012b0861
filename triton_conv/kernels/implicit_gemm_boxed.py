"""Implicit GEMM of stride 1, channels-last, rank 1 to 3: boxes of pixels brought in by the bulk copy engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from .arguments import geometry_arguments, weight_arguments
from .boxes import box, boxes, load_box, pixels_spanned, unboxable
from .common import aligned, below, dot, epilogue, store_pixels, wide
from .kernel import Kernel, ProductTile, cdiv


@triton.jit
def implicit_gemm_boxed_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_in_group, c_out_group, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xd, stride_xh, stride_xw,
    stride_wg, stride_wn, stride_wk, stride_wd, stride_wh, stride_ww,
    stride_yn, stride_yd, stride_yh, stride_yw, stride_b,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr,
    INDEX_INT64: tl.constexpr, X_VECTOR: tl.constexpr, W_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    K_LAST: tl.constexpr, BOX_N: tl.constexpr, BOX_D: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n] = activation(sum_k x[m, k] w[k, n] + b[n]), m = (image, pixel), n = output channel, k = (channel, tap).

    M runs over boxes of pixels, BLOCK_M of them from BOX_N images; a tap is a box beside it, and padding what lies
    outside of the input. TRANSPOSED taps lie on the other side, which makes it the input gradient of such a
    convolution. The product is computed as w x^T: a right operand may be a box and stay in shared memory, a left one
    that is a box goes through registers. The copy engine computes the addresses of x; those of the weight change by one
    scalar a step (K_LAST: its channels of K are contiguous, else those of N).

    Grid: one axis of cdiv(N, BLOCK_N) x boxes x groups programs, N fastest, so that programs which read the same pixels
    run together. The implicit precomputed GEMM of cuDNN (Chetlur et al. 2014, arXiv:1410.0759).
    """
    TAPS: tl.constexpr = KD * KH * KW
    SIGN: tl.constexpr = -1 if TRANSPOSED else 1
    tiles_n = tl.cdiv(c_out_group, BLOCK_N)
    in_row, rows, planes = tl.cdiv(w_out, BOX_W), tl.cdiv(h_out, BOX_H), tl.cdiv(d_out, BOX_D)
    pid = tl.program_id(0)
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n
    w = pid_m % in_row * BOX_W
    h = pid_m // in_row % rows * BOX_H
    d = pid_m // in_row // rows % planes * BOX_D
    images = tl.cdiv(batch, BOX_N)
    n = pid_m // in_row // rows // planes % images * BOX_N
    group = pid_m // in_row // rows // planes // images

    x_boxes = boxes(
        x_ptr + tl.cast(group * c_in_group, tl.int64), batch, d_in, h_in, w_in, c_in_group,
        stride_xn, stride_xd, stride_xh, stride_xw, RANK, BOX_N, BOX_D, BOX_H, BOX_W, BLOCK_K,
    )  # fmt: skip
    w_base = w_ptr + aligned(tl.cast(group, tl.int64) * stride_wg, W_VECTOR)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = below(offs_n, c_out_group, Y_VECTOR)

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC_DTYPE)
    # At least one step, masked off where there is no channel: a loop that may not run costs every wgmma its overlap.
    for step in range(tl.maximum(tl.cdiv(c_in_group, BLOCK_K), 1) * TAPS):
        tap = step % TAPS
        channel = step // TAPS * BLOCK_K
        kd = tap // (KH * KW)
        kh = tap // KW % KH
        kw = tap % KW
        x_tile = load_box(
            x_boxes, n, d + SIGN * (kd * DIL_D - PAD_D), h + SIGN * (kh * DIL_H - PAD_H),
            w + SIGN * (kw * DIL_W - PAD_W), channel, RANK, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        mask_k = below(channel + offs_k, c_in_group, X_VECTOR)
        w_tap = w_base + aligned(kd * stride_wd + kh * stride_wh + kw * stride_ww, W_VECTOR)
        if K_LAST:
            w_tile = tl.load(
                w_tap + channel + (tl.multiple_of(offs_n * stride_wn, W_VECTOR)[:, None] + offs_k[None, :]),
                mask=mask_n[:, None] & mask_k[None, :],
                other=0.0,
            )  # [BLOCK_N, BLOCK_K]
        else:
            w_tile = tl.trans(
                tl.load(
                    w_tap
                    + aligned(tl.cast(channel, tl.int64) * stride_wk, W_VECTOR)
                    + (tl.multiple_of(offs_k * stride_wk, W_VECTOR)[:, None] + offs_n[None, :]),
                    mask=mask_k[:, None] & mask_n[None, :],
                    other=0.0,
                )
            )
        acc = dot(w_tile, tl.trans(x_tile), acc, PRECISION)

    channel_out = group * c_out_group + offs_n
    result = epilogue(tl.trans(acc), b_ptr, stride_b, channel_out, mask_n, HAS_BIAS, ACTIVATION)
    offs_m = tl.arange(0, BLOCK_M)
    at_w = offs_m % BOX_W
    at_h = offs_m // BOX_W % BOX_H
    at_d = offs_m // (BOX_W * BOX_H) % BOX_D
    at_n = offs_m // (BOX_W * BOX_H * BOX_D)
    mask_m = (at_w < w_out - w) & (at_h < h_out - h) & (at_d < d_out - d) & (at_n < batch - n)
    if INDEX_INT64:
        stride_yn, stride_yd, stride_yh, stride_yw = wide(stride_yn), wide(stride_yd), wide(stride_yh), wide(stride_yw)
    corner = tl.cast(n, tl.int64) * stride_yn + tl.cast(d, tl.int64) * stride_yd + tl.cast(h, tl.int64) * stride_yh
    y_base = y_ptr + aligned(corner + w * stride_yw + group * c_out_group, Y_VECTOR)
    place = tl.multiple_of(at_n * stride_yn + at_d * stride_yd + at_h * stride_yh + at_w * stride_yw, Y_VECTOR)
    store_pixels(y_base, place, offs_n, result, mask_m, mask_n, False)


@dataclass(frozen=True)
class ImplicitGemmBoxedTile(ProductTile):
    """BLOCK_M output pixels by BLOCK_N output channels, BLOCK_K channels of a tap a step."""

    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 64

    def rows(self) -> int:
        return self.BLOCK_N


def _grid(problem: Problem, tile: ImplicitGemmBoxedTile) -> int:
    g, sides = problem.geometry, box(problem, tile.BLOCK_M)
    counts = (cdiv(size, side) for size, side in zip((g.batch, *g.out_size), sides.values(), strict=True))
    return cdiv(g.c_out_group, tile.BLOCK_N) * math.prod(counts) * g.groups


def _arguments(problem: Problem, tile: ImplicitGemmBoxedTile) -> dict[str, object]:
    g = problem.geometry
    sides = box(problem, tile.BLOCK_M)
    return (
        geometry_arguments(problem, pixels_spanned(problem, sides))
        | weight_arguments(problem)
        | tile.sizes()
        | sides
        | dict(
            X_VECTOR=problem.x_vector(g.c_in_group),
            Y_VECTOR=problem.y_vector(g.c_out_group),
        )
    )


def _unsuited(problem: Problem) -> str | None:
    g = problem.geometry
    if any(step != 1 for step in g.stride):
        return f"the stride is {g.stride}, not 1"
    if reason := unboxable(problem):
        return reason
    return None if problem.w_strides[1] == 1 else "the second dimension of its weight is not contiguous"


KERNEL = Kernel(
    name="implicit_gemm_boxed",
    function=implicit_gemm_boxed_kernel,
    tile_type=ImplicitGemmBoxedTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=ImplicitGemmBoxedTile(num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_N=64, BLOCK_K=32),
    descriptors=True,
)
