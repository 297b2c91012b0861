"""Depthwise convolution of images with contiguous pixels (NCHW) on CUDA cores: sums of patches roll down the depth."""

# Device code grows tuples, whose every length is another type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import INT32_LIMIT, Problem
from ..target import Target
from .common import activate, aligned, narrow, tap_at, tile_pixels, wide, widen
from .kernel import Kernel, cdiv
from .planes import RollingPatchTile, arguments, load_planes, not_rolling, walked
from .strips import width
from .windows import chosen


@triton.jit
def depthwise_rolling_patch_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_out, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh,
    stride_wo, stride_wd, stride_wh, stride_ww,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw, stride_b,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    MULTIPLIER: tl.constexpr, X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y[m, c] = activation(sum_tap x_tap[m, c] w[c, tap] + b[c]), the input's pixels contiguous, rank 2 or 3.

    A thread has a patch, ROWS x COLS outputs of a plane, and walks down the depth with it; of rank 2 down the height,
    with a patch of one row: d is the axis walked along, h the other one. Each step loads STRIDE_D input planes, each
    element once, and adds them to the sums of the ALIVE output planes that they belong to; the oldest of these is done
    then and stored, the others are one step older, as the rows of `depthwise_rolling`. The weights of all taps stay in
    registers. A row of a patch is loaded as aligned vectors, the widest that fit: of 8 outputs of a filter of 3 one of
    16 bytes and an element on either side. Their elements are a thread's registers, renamed.

    A banded product makes an output plane at a time and reads every input plane once for each of KD, and twice the
    columns that a block has: 32 bytes an output of 3 x 3 x 3 through L2, and 7 here; its operands pass through
    shared memory besides. Here a 3 x 3 x 3 output takes 35 instructions, of which 27 are products (sm_90, bfloat16,
    2 x 8 outputs), where 39 keep up with the memory of an H100.

    Grid: one axis of cdiv(d_out, PLANES) x blocks of BLOCK_P patches, planes fastest. Patches are counted over (image,
    channel, row, column), so that neighbouring threads read neighbouring columns. A program stores PLANES planes; it
    begins and ends at the planes that these read, and where the image does.
    Depthwise convolution: Sifre 2014; Chollet, arXiv:1610.02357.
    """
    ALIVE: tl.constexpr = (KD + STRIDE_D - 1) // STRIDE_D
    segments = tl.cdiv(d_out, PLANES)
    pid = tl.program_id(0)
    d_o = pid % segments * PLANES
    d0 = d_o * STRIDE_D - PAD_D
    first, image, c, h_o, w_o, mask_p = tile_pixels(
        pid // segments, batch, c_out, tl.cdiv(h_out, ROWS), tl.cdiv(w_out, COLS), 3, INDEX_INT64, BLOCK_P
    )
    h_o *= ROWS
    w_o *= COLS
    h0 = h_o * STRIDE_H - PAD_H
    if INDEX_INT64:
        stride_xd, stride_xh = wide(stride_xd), wide(stride_xh)
        stride_yd, stride_yh, stride_yw = wide(stride_yd), wide(stride_yh), wide(stride_yw)
        stride_wd, stride_wh, stride_ww = wide(stride_wd), wide(stride_wh), wide(stride_ww)

    # Columns are counted from the block's own, where vectors begin.
    x_corner = image * stride_xn + c // MULTIPLIER * stride_xc + h0 * stride_xh + w_o * STRIDE_W
    x_patch = x_ptr + aligned(first * stride_xn, X_VECTOR) + tl.multiple_of(x_corner, X_VECTOR)[:, None, None]
    y_corner = image * stride_yn + c * stride_yc + h_o * stride_yh + w_o * stride_yw
    y_patch = y_ptr + aligned(first * stride_yn, Y_VECTOR) + tl.multiple_of(y_corner, Y_VECTOR)[:, None]
    h_first = h0[:, None, None]
    w_first = (w_o * STRIDE_W)[:, None, None]
    x_inside = tl.where(mask_p[:, None, None], w_in - w_first + PAD_W, 0)
    h_inside = tl.where(mask_p, h_out - h_o, 0)[:, None]
    w_inside = (w_out - w_o)[:, None]

    w_channel = w_ptr + (c * stride_wo)[:, None]
    weights = ()
    for tap in tl.static_range(KD * KH * KW):
        w_tap = w_channel + (tap // (KH * KW) * stride_wd + tap // KW % KH * stride_wh + tap % KW * stride_ww)
        weights += (widen(tl.load(w_tap, mask=mask_p[:, None], other=0.0), ACC_DTYPE),)  # [BLOCK_P, 1], as sums are

    start = tl.zeros((BLOCK_P, 1), dtype=ACC_DTYPE)
    if HAS_BIAS:
        start += tl.load(b_ptr + c * stride_b, mask=mask_p, other=0.0).to(ACC_DTYPE)[:, None]
    fresh = ()
    for _ in tl.static_range(ROWS * COLS):
        fresh += (start,)
    older = ()
    for _ in tl.static_range(ALIVE - 1):
        older += fresh

    # Planes outside the image add nothing: steps of these alone are left out, but for those that the last sums take.
    planes = tl.minimum(PLANES, d_out - d_o)
    begin = tl.minimum(tl.maximum(-d0, 0) // STRIDE_D, ALIVE - 1)
    end = tl.maximum(tl.minimum(planes + ALIVE - 1, tl.cdiv(d_in - d0, STRIDE_D)), planes)
    for step in range(begin, end):
        x_planes = load_planes(
            x_patch, d0 + step * STRIDE_D, d_in, h_first, h_in, w_first, x_inside, stride_xd, stride_xh,
            STRIDE_D, width(ROWS, STRIDE_H, KH, DIL_H), width(COLS, STRIDE_W, KW, DIL_W), PAD_W, X_VECTOR, BLOCK_P,
        )  # fmt: skip
        sums = accumulate_planes(
            fresh + older, x_planes, weights, KD, KH, KW, STRIDE_D, STRIDE_H, STRIDE_W, DIL_H, DIL_W, ROWS, COLS
        )
        done = step - (ALIVE - 1)
        store_plane(
            y_patch + aligned((d_o + done) * stride_yd, Y_VECTOR), sums, done >= 0, h_inside, w_inside,
            stride_yh, stride_yw, ACTIVATION, Y_VECTOR, ALIVE - 1, ROWS, COLS, BLOCK_P,
        )  # fmt: skip
        older = sums[: (ALIVE - 1) * ROWS * COLS]
    for i in tl.static_range(ALIVE - 1):
        done = end + i - (ALIVE - 1)
        store_plane(
            y_patch + aligned((d_o + done) * stride_yd, Y_VECTOR), older, (done >= 0) & (done < planes),
            h_inside, w_inside, stride_yh, stride_yw, ACTIVATION, Y_VECTOR, ALIVE - 2 - i, ROWS, COLS, BLOCK_P,
        )  # fmt: skip


@triton.jit
def accumulate_planes(
    sums, x_planes, weights,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The sums with what the input planes of a step are worth to each: a patch of each age, the youngest first.

    Row by row, each of which is widened when its turn comes: until then an element takes half a register.
    """
    WIDTH: tl.constexpr = width(COLS, STRIDE_W, KW, DIL_W)
    for row in tl.static_range(STRIDE_D * width(ROWS, STRIDE_H, KH, DIL_H)):
        x_row = ()
        for k in tl.static_range(WIDTH):
            x_row += (widen(x_planes[row * WIDTH + k], sums[0].dtype),)
        new = ()
        for n in tl.static_range((KD + STRIDE_D - 1) // STRIDE_D * ROWS * COLS):
            total = sums[n]
            if filter_row(row, n // COLS, KD, KH, STRIDE_D, STRIDE_H, DIL_H, ROWS) >= 0:
                for kw in tl.static_range(KW):
                    w_tap = weights[filter_row(row, n // COLS, KD, KH, STRIDE_D, STRIDE_H, DIL_H, ROWS) * KW + kw]
                    total += x_row[n % COLS * STRIDE_W + kw * DIL_W] * w_tap
            new += (total,)
        sums = new
    return sums


@triton.constexpr_function
def filter_row(row, n, KD, KH, STRIDE_D, STRIDE_H, DIL_H, ROWS):
    """The row of a filter, of KD x KH, that joins a row of a step's input to row n of the sums, or -1."""
    s, h = divmod(row, width(ROWS, STRIDE_H, KH, DIL_H))
    age, i = divmod(n, ROWS)
    kd, kh = age * STRIDE_D + s, tap_at(h, i, STRIDE_H, DIL_H, KH)
    return kd * KH + kh if kd < KD and kh >= 0 else -1


@triton.jit
def store_plane(
    y_plane, sums, live, h_inside, w_inside, stride_yh, stride_yw,
    ACTIVATION: tl.constexpr, Y_VECTOR: tl.constexpr, AGE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Writes the sums of an age, if that plane of outputs is `live`."""
    inside = tl.where(live, h_inside, 0)
    for i in tl.static_range(ROWS):
        for j in tl.static_range(0, COLS, Y_VECTOR):
            vector = ()
            for k in tl.static_range(Y_VECTOR):
                total = activate(sums[(AGE * ROWS + i) * COLS + j + k], ACTIVATION)
                vector += (narrow(total, y_plane.dtype.element_ty),)
            y_vector = y_plane + aligned(i * stride_yh + j * stride_yw, Y_VECTOR)
            mask = (inside > i) & (w_inside > j)
            offs = tl.arange(0, Y_VECTOR)[None, :] * stride_yw
            tl.store(y_vector + offs, chosen(vector, BLOCK_P, 1, 0, 1, Y_VECTOR), mask=mask)


@dataclass(frozen=True)
class DepthwiseRollingPatchTile(RollingPatchTile):
    """BLOCK_P patches of ROWS x COLS outputs, PLANES planes of each: a patch for each thread."""

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        # Threads exchange nothing, unless there are more of them than patches: then vectors are dealt out among them.
        return self.BLOCK_P * 16


def _patches(problem: Problem, tile: DepthwiseRollingPatchTile) -> int:
    g = problem.geometry
    rows = g.out_size[walked(problem)[1]]
    return g.batch * g.c_out * cdiv(rows, tile.ROWS) * cdiv(g.out_size[2], tile.COLS)


def _grid(problem: Problem, tile: DepthwiseRollingPatchTile) -> int:
    planes = problem.geometry.out_size[walked(problem)[0]]
    return cdiv(planes, tile.PLANES) * cdiv(_patches(problem, tile), tile.BLOCK_P)


def _arguments(problem: Problem, tile: DepthwiseRollingPatchTile) -> dict[str, object]:
    g = problem.geometry
    # Patches of all channels: a block has few images.
    pixels = tile.BLOCK_P * tile.ROWS * tile.COLS * g.out_size[walked(problem)[0]]
    found = arguments(problem, tile, cdiv(pixels, g.c_out))
    if _patches(problem, tile) + tile.BLOCK_P > INT32_LIMIT:
        found["INDEX_INT64"] = True
    return found


_LEAST = DepthwiseRollingPatchTile(num_warps=4, num_stages=1, PLANES=16, ROWS=1, COLS=1, BLOCK_P=128)


def _unsuited(problem: Problem) -> str | None:
    return not_rolling(problem, _LEAST)


KERNEL = Kernel(
    name="depthwise_rolling_patch",
    function=depthwise_rolling_patch_kernel,
    tile_type=DepthwiseRollingPatchTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=_LEAST,
)
