"""Implicit GEMM: dense, dilated, strided and wide-group convolution of rank 1 to 3 on tensor cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ..problem import Problem, vector_of
from .arguments import geometry_arguments
from .common import (
    LAST_IS_FASTEST,
    aligned,
    below,
    dot,
    epilogue,
    load_pixels,
    store_pixels,
    tap_offset,
    tile_pixels,
    wide,
)
from .kernel import Kernel, ProductTile, cdiv


@triton.jit
def implicit_gemm_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_in_group, c_out_group, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    stride_wo, stride_wi, stride_wd, stride_wh, stride_ww,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw, stride_b,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PADDING_MODE: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr, PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr,
    X_VECTOR: tl.constexpr, W_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, WEIGHT_FLAT: tl.constexpr,
    FLAT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n] = activation(sum_k x[m, k] w[k, n] + b[n]), m = (image, pixel), n = output channel, k = (channel, tap).

    Grid: one axis of cdiv(N, BLOCK_N) x cdiv(M, BLOCK_M) x groups programs, N fastest, so that programs which read the
    same pixels run together. K runs in steps of BLOCK_K: by default over channels of one tap after the other, so that a
    tap is one scalar added to the pixels' offsets; with FLAT_K over (channel, tap) pairs, which wastes nothing where a
    group has fewer channels than BLOCK_K, and reads a default weight in one contiguous run.

    The algorithm is the implicit precomputed GEMM of cuDNN (Chetlur et al. 2014, arXiv:1410.0759).
    """
    TAPS: tl.constexpr = KD * KH * KW
    tiles_n = tl.cdiv(c_out_group, BLOCK_N)
    tiles_m = tl.cdiv(tl.cast(batch, tl.int64) * d_out * h_out * w_out, BLOCK_M).to(tl.int32)
    pid = tl.program_id(0)
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n % tiles_m
    pid_g = pid // tiles_n // tiles_m
    first, image, d_o, h_o, w_o, mask_m = tile_pixels(pid_m, batch, d_out, h_out, w_out, RANK, INDEX_INT64, BLOCK_M)
    d0 = d_o * STRIDE_D - PAD_D
    h0 = h_o * STRIDE_H - PAD_H
    w0 = w_o * STRIDE_W - PAD_W

    x_base = x_ptr + first * stride_xn + aligned(tl.cast(pid_g * c_in_group, tl.int64) * stride_xc, X_VECTOR)
    w_base = w_ptr + aligned(tl.cast(pid_g * c_out_group, tl.int64) * stride_wo, W_VECTOR)
    image_offset = image * stride_xn
    pixel_offset = d0 * stride_xd + h0 * stride_xh + w0 * stride_xw
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if INDEX_INT64:
        offs_n = offs_n.to(tl.int64)
        # A tap's offset is a product of scalars.
        stride_xd, stride_xh, stride_xw = wide(stride_xd), wide(stride_xh), wide(stride_xw)
        stride_wd, stride_wh, stride_ww = wide(stride_wd), wide(stride_wh), wide(stride_ww)
    mask_n = below(offs_n, c_out_group, Y_VECTOR)
    w_column = tl.multiple_of(offs_n * stride_wo, W_VECTOR)
    offs_k = tl.arange(0, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    # At least one step, masked off where there is no channel: a loop that may not run costs every wgmma its overlap.
    if FLAT_K:
        for step in range(tl.maximum(tl.cdiv(c_in_group * TAPS, BLOCK_K), 1)):
            k = step * BLOCK_K + offs_k
            mask_k = k < c_in_group * TAPS
            channel = k // TAPS
            tap = k % TAPS
            if INDEX_INT64:
                channel = channel.to(tl.int64)
                tap = tap.to(tl.int64)
            kd = tap // (KH * KW)
            kh = tap // KW % KH
            kw = tap % KW
            if WEIGHT_FLAT:
                w_row = k
            else:
                w_row = channel * stride_wi + kd * stride_wd + kh * stride_wh + kw * stride_ww
            # Each (pixel, k) pair has its own tap: offset and mask are whole tiles, [BLOCK_K, BLOCK_M] or transposed.
            if PIXELS_LAST and LAST_IS_FASTEST:
                offset, inside = tap_offset(
                    pixel_offset[None, :], d0[None, :], h0[None, :], w0[None, :],
                    (kd * DIL_D)[:, None], (kh * DIL_H)[:, None], (kw * DIL_W)[:, None],
                    d_in, h_in, w_in, stride_xd, stride_xh, stride_xw, PADDING_MODE, RANK,
                )  # fmt: skip
                x_tile = tl.trans(
                    tl.load(
                        x_base + image_offset[None, :] + offset + (channel * stride_xc)[:, None],
                        mask=inside & mask_m[None, :] & mask_k[:, None],
                        other=0.0,
                    )
                )  # [BLOCK_M, BLOCK_K]
            else:
                offset, inside = tap_offset(
                    pixel_offset[:, None], d0[:, None], h0[:, None], w0[:, None],
                    (kd * DIL_D)[None, :], (kh * DIL_H)[None, :], (kw * DIL_W)[None, :],
                    d_in, h_in, w_in, stride_xd, stride_xh, stride_xw, PADDING_MODE, RANK,
                )  # fmt: skip
                x_tile = tl.load(
                    x_base + image_offset[:, None] + offset + (channel * stride_xc)[None, :],
                    mask=inside & mask_m[:, None] & mask_k[None, :],
                    other=0.0,
                )  # [BLOCK_M, BLOCK_K]
            w_tile = tl.load(
                w_base + w_row[:, None] + w_column[None, :], mask=mask_k[:, None] & mask_n[None, :], other=0.0
            )  # [BLOCK_K, BLOCK_N]
            acc = dot(x_tile, w_tile, acc, PRECISION)
    else:
        for step in range(tl.maximum(tl.cdiv(c_in_group, BLOCK_K), 1) * TAPS):
            tap = step % TAPS
            channel = step // TAPS * BLOCK_K + offs_k
            mask_k = below(channel, c_in_group, X_VECTOR)
            if INDEX_INT64:
                channel = channel.to(tl.int64)
            kd = tap // (KH * KW)
            kh = tap // KW % KH
            kw = tap % KW
            offset, inside = tap_offset(
                pixel_offset, d0, h0, w0, kd * DIL_D, kh * DIL_H, kw * DIL_W,
                d_in, h_in, w_in, stride_xd, stride_xh, stride_xw, PADDING_MODE, RANK,
            )  # fmt: skip
            x_row = tl.multiple_of(image_offset + offset, X_VECTOR)
            x_tile = load_pixels(x_base, x_row, channel * stride_xc, inside & mask_m, mask_k, PIXELS_LAST)
            w_row = tl.multiple_of(channel * stride_wi + (kd * stride_wd + kh * stride_wh + kw * stride_ww), W_VECTOR)
            w_tile = tl.load(
                w_base + w_row[:, None] + w_column[None, :], mask=mask_k[:, None] & mask_n[None, :], other=0.0
            )  # [BLOCK_K, BLOCK_N]
            acc = dot(x_tile, w_tile, acc, PRECISION)

    channel_out = pid_g * c_out_group + offs_n
    acc = epilogue(acc, b_ptr, stride_b, channel_out, mask_n, HAS_BIAS, ACTIVATION)
    y_base = y_ptr + first * stride_yn + aligned(tl.cast(pid_g * c_out_group, tl.int64) * stride_yc, Y_VECTOR)
    y_row = tl.multiple_of(image * stride_yn + d_o * stride_yd + h_o * stride_yh + w_o * stride_yw, Y_VECTOR)
    store_pixels(y_base, y_row, offs_n * stride_yc, acc, mask_m, mask_n, Y_PIXELS_LAST)


@dataclass(frozen=True)
class ImplicitGemmTile(ProductTile):
    """BLOCK_M output pixels by BLOCK_N output channels, BLOCK_K products a step; FLAT_K as the kernel explains."""

    gathered: ClassVar[int | None] = 0

    FLAT_K: bool = False

    def runs(self, problem: Problem) -> tuple[int, int]:
        g = problem.geometry
        if not self.FLAT_K:
            return problem.x_vector(g.c_in_group), problem.w_vector(g.c_in_group)
        # A pixel's (channel, tap) pairs are anywhere.
        return 1, vector_of(problem.w_strides[0], g.K) if problem.weight_flat else 1


def _grid(problem: Problem, tile: ImplicitGemmTile) -> int:
    g = problem.geometry
    return cdiv(g.N, tile.BLOCK_N) * cdiv(g.M, tile.BLOCK_M) * g.groups


def _arguments(problem: Problem, tile: ImplicitGemmTile) -> dict[str, object]:
    g = problem.geometry
    return (
        geometry_arguments(problem, tile.BLOCK_M)
        | tile.sizes()
        | dict(
            c_in_group=g.c_in_group,
            c_out_group=g.c_out_group,
            X_VECTOR=problem.x_vector(g.c_in_group),
            W_VECTOR=problem.w_vector(g.c_in_group),
            Y_VECTOR=problem.y_vector(g.c_out_group),
            WEIGHT_FLAT=problem.weight_flat,
        )
    )


def _unsuited(problem: Problem) -> str | None:
    return "it is transposed" if problem.geometry.transposed else None


KERNEL = Kernel(
    name="implicit_gemm",
    function=implicit_gemm_kernel,
    tile_type=ImplicitGemmTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=ImplicitGemmTile(num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32),
)
