"""Depthwise convolution of channels-last inputs, rank 1 to 3, on CUDA cores: patches of outputs held in registers."""

# Device code grows tuples, whose every length is another type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ..problem import Problem
from ..target import Target
from .arguments import geometry_arguments
from .common import activate, below, is_read, store_pixels, tile_pixels, wide, within
from .kernel import Kernel, Tile, cdiv
from .patches import accumulate_row, interleave, load_taps, no_patches

# Taps of a filter row whose weights fit in registers beside the sums of a patch.
_WIDEST = 13


@triton.jit
def depthwise_patch_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_out, d_in, h_in, w_in, d_out, h_out, w_out, steps,
    stride_xn, stride_xd, stride_xh, stride_xw,
    stride_wo, stride_wd, stride_wh, stride_ww,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw, stride_b,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, Y_RUN: tl.constexpr, ROW_STEPS: tl.constexpr,
    UNROLL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[m, c] = activation(sum_tap x_tap[m, c] w[c, tap] + b[c]), the input's channels contiguous.

    Grid: one axis of cdiv(c_out, BLOCK_C) x cdiv(patches, BLOCK_P) programs, channels fastest: together they read whole
    runs of memory. A patch is ROWS x COLS outputs of an image, and patches are counted down its height first, so that
    the rows that those of a program share are read from L1 (hence num_stages = 1: a pipelined load bypasses it). Each
    input element of a patch is loaded and converted once, and feeds all outputs that it belongs to.

    With UNROLL all rows of the patch are unrolled, the weights of a plane of the filter in registers. Without it a loop
    runs over the rows of its input, and registers hold the weights of one filter row for each of the ROWS outputs: of
    49 taps more would not fit.

    Counted on compiled code (sm_90, bfloat16, instructions an output, where 39 keep up with the memory of an H100):
    12 for a causal filter of 4 taps, 22 for 3 x 3, 53 for 5 x 5, 94 for 7 x 7, each with its default tile.
    Depthwise convolution: Sifre 2014; Chollet, arXiv:1610.02357.
    """
    tiles_c = tl.cdiv(c_out, BLOCK_C)
    patches_h = tl.cdiv(h_out, ROWS)
    patches_w = tl.cdiv(w_out, COLS)
    pid = tl.program_id(0)
    pid_c = pid % tiles_c
    pid_p = pid // tiles_c
    if RANK == 1:
        first, image, d_o, h_o, w_o, mask_p = tile_pixels(
            pid_p, batch, d_out, patches_h, patches_w, RANK, INDEX_INT64, BLOCK_P
        )
    else:
        first, image, d_o, w_o, h_o, mask_p = tile_pixels(
            pid_p, batch, d_out, patches_w, patches_h, RANK, INDEX_INT64, BLOCK_P
        )
    h_o *= ROWS
    w_o *= COLS
    d0 = d_o * STRIDE_D - PAD_D
    h0 = h_o * STRIDE_H - PAD_H
    w0 = w_o * STRIDE_W - PAD_W

    # Offsets of channels start from the tile's first, whose 64-bit base the pointer carries.
    c_first = tl.cast(pid_c * BLOCK_C, tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    if INDEX_INT64:
        offs_c = offs_c.to(tl.int64)
        # A position's offset is a product of scalars.
        stride_xd, stride_xh, stride_xw = wide(stride_xd), wide(stride_xh), wide(stride_xw)
        stride_wd, stride_wh, stride_ww = wide(stride_wd), wide(stride_wh), wide(stride_ww)
        stride_yh, stride_yw = wide(stride_yh), wide(stride_yw)
    mask_c = below(offs_c, c_out - c_first, X_VECTOR)
    mask_pc = mask_p[:, None] & mask_c[None, :]
    x_corner = image * stride_xn + d0 * stride_xd + h0 * stride_xh + w0 * stride_xw
    x_patch = (
        x_ptr + first * stride_xn + c_first + (tl.multiple_of(x_corner, X_VECTOR)[:, None] + offs_c[None, :])
    )  # [BLOCK_P, BLOCK_C]
    w_base = w_ptr + c_first * stride_wo + offs_c * stride_wo

    # The bias is where the sums start: at the end it would be in the way of the stores.
    start = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACC_DTYPE)
    if HAS_BIAS:
        start += tl.load(b_ptr + (c_first + offs_c) * stride_b, mask=mask_c, other=0.0).to(ACC_DTYPE)[None, :]
    acc = ()
    for _ in tl.static_range(ROWS * COLS):
        acc += (start,)

    # A number of steps known to the compiler is an invitation to unroll them: AMD's did, and spilled.
    for step in range(steps):
        kd = step // ROW_STEPS if KD > 1 else 0
        mask_plane = mask_pc
        if RANK >= 3:
            mask_plane = mask_plane & within(d0 + kd * DIL_D, d_in)[:, None]
        x_plane = x_patch + kd * DIL_D * stride_xd
        w_plane = w_base + kd * stride_wd
        if UNROLL:
            weights = load_taps(w_plane, stride_wh, stride_ww, mask_c, ACC_DTYPE, KH, KW, BLOCK_C)
            for h in tl.static_range((ROWS - 1) * STRIDE_H + (KH - 1) * DIL_H + 1):
                if is_read(h, ROWS, STRIDE_H, DIL_H, KH):
                    mask_row = mask_plane & within(h0 + h, h_in)[:, None]
                    acc = accumulate_row(
                        acc, weights, x_plane + h * stride_xh, mask_row, w0, w_in, stride_xw, h, KH, KW,
                        STRIDE_H, STRIDE_W, DIL_H, DIL_W, ROWS, COLS,
                    )  # fmt: skip
        else:
            row = step % ROW_STEPS
            weights = ()
            for i in tl.static_range(ROWS):
                kh = row - i * STRIDE_H // DIL_H
                mask_w = mask_c
                if ROWS > 1:
                    mask_w = mask_w & within(kh, KH)
                weights += load_taps(w_plane + kh * stride_wh, stride_wh, stride_ww, mask_w, ACC_DTYPE, 1, KW, BLOCK_C)
            h = row * DIL_H
            mask_row = mask_plane & within(h0 + h, h_in)[:, None]
            acc = accumulate_row(
                acc, weights, x_plane + h * stride_xh, mask_row, w0, w_in, stride_xw, -1, KH, KW,
                STRIDE_H, STRIDE_W, DIL_H, DIL_W, ROWS, COLS,
            )  # fmt: skip

    y_base = y_ptr + first * stride_yn + c_first * stride_yc
    channel_out = offs_c * stride_yc
    if Y_RUN > 0:
        # Rank 1 with pixels contiguous, as torch's outputs are: the outputs of all patches lie side by side, in runs of
        # Y_RUN that are aligned and have one mask each. Counted in runs, the compiler sees that, and writes vectors.
        pixels = ()
        for j in tl.static_range(COLS):
            pixels += (activate(acc[j], ACTIVATION),)
        tile = tl.permute(interleave(pixels, COLS, BLOCK_P, BLOCK_C), (0, 2, 1))
        offs_y = tl.arange(0, BLOCK_P * COLS)
        if INDEX_INT64:
            offs_y = offs_y.to(tl.int64)
        run = tl.cast(pid_p, offs_y.dtype) * (BLOCK_P * COLS // Y_RUN) + offs_y // Y_RUN
        runs = patches_w * (COLS // Y_RUN)
        pixel = (run // runs - first).to(offs_y.dtype) * stride_yn + (run % runs * Y_RUN + offs_y % Y_RUN)
        mask_y = (run // runs < batch) & (run % runs < w_out // Y_RUN)
        tile = tl.reshape(tile, (BLOCK_P * COLS, BLOCK_C))
        store_pixels(y_base, tl.multiple_of(pixel, Y_RUN), channel_out, tile, mask_y, mask_c, True)
    else:
        y_corner = image * stride_yn + d_o * stride_yd + h_o * stride_yh + w_o * stride_yw
        for i in tl.static_range(ROWS):
            mask_row = mask_p & (h_o + i < h_out)
            for j in tl.static_range(COLS):
                pixel = tl.multiple_of(y_corner + (i * stride_yh + j * stride_yw), Y_VECTOR)
                tile = activate(acc[i * COLS + j], ACTIVATION)
                store_pixels(y_base, pixel, channel_out, tile, mask_row & (w_o + j < w_out), mask_c, False)


@dataclass(frozen=True)
class DepthwisePatchTile(Tile):
    """BLOCK_P patches of ROWS x COLS outputs by BLOCK_C channels; UNROLL as the kernel explains."""

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages", "ROWS", "COLS"})

    UNROLL: bool = True
    ROWS: int = 4
    COLS: int = 4
    BLOCK_P: int = 8
    BLOCK_C: int = 64

    def row_steps(self, problem: Problem) -> int:
        """Steps that the rows of a patch's input take, for a plane of the filter."""
        g = problem.geometry
        # Every row that is read is a multiple of the dilation, or there is one row of outputs: see `mismatch`.
        return 1 if self.UNROLL else (self.ROWS - 1) * g.stride[1] // g.dilation[1] + g.kernel[1]

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        g = problem.geometry
        taps = g.kernel[2] * (g.kernel[1] if self.UNROLL else 1)
        # The exchange of the weights and, where outputs are written along the pixels, of those.
        outputs = self.BLOCK_P * self.COLS if _y_run(problem, self) else 0
        return self.BLOCK_C * problem.itemsize * max(1 << (taps - 1).bit_length(), outputs)

    def accumulator_values(self) -> int:
        # Besides the sums, one more tile of inputs.
        return self.BLOCK_P * self.BLOCK_C * (self.ROWS * self.COLS + 1)

    def load_bytes(self, problem: Problem, target: Target) -> int:
        values = self.BLOCK_P * self.BLOCK_C // (self.num_warps * target.warp_size)
        return min(max(values, 1) * problem.itemsize, 16)

    def mismatch(self, problem: Problem) -> str | None:
        g = problem.geometry
        if not self.UNROLL and self.ROWS > 1 and g.stride[1] % g.dilation[1]:
            return f"{self.ROWS} rows of outputs share no input at stride {g.stride[1]} and dilation {g.dilation[1]}"
        if _y_run(problem, self) and self.COLS & (self.COLS - 1):
            return f"{self.COLS} columns of outputs are no vector along the pixels"
        return None

    def unfit(self, problem: Problem, target: Target) -> str | None:
        if reason := super().unfit(problem, target):
            return reason
        values = self.BLOCK_P * self.BLOCK_C / (self.num_warps * target.warp_size)
        # A thread's weights are those of the channels that it loads at once: all its patches share them.
        channels = self.load_bytes(problem, target) // problem.itemsize
        weights = problem.geometry.kernel[2] * (problem.geometry.kernel[1] if self.UNROLL else self.ROWS)
        registers = (values * (self.ROWS * self.COLS + 1) + channels * weights) * problem.accumulator_bytes / 4
        if registers > 216 and not target.interpreted:
            return f"{registers:.0f} registers a thread for sums and weights"
        return None


def _y_run(problem: Problem, tile: DepthwisePatchTile) -> int:
    """Outputs of a patch that lie side by side at an aligned place, where pixels are contiguous; else 0.

    Of rank 1 alone: torch has no channels_last of rank 1, and makes outputs of higher ranks channels_last.
    """
    *_, w = problem.y_strides
    if problem.geometry.rank > 1 or w != 1 or problem.y_strides[1] == 1:
        return 0
    return problem.y_run(tile.COLS)


def _grid(problem: Problem, tile: DepthwisePatchTile) -> int:
    g = problem.geometry
    d, h, w = g.out_size
    patches = g.batch * d * cdiv(h, tile.ROWS) * cdiv(w, tile.COLS)
    return cdiv(g.c_out, tile.BLOCK_C) * cdiv(patches, tile.BLOCK_P)


def _arguments(problem: Problem, tile: DepthwisePatchTile) -> dict[str, object]:
    g = problem.geometry
    row_steps = tile.row_steps(problem)
    return (
        geometry_arguments(problem, tile.BLOCK_P * tile.ROWS * tile.COLS)
        | tile.sizes()
        | dict(
            c_out=g.c_out,
            steps=g.kernel[0] * row_steps,
            ROW_STEPS=row_steps,
            X_VECTOR=problem.x_vector(g.c_out, tile.BLOCK_C),
            Y_VECTOR=problem.y_vector(g.c_out, tile.BLOCK_C),
            Y_RUN=_y_run(problem, tile),
        )
    )


def _unsuited(problem: Problem) -> str | None:
    if problem.geometry.transposed:
        return "it is transposed"
    return no_patches(problem, _WIDEST)


KERNEL = Kernel(
    name="depthwise_patch",
    function=depthwise_patch_kernel,
    tile_type=DepthwisePatchTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=DepthwisePatchTile(num_warps=4, num_stages=1, UNROLL=False, ROWS=1, COLS=4, BLOCK_P=16, BLOCK_C=32),
)
