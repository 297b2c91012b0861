"""Input gradient of a locally connected layer whose filters are plain: a program walks along a row of the input."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import INT32_LIMIT, VECTOR_LIMIT, Problem
from ..problem_lectures import LocalInputGradientProblem
from ..target import Target
from .arguments import place_arguments
from .common import aligned, below, dot, narrow, wide, within
from .kernel import Kernel, Tile, cdiv
from .staging import Operand, staged_bytes


@triton.jit
def _filter_rows(
    k, d_p, h_p, d_top, h_top, k_limit, stride_pd, stride_ph, stride_wo, stride_wd, stride_wh,
    stride_yc, stride_yd, stride_yh, d_out, h_out, ROWS: tl.constexpr, KH: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, DIL_D: tl.constexpr, DIL_H: tl.constexpr,
):  # fmt: skip
    """(output channel, filter row) pairs k: offsets into filters and dy from those of (d_top, h_top), and whether the
    row of outputs exists."""
    channel = k // ROWS
    row = k % ROWS
    kd = row // KH
    kh = row % KH
    # Where a stride passes this row by, or the output ends, the pair is masked off.
    d_t = d_p - kd * DIL_D
    h_t = h_p - kh * DIL_H
    d_o = d_t // STRIDE_D
    h_o = h_t // STRIDE_H
    met = (d_o * STRIDE_D == d_t) & (h_o * STRIDE_H == h_t) & within(d_o, d_out) & within(h_o, h_out)
    met = met & (k < k_limit)
    in_filter = (d_o - d_top) * stride_pd + (h_o - h_top) * stride_ph
    in_filter += channel * stride_wo + kd * stride_wd + kh * stride_wh
    in_dy = channel * stride_yc + (d_o - d_top) * stride_yd + (h_o - h_top) * stride_yh
    return in_filter, in_dy, met


@triton.jit
def locally_connected_input_gradient_rolling_kernel(
    dy_ptr, w_ptr, dx_ptr,
    batch, c_in_group, c_out_group, groups, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, stride_pd, stride_ph, stride_pw,
    stride_wo, stride_wi, stride_wd, stride_wh, stride_ww,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, SPAN: tl.constexpr,
    PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr, IMAGE_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx[m, n, q] = sum_{tap, k} w[p, k, n, tap] dy[m, k, p], p the output that reads input pixel q with this tap.

    Grid: one axis of images' tiles x tiles of (channel, column) pairs x groups x rows of the input x runs of COLUMNS of
    its columns, images fastest. For stride and dilation 1 along the row, output pixel w reads KW columns from its own
    on, and the next pixel all but one of them. So a program holds KW columns of dx, column q in slot q % KW, and goes
    from one output pixel to the next: of its filter, slot s is fed by tap (s - w) % KW, a rotation of a run of KW
    taps that lie side by side, and after each pixel one slot is complete, stored and cleared. The sum runs over SPAN
    (output channel, filter row) pairs, BLOCK_K at a time. Each weight is read once (and KW - 1 pixels anew for each run
    of COLUMNS), next to its neighbours, where gathering one tap of every filter reads a sector of memory for each of
    them. The next step's weights are under way during the product. No atomics: the same bits every time.

    Gregor and LeCun, arXiv:1006.0448.
    """
    STEPS: tl.constexpr = (SPAN + BLOCK_K - 1) // BLOCK_K
    tiles_m = tl.cdiv(batch, BLOCK_M)
    tiles_n = tl.cdiv(c_in_group * KW, BLOCK_N)
    pid = tl.program_id(0)
    pid_m = pid % tiles_m
    pid_n = pid // tiles_m % tiles_n
    pid_g = pid // tiles_m // tiles_n % groups
    place = pid // tiles_m // tiles_n // groups
    h_i = place % h_in
    d_i = place // h_in % d_in
    first = place // h_in // d_in * COLUMNS
    h_p = h_i + PAD_H
    d_p = d_i + PAD_D
    h_top = h_p // STRIDE_H
    d_top = d_p // STRIDE_D

    m_first = pid_m * BLOCK_M
    image = tl.arange(0, BLOCK_M)
    pair = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n = pair // KW
    slot = pair % KW
    offs_k = tl.arange(0, BLOCK_K)
    if INDEX_INT64:
        image = image.to(tl.int64)
        n = n.to(tl.int64)
        stride_pd, stride_ph, stride_wo = wide(stride_pd), wide(stride_ph), wide(stride_wo)
        stride_yc, stride_yd, stride_yh = wide(stride_yc), wide(stride_yd), wide(stride_yh)
    mask_m = below(image, batch - m_first, IMAGE_VECTOR)
    mask_n = n < c_in_group
    k_first = tl.cast(pid_g * c_out_group, tl.int64)
    y_base = dy_ptr + aligned(tl.cast(m_first, tl.int64) * stride_yn + k_first * stride_yc, IMAGE_VECTOR)
    y_base += aligned(wide(stride_yd) * d_top + wide(stride_yh) * h_top, IMAGE_VECTOR)
    w_base = w_ptr + wide(stride_pd) * d_top + wide(stride_ph) * h_top + k_first * stride_wo
    x_base = dx_ptr + tl.cast(m_first, tl.int64) * stride_xn + wide(stride_xd) * d_i + wide(stride_xh) * h_i
    x_base += tl.cast(pid_g * c_in_group, tl.int64) * stride_xc
    y_image = image * stride_yn
    w_row = n * stride_wi
    x_tile = (n * stride_xc)[:, None] + (image * stride_xn)[None, :]
    mask_x = mask_n[:, None] & mask_m[None, :]

    # The output pixels that read the run's columns: a mask of the loop's own would cost each weight two instructions.
    start = tl.maximum(first + PAD_W - (KW - 1), 0)
    last = tl.minimum(first + COLUMNS, w_in) + PAD_W
    end = tl.maximum(tl.minimum(last, w_out), start)
    in_filter, in_dy, met = _filter_rows(
        offs_k, d_p, h_p, d_top, h_top, SPAN, stride_pd, stride_ph, stride_wo, stride_wd, stride_wh,
        stride_yc, stride_yd, stride_yh, d_out, h_out, KD * KH, KH, STRIDE_D, STRIDE_H, DIL_D, DIL_H,
    )  # fmt: skip
    kw = (slot + KW - start % KW) % KW
    w_tile = tl.load(
        w_base + wide(stride_pw) * start + (w_row + kw * stride_ww)[:, None] + in_filter[None, :],
        mask=mask_n[:, None] & (met & (start < end))[None, :],
        other=0.0,
    )  # [BLOCK_N, BLOCK_K]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC_DTYPE)
    for step in range((end - start) * STEPS):
        w_o = start + step // STEPS
        dy_tile = tl.load(
            y_base + aligned(wide(stride_yw) * w_o, IMAGE_VECTOR)
            + tl.multiple_of(in_dy, IMAGE_VECTOR)[:, None] + y_image[None, :],
            mask=met[:, None] & mask_m[None, :],
            other=0.0,
        )  # fmt: skip
        kw_now = kw
        # Past the last one its own weights are read again, from L1, and not used.
        w_next = tl.minimum(start + (step + 1) // STEPS, end - 1)
        if STEPS > 1:
            in_filter, in_dy, met = _filter_rows(
                (step + 1) % STEPS * BLOCK_K + offs_k, d_p, h_p, d_top, h_top, SPAN, stride_pd, stride_ph, stride_wo,
                stride_wd, stride_wh, stride_yc, stride_yd, stride_yh, d_out, h_out, KD * KH, KH, STRIDE_D, STRIDE_H,
                DIL_D, DIL_H,
            )  # fmt: skip
        kw = (slot + KW - w_next % KW) % KW
        next_tile = tl.load(
            w_base + wide(stride_pw) * w_next + (w_row + kw * stride_ww)[:, None] + in_filter[None, :],
            mask=mask_n[:, None] & met[None, :],
            other=0.0,
        )
        acc = dot(w_tile, dy_tile, acc, PRECISION)
        w_tile = next_tile
        # Tap 0 of this pixel was the last to feed its slot.
        done = (kw_now == 0) & (step % STEPS == STEPS - 1)
        mask_done = mask_x & (done & (w_o - PAD_W >= first))[:, None]
        tl.store(
            x_base + wide(stride_xw) * (w_o - PAD_W) + x_tile, narrow(acc, dx_ptr.dtype.element_ty), mask=mask_done
        )
        acc = tl.where(done[:, None], 0.0, acc)
    # Columns that no further pixel reads.
    for w_o in range(end, last):
        mask_done = mask_x & ((slot == w_o % KW) & (w_o - PAD_W >= first))[:, None]
        tl.store(
            x_base + wide(stride_xw) * (w_o - PAD_W) + x_tile, narrow(acc, dx_ptr.dtype.element_ty), mask=mask_done
        )


@dataclass(frozen=True)
class LocallyConnectedInputGradientRollingTile(Tile):
    """BLOCK_M images by BLOCK_N (input channel, column) pairs, BLOCK_K (output channel, filter row) pairs a step; a
    program writes COLUMNS columns of a row."""

    BLOCK_M: int = 32
    BLOCK_N: int = 16
    BLOCK_K: int = 64
    COLUMNS: int = 128

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        size = problem.itemsize
        operands = [Operand(self.BLOCK_N * self.BLOCK_K * size, size)]
        operands.append(Operand(self.BLOCK_M * self.BLOCK_K * size, VECTOR_LIMIT * size))
        sums = self.BLOCK_M * self.BLOCK_N, size
        return staged_bytes(operands, self.BLOCK_N, self.num_warps, self.num_stages, sums, target)

    def accumulator_values(self) -> int:
        # Two tiles of weights are alive beside the sums.
        return self.BLOCK_N * (self.BLOCK_M + 2 * self.BLOCK_K)


def _grid(problem: LocalInputGradientProblem, tile: LocallyConnectedInputGradientRollingTile) -> int:
    g = problem.geometry
    runs = cdiv(g.in_size[2], tile.COLUMNS)
    tiles = cdiv(g.batch, tile.BLOCK_M) * cdiv(g.c_in_group * g.kernel[2], tile.BLOCK_N) * g.groups
    return tiles * g.in_size[0] * g.in_size[1] * runs


def _arguments(problem: LocalInputGradientProblem, tile: LocallyConnectedInputGradientRollingTile) -> dict[str, object]:
    g = problem.geometry
    arguments = place_arguments(problem, tile.BLOCK_M) | tile.sizes()
    # Offsets inside a tile reach from one output row to another.
    depth, height, _ = problem.place_strides
    rows = (g.kernel[0] * abs(depth) * g.dilation[0]) + (g.kernel[1] * abs(height) * g.dilation[1])
    far = rows + g.c_out_group * abs(problem.w_strides[0]) > INT32_LIMIT
    return arguments | dict(
        SPAN=g.c_out_group * g.kernel[0] * g.kernel[1],
        INDEX_INT64=problem.wide_index(tile.BLOCK_M) or far,
        IMAGE_VECTOR=problem.image_vector(problem.y_strides, tile.BLOCK_M, g.batch),
    )


def _unsuited(problem: Problem) -> str | None:
    if not isinstance(problem, LocalInputGradientProblem):
        return "it is no input gradient of unshared filters"
    g = problem.geometry
    if not problem.flat:
        return "the filters' taps do not lie side by side"
    if g.stride[2] != 1 or g.dilation[2] != 1:
        return "the outputs of a row do not read each one column further"
    return None


KERNEL = Kernel(
    name="locally_connected_input_gradient_rolling",
    function=locally_connected_input_gradient_rolling_kernel,
    tile_type=LocallyConnectedInputGradientRollingTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=LocallyConnectedInputGradientRollingTile(
        num_warps=4, num_stages=1, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, COLUMNS=128
    ),
    pointers=("dy_ptr", "w_ptr", "dx_ptr"),
)
