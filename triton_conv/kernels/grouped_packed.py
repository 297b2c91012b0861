"""Grouped convolution with few channels a group: several groups share one block-diagonal tile."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..problem import Problem
from .arguments import geometry_arguments
from .common import aligned, below, dot, epilogue, load_pixels, store_pixels, tap_offset, tile_pixels, wide
from .kernel import Kernel, ProductTile, cdiv


@triton.jit
def grouped_packed_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    batch, c_in, c_out, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    stride_wo, stride_wi, stride_wd, stride_wh, stride_ww,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw, stride_b,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PADDING_MODE: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr, PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr,
    X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, C_IN_GROUP: tl.constexpr, C_OUT_GROUP: tl.constexpr,
    GROUPS_PER_TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n] = activation(sum_tap sum_k x_tap[m, k] W_tap[k, n] + b[n]) for a slab of GROUPS_PER_TILE groups.

    k runs over the slab's input channels and n over its output channels; W_tap[k, n] is the weight where k and n are of
    one group and zero elsewhere, expanded while it is loaded. The multiplications by zero are free: with at most 32
    channels in a slab the kernel waits for memory, and the tensor cores have nothing better to do.

    Grid: one axis of cdiv(groups, GROUPS_PER_TILE) x cdiv(M, BLOCK_M) programs, slabs fastest: neighbouring slabs share
    the cache lines of a channels-last input. Grouped convolution: Krizhevsky et al. 2012; Xie et al., arXiv:1611.05431.
    """
    SLAB_IN: tl.constexpr = GROUPS_PER_TILE * C_IN_GROUP
    SLAB_OUT: tl.constexpr = GROUPS_PER_TILE * C_OUT_GROUP
    slabs = tl.cdiv(c_in, SLAB_IN)
    pid = tl.program_id(0)
    slab = pid % slabs
    pid_m = pid // slabs
    first, image, d_o, h_o, w_o, mask_m = tile_pixels(pid_m, batch, d_out, h_out, w_out, RANK, INDEX_INT64, BLOCK_M)
    d0 = d_o * STRIDE_D - PAD_D
    h0 = h_o * STRIDE_H - PAD_H
    w0 = w_o * STRIDE_W - PAD_W
    image_offset = image * stride_xn
    pixel_offset = d0 * stride_xd + h0 * stride_xh + w0 * stride_xw

    offs_k = tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    if INDEX_INT64:
        offs_k = offs_k.to(tl.int64)
        offs_n = offs_n.to(tl.int64)
        # A tap's offset is a product of scalars.
        stride_xd, stride_xh, stride_xw = wide(stride_xd), wide(stride_xh), wide(stride_xw)
        stride_wd, stride_wh, stride_ww = wide(stride_wd), wide(stride_wh), wide(stride_ww)
    mask_k = (offs_k < SLAB_IN) & below(offs_k, c_in - slab * SLAB_IN, X_VECTOR)
    mask_n = (offs_n < SLAB_OUT) & below(offs_n, c_out - slab * SLAB_OUT, Y_VECTOR)
    same_group = (offs_k // C_IN_GROUP)[:, None] == (offs_n // C_OUT_GROUP)[None, :]
    mask_w = same_group & mask_k[:, None] & mask_n[None, :]
    w_offset = (offs_k % C_IN_GROUP * stride_wi)[:, None] + (offs_n * stride_wo)[None, :]
    x_base = x_ptr + first * stride_xn + aligned(tl.cast(slab * SLAB_IN, tl.int64) * stride_xc, X_VECTOR)
    w_base = w_ptr + tl.cast(slab * SLAB_OUT, tl.int64) * stride_wo

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    for tap in range(KD * KH * KW):
        kd = tap // (KH * KW)
        kh = tap // KW % KH
        kw = tap % KW
        offset, inside = tap_offset(
            pixel_offset, d0, h0, w0, kd * DIL_D, kh * DIL_H, kw * DIL_W,
            d_in, h_in, w_in, stride_xd, stride_xh, stride_xw, PADDING_MODE, RANK,
        )  # fmt: skip
        x_row = tl.multiple_of(image_offset + offset, X_VECTOR)
        x_tile = load_pixels(x_base, x_row, offs_k * stride_xc, inside & mask_m, mask_k, PIXELS_LAST)
        w_tap = w_base + (kd * stride_wd + kh * stride_wh + kw * stride_ww)
        w_tile = tl.load(w_tap + w_offset, mask=mask_w, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = dot(x_tile, w_tile, acc, PRECISION)

    acc = epilogue(acc, b_ptr, stride_b, slab * SLAB_OUT + offs_n, mask_n, HAS_BIAS, ACTIVATION)
    y_base = y_ptr + first * stride_yn + aligned(tl.cast(slab * SLAB_OUT, tl.int64) * stride_yc, Y_VECTOR)
    y_row = tl.multiple_of(image * stride_yn + d_o * stride_yd + h_o * stride_yh + w_o * stride_yw, Y_VECTOR)
    store_pixels(y_base, y_row, offs_n * stride_yc, acc, mask_m, mask_n, Y_PIXELS_LAST)


@dataclass(frozen=True)
class GroupedPackedTile(ProductTile):
    """BLOCK_M pixels by a slab of as many whole groups as fit in BLOCK_K input and BLOCK_N output channels."""

    BLOCK_N: int = 32

    def groups_per_tile(self, problem: Problem) -> int:
        g = problem.geometry
        return min(self.BLOCK_K // max(g.c_in_group, 1), self.BLOCK_N // g.c_out_group, g.groups)

    def mismatch(self, problem: Problem) -> str | None:
        g = problem.geometry
        if self.groups_per_tile(problem) < 1:
            return (
                f"a group of {g.c_in_group} to {g.c_out_group} channels does not fit in {self.BLOCK_K} x {self.BLOCK_N}"
            )
        return None


def _grid(problem: Problem, tile: GroupedPackedTile) -> int:
    g = problem.geometry
    return cdiv(g.groups, tile.groups_per_tile(problem)) * cdiv(g.M, tile.BLOCK_M)


def _arguments(problem: Problem, tile: GroupedPackedTile) -> dict[str, object]:
    g = problem.geometry
    packed = tile.groups_per_tile(problem)
    return (
        geometry_arguments(problem, tile.BLOCK_M)
        | tile.sizes()
        | dict(
            c_in=g.c_in,
            c_out=g.c_out,
            X_VECTOR=problem.x_vector(packed * g.c_in_group, g.c_in),
            Y_VECTOR=problem.y_vector(packed * g.c_out_group, g.c_out),
            C_IN_GROUP=g.c_in_group,
            C_OUT_GROUP=g.c_out_group,
            GROUPS_PER_TILE=packed,
        )
    )


def _unsuited(problem: Problem) -> str | None:
    g = problem.geometry
    if g.transposed:
        return "it is transposed"
    if g.groups == 1 or g.c_in_group == 0:
        return "there are no groups to pack"
    if max(g.c_in_group, g.c_out_group) > 64:
        return f"a group has {g.c_in_group} to {g.c_out_group} channels, more than 64"
    return None


KERNEL = Kernel(
    name="grouped_packed",
    function=grouped_packed_kernel,
    tile_type=GroupedPackedTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=GroupedPackedTile(num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_N=64, BLOCK_K=64),
)
