"""Grouped convolution whose channels leave shuffled, rank 1 to 3: ShuffleNet's 1x1 and its shuffle in one kernel."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from ..problem_lectures import ShuffleProblem
from .arguments import geometry_arguments
from .common import (
    aligned,
    below,
    dot,
    epilogue,
    load_pixels,
    store_pixels,
    tap_offset,
    tile_pixels,
    wide,
    within,
)
from .kernel import Kernel, ProductTile, cdiv


@triton.jit
def shuffle_gemm_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_in_group, c_out_group, groups, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    stride_wo, stride_wi, stride_wd, stride_wh, stride_ww,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw, stride_b,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr,
    INDEX_INT64: tl.constexpr, PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr,
    X_VECTOR: tl.constexpr, W_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n groups + g] = activation(sum_k x[m, g, k] w[k, g, n] + b[g, n]), n = output channel of group g.

    Grid: one axis of groups x cdiv(N, BLOCK_N) x cdiv(M, BLOCK_M) programs, groups fastest: in NHWC the channels of all
    groups alternate, and what one program leaves of a line the next ones fill in while it is in L2. K runs over
    channels of one tap after the other. Nothing is read or written more often than by the convolution alone.

    WHOLE: cdiv(c_out, BLOCK_N) x cdiv(M, BLOCK_M) programs, N and K over the channels of all groups, the output's in
    the order that they leave in, and a weight is zero where the two are of different groups. `groups` times the
    products, but a pixel's channels are stored side by side: one group's are two bytes each in a sector of their own
    (ShuffleNet's 3 groups, NHWC, on an H100: 117 us, where copying the input and output takes 29).

    Zhang et al., "ShuffleNet", arXiv:1707.01083.
    """
    TAPS: tl.constexpr = KD * KH * KW
    pid = tl.program_id(0)
    if WHOLE:
        tiles_n = tl.cdiv(c_out_group * groups, BLOCK_N)
        pid_g = 0
        pid_n = pid % tiles_n
        pid_m = pid // tiles_n
        channels = c_in_group * groups
    else:
        tiles_n = tl.cdiv(c_out_group, BLOCK_N)
        pid_g = pid % groups
        pid_n = pid // groups % tiles_n
        pid_m = pid // groups // tiles_n
        channels = c_in_group
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
    if WHOLE:
        # Counted from channel 0 of the input, as K is; `source` is the output channel before shuffling.
        source = offs_n % groups * c_out_group + offs_n // groups
        own = offs_n % groups * c_in_group
        mask_n = below(offs_n, c_out_group * groups, Y_VECTOR)
        w_column = tl.multiple_of(source * stride_wo - own * stride_wi, W_VECTOR)
    else:
        source = pid_g * c_out_group + offs_n
        mask_n = offs_n < c_out_group
        w_column = tl.multiple_of(offs_n * stride_wo, W_VECTOR)
    offs_k = tl.arange(0, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    # At least one step, masked off where there is no channel: a loop that may not run costs every wgmma its overlap.
    for step in range(tl.maximum(tl.cdiv(channels, BLOCK_K), 1) * TAPS):
        tap = step % TAPS
        channel = step // TAPS * BLOCK_K + offs_k
        mask_k = below(channel, channels, X_VECTOR)
        mask_w = mask_k[:, None] & mask_n[None, :]
        if WHOLE:
            # One truth a vector: a group's channels begin at a multiple of it.
            mask_w = mask_w & within(
                (channel // W_VECTOR)[:, None] - (own // W_VECTOR)[None, :], c_in_group // W_VECTOR
            )
        if INDEX_INT64:
            channel = channel.to(tl.int64)
        kd = tap // (KH * KW)
        kh = tap // KW % KH
        kw = tap % KW
        offset, inside = tap_offset(
            pixel_offset, d0, h0, w0, kd * DIL_D, kh * DIL_H, kw * DIL_W,
            d_in, h_in, w_in, stride_xd, stride_xh, stride_xw, "zeros", RANK,
        )  # fmt: skip
        x_row = tl.multiple_of(image_offset + offset, X_VECTOR)
        x_tile = load_pixels(x_base, x_row, channel * stride_xc, inside & mask_m, mask_k, PIXELS_LAST)
        w_row = tl.multiple_of(channel * stride_wi + (kd * stride_wd + kh * stride_wh + kw * stride_ww), W_VECTOR)
        w_tile = tl.load(w_base + w_row[:, None] + w_column[None, :], mask=mask_w, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = dot(x_tile, w_tile, acc, PRECISION)

    acc = epilogue(acc, b_ptr, stride_b, source, mask_n, HAS_BIAS, ACTIVATION)
    y_base = y_ptr + first * stride_yn
    y_row = image * stride_yn + d_o * stride_yd + h_o * stride_yh + w_o * stride_yw
    if WHOLE:
        y_row = tl.multiple_of(y_row, Y_VECTOR)
        store_pixels(y_base, y_row, offs_n * stride_yc, acc, mask_m, mask_n, Y_PIXELS_LAST)
    else:
        y_base += tl.cast(pid_g, tl.int64) * stride_yc
        store_pixels(y_base, y_row, offs_n * groups * stride_yc, acc, mask_m, mask_n, Y_PIXELS_LAST)


@dataclass(frozen=True)
class ShuffleGemmTile(ProductTile):
    """BLOCK_M output pixels by BLOCK_N output channels of a group, BLOCK_K input channels a step; of all groups if
    WHOLE."""

    WHOLE: bool = False

    def runs(self, problem: Problem) -> tuple[int, int]:
        channels = problem.geometry.c_in_group
        return problem.x_vector(channels), problem.w_vector(channels)


def _grid(problem: Problem, tile: ShuffleGemmTile) -> int:
    g = problem.geometry
    tiles_n = cdiv(g.c_out, tile.BLOCK_N) if tile.WHOLE else g.groups * cdiv(g.N, tile.BLOCK_N)
    return tiles_n * cdiv(g.M, tile.BLOCK_M)


def _arguments(problem: Problem, tile: ShuffleGemmTile) -> dict[str, object]:
    g = problem.geometry
    return (
        geometry_arguments(problem, tile.BLOCK_M)
        | tile.sizes()
        | dict(
            c_in_group=g.c_in_group,
            c_out_group=g.c_out_group,
            groups=g.groups,
            X_VECTOR=problem.x_vector(g.c_in_group),
            W_VECTOR=problem.w_vector(g.c_in_group),
            Y_VECTOR=problem.y_vector(g.c_out) if tile.WHOLE else 1,
        )
    )


def _unsuited(problem: Problem) -> str | None:
    return None if isinstance(problem, ShuffleProblem) else "its channels leave in order"


KERNEL = Kernel(
    name="shuffle_gemm",
    function=shuffle_gemm_kernel,
    tile_type=ShuffleGemmTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=ShuffleGemmTile(num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32),
)
