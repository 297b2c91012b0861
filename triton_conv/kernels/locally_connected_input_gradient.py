"""Input gradient of a locally connected layer, rank 1 to 3: every input pixel gathers from the filters that read it."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import VECTOR_LIMIT, Problem
from ..problem_lectures import LocalInputGradientProblem
from .arguments import place_arguments
from .common import aligned, below, dot, store_pixels, wide, within
from .kernel import Kernel, ProductTile, cdiv


@triton.jit
def locally_connected_input_gradient_kernel(
    dy_ptr, w_ptr, dx_ptr,
    batch, c_in_group, c_out_group, groups, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, stride_pd, stride_ph, stride_pw,
    stride_wo, stride_wi, stride_wd, stride_wh, stride_ww,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr, IMAGE_VECTOR: tl.constexpr,
    X_VECTOR: tl.constexpr, W_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx[m, n, q] = sum_{tap, k} w[p, k, n, tap] dy[m, k, p], p the output that reads input pixel q with this tap.

    Grid: one axis of cdiv(batch, BLOCK_M) x cdiv(N, BLOCK_N) x groups x input pixels programs, images fastest. M counts
    images, N input channels, K output channels. Each weight is read by one program (of each tile of images): of a plain
    weight, whose taps lie side by side, neighbouring programs share its lines in L2; with channels innermost every load
    is a run. No column buffer, no atomics: the same bits every time.

    Gregor and LeCun, arXiv:1006.0448.
    """
    TAPS: tl.constexpr = KD * KH * KW
    # Either images or channels lie innermost, and the other one's vector is 1.
    ALIGNED: tl.constexpr = Y_VECTOR * IMAGE_VECTOR
    tiles_m = tl.cdiv(batch, BLOCK_M)
    tiles_n = tl.cdiv(c_in_group, BLOCK_N)
    pid = tl.program_id(0)
    pid_m = pid % tiles_m
    pid_n = pid // tiles_m % tiles_n
    pid_g = pid // tiles_m // tiles_n % groups
    place = pid // tiles_m // tiles_n // groups
    w_i = place % w_in + PAD_W
    h_i = place // w_in % h_in + PAD_H
    d_i = place // w_in // h_in + PAD_D

    m_first = pid_m * BLOCK_M
    image = tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if INDEX_INT64:
        image = image.to(tl.int64)
        offs_n = offs_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
        stride_wd, stride_wh, stride_ww = wide(stride_wd), wide(stride_wh), wide(stride_ww)
    mask_m = below(image, batch - m_first, IMAGE_VECTOR)
    mask_n = below(offs_n, c_in_group, W_VECTOR)
    k_first = tl.cast(pid_g * c_out_group, tl.int64)
    y_base = dy_ptr + aligned(tl.cast(m_first, tl.int64) * stride_yn, ALIGNED)
    y_base += aligned(k_first * stride_yc, ALIGNED)
    y_image = image * stride_yn
    w_column = offs_n * stride_wi

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC_DTYPE)
    for step in range(tl.maximum(tl.cdiv(c_out_group, BLOCK_K), 1) * TAPS):
        tap = step % TAPS
        channel = step // TAPS * BLOCK_K + offs_k
        mask_k = below(channel, c_out_group, Y_VECTOR)
        kd = tap // (KH * KW)
        kh = tap // KW % KH
        kw = tap % KW
        # Where a stride passes this pixel by, or the output ends, the tap is masked off.
        d_t = d_i - kd * DIL_D
        h_t = h_i - kh * DIL_H
        w_t = w_i - kw * DIL_W
        d_o = d_t // STRIDE_D
        h_o = h_t // STRIDE_H
        w_o = w_t // STRIDE_W
        met = (d_o * STRIDE_D == d_t) & (h_o * STRIDE_H == h_t) & (w_o * STRIDE_W == w_t)
        met = met & within(d_o, d_out) & within(h_o, h_out) & within(w_o, w_out)
        mask_met = mask_k & met
        y_place = y_base + aligned(wide(stride_yd) * d_o + wide(stride_yh) * h_o + wide(stride_yw) * w_o, ALIGNED)
        if Y_PIXELS_LAST:
            dy_tile = tl.load(
                y_place + tl.multiple_of(channel * stride_yc, IMAGE_VECTOR)[:, None] + y_image[None, :],
                mask=mask_met[:, None] & mask_m[None, :],
                other=0.0,
            )  # [BLOCK_K, BLOCK_M]
        else:
            dy_tile = tl.trans(
                tl.load(
                    y_place + tl.multiple_of(y_image, Y_VECTOR)[:, None] + (channel * stride_yc)[None, :],
                    mask=mask_m[:, None] & mask_met[None, :],
                    other=0.0,
                )
            )
        filter_offset = wide(stride_pd) * d_o + wide(stride_ph) * h_o + wide(stride_pw) * w_o + k_first * stride_wo
        filter_offset += kd * stride_wd + kh * stride_wh + kw * stride_ww
        w_row = tl.multiple_of(channel * stride_wo, W_VECTOR)
        w_tile = tl.load(
            w_ptr + aligned(filter_offset, W_VECTOR) + w_row[:, None] + w_column[None, :],
            mask=mask_met[:, None] & mask_n[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        acc = dot(tl.trans(w_tile), dy_tile, acc, PRECISION)

    x_base = dx_ptr + tl.cast(m_first, tl.int64) * stride_xn + wide(stride_xd) * (d_i - PAD_D)
    x_base += wide(stride_xh) * (h_i - PAD_H) + wide(stride_xw) * (w_i - PAD_W)
    x_base += tl.cast(pid_g * c_in_group, tl.int64) * stride_xc
    x_row = tl.multiple_of(image * stride_xn, X_VECTOR)
    store_pixels(x_base, x_row, offs_n * stride_xc, tl.trans(acc), mask_m, mask_n, PIXELS_LAST)


@dataclass(frozen=True)
class LocallyConnectedInputGradientTile(ProductTile):
    """BLOCK_M images by BLOCK_N input channels of one pixel, BLOCK_K output channels a step."""

    def runs(self, problem: LocalInputGradientProblem) -> tuple[int, int]:  # type: ignore[override]
        return VECTOR_LIMIT, 1 if problem.flat else problem.weight_vector()

    def rows(self) -> int:
        return self.BLOCK_N


def _grid(problem: LocalInputGradientProblem, tile: LocallyConnectedInputGradientTile) -> int:
    g = problem.geometry
    return cdiv(g.batch, tile.BLOCK_M) * cdiv(g.c_in_group, tile.BLOCK_N) * g.groups * g.in_pixels


def _arguments(problem: LocalInputGradientProblem, tile: LocallyConnectedInputGradientTile) -> dict[str, object]:
    g = problem.geometry
    arguments = place_arguments(problem, tile.BLOCK_M) | tile.sizes()
    return arguments | dict(
        IMAGE_VECTOR=problem.image_vector(problem.y_strides, tile.BLOCK_M, g.batch),
        X_VECTOR=problem.x_vector(g.c_in_group),
        W_VECTOR=1 if problem.flat else problem.weight_vector(),
        Y_VECTOR=problem.y_vector(g.c_out_group),
    )


def _unsuited(problem: Problem) -> str | None:
    return None if isinstance(problem, LocalInputGradientProblem) else "it is no input gradient of unshared filters"


KERNEL = Kernel(
    name="locally_connected_input_gradient",
    function=locally_connected_input_gradient_kernel,
    tile_type=LocallyConnectedInputGradientTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=LocallyConnectedInputGradientTile(num_warps=4, num_stages=1, BLOCK_M=16, BLOCK_N=32, BLOCK_K=16),
    pointers=("dy_ptr", "w_ptr", "dx_ptr"),
)
