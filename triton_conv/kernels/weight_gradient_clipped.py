"""Weight gradient of a channels-last convolution, rank 1 to 3: boxes of pixels whose tap reads the input."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from .boxed_sums import BoxedSumsTile, boxed_sums
from .boxes import boxes, load_box
from .common import aligned, below, dot, wide


@triton.jit
def tap_span(k, size_in, size_out, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr):
    """What tap `k` reads along one axis: every STRIDE-th element from `phase` on, output j reading the (j + shift)-th.

    (phase, shift, length, first, end): outputs `first` to `end - 1` read the input, of these elements the last one
    number length - 1. Elements beyond would meet gradients of outputs that do not exist, whose zero times infinity is
    NaN.
    """
    UP: tl.constexpr = (PAD + STRIDE - 1) // STRIDE
    position = k * DIL + (UP * STRIDE - PAD)
    phase = position % STRIDE
    shift = position // STRIDE - UP
    first = tl.maximum(-shift, 0)
    end = tl.minimum(tl.cdiv(size_in - phase, STRIDE) - shift, size_out)
    # A descriptor has at least one element: a tap that lies in the padding for every output begins behind it.
    return phase, shift, tl.maximum(end + shift, 1), tl.where(first < end, first, first + 1), end


@triton.jit
def weight_gradient_clipped_kernel(
    x_ptr, dy_ptr, dw_ptr,
    batch, c_in_group, c_out_group, d_in, h_in, w_in, d_out, h_out, w_out, groups,
    stride_xn, stride_xd, stride_xh, stride_xw,
    stride_yn, stride_yd, stride_yh, stride_yw,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr,
    INDEX_INT64: tl.constexpr, X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    BOX_N: tl.constexpr, BOX_D: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[split, o, tap, c] = sum over the split's pixels m of dy[m, o] x_tap[m, c].

    M runs over the output channels of a group, N over its input channels of one tap, K over pixels, in boxes: BLOCK_K
    pixels of BOX_N images, of those alone for which the tap reads the input (of 3 x 3 taps at dilation 36 in 65 x 65
    pixels two fifths). What a tap reads of a strided input is every STRIDE-th pixel from its phase on, a tensor of its
    own with larger strides.

    Partial sums are float32, channels innermost; the caller adds them up in a fixed order. Grid: one axis of SPLITS x
    groups x cdiv(c_out_group, BLOCK_M) x tiles of N, N fastest: those share dy. The backward filter convolution of
    cuDNN (Chetlur et al. 2014, arXiv:1410.0759).
    """
    TAPS: tl.constexpr = KD * KH * KW
    tiles_n = tl.cdiv(c_in_group, BLOCK_N) * TAPS
    tiles_m = tl.cdiv(c_out_group, BLOCK_M)
    pid = tl.program_id(0)
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n % tiles_m
    group = pid // tiles_n // tiles_m % groups
    split = pid // tiles_n // tiles_m // groups
    tap = pid_n % TAPS
    first_m = pid_m * BLOCK_M
    first_n = pid_n // TAPS * BLOCK_N

    d_phase, d_shift, d_length, d_first, d_end = tap_span(tap // (KH * KW), d_in, d_out, STRIDE_D, PAD_D, DIL_D)
    h_phase, h_shift, h_length, h_first, h_end = tap_span(tap // KW % KH, h_in, h_out, STRIDE_H, PAD_H, DIL_H)
    w_phase, w_shift, w_length, w_first, w_end = tap_span(tap % KW, w_in, w_out, STRIDE_W, PAD_W, DIL_W)
    x_first = x_ptr + tl.cast(group * c_in_group, tl.int64)
    x_first += tl.cast(d_phase, tl.int64) * stride_xd + tl.cast(h_phase, tl.int64) * stride_xh + w_phase * stride_xw
    dy_first = dy_ptr + aligned(tl.cast(group * c_out_group, tl.int64), Y_VECTOR)
    x_boxes = boxes(
        x_first, batch, d_length, h_length, w_length, c_in_group,
        stride_xn, STRIDE_D * stride_xd, STRIDE_H * stride_xh, STRIDE_W * stride_xw,
        RANK, BOX_N, BOX_D, BOX_H, BOX_W, BLOCK_N,
    )  # fmt: skip

    # The left operand must lie in shared memory as one plain tile, or it takes the way through registers: no box. Its
    # pixels' places in a box are the same at every step.
    offs_k = tl.arange(0, BLOCK_K)
    at_w = offs_k % BOX_W
    at_h = offs_k // BOX_W % BOX_H
    at_d = offs_k // (BOX_W * BOX_H) % BOX_D
    at_n = offs_k // (BOX_W * BOX_H * BOX_D)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    mask_m = below(offs_m, c_out_group, Y_VECTOR)
    if INDEX_INT64:
        stride_yn, stride_yd, stride_yh, stride_yw = wide(stride_yn), wide(stride_yd), wide(stride_yh), wide(stride_yw)
    place = tl.multiple_of(at_n * stride_yn + at_d * stride_yd + at_h * stride_yh + at_w * stride_yw, Y_VECTOR)
    dy_place = place[:, None] + offs_m[None, :]

    in_row = tl.maximum(tl.cdiv(w_end - w_first, BOX_W), 1)
    rows = tl.maximum(tl.cdiv(h_end - h_first, BOX_H), 1)
    planes = tl.maximum(tl.cdiv(d_end - d_first, BOX_D), 1)
    steps = tl.cdiv(tl.cdiv(batch, BOX_N) * planes * rows * in_row, SPLITS)
    step = split * steps
    w = w_first + step % in_row * BOX_W
    h = h_first + step // in_row % rows * BOX_H
    d = d_first + step // in_row // rows % planes * BOX_D
    n = step // in_row // rows // planes * BOX_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    # A box past the last image is outside of both tensors.
    for _ in range(tl.maximum(steps, 1)):
        x_tile = load_box(x_boxes, n, d + d_shift, h + h_shift, w + w_shift, first_n, RANK, BLOCK_K, BLOCK_N)
        corner = tl.cast(n, tl.int64) * stride_yn + tl.cast(d, tl.int64) * stride_yd + tl.cast(h, tl.int64) * stride_yh
        mask_k = (at_w < w_end - w) & (at_n < batch - n)
        if RANK >= 2:
            mask_k = mask_k & (at_h < h_end - h)
        if RANK >= 3:
            mask_k = mask_k & (at_d < d_end - d)
        dy_tile = tl.load(
            dy_first + aligned(corner + w * stride_yw, Y_VECTOR) + dy_place,
            mask=mask_k[:, None] & mask_m[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_M]
        acc = dot(tl.trans(dy_tile), x_tile, acc, PRECISION)
        w += BOX_W
        carry = w >= w_end
        w = tl.where(carry, w_first, w)
        h = tl.where(carry, h + BOX_H, h)
        carry = h >= h_end
        h = tl.where(carry, h_first, h)
        d = tl.where(carry, d + BOX_D, d)
        carry = d >= d_end
        d = tl.where(carry, d_first, d)
        n = tl.where(carry, n + BOX_N, n)

    offs_n = first_n + tl.arange(0, BLOCK_N)
    row = ((tl.cast(split, tl.int64) * groups + group) * c_out_group + offs_m) * TAPS + tap
    mask = mask_m[:, None] & below(offs_n, c_in_group, X_VECTOR)[None, :]
    tl.store(dw_ptr + row[:, None] * c_in_group + offs_n[None, :], acc, mask=mask)


@dataclass(frozen=True)
class WeightGradientClippedTile(BoxedSumsTile):
    """BLOCK_M output by BLOCK_N input channels of one tap, BLOCK_K pixels a step, SPLITS partial sums."""


def spans(problem: Problem, axis: int) -> list[int]:
    """How many outputs along one axis read the input, for each tap."""
    g = problem.geometry
    size, step, dilation, pad = g.in_size[axis], g.stride[axis], g.dilation[axis], g.pad_before[axis]
    positions = [[j * step + k * dilation - pad for j in range(g.out_size[axis])] for k in range(g.kernel[axis])]
    return [sum(0 <= position < size for position in tap) for tap in positions]


def _unsuited(problem: Problem) -> str | None:
    g = problem.geometry
    read = math.prod(sum(spans(problem, axis)) for axis in range(3))
    # By the model of dilated_d4's 91% an H100 takes 316 us, of all pixels 341.
    if 20 * read > 19 * g.taps * g.out_pixels:
        return f"its taps read the input for {100 * read // (g.taps * g.out_pixels)}% of the pixels"
    return None


KERNEL = boxed_sums("weight_gradient_clipped", weight_gradient_clipped_kernel, WeightGradientClippedTile, _unsuited)
