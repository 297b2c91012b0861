"""Depthwise convolution with any channel multiplier, rank 1 to 3, direct: no product to feed tensor cores with."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from ..target import Target
from .arguments import geometry_arguments
from .common import accumulate_tap, activate, below, narrow, tile_pixels, wide
from .kernel import Kernel, Tile, cdiv


@triton.jit
def depthwise_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_out, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    stride_wo, stride_wd, stride_wh, stride_ww,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw, stride_b,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PADDING_MODE: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr, PIXELS_LAST: tl.constexpr,
    X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, MULTIPLIER: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[m, c] = activation(sum_tap x_tap[m, c // MULTIPLIER] w[c, tap] + b[c]).

    Grid: one axis of cdiv(c_out, BLOCK_C) x cdiv(M, BLOCK_M) programs; channels fastest for NHWC, whose cache lines
    they share, pixels fastest for NCHW. A tile is [pixels, channels] or, for NCHW (PIXELS_LAST), its transpose. Taps
    are read again and again from L1: hence num_stages = 1, since a pipelined load bypasses L1.

    With UNROLL the taps of a filter row are unrolled. Depthwise convolution: Sifre 2014; Chollet, arXiv:1610.02357.
    """
    tiles_c = tl.cdiv(c_out, BLOCK_C)
    pid = tl.program_id(0)
    if PIXELS_LAST:
        tiles_m = tl.cdiv(tl.cast(batch, tl.int64) * d_out * h_out * w_out, BLOCK_M).to(tl.int32)
        pid_m = pid % tiles_m
        pid_c = pid // tiles_m
    else:
        pid_c = pid % tiles_c
        pid_m = pid // tiles_c
    first, image, d_o, h_o, w_o, mask_m = tile_pixels(pid_m, batch, d_out, h_out, w_out, RANK, INDEX_INT64, BLOCK_M)
    d0 = d_o * STRIDE_D - PAD_D
    h0 = h_o * STRIDE_H - PAD_H
    w0 = w_o * STRIDE_W - PAD_W
    image_offset = image * stride_xn
    pixel_offset = d0 * stride_xd + h0 * stride_xh + w0 * stride_xw

    # Offsets of channels start from the tile's first, whose 64-bit base the pointer carries.
    c_first = tl.cast(pid_c * BLOCK_C, tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    if INDEX_INT64:
        offs_c = offs_c.to(tl.int64)
        # A tap's offset is a product of scalars.
        stride_xd, stride_xh, stride_xw = wide(stride_xd), wide(stride_xh), wide(stride_xw)
        stride_wd, stride_wh, stride_ww = wide(stride_wd), wide(stride_wh), wide(stride_ww)
    mask_c = below(offs_c, c_out - c_first, X_VECTOR)
    channel_in = (c_first % MULTIPLIER + offs_c) // MULTIPLIER * stride_xc if MULTIPLIER > 1 else offs_c * stride_xc
    x_base = x_ptr + first * stride_xn + c_first // MULTIPLIER * stride_xc
    w_base = w_ptr + c_first * stride_wo + offs_c * stride_wo

    acc = tl.zeros((BLOCK_C, BLOCK_M) if PIXELS_LAST else (BLOCK_M, BLOCK_C), dtype=ACC_DTYPE)
    for row in range(KD * KH):
        kd = row // KH
        kh = row % KH
        w_row = w_base + (kd * stride_wd + kh * stride_wh)
        if UNROLL:
            for kw in tl.static_range(KW):
                acc = accumulate_tap(
                    acc, x_base, w_row + kw * stride_ww, image_offset, pixel_offset, channel_in, mask_m, mask_c,
                    d0, h0, w0, kd * DIL_D, kh * DIL_H, kw * DIL_W, d_in, h_in, w_in, stride_xd, stride_xh, stride_xw,
                    PADDING_MODE, RANK, PIXELS_LAST, X_VECTOR,
                )  # fmt: skip
        else:
            for kw in range(KW):
                acc = accumulate_tap(
                    acc, x_base, w_row + kw * stride_ww, image_offset, pixel_offset, channel_in, mask_m, mask_c,
                    d0, h0, w0, kd * DIL_D, kh * DIL_H, kw * DIL_W, d_in, h_in, w_in, stride_xd, stride_xh, stride_xw,
                    PADDING_MODE, RANK, PIXELS_LAST, X_VECTOR,
                )  # fmt: skip

    y_base = y_ptr + first * stride_yn + c_first * stride_yc
    y_row = tl.multiple_of(image * stride_yn + d_o * stride_yd + h_o * stride_yh + w_o * stride_yw, Y_VECTOR)
    if HAS_BIAS:
        bias = tl.load(b_ptr + (c_first + offs_c) * stride_b, mask=mask_c, other=0.0).to(ACC_DTYPE)
        acc += bias[:, None] if PIXELS_LAST else bias[None, :]
    y_tile = narrow(activate(acc, ACTIVATION), y_ptr.dtype.element_ty)
    channel_out = offs_c * stride_yc
    if PIXELS_LAST:
        tl.store(y_base + channel_out[:, None] + y_row[None, :], y_tile, mask=mask_c[:, None] & mask_m[None, :])
    else:
        tl.store(y_base + y_row[:, None] + channel_out[None, :], y_tile, mask=mask_m[:, None] & mask_c[None, :])


@dataclass(frozen=True)
class DepthwiseTile(Tile):
    """BLOCK_M output pixels by BLOCK_C output channels; UNROLL unrolls a filter row."""

    BLOCK_M: int = 32
    BLOCK_C: int = 32
    UNROLL: bool = True

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        # The weights, or the bias, of all channels change their layout.
        return self.BLOCK_C * problem.accumulator_bytes

    def accumulator_values(self) -> int:
        # Besides the sums, each tap in flight holds a tile of inputs of the same size.
        return 2 * self.BLOCK_M * self.BLOCK_C

    def mismatch(self, problem: Problem) -> str | None:
        if self.UNROLL and problem.geometry.kernel[2] > 32:
            return f"a filter row of {problem.geometry.kernel[2]} taps is too long to unroll"
        return None


def _grid(problem: Problem, tile: DepthwiseTile) -> int:
    return cdiv(problem.geometry.c_out, tile.BLOCK_C) * cdiv(problem.geometry.M, tile.BLOCK_M)


def _arguments(problem: Problem, tile: DepthwiseTile) -> dict[str, object]:
    g = problem.geometry
    multiplier = g.c_out_group
    return (
        geometry_arguments(problem, tile.BLOCK_M)
        | tile.sizes()
        | dict(
            c_out=g.c_out,
            X_VECTOR=problem.x_vector(g.c_out, tile.BLOCK_C) if multiplier == 1 else 1,
            Y_VECTOR=problem.y_vector(g.c_out, tile.BLOCK_C),
            MULTIPLIER=multiplier,
        )
    )


def _unsuited(problem: Problem) -> str | None:
    g = problem.geometry
    if g.transposed:
        return "it is transposed"
    return None if g.c_in_group == 1 else f"a group has {g.c_in_group} input channels, not 1"


KERNEL = Kernel(
    name="depthwise",
    function=depthwise_kernel,
    tile_type=DepthwiseTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=DepthwiseTile(num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_C=16, UNROLL=False),
)
