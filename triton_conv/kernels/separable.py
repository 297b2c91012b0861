"""Depthwise separable convolution, rank 1 to 3: the depthwise result goes from registers into the 1x1's product."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from ..problem_lectures import SeparableProblem
from ..target import Target
from .arguments import separable_arguments
from .common import accumulate_tap, activate, below, dot, epilogue, narrow, store_pixels, tile_pixels, wide
from .kernel import Kernel, Tile, cdiv
from .staging import Operand, staged_bytes


@triton.jit
def separable_kernel(
    x_ptr, w_ptr, mid_b_ptr, pw_ptr, b_ptr, y_ptr,
    batch, c_mid, c_out, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    stride_wo, stride_wd, stride_wh, stride_ww, stride_mb, stride_po, stride_pi,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw, stride_b,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_MID_BIAS: tl.constexpr, MID_ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr, PIXELS_LAST: tl.constexpr,
    Y_PIXELS_LAST: tl.constexpr, X_VECTOR: tl.constexpr, P_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    MULTIPLIER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n] = activation(sum_k pw[n, k] mid[m, k] + b[n]), mid[m, k] = act(sum_tap x_tap[m, k] w[k, tap] + mid_b[k]).

    Grid: one axis of cdiv(c_out, BLOCK_N) x cdiv(M, BLOCK_M) programs, channels fastest. The intermediate of BLOCK_M
    pixels and BLOCK_K channels is summed in float32, rounded to the dtype as storing it would, and is the right operand
    of the product, which wgmma takes from shared memory: it never reaches device memory, whose traffic falls from
    3 C + K to C + K elements a pixel. Each further tile of output channels filters the input again. Taps are read from
    L1: hence num_stages = 1, since a pipelined load bypasses L1.

    Sifre 2014; Chollet, arXiv:1610.02357; Howard et al., arXiv:1704.04861.
    """
    tiles_n = tl.cdiv(c_out, BLOCK_N)
    pid = tl.program_id(0)
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n
    first, image, d_o, h_o, w_o, mask_m = tile_pixels(pid_m, batch, d_out, h_out, w_out, RANK, INDEX_INT64, BLOCK_M)
    d0 = d_o * STRIDE_D - PAD_D
    h0 = h_o * STRIDE_H - PAD_H
    w0 = w_o * STRIDE_W - PAD_W
    image_offset = image * stride_xn
    pixel_offset = d0 * stride_xd + h0 * stride_xh + w0 * stride_xw
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if INDEX_INT64:
        offs_n = offs_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
        # A tap's offset is a product of scalars.
        stride_xd, stride_xh, stride_xw = wide(stride_xd), wide(stride_xh), wide(stride_xw)
        stride_wd, stride_wh, stride_ww = wide(stride_wd), wide(stride_wh), wide(stride_ww)
    mask_n = below(offs_n, c_out, Y_VECTOR)
    p_row = tl.multiple_of(offs_n * stride_po, P_VECTOR)
    x_base = x_ptr + first * stride_xn

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC_DTYPE)
    for block in range(tl.maximum(tl.cdiv(c_mid, BLOCK_K), 1)):
        channel = block * BLOCK_K + offs_k
        mask_k = below(channel, c_mid, X_VECTOR)
        channel_in = channel // MULTIPLIER * stride_xc if MULTIPLIER > 1 else channel * stride_xc
        w_base = w_ptr + channel * stride_wo
        mid = tl.zeros((BLOCK_K, BLOCK_M) if PIXELS_LAST else (BLOCK_M, BLOCK_K), dtype=ACC_DTYPE)
        for tap in range(KD * KH * KW):
            kd = tap // (KH * KW)
            kh = tap // KW % KH
            kw = tap % KW
            mid = accumulate_tap(
                mid, x_base, w_base + (kd * stride_wd + kh * stride_wh + kw * stride_ww), image_offset, pixel_offset,
                channel_in, mask_m, mask_k, d0, h0, w0, kd * DIL_D, kh * DIL_H, kw * DIL_W, d_in, h_in, w_in,
                stride_xd, stride_xh, stride_xw, "zeros", RANK, PIXELS_LAST, X_VECTOR,
            )  # fmt: skip
        if HAS_MID_BIAS:
            mid_bias = tl.load(mid_b_ptr + channel * stride_mb, mask=mask_k, other=0.0).to(ACC_DTYPE)
            mid += mid_bias[:, None] if PIXELS_LAST else mid_bias[None, :]
        sample = narrow(activate(mid, MID_ACTIVATION), x_ptr.dtype.element_ty)
        if not PIXELS_LAST:
            sample = tl.trans(sample)  # [BLOCK_K, BLOCK_M]
        p_tile = tl.load(
            pw_ptr + p_row[:, None] + (channel * stride_pi)[None, :], mask=mask_n[:, None] & mask_k[None, :], other=0.0
        )  # [BLOCK_N, BLOCK_K]
        acc = dot(p_tile, sample, acc, PRECISION)

    acc = epilogue(tl.trans(acc), b_ptr, stride_b, offs_n, mask_n, HAS_BIAS, ACTIVATION)
    y_base = y_ptr + first * stride_yn
    y_row = tl.multiple_of(image * stride_yn + d_o * stride_yd + h_o * stride_yh + w_o * stride_yw, Y_VECTOR)
    store_pixels(y_base, y_row, offs_n * stride_yc, acc, mask_m, mask_n, Y_PIXELS_LAST)


@dataclass(frozen=True)
class SeparableTile(Tile):
    """BLOCK_M output pixels by BLOCK_N output channels, BLOCK_K channels of the intermediate a step."""

    BLOCK_M: int = 64
    BLOCK_N: int = 64
    BLOCK_K: int = 32

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        operands = [Operand(size * self.BLOCK_K * problem.itemsize) for size in (self.BLOCK_M, self.BLOCK_N)]
        sums = self.BLOCK_M * self.BLOCK_N, problem.itemsize
        return staged_bytes(operands, self.BLOCK_N, self.num_warps, 1, sums, target)

    def accumulator_values(self) -> int:
        # The intermediate, and the tap that is added to it, are alive beside the accumulator.
        return self.BLOCK_M * self.BLOCK_N + 2 * self.BLOCK_M * self.BLOCK_K


def _grid(problem: SeparableProblem, tile: SeparableTile) -> int:
    return cdiv(problem.c_final, tile.BLOCK_N) * cdiv(problem.geometry.M, tile.BLOCK_M)


def _arguments(problem: SeparableProblem, tile: SeparableTile) -> dict[str, object]:
    return separable_arguments(problem, tile.BLOCK_M) | tile.sizes() | dict(MULTIPLIER=problem.geometry.c_out_group)


def _unsuited(problem: Problem) -> str | None:
    return None if isinstance(problem, SeparableProblem) else "no 1x1 convolution follows it"


KERNEL = Kernel(
    name="separable",
    function=separable_kernel,
    tile_type=SeparableTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=SeparableTile(num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16),
    pointers=("x_ptr", "w_ptr", "mid_b_ptr", "pw_ptr", "b_ptr", "y_ptr"),
)
