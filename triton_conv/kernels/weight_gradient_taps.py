"""Weight gradient of a channels-last convolution of images: all taps of a filter in one program, in boxes of rows."""

# Device code grows tuples, whose every length is another type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from ..target import Target
from .boxed_sums import BoxedSumsTile, boxed_sums
from .boxes import boxes, covering_box, load_box
from .common import aligned, below, dot, wide, within
from .kernel import cdiv

# Taps whose 64 x 64 sums eight warps hold; and channels of a group that make no wider product than that.
_MOST_TAPS, _MOST_CHANNELS = 10, 64


@triton.jit
def weight_gradient_taps_kernel(
    x_ptr, dy_ptr, dw_ptr,
    batch, c_in_group, c_out_group, h_in, w_in, h_out, w_out, groups,
    stride_xn, stride_xh, stride_xw, stride_yn, stride_yh, stride_yw,
    KH: tl.constexpr, KW: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr,
    DIL_W: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, BOX_N: tl.constexpr, BOX_W: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[split, o, tap, c] = sum over the split's pixels m of dy[m, o] x_tap[m, c].

    M runs over the output channels of a group, N over its input channels, K over pixels, BLOCK_K columns of BOX_N
    images in a row. A row of the input is copied once for each column of the filter, and meets the KH rows of dy that
    read it: KH + KW tiles for KH x KW products, where a tap alone reads two for one.

    A row or column of dy that does not exist is zero, and is multiplied: an infinity or NaN of the input makes NaN of
    all taps of its channel.

    Partial sums are float32, channels innermost; the caller adds them up in a fixed order. Grid: one axis of SPLITS x
    groups x cdiv(c_out_group, BLOCK_M) x cdiv(c_in_group, BLOCK_N) programs, N fastest, then groups: together they read
    whole lines of memory. The backward filter convolution of cuDNN (Chetlur et al. 2014, arXiv:1410.0759).
    """
    tiles_n = tl.cdiv(c_in_group, BLOCK_N)
    tiles_m = tl.cdiv(c_out_group, BLOCK_M)
    pid = tl.program_id(0)
    first_n = pid % tiles_n * BLOCK_N
    first_m = pid // tiles_n % tiles_m * BLOCK_M
    group = pid // tiles_n // tiles_m % groups
    split = pid // tiles_n // tiles_m // groups
    x_boxes = boxes(
        x_ptr + tl.cast(group * c_in_group, tl.int64), batch, 1, h_in, w_in, c_in_group,
        stride_xn, 0, stride_xh, stride_xw, 2, BOX_N, 1, 1, BOX_W, BLOCK_N,
    )  # fmt: skip

    # The left operand must lie in shared memory as one plain tile, or it takes the way through registers: no box.
    offs_m = first_m + tl.arange(0, BLOCK_M)
    mask_m = below(offs_m, c_out_group, Y_VECTOR)
    if INDEX_INT64:
        stride_yn, stride_yh, stride_yw = wide(stride_yn), wide(stride_yh), wide(stride_yw)
    at_n = tl.arange(0, BLOCK_K) // BOX_W
    at_w = tl.arange(0, BLOCK_K) % BOX_W
    dy_place = tl.multiple_of(at_n * stride_yn + at_w * stride_yw, Y_VECTOR)[:, None] + offs_m[None, :]
    dy_group = dy_ptr + aligned(tl.cast(group * c_out_group, tl.int64), Y_VECTOR)

    in_row = tl.cdiv(w_out, BOX_W)
    steps = tl.cdiv(tl.cdiv(batch, BOX_N) * h_in * in_row, SPLITS)
    step = split * steps
    w = step % in_row * BOX_W
    h = step // in_row % h_in
    n = step // in_row // h_in * BOX_N
    sums = ()
    for _ in tl.static_range(KH * KW):
        sums += (tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE),)
    # A box past the last image is outside of both tensors.
    for _ in range(tl.maximum(steps, 1)):
        x_tiles = ()
        for kw in tl.static_range(KW):
            x_tiles += (load_box(x_boxes, n, 0, h, w + (kw * DIL_W - PAD_W), first_n, 2, BLOCK_K, BLOCK_N),)
        mask_k = (at_w < w_out - w) & (at_n < batch - n)
        added = ()
        for kh in tl.static_range(KH):
            row = h + (PAD_H - kh * DIL_H)
            corner = tl.cast(n, tl.int64) * stride_yn + tl.cast(row, tl.int64) * stride_yh + w * stride_yw
            dy_tile = tl.load(
                dy_group + aligned(corner, Y_VECTOR) + dy_place,
                mask=(mask_k & within(row, h_out))[:, None] & mask_m[None, :],
                other=0.0,
            )  # [BLOCK_K, BLOCK_M]
            for kw in tl.static_range(KW):
                added += (dot(tl.trans(dy_tile), x_tiles[kw], sums[kh * KW + kw], PRECISION),)
        sums = added
        w += BOX_W
        carry = w >= w_out
        w = tl.where(carry, 0, w)
        h = tl.where(carry, h + 1, h)
        carry = h >= h_in
        h = tl.where(carry, 0, h)
        n = tl.where(carry, n + BOX_N, n)

    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask = mask_m[:, None] & below(offs_n, c_in_group, X_VECTOR)[None, :]
    dw_group = dw_ptr + (tl.cast(split, tl.int64) * groups + group) * (c_out_group * KH * KW * c_in_group)
    place = (offs_m * (KH * KW * c_in_group))[:, None] + offs_n[None, :]
    for tap in tl.static_range(KH * KW):
        tl.store(dw_group + tap * c_in_group + place, sums[tap], mask=mask)


@dataclass(frozen=True)
class WeightGradientTapsTile(BoxedSumsTile):
    """BLOCK_M output by BLOCK_N input channels of all taps, BLOCK_K pixels of a row a step, SPLITS partial sums."""

    BLOCK_M: int = 64
    BLOCK_N: int = 64

    def taps_apart(self, problem: Problem) -> int:
        return 1

    def sides(self, problem: Problem) -> dict[str, int]:
        g = problem.geometry
        return covering_box((g.batch, 1, 1, g.out_size[2]), self.BLOCK_K)

    def steps(self, problem: Problem) -> int:
        """Boxes of a row that a program sums over."""
        g, sides = problem.geometry, self.sides(problem)
        boxes = cdiv(g.batch, sides["BOX_N"]) * cdiv(g.out_size[2], sides["BOX_W"]) * g.in_size[1]
        return max(cdiv(boxes, self.SPLITS), 1)

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        """What a stage copies, and barriers; a tap's sums turn into the layout of their store there afterwards."""
        _, height, width = problem.geometry.kernel
        copied = self.BLOCK_K * (height * self.BLOCK_M + width * self.BLOCK_N) * problem.itemsize
        return max(self.num_stages * copied, 4 * self.accumulator_values()) + 256

    def unfit(self, problem: Problem, target: Target) -> str | None:
        if reason := super().unfit(problem, target):
            return reason
        taps = problem.geometry.taps
        registers = taps * self.accumulator_values() // (self.num_warps * target.warp_size)
        if registers > 160 and not target.interpreted:
            return f"{registers} registers a thread for the sums of {taps} taps"
        return None


def _unsuited(problem: Problem) -> str | None:
    g = problem.geometry
    if g.rank != 2 or g.kernel[1] == 1:
        return "there are no rows of a filter that share a row of the input"
    if g.stride != (1, 1, 1):
        return f"the stride is {g.stride}, not 1"
    if g.taps > _MOST_TAPS:
        return f"the sums of {g.taps} taps do not fit in registers together"
    if min(g.c_in_group, g.c_out_group) > _MOST_CHANNELS:
        return f"groups of {g.c_in_group} to {g.c_out_group} channels fill a product of a single tap"
    return None


KERNEL = boxed_sums("weight_gradient_taps", weight_gradient_taps_kernel, WeightGradientTapsTile, _unsuited)
