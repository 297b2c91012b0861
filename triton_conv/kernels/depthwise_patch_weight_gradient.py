"""Weight gradient of a depthwise convolution, channels-last, rank 1 to 3: all taps of filter rows held in registers."""

# Device code grows tuples, whose every length is another type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ..problem import Problem, WeightGradientProblem
from ..target import Target
from .arguments import geometry_arguments
from .common import below, is_read, tap_at, tile_pixels, widen, within
from .kernel import Kernel, Tile, cdiv
from .patches import no_patches

# Taps of a filter row, each a sum for every channel of a thread: with two channels, sums and one window of gradients
# are four registers a tap.
_WIDEST = 32


@triton.jit
def depthwise_patch_weight_gradient_kernel(
    x_ptr, dy_ptr, dw_ptr,
    batch, c_out, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xd, stride_xh,
    stride_yn, stride_yc, stride_yd, stride_yh,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr, X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    STRIDE_XW: tl.constexpr, STRIDE_YW: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dw[split, c, tap] = sum over the split's pixels m of dy[m, c] x_tap[m, c], the input's channels contiguous.

    Partial sums are float32 (float64), added up by the caller in a fixed order. A patch is COLS outputs of a row; a
    thread holds the sums of ROWS rows of the filter for its channels, loads and converts the gradient of a patch once,
    and each input element that those rows join to it once. LANES threads side by side take the further rows of the
    filter for the same patch: they read the same gradient, and input rows that L1 holds (hence num_stages = 1: a
    pipelined load bypasses it). Patches are counted down the height, so that steps share rows in L1 too.

    Strides of a column are constants, so that its loads differ in an offset written into the instruction; with runtime
    strides 3 x 3 took 23 instructions an output and 239 registers. Counted so (sm_90, bfloat16): 20 for 3 x 3, with 184
    registers, 52 for 5 x 5, 95 for 7 x 7, 49 of them products. The price is a compilation for each number of channels.

    Grid: one axis of SPLITS x cdiv(c_out, BLOCK_C) x cdiv(KD KH, ROWS LANES) programs: rows of the filter fastest, then
    channels, so that those that read the same elements run together.
    Depthwise convolution: Sifre 2014; Chollet, arXiv:1610.02357.
    """
    TAPS: tl.constexpr = KD * KH * KW
    GROUPS: tl.constexpr = (KD * KH + ROWS * LANES - 1) // (ROWS * LANES)
    PATCHES: tl.constexpr = BLOCK_P // LANES
    tiles_c = tl.cdiv(c_out, BLOCK_C)
    patches_w = tl.cdiv(w_out, COLS)
    pid = tl.program_id(0)
    group = pid % GROUPS
    pid_c = pid // GROUPS % tiles_c
    split = pid // GROUPS // tiles_c

    c_first = tl.cast(pid_c * BLOCK_C, tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    # The first filter row of each lane.
    row0 = (group * LANES + tl.arange(0, BLOCK_P) % LANES) * ROWS
    if INDEX_INT64:
        offs_c, row0 = offs_c.to(tl.int64), row0.to(tl.int64)
    mask_c = below(offs_c, c_out - c_first, X_VECTOR)
    channel_out = offs_c * stride_yc
    x_channel = x_ptr + c_first
    y_channel = dy_ptr + c_first * stride_yc

    acc = ()
    for _ in tl.static_range(ROWS * KW):
        acc += (tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC_DTYPE),)

    blocks = tl.cdiv(tl.cast(batch, tl.int64) * d_out * h_out * patches_w, SPLITS * PATCHES).to(tl.int32)
    for step in range(blocks):
        if RANK == 1:
            first, image, d_o, h_o, w_o, mask_p = tile_pixels(
                split * blocks + step, batch, d_out, h_out, patches_w, RANK, INDEX_INT64, PATCHES, LANES
            )
        else:
            first, image, d_o, w_o, h_o, mask_p = tile_pixels(
                split * blocks + step, batch, d_out, patches_w, h_out, RANK, INDEX_INT64, PATCHES, LANES
            )
        w_o *= COLS
        y_corner = image * stride_yn + d_o * stride_yd + h_o * stride_yh + w_o * STRIDE_YW
        y_corner = tl.multiple_of(y_corner, Y_VECTOR)[:, None] + channel_out[None, :]
        y_patch = y_channel + first * stride_yn + y_corner  # [BLOCK_P, BLOCK_C]
        # Columns that a patch has left: all that masks one, in a single comparison with a constant.
        inside = tl.where(mask_p[:, None] & mask_c[None, :], (w_out - w_o)[:, None], 0)
        gradients = ()
        for j in tl.static_range(COLS):
            dy_tile = tl.load(y_patch + j * STRIDE_YW, mask=j < inside, other=0.0)
            gradients += (widen(dy_tile, ACC_DTYPE),)  # [BLOCK_P, BLOCK_C]

        d0 = d_o * STRIDE_D - PAD_D
        h0 = h_o * STRIDE_H - PAD_H
        w0 = w_o * STRIDE_W - PAD_W
        x_corner = image * stride_xn + w0 * STRIDE_XW
        x_base = x_channel + first * stride_xn
        for i in tl.static_range(ROWS):
            row = row0 + i
            mask_row = mask_p
            x_row = x_corner
            if ROWS * LANES * GROUPS > KD * KH:
                mask_row = mask_row & (row < KD * KH)
            if RANK >= 2:
                h = h0 + row % KH * DIL_H
                mask_row = mask_row & within(h, h_in)
                x_row += h * stride_xh
            if RANK >= 3:
                d = d0 + row // KH * DIL_D
                mask_row = mask_row & within(d, d_in)
                x_row += d * stride_xd
            x_patch = x_base + (tl.multiple_of(x_row, X_VECTOR)[:, None] + offs_c[None, :])
            inside = tl.where(mask_row[:, None] & mask_c[None, :], (w_in - w0)[:, None], 0)
            for k in tl.static_range((COLS - 1) * STRIDE_W + (KW - 1) * DIL_W + 1):
                if is_read(k, COLS, STRIDE_W, DIL_W, KW):
                    mask = k < inside
                    if k < PAD_W:
                        mask = mask & (w0 >= -k)[:, None]
                    x_tile = tl.load(x_patch + k * STRIDE_XW, mask=mask, other=0.0)
                    acc = accumulate_position(
                        acc, gradients, widen(x_tile, ACC_DTYPE), i, k, STRIDE_W, DIL_W, KW, COLS, ROWS
                    )

    # Of the lanes of a filter row, one after another in dimension 0, those of different patches are summed.
    dw_row = dw_ptr + (tl.cast(split, tl.int64) * c_out + c_first) * TAPS
    lane_row = (group * LANES + tl.arange(0, LANES)) * ROWS
    offs_w = tl.arange(0, BLOCK_C) * TAPS
    for i in tl.static_range(ROWS):
        row = lane_row + i
        mask = (row < KD * KH)[:, None] & mask_c[None, :]
        for s in tl.static_range(KW):
            total = tl.sum(tl.reshape(acc[i * KW + s], (PATCHES, LANES, BLOCK_C)), axis=0)  # [LANES, BLOCK_C]
            tl.store(dw_row + ((row * KW + s)[:, None] + offs_w[None, :]), total, mask=mask)


@triton.jit
def accumulate_position(
    acc, gradients, x_tile,
    ROW: tl.constexpr, POSITION: tl.constexpr, STRIDE_W: tl.constexpr, DIL_W: tl.constexpr, KW: tl.constexpr,
    COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds the input at one position of a patch's row, times the gradient of the one output each tap joins it to."""
    new = ()
    for i in tl.static_range(ROWS):
        for s in tl.static_range(KW):
            # position = column * STRIDE + tap * DIL, here solved for the column.
            if i == ROW and tap_at(POSITION, s, DIL_W, STRIDE_W, COLS) >= 0:
                new += (acc[i * KW + s] + x_tile * gradients[tap_at(POSITION, s, DIL_W, STRIDE_W, COLS)],)
            else:
                new += (acc[i * KW + s],)
    return new


@dataclass(frozen=True)
class DepthwisePatchWeightGradientTile(Tile):
    """BLOCK_P lanes, LANES of them for each patch of COLS outputs, by BLOCK_C channels; ROWS filter rows a lane."""

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages", "ROWS", "COLS", "SPLITS"})

    ROWS: int = 1
    COLS: int = 8
    LANES: int = 1
    BLOCK_P: int = 16
    BLOCK_C: int = 64
    SPLITS: int = 1

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        # A sum over patches crosses warps, and then turns into the layout of the store.
        return self.LANES * self.BLOCK_C * max(self.num_warps, 2) * problem.accumulator_bytes

    def accumulator_values(self) -> int:
        # Without the taps, which `unfit` counts.
        return self.BLOCK_P * self.BLOCK_C

    def load_bytes(self, problem: Problem, target: Target) -> int:
        values = self.BLOCK_P * self.BLOCK_C // (self.num_warps * target.warp_size)
        return min(max(values, 1) * problem.itemsize, 16)

    def mismatch(self, problem: Problem) -> str | None:
        if self.LANES > self.BLOCK_P:
            return f"{self.LANES} lanes a patch are more than {self.BLOCK_P} lanes"
        return None

    def unfit(self, problem: Problem, target: Target) -> str | None:
        if reason := super().unfit(problem, target):
            return reason
        g = problem.geometry
        values = self.BLOCK_P * self.BLOCK_C / (self.num_warps * target.warp_size)
        # Of the gradients, those that one input element meets.
        taps = self.ROWS * g.kernel[2] + min(self.COLS, g.kernel[2]) + 1
        registers = values * taps * problem.accumulator_bytes / 4
        if registers > 216 and not target.interpreted:
            return f"{registers:.0f} registers a thread for sums and gradients"
        return None


def _grid(problem: Problem, tile: DepthwisePatchWeightGradientTile) -> int:
    g = problem.geometry
    rows = cdiv(g.kernel[0] * g.kernel[1], tile.ROWS * tile.LANES)
    return rows * cdiv(g.c_out, tile.BLOCK_C) * tile.SPLITS


def _arguments(problem: Problem, tile: DepthwisePatchWeightGradientTile) -> dict[str, object]:
    g = problem.geometry
    return (
        geometry_arguments(problem, tile.BLOCK_P * tile.COLS)
        | tile.sizes()
        | dict(
            c_out=g.c_out,
            X_VECTOR=problem.x_vector(g.c_out, tile.BLOCK_C),
            Y_VECTOR=problem.y_vector(g.c_out, tile.BLOCK_C),
            STRIDE_XW=problem.x_strides[4],
            STRIDE_YW=problem.y_strides[4],
        )
    )


def _unsuited(problem: Problem) -> str | None:
    if not isinstance(problem, WeightGradientProblem):
        return "it is no weight gradient"
    return no_patches(problem, _WIDEST)


KERNEL = Kernel(
    name="depthwise_patch_weight_gradient",
    function=depthwise_patch_weight_gradient_kernel,
    tile_type=DepthwisePatchWeightGradientTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=DepthwisePatchWeightGradientTile(
        num_warps=4, num_stages=1, ROWS=1, COLS=4, LANES=1, BLOCK_P=16, BLOCK_C=16
    ),
    pointers=("x_ptr", "dy_ptr", "dw_ptr"),
)
