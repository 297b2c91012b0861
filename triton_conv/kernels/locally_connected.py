"""Locally connected layer, rank 1 to 3: a filter of its own for every output pixel, each of them read once."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from ..problem_lectures import LocalInputGradientProblem, LocalProblem, LocalWeightGradientProblem
from .arguments import place_arguments
from .common import aligned, below, dot, store_pixels, wide, within
from .kernel import Kernel, ProductTile, cdiv


@triton.jit
def locally_connected_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_in_group, c_out_group, groups, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, stride_pd, stride_ph, stride_pw,
    stride_wo, stride_wi, stride_wd, stride_wh, stride_ww, stride_bc, stride_bd, stride_bh, stride_bw,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr, FLAT_K: tl.constexpr, IMAGE_VECTOR: tl.constexpr,
    X_VECTOR: tl.constexpr, W_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n, p] = sum_k w[p, n, k] x_p[k, m] + b[n, p], m = image, n = output channel, k = (channel, tap), p = pixel.

    Grid: one axis of cdiv(batch, BLOCK_M) x cdiv(N, BLOCK_N) x groups x pixels programs, images fastest: those that
    read the same filter run together. M counts images here, the pixels that share a filter. The filter is the left
    operand, read in its own order of memory: with FLAT_K runs of (channel, tap) pairs, as a plain weight has them, else
    channels of one tap after the other. Its traffic is the least there is up to BLOCK_M images.

    Gregor and LeCun, arXiv:1006.0448; Taigman et al., "DeepFace" (2014).
    """
    TAPS: tl.constexpr = KD * KH * KW
    # Either images or channels lie innermost, and the other one's vector is 1.
    ALIGNED: tl.constexpr = X_VECTOR * IMAGE_VECTOR
    tiles_m = tl.cdiv(batch, BLOCK_M)
    tiles_n = tl.cdiv(c_out_group, BLOCK_N)
    pid = tl.program_id(0)
    pid_m = pid % tiles_m
    pid_n = pid // tiles_m % tiles_n
    pid_g = pid // tiles_m // tiles_n % groups
    place = pid // tiles_m // tiles_n // groups
    w_o = place % w_out
    h_o = place // w_out % h_out
    d_o = place // w_out // h_out
    d0 = d_o * STRIDE_D - PAD_D
    h0 = h_o * STRIDE_H - PAD_H
    w0 = w_o * STRIDE_W - PAD_W

    m_first = pid_m * BLOCK_M
    image = tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if INDEX_INT64:
        image = image.to(tl.int64)
        offs_n = offs_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
        stride_xd, stride_xh, stride_xw = wide(stride_xd), wide(stride_xh), wide(stride_xw)
        stride_wd, stride_wh, stride_ww = wide(stride_wd), wide(stride_wh), wide(stride_ww)
    mask_m = below(image, batch - m_first, IMAGE_VECTOR)
    mask_n = below(offs_n, c_out_group, Y_VECTOR)
    x_base = x_ptr + aligned(tl.cast(m_first, tl.int64) * stride_xn, ALIGNED)
    x_base += aligned(tl.cast(pid_g * c_in_group, tl.int64) * stride_xc, ALIGNED)
    filter_offset = wide(stride_pd) * d_o + wide(stride_ph) * h_o + wide(stride_pw) * w_o
    filter_offset += tl.cast(pid_g * c_out_group, tl.int64) * stride_wo
    w_base = w_ptr + aligned(filter_offset, W_VECTOR)
    w_row = tl.multiple_of(offs_n * stride_wo, W_VECTOR)
    x_image = image * stride_xn

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC_DTYPE)
    # At least one step: a loop that may not run costs every wgmma its overlap.
    if FLAT_K:
        for step in range(tl.maximum(tl.cdiv(c_in_group * TAPS, BLOCK_K), 1)):
            k = step * BLOCK_K + offs_k
            mask_k = below(k, c_in_group * TAPS, W_VECTOR)
            tap = k % TAPS
            d_i = d0 + tap // (KH * KW) * DIL_D
            h_i = h0 + tap // KW % KH * DIL_H
            w_i = w0 + tap % KW * DIL_W
            inside = within(d_i, d_in) & within(h_i, h_in) & within(w_i, w_in)
            x_row = k // TAPS * stride_xc + d_i * stride_xd + h_i * stride_xh + w_i * stride_xw
            x_tile = tl.load(
                x_base + tl.multiple_of(x_row, IMAGE_VECTOR)[:, None] + x_image[None, :],
                mask=(inside & mask_k)[:, None] & mask_m[None, :],
                other=0.0,
            )  # [BLOCK_K, BLOCK_M]
            w_tile = tl.load(
                w_base + w_row[:, None] + k[None, :], mask=mask_n[:, None] & mask_k[None, :], other=0.0
            )  # [BLOCK_N, BLOCK_K]
            acc = dot(w_tile, x_tile, acc, PRECISION)
    else:
        for step in range(tl.maximum(tl.cdiv(c_in_group, BLOCK_K), 1) * TAPS):
            tap = step % TAPS
            channel = step // TAPS * BLOCK_K + offs_k
            mask_k = below(channel, c_in_group, W_VECTOR)
            kd = tap // (KH * KW)
            kh = tap // KW % KH
            kw = tap % KW
            d_i = d0 + kd * DIL_D
            h_i = h0 + kh * DIL_H
            w_i = w0 + kw * DIL_W
            inside = within(d_i, d_in) & within(h_i, h_in) & within(w_i, w_in)
            x_tap = x_base + aligned(d_i * stride_xd + h_i * stride_xh + w_i * stride_xw, ALIGNED)
            if PIXELS_LAST:
                x_tile = tl.load(
                    x_tap + tl.multiple_of(channel * stride_xc, IMAGE_VECTOR)[:, None] + x_image[None, :],
                    mask=(mask_k & inside)[:, None] & mask_m[None, :],
                    other=0.0,
                )  # [BLOCK_K, BLOCK_M]
            else:
                x_tile = tl.trans(
                    tl.load(
                        x_tap + tl.multiple_of(x_image, X_VECTOR)[:, None] + (channel * stride_xc)[None, :],
                        mask=mask_m[:, None] & (mask_k & inside)[None, :],
                        other=0.0,
                    )
                )
            w_column = channel * stride_wi
            w_tap = w_base + aligned(kd * stride_wd + kh * stride_wh + kw * stride_ww, W_VECTOR)
            w_tile = tl.load(
                w_tap + w_row[:, None] + w_column[None, :], mask=mask_n[:, None] & mask_k[None, :], other=0.0
            )  # [BLOCK_N, BLOCK_K]
            acc = dot(w_tile, x_tile, acc, PRECISION)

    channel_out = tl.cast(pid_g * c_out_group, tl.int64) + offs_n
    if HAS_BIAS:
        b_base = b_ptr + wide(stride_bd) * d_o + wide(stride_bh) * h_o + wide(stride_bw) * w_o
        acc += tl.load(b_base + channel_out * stride_bc, mask=mask_n, other=0.0).to(ACC_DTYPE)[:, None]
    y_base = y_ptr + tl.cast(m_first, tl.int64) * stride_yn + wide(stride_yd) * d_o + wide(stride_yh) * h_o
    y_base += wide(stride_yw) * w_o + tl.cast(pid_g * c_out_group, tl.int64) * stride_yc
    y_row = tl.multiple_of(image * stride_yn, Y_VECTOR)
    store_pixels(y_base, y_row, offs_n * stride_yc, tl.trans(acc), mask_m, mask_n, Y_PIXELS_LAST)


@dataclass(frozen=True)
class LocallyConnectedTile(ProductTile):
    """BLOCK_M images by BLOCK_N output channels of one pixel, BLOCK_K products a step."""

    def rows(self) -> int:
        return self.BLOCK_N


def _grid(problem: LocalProblem, tile: LocallyConnectedTile) -> int:
    g = problem.geometry
    return cdiv(g.batch, tile.BLOCK_M) * cdiv(g.N, tile.BLOCK_N) * g.groups * g.out_pixels


def _arguments(problem: LocalProblem, tile: LocallyConnectedTile) -> dict[str, object]:
    g = problem.geometry
    arguments = place_arguments(problem, tile.BLOCK_M) | tile.sizes()
    arguments |= {f"stride_b{axis}": s for axis, s in zip("cdhw", problem.bias_strides, strict=True)}
    images = problem.image_vector(problem.x_strides, tile.BLOCK_M, g.batch)
    return arguments | dict(
        FLAT_K=problem.flat,
        IMAGE_VECTOR=images,
        X_VECTOR=problem.x_vector(g.c_in_group),
        W_VECTOR=problem.weight_vector(),
        Y_VECTOR=problem.y_vector(g.c_out_group),
    )


def _unsuited(problem: Problem) -> str | None:
    if not isinstance(problem, LocalProblem):
        return "its filters are shared"
    gradient = isinstance(problem, (LocalInputGradientProblem, LocalWeightGradientProblem))
    return "it is a gradient" if gradient else None


KERNEL = Kernel(
    name="locally_connected",
    function=locally_connected_kernel,
    tile_type=LocallyConnectedTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=LocallyConnectedTile(num_warps=4, num_stages=1, BLOCK_M=16, BLOCK_N=32, BLOCK_K=16),
)
