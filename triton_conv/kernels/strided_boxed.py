"""Convolution with a stride, forward or transposed, channels-last, rank 1 to 3: boxes by the bulk copy engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from ..geometry import ConvGeometry
from ..problem import Problem
from .boxes import boxes, covering_box, load_box, tap_phase, unboxable
from .common import aligned, below, dot, epilogue, store_pixels, wide
from .kernel import Kernel, ProductTile, cdiv, geometry_arguments

# A descriptor is made in some thousand clocks, before a program's first step.
_MOST_DESCRIPTORS = 8
# Bytes of input that stay in L2 while programs of every phase read them, beside what they write.
_CHUNK_BYTES = 1 << 24


@triton.jit
def output_phase(
    j, size_in, size_out, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr, PERIOD: tl.constexpr
):  # fmt: skip
    """The j-th phase of an axis of a transposed convolution's output: the one that tap j meets, and every PERIOD-th
    after it; those that no tap meets, where STRIDE and DIL have a common divisor, come last.
    """
    return (tap_phase(j % PERIOD, size_in, size_out, STRIDE, PAD, DIL)[0] + j // PERIOD) % STRIDE


@triton.jit
def chosen(descriptors, index, COUNT: tl.constexpr):
    """One of COUNT descriptors, of which the compiler makes a choice between addresses."""
    found = descriptors[0]
    for i in tl.static_range(1, COUNT):
        if index == i:
            found = descriptors[i]
    return found


@triton.jit
def strided_boxed_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_in_group, c_out_group, d_in, h_in, w_in, d_out, h_out, w_out, groups, chunk,
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
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[phase + OUT t, n] = activation(sum_k x_k[t + shift_k, c] w[k, c, n] + b[n]), pixels t in boxes.

    A stride takes a tensor apart into phases, every STRIDE-th element of an axis from one on, each a tensor of its own
    with larger strides. Taps j, j + PERIOD, ... of an axis meet one phase: of a forward convolution one of the input,
    from which x_k is copied, while OUT = 1; TRANSPOSED, one of the output (OUT = STRIDE), and x_k is the input. Within
    phases the convolution has stride 1, and is computed as `implicit_gemm_boxed` does: as w x^T, padding being what
    lies outside. A phase of the output that no tap meets stores the epilogue of zero.

    Grid: one axis of chunks of boxes x phases of the output x boxes of a chunk x cdiv(N, BLOCK_N) programs, N fastest.
    The phases with the most taps come first, so that the shortest programs are the last; the input of a chunk stays in
    L2 between them. Dumoulin and Visin, arXiv:1603.07285, section 4; Shi et al., arXiv:1609.07009 for the phases.
    """
    SIGN: tl.constexpr = -1 if TRANSPOSED else 1
    OUT_D: tl.constexpr = STRIDE_D if TRANSPOSED else 1
    OUT_H: tl.constexpr = STRIDE_H if TRANSPOSED else 1
    OUT_W: tl.constexpr = STRIDE_W if TRANSPOSED else 1
    tiles_n = tl.cdiv(c_out_group, BLOCK_N)
    in_row, rows = tl.cdiv(tl.cdiv(w_out, OUT_W), BOX_W), tl.cdiv(tl.cdiv(h_out, OUT_H), BOX_H)
    planes, images = tl.cdiv(tl.cdiv(d_out, OUT_D), BOX_D), tl.cdiv(batch, BOX_N)
    pid = tl.program_id(0)
    first = pid // (chunk * OUT_D * OUT_H * OUT_W * tiles_n) * chunk
    of_phase = tl.minimum(chunk, in_row * rows * planes * images * groups - first) * tiles_n
    pid -= first * OUT_D * OUT_H * OUT_W * tiles_n
    phase = pid // of_phase
    pid_n = pid % of_phase % tiles_n
    pid_m = first + pid % of_phase // tiles_n
    w = pid_m % in_row * BOX_W
    h = pid_m // in_row % rows * BOX_H
    d = pid_m // in_row // rows % planes * BOX_D
    n = pid_m // in_row // rows // planes % images * BOX_N
    group = pid_m // in_row // rows // planes // images

    kd0 = phase // (OUT_W * OUT_H)
    kh0 = phase // OUT_W % OUT_H
    kw0 = phase % OUT_W
    d_phase = output_phase(kd0, d_in, d_out, OUT_D, PAD_D, DIL_D, PERIOD_D)
    h_phase = output_phase(kh0, h_in, h_out, OUT_H, PAD_H, DIL_H, PERIOD_H)
    w_phase = output_phase(kw0, w_in, w_out, OUT_W, PAD_W, DIL_W, PERIOD_W)
    # Taps of an output's phase are PERIOD apart; all of them are one phase's where only the input has phases.
    STEP_D: tl.constexpr = PERIOD_D if TRANSPOSED else 1
    STEP_H: tl.constexpr = PERIOD_H if TRANSPOSED else 1
    STEP_W: tl.constexpr = PERIOD_W if TRANSPOSED else 1
    has_tap = (kd0 < min(KD, STEP_D)) & (kh0 < min(KH, STEP_H)) & (kw0 < min(KW, STEP_W))
    taps = tl.cdiv(KD - kd0, STEP_D) * tl.cdiv(KH - kh0, STEP_H) * tl.cdiv(KW - kw0, STEP_W)

    IN_D: tl.constexpr = 1 if TRANSPOSED else STRIDE_D
    IN_H: tl.constexpr = 1 if TRANSPOSED else STRIDE_H
    IN_W: tl.constexpr = 1 if TRANSPOSED else STRIDE_W
    PHASES_D: tl.constexpr = 1 if TRANSPOSED else min(KD, PERIOD_D)
    PHASES_H: tl.constexpr = 1 if TRANSPOSED else min(KH, PERIOD_H)
    PHASES_W: tl.constexpr = 1 if TRANSPOSED else min(KW, PERIOD_W)
    x_first = x_ptr + tl.cast(group * c_in_group, tl.int64)
    stride_xd, stride_xh, stride_xw = wide(stride_xd), wide(stride_xh), wide(stride_xw)
    x_boxes = ()
    for j in tl.static_range(PHASES_D * PHASES_H * PHASES_W):
        from_d = tap_phase(j // (PHASES_H * PHASES_W), d_in, d_out, IN_D, PAD_D, DIL_D)[0]
        from_h = tap_phase(j // PHASES_W % PHASES_H, h_in, h_out, IN_H, PAD_H, DIL_H)[0]
        from_w = tap_phase(j % PHASES_W, w_in, w_out, IN_W, PAD_W, DIL_W)[0]
        x_boxes += (
            boxes(
                x_first + from_d * stride_xd + from_h * stride_xh + from_w * stride_xw, batch,
                tl.cdiv(d_in - from_d, IN_D), tl.cdiv(h_in - from_h, IN_H), tl.cdiv(w_in - from_w, IN_W), c_in_group,
                stride_xn, IN_D * stride_xd, IN_H * stride_xh, IN_W * stride_xw,
                RANK, BOX_N, BOX_D, BOX_H, BOX_W, BLOCK_K,
            ),
        )  # fmt: skip

    w_base = w_ptr + aligned(tl.cast(group, tl.int64) * stride_wg, W_VECTOR)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = below(offs_n, c_out_group, Y_VECTOR)
    mask_w = mask_n & has_tap
    # What no tap meets is read past the last image, where all is zero.
    x_n = tl.where(has_tap, n, batch)

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC_DTYPE)
    kd, kh, kw = kd0, kh0, kw0
    channel = 0
    # At least one step: a loop that may not run costs every wgmma its overlap.
    for _ in range(tl.maximum(tl.where(has_tap, taps * tl.cdiv(c_in_group, BLOCK_K), 1), 1)):
        phase_of_tap = (kd % PERIOD_D * PHASES_H + kh % PERIOD_H) * PHASES_W + kw % PERIOD_W
        x_tile = load_box(
            chosen(x_boxes, phase_of_tap, PHASES_D * PHASES_H * PHASES_W), x_n,
            d + SIGN * tap_phase(kd, d_in, d_out, STRIDE_D, PAD_D, DIL_D)[1],
            h + SIGN * tap_phase(kh, h_in, h_out, STRIDE_H, PAD_H, DIL_H)[1],
            w + SIGN * tap_phase(kw, w_in, w_out, STRIDE_W, PAD_W, DIL_W)[1],
            channel, RANK, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        mask_k = below(channel + offs_k, c_in_group, X_VECTOR)
        w_tap = w_base + aligned(kd * stride_wd + kh * stride_wh + kw * stride_ww, W_VECTOR)
        if K_LAST:
            w_tile = tl.load(
                w_tap + channel + (tl.multiple_of(offs_n * stride_wn, W_VECTOR)[:, None] + offs_k[None, :]),
                mask=mask_w[:, None] & mask_k[None, :],
                other=0.0,
            )  # [BLOCK_N, BLOCK_K]
        else:
            w_tile = tl.trans(
                tl.load(
                    w_tap
                    + aligned(tl.cast(channel, tl.int64) * stride_wk, W_VECTOR)
                    + (tl.multiple_of(offs_k * stride_wk, W_VECTOR)[:, None] + offs_n[None, :]),
                    mask=mask_k[:, None] & mask_w[None, :],
                    other=0.0,
                )
            )
        acc = dot(w_tile, tl.trans(x_tile), acc, PRECISION)
        kw += STEP_W
        carry = kw >= KW
        kw = tl.where(carry, kw0, kw)
        kh = tl.where(carry, kh + STEP_H, kh)
        carry = kh >= KH
        kh = tl.where(carry, kh0, kh)
        kd = tl.where(carry, kd + STEP_D, kd)
        carry = kd >= KD
        kd = tl.where(carry, kd0, kd)
        channel = tl.where(carry, channel + BLOCK_K, channel)

    channel_out = group * c_out_group + offs_n
    result = epilogue(tl.trans(acc), b_ptr, stride_b, channel_out, mask_n, HAS_BIAS, ACTIVATION)
    offs_m = tl.arange(0, BLOCK_M)
    at_w = offs_m % BOX_W * OUT_W
    at_h = offs_m // BOX_W % BOX_H * OUT_H
    at_d = offs_m // (BOX_W * BOX_H) % BOX_D * OUT_D
    at_n = offs_m // (BOX_W * BOX_H * BOX_D)
    d, h, w = d_phase + d * OUT_D, h_phase + h * OUT_H, w_phase + w * OUT_W
    mask_m = (at_w < w_out - w) & (at_h < h_out - h) & (at_d < d_out - d) & (at_n < batch - n)
    if INDEX_INT64:
        stride_yn, stride_yd, stride_yh, stride_yw = wide(stride_yn), wide(stride_yd), wide(stride_yh), wide(stride_yw)
    corner = tl.cast(n, tl.int64) * stride_yn + tl.cast(d, tl.int64) * stride_yd + tl.cast(h, tl.int64) * stride_yh
    y_base = y_ptr + aligned(corner + w * stride_yw + group * c_out_group, Y_VECTOR)
    place = tl.multiple_of(at_n * stride_yn + at_d * stride_yd + at_h * stride_yh + at_w * stride_yw, Y_VECTOR)
    store_pixels(y_base, place, offs_n, result, mask_m, mask_n, False)


@dataclass(frozen=True)
class StridedBoxedTile(ProductTile):
    """BLOCK_M pixels of a phase of the output by BLOCK_N output channels, BLOCK_K channels of a tap a step."""

    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 64

    def rows(self) -> int:
        return self.BLOCK_N


def _phase_size(problem: Problem) -> list[int]:
    """Images and pixels of the largest phase of the output."""
    g = problem.geometry
    steps = g.stride if g.transposed else (1, 1, 1)
    return [g.batch, *(cdiv(size, step) for size, step in zip(g.out_size, steps, strict=True))]


def _boxes(problem: Problem, tile: StridedBoxedTile) -> int:
    """Boxes of the largest phase of the output, of every group."""
    sizes = _phase_size(problem)
    sides = covering_box(sizes, tile.BLOCK_M).values()
    return problem.geometry.groups * math.prod(cdiv(size, side) for size, side in zip(sizes, sides, strict=True))


def _grid(problem: Problem, tile: StridedBoxedTile) -> int:
    g = problem.geometry
    return g.phases * _boxes(problem, tile) * cdiv(g.c_out_group, tile.BLOCK_N)


def _periods(g: ConvGeometry) -> list[int]:
    """How many taps of each axis meet phases of their own."""
    return [stride // math.gcd(stride, dilation) for stride, dilation in zip(g.stride, g.dilation, strict=True)]


def _arguments(problem: Problem, tile: StridedBoxedTile) -> dict[str, object]:
    g = problem.geometry
    outer, inner, *_ = problem.w_strides
    stride_wn, stride_wk = (inner, outer) if g.transposed else (outer, inner)
    return (
        geometry_arguments(problem, tile.BLOCK_M)
        | tile.sizes()
        | covering_box(_phase_size(problem), tile.BLOCK_M)
        | {f"PERIOD_{axis}": period for axis, period in zip("DHW", _periods(g), strict=True)}
        | dict(
            c_in_group=g.c_in_group,
            c_out_group=g.c_out_group,
            groups=g.groups,
            chunk=max(_CHUNK_BYTES // (tile.BLOCK_M * g.c_in_group * problem.itemsize), 1),
            stride_wg=outer * (g.c_in_group if g.transposed else g.c_out_group),
            stride_wn=stride_wn,
            stride_wk=stride_wk,
            TRANSPOSED=g.transposed,
            K_LAST=stride_wk == 1,
            X_VECTOR=problem.x_vector(g.c_in_group),
            W_VECTOR=problem.w_vector(g.c_in_group, g.c_out_group),
            Y_VECTOR=problem.y_vector(g.c_out_group),
        )
    )


def _unsuited(problem: Problem) -> str | None:
    g = problem.geometry
    if all(step == 1 for step in g.stride):
        return "its stride is 1"
    if reason := unboxable(problem):
        return reason
    if problem.w_strides[1] != 1:
        return "the second dimension of its weight is not contiguous"
    if g.transposed:
        return None
    if any(size < step for size, step in zip(g.in_size, g.stride, strict=True)):
        return f"the stride {g.stride} is larger than the input"
    descriptors = math.prod(min(taps, period) for taps, period in zip(g.kernel, _periods(g), strict=True))
    return None if descriptors <= _MOST_DESCRIPTORS else f"its taps meet {descriptors} phases of the input"


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
