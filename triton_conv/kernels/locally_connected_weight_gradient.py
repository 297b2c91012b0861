"""Weight gradient of a locally connected layer, rank 1 to 3: for every output pixel a product over the images."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from ..problem_lectures import LocalWeightGradientProblem
from ..target import Target
from .arguments import place_arguments
from .common import aligned, below, dot, narrow, wide, within
from .kernel import Kernel, ProductTile, cdiv


@triton.jit
def locally_connected_weight_gradient_kernel(
    x_ptr, dy_ptr, dw_ptr,
    batch, c_in_group, c_out_group, groups, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, stride_pd, stride_ph, stride_pw,
    stride_wo, stride_wi, stride_wd, stride_wh, stride_ww,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr, FLAT_N: tl.constexpr, IMAGE_VECTOR: tl.constexpr,
    X_VECTOR: tl.constexpr, W_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[p, m, n] = sum_k dy[k, m, p] x_p[k, n], m = output channel, n = (channel, tap), k = image, p = output pixel.

    Grid: one axis of tiles of n x cdiv(c_out_group, BLOCK_M) x groups x pixels programs. The gradient is as large as
    the weight and is written once, in its order: with FLAT_N in runs of (channel, tap) pairs, else in runs of channels,
    the tiles of one tap after those of another. The sum runs over the images of the batch, all in one program.

    Gregor and LeCun, arXiv:1006.0448.
    """
    TAPS: tl.constexpr = KD * KH * KW
    # Either images or channels lie innermost, and the other one's vector is 1.
    X_ALIGNED: tl.constexpr = X_VECTOR * IMAGE_VECTOR
    Y_ALIGNED: tl.constexpr = Y_VECTOR * IMAGE_VECTOR
    tiles_n = tl.cdiv(c_in_group * TAPS, BLOCK_N) if FLAT_N else tl.cdiv(c_in_group, BLOCK_N) * TAPS
    tiles_m = tl.cdiv(c_out_group, BLOCK_M)
    pid = tl.program_id(0)
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n % tiles_m
    pid_g = pid // tiles_n // tiles_m % groups
    place = pid // tiles_n // tiles_m // groups
    w_o = place % w_out
    h_o = place // w_out % h_out
    d_o = place // w_out // h_out

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    lane_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if INDEX_INT64:
        offs_m = offs_m.to(tl.int64)
        lane_n = lane_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
        stride_xd, stride_xh, stride_xw = wide(stride_xd), wide(stride_xh), wide(stride_xw)
    mask_m = below(offs_m, c_out_group, Y_VECTOR)
    if FLAT_N:
        column = pid_n * BLOCK_N + lane_n
        channel = column // TAPS
        tap = column % TAPS
        mask_n = below(column, c_in_group * TAPS, W_VECTOR)
    else:
        channel = pid_n // TAPS * BLOCK_N + lane_n
        tap = pid_n % TAPS
        mask_n = below(channel, c_in_group, W_VECTOR)
    kd = tap // (KH * KW)
    kh = tap // KW % KH
    kw = tap % KW
    d_i = d_o * STRIDE_D - PAD_D + kd * DIL_D
    h_i = h_o * STRIDE_H - PAD_H + kh * DIL_H
    w_i = w_o * STRIDE_W - PAD_W + kw * DIL_W
    mask_x = mask_n & within(d_i, d_in) & within(h_i, h_in) & within(w_i, w_in)
    x_base = x_ptr + aligned(tl.cast(pid_g * c_in_group, tl.int64) * stride_xc, X_ALIGNED)
    x_place = d_i * stride_xd + h_i * stride_xh + w_i * stride_xw
    if not FLAT_N:
        x_base += aligned(tl.cast(x_place, tl.int64), X_ALIGNED)
        x_column = channel * stride_xc
    else:
        x_column = channel * stride_xc + x_place
    y_base = dy_ptr + aligned(tl.cast(pid_g * c_out_group, tl.int64) * stride_yc, Y_ALIGNED)
    y_base += aligned(wide(stride_yd) * d_o + wide(stride_yh) * h_o + wide(stride_yw) * w_o, Y_ALIGNED)
    y_column = offs_m * stride_yc

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    for step in range(tl.maximum(tl.cdiv(batch, BLOCK_K), 1)):
        image = step * BLOCK_K + offs_k
        mask_k = below(image, batch, IMAGE_VECTOR)
        x_image = image * stride_xn
        y_image = image * stride_yn
        if Y_PIXELS_LAST:
            dy_tile = tl.load(
                y_base + tl.multiple_of(y_column, IMAGE_VECTOR)[:, None] + y_image[None, :],
                mask=mask_m[:, None] & mask_k[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_K]
        else:
            dy_tile = tl.trans(
                tl.load(
                    y_base + tl.multiple_of(y_image, Y_VECTOR)[:, None] + y_column[None, :],
                    mask=mask_k[:, None] & mask_m[None, :],
                    other=0.0,
                )
            )
        if PIXELS_LAST or FLAT_N:
            x_tile = tl.trans(
                tl.load(
                    x_base + tl.multiple_of(x_column, IMAGE_VECTOR)[:, None] + x_image[None, :],
                    mask=mask_x[:, None] & mask_k[None, :],
                    other=0.0,
                )
            )  # [BLOCK_K, BLOCK_N]
        else:
            x_tile = tl.load(
                x_base + tl.multiple_of(x_image, X_VECTOR)[:, None] + x_column[None, :],
                mask=mask_k[:, None] & mask_x[None, :],
                other=0.0,
            )
        acc = dot(dy_tile, x_tile, acc, PRECISION)

    w_base = dw_ptr + wide(stride_pd) * d_o + wide(stride_ph) * h_o + wide(stride_pw) * w_o
    w_base += tl.cast(pid_g * c_out_group, tl.int64) * stride_wo
    if FLAT_N:
        w_column = column
    else:
        w_base += kd * wide(stride_wd) + kh * wide(stride_wh) + kw * wide(stride_ww)
        w_column = channel * stride_wi
    w_row = tl.multiple_of(offs_m * stride_wo, W_VECTOR)
    result = narrow(acc, dw_ptr.dtype.element_ty)
    tl.store(w_base + w_row[:, None] + w_column[None, :], result, mask=mask_m[:, None] & mask_n[None, :])


@dataclass(frozen=True)
class LocallyConnectedWeightGradientTile(ProductTile):
    """BLOCK_M output channels by BLOCK_N columns of one pixel's filter, BLOCK_K images a step."""

    def load_bytes(self, problem: Problem, target: Target) -> int:
        values = min(self.BLOCK_M, self.BLOCK_N) * self.BLOCK_K // (self.num_warps * target.warp_size)
        return min(16, values * problem.itemsize)


def _grid(problem: LocalWeightGradientProblem, tile: LocallyConnectedWeightGradientTile) -> int:
    g = problem.geometry
    tiles_n = cdiv(g.K, tile.BLOCK_N) if problem.flat else cdiv(g.c_in_group, tile.BLOCK_N) * g.taps
    return tiles_n * cdiv(g.c_out_group, tile.BLOCK_M) * g.groups * g.out_pixels


def _arguments(problem: LocalWeightGradientProblem, tile: LocallyConnectedWeightGradientTile) -> dict[str, object]:
    g = problem.geometry
    arguments = place_arguments(problem, tile.BLOCK_M) | tile.sizes()
    x_images = problem.image_vector(problem.x_strides, tile.BLOCK_K, g.batch)
    y_images = problem.image_vector(problem.y_strides, tile.BLOCK_K, g.batch)
    return arguments | dict(
        FLAT_N=problem.flat,
        IMAGE_VECTOR=min(x_images, y_images),
        X_VECTOR=problem.x_vector(g.c_in_group),
        W_VECTOR=problem.weight_vector(),
        Y_VECTOR=problem.y_vector(g.c_out_group),
    )


def _unsuited(problem: Problem) -> str | None:
    return None if isinstance(problem, LocalWeightGradientProblem) else "it is no weight gradient of unshared filters"


KERNEL = Kernel(
    name="locally_connected_weight_gradient",
    function=locally_connected_weight_gradient_kernel,
    tile_type=LocallyConnectedWeightGradientTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=LocallyConnectedWeightGradientTile(num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16),
    pointers=("x_ptr", "dy_ptr", "dw_ptr"),
)
