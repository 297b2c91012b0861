"""Depthwise separable convolution of channels-last inputs, rank 1 to 3, that filters once for all output channels."""

# Device code grows tuples, whose every length is another type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from ..problem_lectures import SeparableProblem
from ..target import Target
from .arguments import separable_arguments
from .common import activate, below, dot, epilogue, is_read, narrow, store_pixels, tile_pixels, wide, within
from .kernel import Kernel, Tile, cdiv
from .patches import accumulate_row, interleave, load_taps, no_patches
from .windows import elements, side_by_side

# Taps along a dimension, and blocks of channels: all of them are unrolled. Of four blocks it takes ten seconds to
# compile, of eight a minute.
_WIDEST = 7
_MOST_PARTS = 4
# 64 KiB for 64 pixels. Twice as many spill and, by the static model, save nothing.
_MOST_CHANNELS = 512


@triton.jit
def separable_whole_kernel(
    x_ptr, w_ptr, mid_b_ptr, pw_ptr, b_ptr, y_ptr,
    batch, c_mid, c_out, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xd, stride_xh, stride_xw,
    stride_wo, stride_wd, stride_wh, stride_ww, stride_mb, stride_po, stride_pi,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw, stride_b,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    HAS_MID_BIAS: tl.constexpr, MID_ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr, Y_PIXELS_LAST: tl.constexpr,
    X_VECTOR: tl.constexpr, P_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr,
    HELD: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n] = activation(sum_k pw[n, k] mid[m, k] + b[n]), mid[m, k] = act(sum_tap x_tap[m, k] w[k, tap] + mid_b[k]).

    Grid: one axis of cdiv(patches, BLOCK_P) programs, each of all output channels. First come all channels of the
    intermediate of BLOCK_P patches of ROWS x COLS pixels, BLOCK_K at a time: as in `depthwise_patch`, a thread holds a
    patch of HELD channels, loads each number of its input once, and all loads are under way together. Rounded to the
    dtype as storing it would, the intermediate stays in shared memory, as the right operand of one product after the
    other, each of BLOCK_N output channels, whose weights every program reads from L2. Registers hold either a patch or
    the sums of a product, never both.

    Counted on compiled code (sm_90, bfloat16, 128 channels to 128, 3 x 3): 29 instructions a number of the
    intermediate with the products and stores, where `separable` takes 74 and asks L2 for 2.6 times the bytes.

    Sifre 2014; Chollet, arXiv:1610.02357; Howard et al., arXiv:1704.04861.
    """
    PIXELS: tl.constexpr = ROWS * COLS
    BLOCK_M: tl.constexpr = BLOCK_P * PIXELS
    patches_h = tl.cdiv(h_out, ROWS)
    patches_w = tl.cdiv(w_out, COLS)
    # Counted down the height first, so that the rows that patches share are read from L1.
    first, image, d_o, w_o, h_o, mask_p = tile_pixels(
        tl.program_id(0), batch, d_out, patches_w, patches_h, 3 if RANK == 3 else 2, INDEX_INT64, BLOCK_P
    )
    h_o *= ROWS
    w_o *= COLS
    d0 = d_o * STRIDE_D - PAD_D
    h0 = h_o * STRIDE_H - PAD_H
    w0 = w_o * STRIDE_W - PAD_W
    offs_k = tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    if INDEX_INT64:
        offs_k = offs_k.to(tl.int64)
        offs_n = offs_n.to(tl.int64)
        # A position's offset is a product of scalars.
        stride_xd, stride_xh, stride_xw = wide(stride_xd), wide(stride_xh), wide(stride_xw)
        stride_wd, stride_wh, stride_ww = wide(stride_wd), wide(stride_wh), wide(stride_ww)
        stride_yh, stride_yw = wide(stride_yh), wide(stride_yw)
    x_base = x_ptr + first * stride_xn
    x_corner = tl.multiple_of(image * stride_xn + d0 * stride_xd + h0 * stride_xh + w0 * stride_xw, X_VECTOR)

    filtered = ()
    for part in tl.static_range(PARTS):
        channel = part * BLOCK_K + offs_k
        mask_k = below(channel, c_mid, X_VECTOR)
        x_patch = x_base + (x_corner[:, None] + channel[None, :])  # [BLOCK_P, BLOCK_K]
        start = tl.zeros((BLOCK_P, BLOCK_K), dtype=ACC_DTYPE)
        if HAS_MID_BIAS:
            start += tl.load(mid_b_ptr + channel * stride_mb, mask=mask_k, other=0.0).to(ACC_DTYPE)[None, :]
        mid = ()
        for _ in tl.static_range(PIXELS):
            mid += (start,)
        for kd in tl.static_range(KD):
            mask_plane = mask_p[:, None] & mask_k[None, :]
            if RANK >= 3:
                mask_plane = mask_plane & within(d0 + kd * DIL_D, d_in)[:, None]
            x_plane = x_patch + kd * DIL_D * stride_xd
            weights = load_taps(
                w_ptr + channel * stride_wo + kd * stride_wd, stride_wh, stride_ww, mask_k, ACC_DTYPE, KH, KW, BLOCK_K
            )
            for h in tl.static_range((ROWS - 1) * STRIDE_H + (KH - 1) * DIL_H + 1):
                if is_read(h, ROWS, STRIDE_H, DIL_H, KH):
                    mask_row = mask_plane & within(h0 + h, h_in)[:, None]
                    mid = accumulate_row(
                        mid, weights, x_plane + h * stride_xh, mask_row, w0, w_in, stride_xw, h, KH, KW,
                        STRIDE_H, STRIDE_W, DIL_H, DIL_W, ROWS, COLS,
                    )  # fmt: skip
        samples = ()
        for i in tl.static_range(PIXELS):
            samples += (narrow(activate(mid[i], MID_ACTIVATION), x_ptr.dtype.element_ty),)
        tile = tl.permute(interleave(samples, PIXELS, BLOCK_P, BLOCK_K), (0, 2, 1))
        # Channels were taken apart last, and so are innermost: the compiler lays shared memory out as registers lie,
        # and a thread's pixels side by side there meet those of its neighbours in the same bank, four to eight of them.
        vectors = tl.reshape(tile, (BLOCK_M, BLOCK_K // HELD, HELD))
        tile = side_by_side(elements(vectors, BLOCK_M, BLOCK_K // HELD, HELD), 0, 1, HELD)
        filtered += (tl.trans(tl.reshape(tile, (BLOCK_M, BLOCK_K))),)

    h_m = h_o[:, None] + (tl.arange(0, PIXELS) // COLS)[None, :]  # [BLOCK_P, PIXELS]
    w_m = w_o[:, None] + (tl.arange(0, PIXELS) % COLS)[None, :]
    y_image = image * stride_yn + d_o * stride_yd
    y_row = tl.reshape(y_image[:, None] + h_m * stride_yh + w_m * stride_yw, (BLOCK_M,))
    mask_m = tl.reshape(mask_p[:, None] & (h_m < h_out) & (w_m < w_out), (BLOCK_M,))
    y_row = tl.multiple_of(y_row, Y_VECTOR)
    y_base = y_ptr + first * stride_yn
    for block in range(tl.maximum(tl.cdiv(c_out, BLOCK_N), 1)):
        out = block * BLOCK_N + offs_n
        mask_n = below(out, c_out, Y_VECTOR)
        p_row = tl.multiple_of(out * stride_po, P_VECTOR)
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC_DTYPE)
        for part in tl.static_range(PARTS):
            channel = part * BLOCK_K + offs_k
            mask_k = below(channel, c_mid, X_VECTOR)
            p_tile = tl.load(
                pw_ptr + p_row[:, None] + (channel * stride_pi)[None, :],
                mask=mask_n[:, None] & mask_k[None, :],
                other=0.0,
            )  # [BLOCK_N, BLOCK_K]
            acc = dot(p_tile, filtered[part], acc, PRECISION)
        result = epilogue(tl.trans(acc), b_ptr, stride_b, out, mask_n, HAS_BIAS, ACTIVATION)
        store_pixels(y_base, y_row, out * stride_yc, result, mask_m, mask_n, Y_PIXELS_LAST)


@dataclass(frozen=True)
class SeparableWholeTile(Tile):
    """BLOCK_P patches of ROWS x COLS pixels, whose intermediate is filtered BLOCK_K channels at a time; BLOCK_N output
    channels a product."""

    ROWS: int = 2
    COLS: int = 4
    BLOCK_P: int = 8
    BLOCK_N: int = 128
    BLOCK_K: int = 128

    @property
    def pixels(self) -> int:
        return self.ROWS * self.COLS * self.BLOCK_P

    def parts_of(self, problem: Problem) -> int:
        """Blocks of channels of the intermediate."""
        return cdiv(problem.geometry.c_out, self.BLOCK_K)

    def values(self, threads: int) -> int:
        """Channels of a patch that a thread holds, of one patch or several."""
        return max(self.BLOCK_P * self.BLOCK_K // threads, 1)

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        size, stages = problem.itemsize, self.num_stages
        g = problem.geometry
        filtered = self.pixels * self.BLOCK_K * self.parts_of(problem)
        # What a filter's taps are exchanged in lies between blocks of channels. The result is turned around where a
        # product's weights were, unless the next ones are under way, those of all blocks at once.
        taps = self.BLOCK_K << (g.kernel[1] * g.kernel[2] - 1).bit_length()
        weights, result = self.BLOCK_N * self.BLOCK_K, self.BLOCK_N * self.pixels
        product = max(weights, result) if stages == 1 else weights * self.parts_of(problem) * stages + result
        return size * (filtered + taps + product)

    def accumulator_values(self) -> int:
        return max(self.BLOCK_P * self.BLOCK_K * (self.ROWS * self.COLS + 1), self.BLOCK_N * self.pixels)

    def load_bytes(self, problem: Problem, target: Target) -> int:
        return min(self.values(self.num_warps * target.warp_size) * problem.itemsize, 16)

    def mismatch(self, problem: Problem) -> str | None:
        if self.pixels < 16 or self.BLOCK_K < 16:
            return f"a product of {self.pixels} pixels and {self.BLOCK_K} channels is too small for matrix units"
        if self.parts_of(problem) > _MOST_PARTS:
            return f"{self.parts_of(problem)} blocks of channels are more than a program unrolls"
        return None

    def unfit(self, problem: Problem, target: Target) -> str | None:
        if reason := super().unfit(problem, target):
            return reason
        g = problem.geometry
        values = self.values(self.num_warps * target.warp_size)
        # All patches of a thread share the weights of its channels.
        registers = values * (self.ROWS * self.COLS + 1) + min(values, 8) * g.kernel[1] * g.kernel[2]
        if registers > 216 and not target.interpreted:
            return f"{registers} registers a thread for sums and weights"
        return None


def _grid(problem: SeparableProblem, tile: SeparableWholeTile) -> int:
    g = problem.geometry
    d, h, w = g.out_size
    return cdiv(g.batch * d * cdiv(h, tile.ROWS) * cdiv(w, tile.COLS), tile.BLOCK_P)


def _arguments(problem: SeparableProblem, tile: SeparableWholeTile) -> dict[str, object]:
    arguments = separable_arguments(problem, tile.pixels) | tile.sizes()
    held = min(tile.values(32 * tile.num_warps), problem.x_vector(problem.geometry.c_out), 8)
    return arguments | dict(HELD=held, PARTS=tile.parts_of(problem))


def _unsuited(problem: Problem) -> str | None:
    if not isinstance(problem, SeparableProblem):
        return "no 1x1 convolution follows it"
    if problem.itemsize != 2:
        return "only of 16-bit numbers shared memory holds all channels of a tile"
    g = problem.geometry
    if g.c_out > _MOST_CHANNELS:
        return f"shared memory does not hold {g.c_out} channels of a tile"
    if max(g.kernel) > _WIDEST:
        return f"{max(g.kernel)} taps in a row do not fit in registers"
    return no_patches(problem, _WIDEST)


KERNEL = Kernel(
    name="separable_whole",
    function=separable_whole_kernel,
    tile_type=SeparableWholeTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=SeparableWholeTile(num_warps=4, num_stages=1, ROWS=1, COLS=2, BLOCK_P=16, BLOCK_N=32, BLOCK_K=64),
    pointers=("x_ptr", "w_ptr", "mid_b_ptr", "pw_ptr", "b_ptr", "y_ptr"),
)
