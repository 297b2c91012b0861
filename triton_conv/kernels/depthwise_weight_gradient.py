"""Weight gradient of a depthwise convolution with any multiplier, rank 1 to 3: sums over pixels, one tap a program."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem, WeightGradientProblem
from ..target import Target
from .arguments import geometry_arguments
from .common import below, tap_offset, tile_pixels, wide
from .kernel import Kernel, Tile, cdiv


@triton.jit
def depthwise_weight_gradient_kernel(
    x_ptr, dy_ptr, dw_ptr,
    batch, c_out, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PADDING_MODE: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr, PIXELS_LAST: tl.constexpr,
    X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, MULTIPLIER: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dw[split, c, tap] = sum over the split's pixels m of dy[m, c] x_tap[m, c // MULTIPLIER].

    Partial sums are float32 (float64), added up by the caller in a fixed order. A tile is [pixels, channels] or, for
    NCHW (PIXELS_LAST), its transpose; it is summed over pixels once, at the end.

    Grid: one axis of SPLITS x cdiv(c_out, BLOCK_C) x taps programs, taps fastest: they read the same dy from L2.
    Depthwise convolution: Chollet, arXiv:1610.02357.
    """
    TAPS: tl.constexpr = KD * KH * KW
    tiles_c = tl.cdiv(c_out, BLOCK_C)
    pid = tl.program_id(0)
    tap = pid % TAPS
    pid_c = pid // TAPS % tiles_c
    split = pid // TAPS // tiles_c
    dd = tap // (KH * KW) * DIL_D
    dh = tap // KW % KH * DIL_H
    dw = tap % KW * DIL_W

    c_first = tl.cast(pid_c * BLOCK_C, tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    if INDEX_INT64:
        offs_c = offs_c.to(tl.int64)
        # A tap's offset is a product of scalars.
        stride_xd, stride_xh, stride_xw = wide(stride_xd), wide(stride_xh), wide(stride_xw)
    mask_c = below(offs_c, c_out - c_first, X_VECTOR)
    channel_in = (c_first % MULTIPLIER + offs_c) // MULTIPLIER * stride_xc if MULTIPLIER > 1 else offs_c * stride_xc
    channel_out = offs_c * stride_yc
    x_channel = x_ptr + c_first // MULTIPLIER * stride_xc
    y_channel = dy_ptr + c_first * stride_yc

    acc = tl.zeros((BLOCK_C, BLOCK_M) if PIXELS_LAST else (BLOCK_M, BLOCK_C), dtype=ACC_DTYPE)
    blocks = tl.cdiv(tl.cast(batch, tl.int64) * d_out * h_out * w_out, SPLITS * BLOCK_M).to(tl.int32)
    for step in range(tl.maximum(blocks, 1)):
        first, image, d_o, h_o, w_o, mask_m = tile_pixels(
            split * blocks + step, batch, d_out, h_out, w_out, RANK, INDEX_INT64, BLOCK_M
        )
        d0 = d_o * STRIDE_D - PAD_D
        h0 = h_o * STRIDE_H - PAD_H
        w0 = w_o * STRIDE_W - PAD_W
        offset, inside = tap_offset(
            d0 * stride_xd + h0 * stride_xh + w0 * stride_xw, d0, h0, w0, dd, dh, dw,
            d_in, h_in, w_in, stride_xd, stride_xh, stride_xw, PADDING_MODE, RANK,
        )  # fmt: skip
        x_row = tl.multiple_of(image * stride_xn + offset, X_VECTOR)
        y_row = tl.multiple_of(image * stride_yn + d_o * stride_yd + h_o * stride_yh + w_o * stride_yw, Y_VECTOR)
        x_base = x_channel + first * stride_xn
        y_base = y_channel + first * stride_yn
        mask_x = inside & mask_m
        if PIXELS_LAST:
            x_tile = tl.load(
                x_base + channel_in[:, None] + x_row[None, :], mask=mask_c[:, None] & mask_x[None, :], other=0.0
            )  # [BLOCK_C, BLOCK_M]
            dy_tile = tl.load(
                y_base + channel_out[:, None] + y_row[None, :], mask=mask_c[:, None] & mask_m[None, :], other=0.0
            )  # [BLOCK_C, BLOCK_M]
        else:
            x_tile = tl.load(
                x_base + x_row[:, None] + channel_in[None, :], mask=mask_x[:, None] & mask_c[None, :], other=0.0
            )  # [BLOCK_M, BLOCK_C]
            dy_tile = tl.load(
                y_base + y_row[:, None] + channel_out[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0
            )  # [BLOCK_M, BLOCK_C]
        acc += x_tile.to(ACC_DTYPE) * dy_tile.to(ACC_DTYPE)

    total = tl.sum(acc, axis=1 if PIXELS_LAST else 0)
    row = tl.cast(split, tl.int64) * c_out + c_first + offs_c
    tl.store(dw_ptr + row * TAPS + tap, total, mask=mask_c)


@dataclass(frozen=True)
class DepthwiseWeightGradientTile(Tile):
    """BLOCK_M pixels by BLOCK_C channels a step, SPLITS partial sums."""

    BLOCK_M: int = 32
    BLOCK_C: int = 32
    SPLITS: int = 1

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        # The sum over pixels crosses warps: of each a number a channel, once its threads have added theirs up.
        return self.BLOCK_C * self.num_warps * problem.accumulator_bytes

    def accumulator_values(self) -> int:
        return 3 * self.BLOCK_M * self.BLOCK_C


def _grid(problem: Problem, tile: DepthwiseWeightGradientTile) -> int:
    g = problem.geometry
    return g.taps * cdiv(g.c_out, tile.BLOCK_C) * tile.SPLITS


def _arguments(problem: Problem, tile: DepthwiseWeightGradientTile) -> dict[str, object]:
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
    if not isinstance(problem, WeightGradientProblem):
        return "it is no weight gradient"
    g = problem.geometry
    return None if g.c_in_group == 1 else f"a group has {g.c_in_group} input channels, not 1"


KERNEL = Kernel(
    name="depthwise_weight_gradient",
    function=depthwise_weight_gradient_kernel,
    tile_type=DepthwiseWeightGradientTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=DepthwiseWeightGradientTile(num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_C=16),
    pointers=("x_ptr", "dy_ptr", "dw_ptr"),
)
