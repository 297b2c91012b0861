"""Weight gradient of a depthwise convolution of images with contiguous pixels (NCHW): gradients roll past the input."""

# Device code grows tuples, whose every length is another type.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ..problem import Problem, WeightGradientProblem
from ..target import Target
from .common import aligned, tap_at, tile_pixels, wide, widen, within
from .kernel import Kernel, cdiv
from .planes import RollingPatchTile, arguments, load_planes, not_rolling, row_pieces, rows_read, walked
from .strips import width
from .windows import chosen, elements


@triton.jit
def depthwise_rolling_patch_weight_gradient_kernel(
    x_ptr, dy_ptr, dw_ptr,
    batch, c_out, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    MULTIPLIER: tl.constexpr, X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, BLOCK_S: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_P: tl.constexpr,
    STEPS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """dw[split, c, tap] = sum over the split's pixels m of dy[m, c] x_tap[m, c], the input's pixels contiguous.

    Of rank 2 or 3. Partial sums are float32 (float64), added up by the caller in a fixed order.

    A thread has a patch, ROWS x COLS outputs of a plane, and walks down the depth with it, as in
    `depthwise_rolling_patch`; of rank 2 down the height, with a patch of one row: d is the axis walked along, h the
    other one. Each step loads STRIDE_D input planes and one plane of the output's gradient, each element once, and
    multiplies them with the ALIVE planes of the gradient that they belong to, which stay in registers beside the sums
    of all taps. Input planes count for their steps alone, so that segments of PLANES steps share no products; each
    begins with the planes of the gradient that are alive before it. A trip of the loop takes STEPS of them, whose loads
    are under way together, and after which gradients move to the registers of their next age.

    A product of whole rows, in `depthwise_fused_weight_gradient`, reads an input row for each group of output rows that
    it meets: 19 bytes an output of 3 x 3 x 3 through L2, and 7 here. Here such an output takes 37 instructions, of
    which 27 are products (sm_90, bfloat16, 2 x 8 outputs), where 39 keep up with the memory of an H100; one of 5 x 5
    takes 36.

    Grid: one axis of c_out x SPLITS programs, splits fastest. A program has one channel, and takes every SPLITS-th of
    the segments of BLOCK_P patches, which are counted over (image, row, column), so that neighbouring threads read
    neighbouring columns. The sums of its threads are added up at the end.
    Depthwise convolution: Sifre 2014; Chollet, arXiv:1610.02357.
    """
    TAPS: tl.constexpr = KD * KH * KW
    ALIVE: tl.constexpr = (KD + STRIDE_D - 1) // STRIDE_D
    HEIGHT: tl.constexpr = width(ROWS, STRIDE_H, KH, DIL_H)
    WIDTH: tl.constexpr = width(COLS, STRIDE_W, KW, DIL_W)
    split = tl.program_id(0) % SPLITS
    c = tl.program_id(0) // SPLITS
    rows = tl.cdiv(h_out, ROWS)
    columns = tl.cdiv(w_out, COLS)
    if INDEX_INT64:
        rows, columns = wide(rows), wide(columns)
        stride_xd, stride_xh = wide(stride_xd), wide(stride_xh)
        stride_yd, stride_yh, stride_yw = wide(stride_yd), wide(stride_yh), wide(stride_yw)
    x_channel = x_ptr + aligned(c // MULTIPLIER * wide(stride_xc), X_VECTOR)
    y_channel = dy_ptr + aligned(c * wide(stride_yc), Y_VECTOR)

    sums = ()
    for _ in tl.static_range(TAPS):
        sums += (tl.zeros((BLOCK_P, 1), dtype=ACC_DTYPE),)
    # Steps whose input planes meet the image and an output.
    begin = PAD_D // STRIDE_D
    end = tl.minimum(d_out + ALIVE - 1, tl.cdiv(d_in + PAD_D, STRIDE_D))
    segments = tl.cdiv(tl.maximum(end - begin, 0), PLANES)
    items = tl.cdiv(batch * rows * columns, BLOCK_P) * segments
    for turn in range(tl.cdiv(tl.maximum(items - split, 0), SPLITS)):
        item = split + turn * SPLITS
        first, image, _d, h_o, w_o, mask_p = tile_pixels(
            item // segments, batch, 1, rows, columns, 2, INDEX_INT64, BLOCK_P
        )
        h_o *= ROWS
        w_o *= COLS
        h0 = h_o * STRIDE_H - PAD_H
        # Columns are counted from the block's own, where vectors begin.
        x_corner = image * stride_xn + h0 * stride_xh + w_o * STRIDE_W
        x_patch = x_channel + aligned(first * stride_xn, X_VECTOR) + tl.multiple_of(x_corner, X_VECTOR)[:, None, None]
        y_corner = image * stride_yn + h_o * stride_yh + w_o * stride_yw
        y_patch = y_channel + aligned(first * stride_yn, Y_VECTOR) + tl.multiple_of(y_corner, Y_VECTOR)[:, None, None]
        h_first = h0[:, None, None]
        w_first = (w_o * STRIDE_W)[:, None, None]
        x_inside = tl.where(mask_p[:, None, None], w_in - w_first + PAD_W, 0)
        h_inside = tl.where(mask_p, h_out - h_o, 0)[:, None, None]
        w_inside = (w_out - w_o)[:, None, None]

        start = begin + item % segments * PLANES
        older = ()
        for age in tl.static_range(1, ALIVE):
            older += load_gradients(
                y_patch, start - age, d_out, h_inside, w_inside, stride_yd, stride_yh, stride_yw,
                ACC_DTYPE, Y_VECTOR, ROWS, COLS, BLOCK_P,
            )  # fmt: skip
        stop = tl.minimum(start + PLANES, end)
        d_stop = tl.minimum(d_in, stop * STRIDE_D - PAD_D)
        for step in range(start, stop, STEPS):
            x_planes = load_planes(
                x_patch, step * STRIDE_D - PAD_D, d_stop, h_first, h_in, w_first, x_inside, stride_xd, stride_xh,
                STEPS * STRIDE_D, HEIGHT, WIDTH, PAD_W, X_VECTOR, BLOCK_P,
            )  # fmt: skip
            alive = older
            for i in tl.static_range(STEPS):
                alive = load_gradients(
                    y_patch, step + i, d_out, h_inside, w_inside, stride_yd, stride_yh, stride_yw,
                    ACC_DTYPE, Y_VECTOR, ROWS, COLS, BLOCK_P,
                ) + alive  # fmt: skip
            for i in tl.static_range(STEPS):
                sums = accumulate_taps(
                    sums, x_planes[i * STRIDE_D * HEIGHT * WIDTH :], alive[(STEPS - 1 - i) * ROWS * COLS :],
                    KD, KH, KW, STRIDE_D, STRIDE_H, STRIDE_W, DIL_H, DIL_W, ROWS, COLS,
                )  # fmt: skip
            older = alive[: (ALIVE - 1) * ROWS * COLS]

    # All taps of a thread side by side: the sums of threads are exchanged once.
    for _ in tl.static_range(BLOCK_S - TAPS):
        sums += (tl.zeros((BLOCK_P, 1), dtype=ACC_DTYPE),)
    total = tl.sum(chosen(sums, BLOCK_P, 1, 0, 1, BLOCK_S), axis=0)
    tap = tl.arange(0, BLOCK_S)
    tl.store(dw_ptr + (tl.cast(split, tl.int64) * c_out + c) * TAPS + tap, total, mask=tap < TAPS)


@triton.jit
def load_gradients(
    y_patch, d, d_out, h_inside, w_inside, stride_yd, stride_yh, stride_yw,
    ACC_DTYPE: tl.constexpr, Y_VECTOR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Patches of plane `d` of the gradient, zero outside: element by element, row by row."""
    inside = tl.where(within(d, d_out), h_inside, 0)
    y_plane = y_patch + aligned(d * stride_yd, Y_VECTOR)
    offs = tl.arange(0, Y_VECTOR)[None, None, :] * stride_yw
    tiles = ()
    for i in tl.static_range(ROWS):
        for j in tl.static_range(0, COLS, Y_VECTOR):
            y_vector = y_plane + aligned(i * stride_yh + j * stride_yw, Y_VECTOR)
            vectors = tl.load(y_vector + offs, mask=(inside > i) & (w_inside > j), other=0.0)
            tiles += elements(widen(vectors, ACC_DTYPE), BLOCK_P, 1, Y_VECTOR)
    return tiles


@triton.jit
def accumulate_taps(
    sums, x_planes, alive,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The sums of all taps with what the input planes of a step and the planes of the gradient that are alive add.

    Row by row of the input, each of which is widened when its turn comes: until then an element takes half a register.
    """
    WIDTH: tl.constexpr = width(COLS, STRIDE_W, KW, DIL_W)
    for row in tl.static_range(STRIDE_D * width(ROWS, STRIDE_H, KH, DIL_H)):
        x_row = ()
        for k in tl.static_range(WIDTH):
            x_row += (widen(x_planes[row * WIDTH + k], sums[0].dtype),)
        new = ()
        for tap in tl.static_range(KD * KH * KW):
            total = sums[tap]
            if gradient_row(row, tap // KW, KH, STRIDE_D, STRIDE_H, DIL_H, ROWS) >= 0:
                for j in tl.static_range(COLS):
                    dy = alive[gradient_row(row, tap // KW, KH, STRIDE_D, STRIDE_H, DIL_H, ROWS) * COLS + j]
                    total += x_row[j * STRIDE_W + tap % KW * DIL_W] * dy
            new += (total,)
        sums = new
    return sums


@triton.constexpr_function
def gradient_row(row, filter_row, KH, STRIDE_D, STRIDE_H, DIL_H, ROWS):
    """The row of what is alive of the gradient, ROWS of each age, that a row of a filter, of KD x KH, joins to a row of
    a step's input, or -1.
    """
    s, h = divmod(row, width(ROWS, STRIDE_H, KH, DIL_H))
    kd, kh = divmod(filter_row, KH)
    age, rest = divmod(kd - s, STRIDE_D)
    i = tap_at(h, kh, DIL_H, STRIDE_H, ROWS)
    return age * ROWS + i if rest == 0 and age >= 0 and i >= 0 else -1


@dataclass(frozen=True)
class DepthwiseRollingPatchWeightGradientTile(RollingPatchTile):
    """BLOCK_P patches of ROWS x COLS outputs, a patch for each thread, in segments of PLANES steps, of which a trip of
    the loop takes STEPS.
    """

    whole: ClassVar[frozenset[str]] = RollingPatchTile.whole | {"STEPS", "SPLITS"}

    STEPS: int = 1
    SPLITS: int = 1

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        # The sums of all taps, of every warp; where threads are more than patches, of every patch, and vectors that
        # these load are dealt out.
        threads = self.num_warps * (64 if target is None else target.warp_size)
        sums = block_s(problem) * (self.num_warps if threads <= self.BLOCK_P else self.BLOCK_P)
        return max(sums * problem.accumulator_bytes, self.BLOCK_P * 16)

    def products(self, problem: Problem) -> int:
        return self.STEPS * super().products(problem)

    def held(self, problem: Problem) -> int:
        row = sum(max(length * problem.itemsize, 4) for length in row_pieces(problem, self))
        loaded = self.ROWS * self.COLS * problem.itemsize
        more = (self.STEPS - 1) * rows_read(problem, self) * row + self.STEPS * loaded
        return super().held(problem) + more // 4


def block_s(problem: Problem) -> int:
    """The taps, up to a power of two."""
    return 1 << (problem.geometry.taps - 1).bit_length()


def steps_down(problem: Problem) -> int:
    """Steps down an image, each of a stride's input planes."""
    g = problem.geometry
    depth, _ = walked(problem)
    alive = cdiv(g.kernel[depth], g.stride[depth])
    end = min(g.out_size[depth] + alive - 1, cdiv(g.in_size[depth] + g.pad_before[depth], g.stride[depth]))
    return max(end - g.pad_before[depth] // g.stride[depth], 0)


def patch_blocks(problem: Problem, tile: DepthwiseRollingPatchWeightGradientTile) -> int:
    """Blocks of BLOCK_P patches of a channel."""
    g = problem.geometry
    rows = g.out_size[walked(problem)[1]]
    return cdiv(g.batch * cdiv(rows, tile.ROWS) * cdiv(g.out_size[2], tile.COLS), tile.BLOCK_P)


def _grid(problem: Problem, tile: DepthwiseRollingPatchWeightGradientTile) -> int:
    return problem.geometry.c_out * tile.SPLITS


def _arguments(problem: Problem, tile: DepthwiseRollingPatchWeightGradientTile) -> dict[str, object]:
    planes = problem.geometry.out_size[walked(problem)[0]]
    block = tile.BLOCK_P * tile.ROWS * tile.COLS * planes
    return arguments(problem, tile, block) | dict(BLOCK_S=block_s(problem))


_LEAST = DepthwiseRollingPatchWeightGradientTile(num_warps=1, num_stages=1, PLANES=16, ROWS=1, COLS=1, BLOCK_P=32)


def _unsuited(problem: Problem) -> str | None:
    if not isinstance(problem, WeightGradientProblem):
        return "it is no weight gradient"
    return not_rolling(problem, _LEAST)


KERNEL = Kernel(
    name="depthwise_rolling_patch_weight_gradient",
    function=depthwise_rolling_patch_weight_gradient_kernel,
    tile_type=DepthwiseRollingPatchWeightGradientTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=_LEAST,
    pointers=("x_ptr", "dy_ptr", "dw_ptr"),
)
