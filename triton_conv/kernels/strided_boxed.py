"""Convolution with a stride, forward or transposed, channels-last, rank 1 to 3: boxes by the bulk copy engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import INT32_LIMIT, Problem
from ..target import Target
from .arguments import geometry_arguments, weight_arguments
from .boxes import boxes, covering_box, load_box, pixels_spanned, tap_phase, unboxable
from .common import aligned, below, dot, epilogue, store_pixels, wide
from .kernel import Kernel, ProductTile, cdiv


@triton.jit
def first_taps(
    phase, OUT_H: tl.constexpr, OUT_W: tl.constexpr, MET_D: tl.constexpr, MET_H: tl.constexpr, MET_W: tl.constexpr
):
    """The first tap of each axis that meets a phase of the output, which phases are numbered by; and whether any does:
    the first MET of an axis are met.
    """
    kd = phase // (OUT_W * OUT_H)
    kh = phase // OUT_W % OUT_H
    kw = phase % OUT_W
    return kd, kh, kw, (kd < MET_D) & (kh < MET_H) & (kw < MET_W)


@triton.jit
def output_pixel(
    t, first, size_in, size_out, OUT: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr, PERIOD: tl.constexpr
):  # fmt: skip
    """Element t of the phase of an output's axis that tap `first` meets, and every PERIOD-th after it. The phases that
    no tap meets, where stride and dilation have a common divisor, come after the others.
    """
    return (tap_phase(first % PERIOD, size_in, size_out, OUT, PAD, DIL)[0] + first // PERIOD) % OUT + t * OUT


@triton.jit
def store_box(
    acc, b_ptr, y_ptr, n, d, h, w, sizes, strides, stride_b, channel, offs_n, mask_n,
    OUT_D: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    INDEX_INT64: tl.constexpr, Y_VECTOR: tl.constexpr, BOX_D: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Stores the sums, [channels, pixels], of a box: its first pixel is (n, d, h, w), and they are OUT apart."""
    result = epilogue(tl.trans(acc), b_ptr, stride_b, channel + offs_n, mask_n, HAS_BIAS, ACTIVATION)
    batch, d_out, h_out, w_out = sizes
    stride_yn, stride_yd, stride_yh, stride_yw = strides
    offs_m = tl.arange(0, BLOCK_M)
    at_w = offs_m % BOX_W * OUT_W
    at_h = offs_m // BOX_W % BOX_H * OUT_H
    at_d = offs_m // (BOX_W * BOX_H) % BOX_D * OUT_D
    at_n = offs_m // (BOX_W * BOX_H * BOX_D)
    mask_m = (at_w < w_out - w) & (at_h < h_out - h) & (at_d < d_out - d) & (at_n < batch - n)
    if INDEX_INT64:
        stride_yn, stride_yd, stride_yh, stride_yw = wide(stride_yn), wide(stride_yd), wide(stride_yh), wide(stride_yw)
    corner = tl.cast(n, tl.int64) * stride_yn + tl.cast(d, tl.int64) * stride_yd + tl.cast(h, tl.int64) * stride_yh
    y_base = y_ptr + aligned(corner + w * stride_yw + channel, Y_VECTOR)
    place = tl.multiple_of(at_n * stride_yn + at_d * stride_yd + at_h * stride_yh + at_w * stride_yw, Y_VECTOR)
    store_pixels(y_base, place, offs_n, result, mask_m, mask_n, False)


@triton.jit
def strided_boxed_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_in_group, c_out_group, d_in, h_in, w_in, d_out, h_out, w_out, groups,
    stride_xn, stride_xd, stride_xh, stride_xw,
    stride_wg, stride_wn, stride_wk, stride_wd, stride_wh, stride_ww,
    stride_yn, stride_yd, stride_yh, stride_yw, stride_b,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PERIOD_D: tl.constexpr, PERIOD_H: tl.constexpr, PERIOD_W: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr,
    INDEX_INT64: tl.constexpr, X_VECTOR: tl.constexpr, W_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    K_LAST: tl.constexpr, BOX_N: tl.constexpr, BOX_D: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    TOGETHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[phase + OUT t, n] = activation(sum_k x_k[t + shift_k, c] w[k, c, n] + b[n]), pixels t in boxes.

    A stride takes a tensor apart into phases: every STRIDE-th element of an axis, a tensor of its own with larger
    strides. Taps j, j + PERIOD, ... of an axis meet one phase: of a forward convolution one of the input, from which
    x_k is copied, while OUT = 1; TRANSPOSED, one of the output (OUT = STRIDE), and x_k is the input. Between phases the
    stride is 1, and the product w x^T as in `implicit_gemm_boxed`, padding being what lies outside.

    The phases of an input are one descriptor: they begin at other places, which are added to the channel. A phase of
    an output that no tap meets stores the epilogue of zero. A program computes one phase of a box, or all of them
    TOGETHER in one loop, which copies for the next while it stores the last.

    Grid: one axis of phases, unless TOGETHER, x groups x boxes x cdiv(N, BLOCK_N) programs, N fastest; the phases with
    the most taps first, so that the shortest programs are the last. Dumoulin and Visin, arXiv:1603.07285, section 4;
    Shi et al., arXiv:1609.07009 for the phases.
    """
    SIGN: tl.constexpr = -1 if TRANSPOSED else 1
    IN_D: tl.constexpr = 1 if TRANSPOSED else STRIDE_D
    IN_H: tl.constexpr = 1 if TRANSPOSED else STRIDE_H
    IN_W: tl.constexpr = 1 if TRANSPOSED else STRIDE_W
    OUT_D: tl.constexpr = STRIDE_D // IN_D
    OUT_H: tl.constexpr = STRIDE_H // IN_H
    OUT_W: tl.constexpr = STRIDE_W // IN_W
    # From one tap of an output's phase to the next, and how many phases of an axis any tap meets.
    STEP_D: tl.constexpr = PERIOD_D if TRANSPOSED else 1
    STEP_H: tl.constexpr = PERIOD_H if TRANSPOSED else 1
    STEP_W: tl.constexpr = PERIOD_W if TRANSPOSED else 1
    MET_D: tl.constexpr = min(KD, STEP_D)
    MET_H: tl.constexpr = min(KH, STEP_H)
    MET_W: tl.constexpr = min(KW, STEP_W)
    tiles_n = tl.cdiv(c_out_group, BLOCK_N)
    in_row, rows = tl.cdiv(tl.cdiv(w_out, OUT_W), BOX_W), tl.cdiv(tl.cdiv(h_out, OUT_H), BOX_H)
    planes, images = tl.cdiv(tl.cdiv(d_out, OUT_D), BOX_D), tl.cdiv(batch, BOX_N)
    pid = tl.program_id(0)
    pid_n = pid % tiles_n
    pid_m = pid // tiles_n
    w = pid_m % in_row * BOX_W
    h = pid_m // in_row % rows * BOX_H
    d = pid_m // in_row // rows % planes * BOX_D
    n = pid_m // in_row // rows // planes % images * BOX_N
    group = pid_m // in_row // rows // planes // images % groups
    phase = pid_m // in_row // rows // planes // images // groups

    # Every phase of the input that a tap meets has as many elements as that of the first tap.
    x_boxes = boxes(
        x_ptr + tl.cast(group * c_in_group, tl.int64), batch,
        tl.cdiv(d_in - tap_phase(0, d_in, d_out, IN_D, PAD_D, DIL_D)[0], IN_D),
        tl.cdiv(h_in - tap_phase(0, h_in, h_out, IN_H, PAD_H, DIL_H)[0], IN_H),
        tl.cdiv(w_in - tap_phase(0, w_in, w_out, IN_W, PAD_W, DIL_W)[0], IN_W),
        (IN_D - 1) * stride_xd + (IN_H - 1) * stride_xh + (IN_W - 1) * stride_xw + c_in_group,
        stride_xn, IN_D * stride_xd, IN_H * stride_xh, IN_W * stride_xw,
        RANK, BOX_N, BOX_D, BOX_H, BOX_W, BLOCK_K,
    )  # fmt: skip
    w_base = w_ptr + aligned(tl.cast(group, tl.int64) * stride_wg, W_VECTOR)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = below(offs_n, c_out_group, Y_VECTOR)

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC_DTYPE)
    first_d, first_h, first_w, met = first_taps(phase, OUT_H, OUT_W, MET_D, MET_H, MET_W)
    kd, kh, kw = first_d, first_h, first_w
    channel = 0
    blocks = tl.maximum(tl.cdiv(c_in_group, BLOCK_K), 1)
    if TOGETHER:
        steps = blocks * (KD * KH * KW) + (OUT_D * OUT_H * OUT_W - MET_D * MET_H * MET_W)
    else:
        taps = tl.cdiv(KD - kd, STEP_D) * tl.cdiv(KH - kh, STEP_H) * tl.cdiv(KW - kw, STEP_W)
        steps = tl.where(met, blocks * taps, 1)
    sizes = (batch, d_out, h_out, w_out)
    strides = (stride_yn, stride_yd, stride_yh, stride_yw)
    # At least one step: a loop that may not run costs every wgmma its overlap.
    for _ in range(tl.maximum(steps, 1)):
        x_channel = channel
        if not TRANSPOSED:
            x_channel += tap_phase(kd, d_in, d_out, STRIDE_D, PAD_D, DIL_D)[0] * stride_xd
            x_channel += tap_phase(kh, h_in, h_out, STRIDE_H, PAD_H, DIL_H)[0] * stride_xh
            x_channel += tap_phase(kw, w_in, w_out, STRIDE_W, PAD_W, DIL_W)[0] * stride_xw
        # What no tap meets is read past the last image, where all is zero.
        x_tile = load_box(
            x_boxes, tl.where(met, n, batch),
            d + SIGN * tap_phase(kd, d_in, d_out, STRIDE_D, PAD_D, DIL_D)[1],
            h + SIGN * tap_phase(kh, h_in, h_out, STRIDE_H, PAD_H, DIL_H)[1],
            w + SIGN * tap_phase(kw, w_in, w_out, STRIDE_W, PAD_W, DIL_W)[1],
            x_channel, RANK, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        mask_k = below(channel + offs_k, c_in_group, X_VECTOR) & met
        w_tap = w_base + aligned(kd * stride_wd + kh * stride_wh + kw * stride_ww, W_VECTOR)
        if K_LAST:
            w_tile = tl.load(
                w_tap + channel + (tl.multiple_of(offs_n * stride_wn, W_VECTOR)[:, None] + offs_k[None, :]),
                mask=mask_n[:, None] & mask_k[None, :],
                other=0.0,
            )  # [BLOCK_N, BLOCK_K]
        else:
            w_tile = tl.trans(
                tl.load(
                    w_tap
                    + aligned(tl.cast(channel, tl.int64) * stride_wk, W_VECTOR)
                    + (tl.multiple_of(offs_k * stride_wk, W_VECTOR)[:, None] + offs_n[None, :]),
                    mask=mask_k[:, None] & mask_n[None, :],
                    other=0.0,
                )
            )
        acc = dot(w_tile, tl.trans(x_tile), acc, PRECISION)
        kw += STEP_W
        carry = kw >= KW
        kw = tl.where(carry, first_w, kw)
        kh = tl.where(carry, kh + STEP_H, kh)
        carry = kh >= KH
        kh = tl.where(carry, first_h, kh)
        kd = tl.where(carry, kd + STEP_D, kd)
        carry = kd >= KD
        kd = tl.where(carry, first_d, kd)
        channel = tl.where(carry, channel + BLOCK_K, channel)
        if TOGETHER:
            done = (channel >= c_in_group) | (met == 0)
            if done:
                store_box(
                    acc, b_ptr, y_ptr, n,
                    output_pixel(d, first_d, d_in, d_out, OUT_D, PAD_D, DIL_D, PERIOD_D),
                    output_pixel(h, first_h, h_in, h_out, OUT_H, PAD_H, DIL_H, PERIOD_H),
                    output_pixel(w, first_w, w_in, w_out, OUT_W, PAD_W, DIL_W, PERIOD_W),
                    sizes, strides, stride_b, group * c_out_group, offs_n, mask_n, OUT_D, OUT_H, OUT_W,
                    HAS_BIAS, ACTIVATION, INDEX_INT64, Y_VECTOR, BOX_D, BOX_H, BOX_W, BLOCK_M,
                )  # fmt: skip
                acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC_DTYPE)
            # Apart from the store, which waits for the sums: copies need the next phase before.
            phase += done.to(tl.int32)
            first_d, first_h, first_w, met = first_taps(phase, OUT_H, OUT_W, MET_D, MET_H, MET_W)
            kd = tl.where(done, first_d, kd)
            kh = tl.where(done, first_h, kh)
            kw = tl.where(done, first_w, kw)
            channel = tl.where(done, 0, channel)
    if not TOGETHER:
        store_box(
            acc, b_ptr, y_ptr, n,
            output_pixel(d, first_d, d_in, d_out, OUT_D, PAD_D, DIL_D, PERIOD_D),
            output_pixel(h, first_h, h_in, h_out, OUT_H, PAD_H, DIL_H, PERIOD_H),
            output_pixel(w, first_w, w_in, w_out, OUT_W, PAD_W, DIL_W, PERIOD_W),
            sizes, strides, stride_b, group * c_out_group, offs_n, mask_n, OUT_D, OUT_H, OUT_W,
            HAS_BIAS, ACTIVATION, INDEX_INT64, Y_VECTOR, BOX_D, BOX_H, BOX_W, BLOCK_M,
        )  # fmt: skip


@dataclass(frozen=True)
class StridedBoxedTile(ProductTile):
    """BLOCK_M pixels of a phase of the output by BLOCK_N output channels, BLOCK_K channels of a tap a step; all phases
    of an output TOGETHER in a program, or each in its own.
    """

    TOGETHER: bool = False
    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 64

    def rows(self) -> int:
        return self.BLOCK_N

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        # Sums that are stored while copies are under way turn beside their buffers, a part of a warp's at a time.
        turned = min(4096 * self.num_warps, self.BLOCK_M * self.BLOCK_N * self.stored_bytes(problem, target))
        return super().shared_bytes(problem, target) + (turned if self.TOGETHER else 0)

    def mismatch(self, problem: Problem) -> str | None:
        g = problem.geometry
        if self.TOGETHER and g.phases == 1:
            return "its output has one phase"
        if not g.transposed and g.c_in_group % self.BLOCK_K:
            return f"{g.c_in_group} channels are no whole steps of {self.BLOCK_K}"
        return None


def _phase_size(problem: Problem) -> list[int]:
    """Images and pixels of the largest phase of the output."""
    g = problem.geometry
    steps = g.stride if g.transposed else (1, 1, 1)
    return [g.batch, *(cdiv(size, step) for size, step in zip(g.out_size, steps, strict=True))]


def _grid(problem: Problem, tile: StridedBoxedTile) -> int:
    g, sizes = problem.geometry, _phase_size(problem)
    sides = covering_box(sizes, tile.BLOCK_M).values()
    boxes = math.prod(cdiv(size, side) for size, side in zip(sizes, sides, strict=True))
    return boxes * cdiv(g.c_out_group, tile.BLOCK_N) * g.groups * (1 if tile.TOGETHER else g.phases)


def _arguments(problem: Problem, tile: StridedBoxedTile) -> dict[str, object]:
    g = problem.geometry
    sides = covering_box(_phase_size(problem), tile.BLOCK_M)
    periods = {f"PERIOD_{axis}": s // math.gcd(s, d) for axis, s, d in zip("DHW", g.stride, g.dilation, strict=True)}
    return (
        geometry_arguments(problem, pixels_spanned(problem, sides))
        | weight_arguments(problem)
        | tile.sizes()
        | sides
        | periods
        | dict(
            X_VECTOR=problem.x_vector(g.c_in_group),
            Y_VECTOR=problem.y_vector(g.c_out_group),
        )
    )


def _unsuited(problem: Problem) -> str | None:
    g = problem.geometry
    if g.stride == (1, 1, 1):
        return "its stride is 1"
    if reason := unboxable(problem):
        return reason
    if problem.w_strides[1] != 1:
        return "the second dimension of its weight is not contiguous"
    return None if g.transposed else _uneven(problem)


def _uneven(problem: Problem) -> str | None:
    """Why the phases of a forward convolution's input are not one descriptor, or None."""
    g = problem.geometry
    if g.c_in_group % 32:
        return f"{g.c_in_group} channels are no whole steps of 32, and other pixels lie beyond"
    for size, stride, taps, pad, dilation in zip(g.in_size, g.stride, g.kernel, g.pad_before, g.dilation, strict=True):
        lengths = {cdiv(size - (k * dilation - pad) % stride, stride) for k in range(taps)}
        if len(lengths) > 1 or 0 in lengths:
            return f"phases of an input of {size} pixels, {stride} apart, are not of one length"
    reach = sum(stride * step for stride, step in zip(g.stride, problem.x_strides[2:], strict=True)) + g.c_in
    return None if reach <= INT32_LIMIT else "phases of its input lie too far apart"


KERNEL = Kernel(
    name="strided_boxed",
    function=strided_boxed_kernel,
    tile_type=StridedBoxedTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=StridedBoxedTile(num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_N=64, BLOCK_K=32),
    descriptors=True,
)
