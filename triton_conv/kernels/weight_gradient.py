"""Weight gradient of a convolution as a product over pixels, split into partial sums: rank 1 to 3, any groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import triton
import triton.language as tl

from ..problem import Problem, WeightGradientProblem
from ..target import Target
from .arguments import geometry_arguments
from .common import (
    LAST_IS_FASTEST,
    aligned,
    below,
    dot,
    load_pixels,
    next_tile,
    tap_offset,
    tile_digits,
    tile_pixels,
    wide,
)
from .kernel import Kernel, ProductTile, cdiv
from .staging import Operand, address_bytes, partial_bytes, staging_of


@triton.jit
def weight_gradient_kernel(
    x_ptr, dy_ptr, dw_ptr,
    batch, c_in_group, c_out_group, d_in, h_in, w_in, d_out, h_out, w_out, groups,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PADDING_MODE: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr, X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    FLAT_N: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[split, o, c, tap] = sum over the split's pixels m of dy[m, o] x_tap[m, c].

    M runs over the output channels of a group, N over its input channels of one tap (FLAT_N: over (channel, tap) pairs,
    for groups narrower than BLOCK_N), K over pixels. Partial sums are float32 (float64), in the weight's own order; the
    caller adds them up in a fixed order, so that the result is the same bits every time.

    Grid: one axis of SPLITS x groups x cdiv(c_out_group, BLOCK_M) x tiles of N, N fastest: those share dy. The backward
    filter convolution of cuDNN (Chetlur et al. 2014, arXiv:1410.0759).
    """
    TAPS: tl.constexpr = KD * KH * KW
    tiles_c = tl.cdiv(c_in_group * TAPS, BLOCK_N) if FLAT_N else tl.cdiv(c_in_group, BLOCK_N)
    tiles_n = tiles_c if FLAT_N else tiles_c * TAPS
    tiles_m = tl.cdiv(c_out_group, BLOCK_M)
    pid = tl.program_id(0)
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n % tiles_m
    group = pid // tiles_n // tiles_m % groups
    split = pid // tiles_n // tiles_m // groups

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    if FLAT_N:
        column = pid_n * BLOCK_N + offs_n
        mask_n = column < c_in_group * TAPS
        channel = column // TAPS
        tap = column % TAPS
    else:
        channel = pid_n // TAPS * BLOCK_N + offs_n
        mask_n = below(channel, c_in_group, X_VECTOR)
        tap = pid_n % TAPS
        column = channel * TAPS + tap
    mask_m = below(offs_m, c_out_group, Y_VECTOR)
    if INDEX_INT64:
        offs_m = offs_m.to(tl.int64)
        channel = channel.to(tl.int64)
        # A tap's offset is a product of scalars.
        stride_xd, stride_xh, stride_xw = wide(stride_xd), wide(stride_xh), wide(stride_xw)
    dd = tap // (KH * KW) * DIL_D
    dh = tap // KW % KH * DIL_H
    dw = tap % KW * DIL_W
    x_group = x_ptr + aligned(tl.cast(group * c_in_group, tl.int64) * stride_xc, X_VECTOR)
    y_group = dy_ptr + aligned(tl.cast(group * c_out_group, tl.int64) * stride_yc, Y_VECTOR)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    blocks = tl.cdiv(tl.cast(batch, tl.int64) * d_out * h_out * w_out, SPLITS * BLOCK_K).to(tl.int32)
    block = split * blocks
    first, image, d_o, h_o, w_o, mask_k = tile_pixels(block, batch, d_out, h_out, w_out, RANK, INDEX_INT64, BLOCK_K)
    rest = (tl.cast(block, tl.int64) * BLOCK_K - first * d_out * h_out * w_out).to(w_o.dtype)
    digits = tile_digits(d_out, h_out, w_out, RANK, BLOCK_K)
    for _ in range(tl.maximum(blocks, 1)):
        d0 = d_o * STRIDE_D - PAD_D
        h0 = h_o * STRIDE_H - PAD_H
        w0 = w_o * STRIDE_W - PAD_W
        image_offset = image * stride_xn
        pixel_offset = d0 * stride_xd + h0 * stride_xh + w0 * stride_xw
        x_base = x_group + first * stride_xn
        if FLAT_N:
            if PIXELS_LAST and LAST_IS_FASTEST:
                offset, inside = tap_offset(
                    pixel_offset[None, :], d0[None, :], h0[None, :], w0[None, :], dd[:, None], dh[:, None], dw[:, None],
                    d_in, h_in, w_in, stride_xd, stride_xh, stride_xw, PADDING_MODE, RANK,
                )  # fmt: skip
                x_tile = tl.trans(
                    tl.load(
                        x_base + image_offset[None, :] + offset + (channel * stride_xc)[:, None],
                        mask=inside & mask_k[None, :] & mask_n[:, None],
                        other=0.0,
                    )
                )  # [BLOCK_K, BLOCK_N]
            else:
                offset, inside = tap_offset(
                    pixel_offset[:, None], d0[:, None], h0[:, None], w0[:, None], dd[None, :], dh[None, :], dw[None, :],
                    d_in, h_in, w_in, stride_xd, stride_xh, stride_xw, PADDING_MODE, RANK,
                )  # fmt: skip
                x_tile = tl.load(
                    x_base + image_offset[:, None] + offset + (channel * stride_xc)[None, :],
                    mask=inside & mask_k[:, None] & mask_n[None, :],
                    other=0.0,
                )  # [BLOCK_K, BLOCK_N]
        else:
            offset, inside = tap_offset(
                pixel_offset, d0, h0, w0, dd, dh, dw,
                d_in, h_in, w_in, stride_xd, stride_xh, stride_xw, PADDING_MODE, RANK,
            )  # fmt: skip
            x_row = tl.multiple_of(image_offset + offset, X_VECTOR)
            x_tile = load_pixels(x_base, x_row, channel * stride_xc, inside & mask_k, mask_n, PIXELS_LAST)
        y_row = tl.multiple_of(image * stride_yn + d_o * stride_yd + h_o * stride_yh + w_o * stride_yw, Y_VECTOR)
        dy_tile = load_pixels(
            y_group + first * stride_yn, y_row, offs_m * stride_yc, mask_k, mask_m, Y_PIXELS_LAST
        )  # [BLOCK_K, BLOCK_M]
        acc = dot(tl.trans(dy_tile), x_tile, acc, PRECISION)
        first, rest, image, d_o, h_o, w_o, mask_k = next_tile(
            digits, first, rest, image, d_o, h_o, w_o, batch, d_out, h_out, w_out, RANK
        )

    row = (tl.cast(split, tl.int64) * groups + group) * c_out_group + offs_m
    tl.store(dw_ptr + row[:, None] * (c_in_group * TAPS) + column[None, :], acc, mask=mask_m[:, None] & mask_n[None, :])


@dataclass(frozen=True)
class WeightGradientTile(ProductTile):
    """BLOCK_M output by BLOCK_N input channels of one tap (FLAT_N: (channel, tap) pairs), BLOCK_K pixels a step, SPLITS
    partial sums."""

    gathered: ClassVar[int | None] = 1

    FLAT_N: bool = False
    SPLITS: int = 1

    def runs(self, problem: Problem) -> tuple[int, int]:
        g = problem.geometry
        return problem.y_vector(g.c_out_group), 1 if self.FLAT_N else problem.x_vector(g.c_in_group)

    def stored_bytes(self, problem: Problem, target: Target | None) -> int:
        return partial_bytes(problem, target)

    def factors(self, problem: Problem, target: Target | None) -> list[Operand]:
        dy, x = super().factors(problem, target)
        if self.FLAT_N and self.num_stages > 1 and problem.itemsize == 2 and dy.run >= 4 and staging_of(target).turns:
            # Loads of tiles of one shape are laid out alike.
            side = dy.run // problem.itemsize if self.BLOCK_M == self.BLOCK_N else 1
            x = replace(x, size=max(x.size, address_bytes(self.BLOCK_K, self.BLOCK_N, side, self.num_warps)))
        return [dy, x]


def _grid(problem: Problem, tile: WeightGradientTile) -> int:
    g = problem.geometry
    tiles_n = cdiv(g.K, tile.BLOCK_N) if tile.FLAT_N else cdiv(g.c_in_group, tile.BLOCK_N) * g.taps
    return tiles_n * cdiv(g.c_out_group, tile.BLOCK_M) * g.groups * tile.SPLITS


def _arguments(problem: Problem, tile: WeightGradientTile) -> dict[str, object]:
    g = problem.geometry
    return (
        geometry_arguments(problem, tile.BLOCK_K)
        | tile.sizes()
        | dict(
            c_in_group=g.c_in_group,
            c_out_group=g.c_out_group,
            groups=g.groups,
            X_VECTOR=problem.x_vector(g.c_in_group),
            Y_VECTOR=problem.y_vector(g.c_out_group),
        )
    )


def _unsuited(problem: Problem) -> str | None:
    if not isinstance(problem, WeightGradientProblem):
        return "it is no weight gradient"
    return None


KERNEL = Kernel(
    name="weight_gradient",
    function=weight_gradient_kernel,
    tile_type=WeightGradientTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=WeightGradientTile(num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, FLAT_N=True),
    pointers=("x_ptr", "dy_ptr", "dw_ptr"),
)
