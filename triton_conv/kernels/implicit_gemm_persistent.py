"""Implicit GEMM of stride 1, channels-last, rank 1 to 3: all of it in boxes, in turns, no tap in the padding."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ..problem import VECTOR_LIMIT, Problem
from ..target import Target
from .arguments import geometry_arguments
from .boxes import boxes, load_box, unboxable
from .common import below, dot, epilogue, narrow, wide
from .kernel import Join, Kernel, ProductTile, cdiv
from .staging import Operand, staging_of
from .turned_boxes import corner, covering, mean_taps, oriented, store_box, taps_inside, turned_box


@triton.jit
def implicit_gemm_persistent_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, partial_ptr,
    batch, c_in, c_out, d_in, h_in, w_in, d_out, h_out, w_out, seam, upright, turned_slot,
    stride_xn, stride_xd, stride_xh, stride_xw, stride_wo, stride_wt,
    stride_yn, stride_yd, stride_yh, stride_yw, stride_b,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BOX_N: tl.constexpr, BOX_D: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, Y_VECTOR: tl.constexpr,
    PROGRAMS: tl.constexpr, MOST_PARTS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n] = activation(sum_k x[m, k] w[k, n] + b[n]), m = (image, pixel), n = output channel, k = (channel, tap).

    M runs over boxes of pixels; from column `seam` on they lie turned, so that hardly any pixel of them is outside. A
    tap is a box beside it; one that lies in the padding for the whole box is left out (of 3 x 3 taps at dilation 36 in
    65 x 65 pixels 58%). TRANSPOSED taps lie on the other side, which makes it the input gradient of such a convolution.

    Everything comes and goes by the copy engine: 98 instructions a step of 256 x 128 x 64 where pointers to the weight
    take 126. The product is computed as w x^T: a right operand may be a box of any rank and stay in shared memory, a
    left one of two dimensions alone.

    Grid: one axis of programs, as many as run at once. The first `upright` of them take turns at the upright tiles, the
    others at the turned ones, N fastest: those share pixels. With SPLIT the tiles that are left after the last whole
    turn are cut along K, each into the same number of parts, a program each (with 132 multiprocessors 266 tiles take
    2.06 turns instead of 3), which `join_parts_kernel` adds up; those of turned tiles begin at `turned_slot`.

    The implicit precomputed GEMM of cuDNN (Chetlur et al. 2014, arXiv:1410.0759), its last turn as in Stream-K (Osama
    et al. 2023, arXiv:2301.03598).
    """
    TAPS: tl.constexpr = KD * KH * KW
    SIGN: tl.constexpr = -1 if TRANSPOSED else 1
    turned = tl.program_id(0) >= upright
    pid = tl.program_id(0) - tl.where(turned, upright, 0)
    programs = tl.where(turned, PROGRAMS - upright, upright)
    tiles_n = tl.cdiv(c_out, BLOCK_N)
    first, rows, columns, planes, tiles = covering(
        turned, batch, d_out, h_out, w_out, seam, tiles_n, BOX_N, BOX_D, BOX_H, BOX_W
    )
    u_in, v_in = oriented(turned, h_in, w_in)
    u_out, v_out = oriented(turned, h_out, w_out)
    stride_xu, stride_xv = oriented(turned, stride_xh, stride_xw)
    stride_yu, stride_yv = oriented(turned, stride_yh, stride_yw)
    side_h, side_w = oriented(turned, BOX_H, BOX_W)
    x_boxes = boxes(
        x_ptr, batch, d_in, u_in, v_in, c_in, stride_xn, stride_xd, stride_xu, stride_xv,
        RANK, BOX_N, BOX_D, BOX_H, BOX_W, BLOCK_K,
    )  # fmt: skip
    y_boxes = boxes(
        y_ptr, batch, d_out, u_out, v_out, c_out, stride_yn, stride_yd, stride_yu, stride_yv,
        RANK, BOX_N, BOX_D, BOX_H, BOX_W, BLOCK_N,
    )  # fmt: skip
    if TRANSPOSED:
        w_box = tl.make_tensor_descriptor(w_ptr, [TAPS, c_in, c_out], [stride_wt, stride_wo, 1], [1, BLOCK_K, BLOCK_N])
    else:
        w_box = tl.make_tensor_descriptor(w_ptr, [TAPS, c_out, c_in], [stride_wt, stride_wo, 1], [1, BLOCK_N, BLOCK_K])

    turns = tiles // programs
    rest = tiles - turns * programs
    parts = tl.minimum(programs // tl.maximum(rest, 1), MOST_PARTS) if SPLIT else 1
    for turn in range(turns + (pid < rest * parts).to(tl.int32)):
        split = SPLIT and turn == turns
        tile = turn * programs + pid
        if SPLIT:
            tile = tl.where(split, turn * programs + pid // parts, tile)
        pid_n, n, d, u, v = corner(tile, tiles_n, first, rows, columns, planes, BOX_N, BOX_D, BOX_H, BOX_W)
        h, w = oriented(turned, u, v)
        kd_first, kd_count = taps_inside(d, tl.minimum(d + BOX_D, d_out), d_in, KD, PAD_D, DIL_D, TRANSPOSED)
        kh_first, kh_count = taps_inside(h, tl.minimum(h + side_h, h_out), h_in, KH, PAD_H, DIL_H, TRANSPOSED)
        kw_first, kw_count = taps_inside(w, tl.minimum(w + side_w, w_out), w_in, KW, PAD_W, DIL_W, TRANSPOSED)
        taps = kd_count * kh_count * kw_count
        steps = tl.maximum(tl.cdiv(c_in, BLOCK_K), 1) * taps
        step = 0
        if SPLIT:
            share = tl.where(split, tl.cdiv(steps, parts), steps)
            step = tl.where(split, pid % parts * share, 0)
            steps = tl.minimum(share, steps - step)
        channel = step // taps * BLOCK_K
        kd = step // kw_count // kh_count % kd_count
        kh = step // kw_count % kh_count
        kw = step % kw_count
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC_DTYPE)
        # At least one step, of zeros behind the last channel: a loop that may not run costs every wgmma its overlap.
        for _ in range(tl.maximum(steps, 1)):
            dd = SIGN * ((kd_first + kd) * DIL_D - PAD_D)
            dh = SIGN * ((kh_first + kh) * DIL_H - PAD_H)
            dw = SIGN * ((kw_first + kw) * DIL_W - PAD_W)
            du, dv = oriented(turned, dh, dw)
            tap = ((kd_first + kd) * KH + kh_first + kh) * KW + kw_first + kw
            x_tile = load_box(x_boxes, n, d + dd, u + du, v + dv, channel, RANK, BLOCK_M, BLOCK_K)
            if TRANSPOSED:
                w_tile = tl.trans(tl.reshape(w_box.load([tap, channel, pid_n * BLOCK_N]), (BLOCK_K, BLOCK_N)))
            else:
                w_tile = tl.reshape(w_box.load([tap, pid_n * BLOCK_N, channel]), (BLOCK_N, BLOCK_K))
            acc = dot(w_tile, tl.trans(x_tile), acc, PRECISION)
            kw += 1
            carry = kw == kw_count
            kw = tl.where(carry, 0, kw)
            kh = tl.where(carry, kh + 1, kh)
            carry = kh == kh_count
            kh = tl.where(carry, 0, kh)
            kd = tl.where(carry, kd + 1, kd)
            carry = kd == kd_count
            kd = tl.where(carry, 0, kd)
            channel = tl.where(carry, channel + BLOCK_K, channel)
        if SPLIT:
            if split:
                place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
                slot = tl.cast(tl.where(turned, turned_slot, 0) + pid, tl.int64)
                tl.store(partial_ptr + slot * (BLOCK_M * BLOCK_N) + place, tl.trans(acc))
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = below(offs_n, c_out, Y_VECTOR)
        if not split:
            result = epilogue(tl.trans(acc), b_ptr, stride_b, offs_n, mask_n, HAS_BIAS, ACTIVATION)
            result = narrow(result, y_ptr.dtype.element_ty)
            store_box(y_boxes, n, d, u, v, pid_n * BLOCK_N, result, RANK, BOX_N, BOX_D, BOX_H, BOX_W, BLOCK_N)


@triton.jit
def join_parts_kernel(
    partial_ptr, b_ptr, y_ptr,
    batch, c_out, d_out, h_out, w_out, seam, upright, turned_slot,
    stride_yn, stride_yd, stride_yh, stride_yw, stride_b,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BOX_N: tl.constexpr, BOX_D: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, Y_VECTOR: tl.constexpr,
    PROGRAMS: tl.constexpr, MOST_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y[m, n] = activation(sum over s of partial[s, m, n] + b[n]) of the tiles that were split, in one order of s,
    whatever order the programs ran in.

    partial: [parts of tiles, BLOCK_M, BLOCK_N] in float32. Grid: one axis of tiles x blocks of ROWS of their pixels.
    BLOCK_S parts are read at once: one after the other they would cost as many trips to memory.
    """
    tiles_n = tl.cdiv(c_out, BLOCK_N)
    blocks: tl.constexpr = BLOCK_M // ROWS
    left = tl.program_id(0) // blocks
    rest = covering(False, batch, d_out, h_out, w_out, seam, tiles_n, BOX_N, BOX_D, BOX_H, BOX_W)[4] % upright
    turned = left >= rest
    left -= tl.where(turned, rest, 0)
    programs = tl.where(turned, PROGRAMS - upright, upright)
    first, rows, columns, planes, tiles = covering(
        turned, batch, d_out, h_out, w_out, seam, tiles_n, BOX_N, BOX_D, BOX_H, BOX_W
    )
    parts = tl.minimum(programs // (tiles % programs), MOST_PARTS)
    pid_n, n, d, u, v = corner(
        tiles // programs * programs + left, tiles_n, first, rows, columns, planes, BOX_N, BOX_D, BOX_H, BOX_W
    )
    offs_m = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, BLOCK_N)
    slot = tl.cast(tl.where(turned, turned_slot, 0) + left * parts, tl.int64) * (BLOCK_M * BLOCK_N)
    place = (offs_m[:, None] * BLOCK_N + inner[None, :])[None, :, :]
    total = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for step in range(tl.cdiv(parts, BLOCK_S)):
        s = step * BLOCK_S + tl.arange(0, BLOCK_S)[:, None, None]
        loaded = tl.load(partial_ptr + slot + (s * (BLOCK_M * BLOCK_N) + place), mask=s < parts, other=0.0)
        total += tl.sum(loaded, axis=0)  # [BLOCK_S, ROWS, BLOCK_N] -> [ROWS, BLOCK_N]

    offs_n = pid_n * BLOCK_N + inner
    mask_n = below(offs_n, c_out, Y_VECTOR)
    result = narrow(epilogue(total, b_ptr, stride_b, offs_n, mask_n, HAS_BIAS, ACTIVATION), y_ptr.dtype.element_ty)
    u_out, v_out = oriented(turned, h_out, w_out)
    stride_yu, stride_yv = oriented(turned, wide(stride_yh), wide(stride_yw))
    n += offs_m // (BOX_W * BOX_H * BOX_D)
    d += offs_m // (BOX_W * BOX_H) % BOX_D
    u += offs_m // BOX_W % BOX_H
    v += offs_m % BOX_W
    mask_m = (n < batch) & (d < d_out) & (u < u_out) & (v < v_out)
    row = tl.multiple_of(n * wide(stride_yn) + d * wide(stride_yd) + u * stride_yu + v * stride_yv, Y_VECTOR)
    tl.store(y_ptr + row[:, None] + offs_n[None, :], result, mask=mask_m[:, None] & mask_n[None, :])


@dataclass(frozen=True)
class ImplicitGemmPersistentTile(ProductTile):
    """BLOCK_M output pixels by BLOCK_N output channels, BLOCK_K channels of a tap a step; PROGRAMS, and SPLIT as the
    kernel explains.
    """

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages", "PROGRAMS"})

    BLOCK_M: int = 256
    BLOCK_N: int = 128
    BLOCK_K: int = 64
    PROGRAMS: int = 132
    SPLIT: bool = False

    def mismatch(self, problem: Problem) -> str | None:
        if self.PROGRAMS < 2 and turned_box(problem, self.BLOCK_M)[2][1]:
            return "one program does not take both upright and turned boxes"
        partial = 4 * partial_sums(problem, self)
        if partial > problem.most_partial_bytes:
            return f"parts of tiles take {partial} bytes of at most {problem.most_partial_bytes}"
        return None

    def load_bytes(self, problem: Problem, target: Target) -> int:
        """None: the copy engine brings everything."""
        return 0

    def rows(self) -> int:
        return self.BLOCK_N

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        """The operands, and beside them the result on its way out."""
        operands = [Operand(block * self.BLOCK_K * problem.itemsize) for block in (self.BLOCK_M, self.BLOCK_N)]
        taken = staging_of(target).taken(operands, self.rows(), self.num_warps, self.num_stages)
        return taken + self.BLOCK_M * self.BLOCK_N * problem.itemsize


# Parts of a tile, of which more would save less than they take to write and read; and of joining them: pixels a program
# and parts at once, 32 numbers a thread of 256 at 128 channels.
_JOINED = dict(MOST_PARTS=16, ROWS=8, BLOCK_S=8)


@dataclass(frozen=True)
class Group:
    """The upright or the turned tiles, the programs that take turns at them, and a tile's steps, the mean."""

    tiles: int
    programs: int
    steps: float

    @property
    def rest(self) -> int:
        """Tiles after the last whole turn."""
        return self.tiles % self.programs if self.programs else 0

    @property
    def parts(self) -> int:
        """As many parts as each of them is split into, if they are."""
        return min(self.programs // self.rest, _JOINED["MOST_PARTS"]) if self.rest else 1

    def longest(self, split: bool) -> float:
        """Steps of a program that has most."""
        if not self.tiles:
            return 0.0
        last = bool(self.rest) / (self.parts if split else 1)
        return self.steps * (self.tiles // self.programs + last)


@functools.lru_cache(maxsize=4096)
def groups(problem: Problem, tile: ImplicitGemmPersistentTile) -> tuple[Group, Group]:
    """The upright tiles and the turned ones, each with as many programs as finish the whole soonest."""
    g = problem.geometry
    box, seam, counts = turned_box(problem, tile.BLOCK_M)
    depth, height, width = g.out_size
    chunks = max(cdiv(g.c_in, tile.BLOCK_K), 1) * mean_taps(problem, 0, box["BOX_D"], 0, depth)
    steps = [
        chunks * mean_taps(problem, 1, rows, 0, height) * mean_taps(problem, 2, columns, *ends)
        for rows, columns, ends in (
            (box["BOX_H"], box["BOX_W"], (0, seam)), (box["BOX_W"], box["BOX_H"], (seam, width)),
        )
    ]  # fmt: skip
    tiles = [count * cdiv(g.c_out, tile.BLOCK_N) for count in counts]

    def division(turned: int) -> tuple[Group, Group]:
        return Group(tiles[0], tile.PROGRAMS - turned, steps[0]), Group(tiles[1], turned, steps[1])

    ways = [division(turned) for turned in (range(1, tile.PROGRAMS) if tiles[1] else (0,))]
    return min(ways, key=lambda way: max(group.longest(tile.SPLIT) for group in way))


def partial_sums(problem: Problem, tile: ImplicitGemmPersistentTile) -> int:
    """Numbers that the programs leave for the second launch."""
    shares = groups(problem, tile)
    splits = tile.SPLIT and any(group.parts > 1 for group in shares)
    return sum(group.rest * group.parts for group in shares) * tile.accumulator_values() if splits else 0


def _joins(problem: Problem, tile: ImplicitGemmPersistentTile) -> int:
    return sum(group.rest for group in groups(problem, tile)) * tile.BLOCK_M // _JOINED["ROWS"]


def _tap_stride(problem: Problem) -> int | None:
    """Elements from one tap of the weight to the next, or None where they are not evenly apart."""
    step, run = 0, 1
    for size, stride in zip(reversed(problem.geometry.kernel), reversed(problem.w_strides[2:]), strict=True):
        if size > 1:
            step = step or stride
            if stride != step * run:
                return None
            run *= size
    # Of a single tap any stride will do that the copy engine takes.
    return step or problem.w_strides[0]


def _arguments(problem: Problem, tile: ImplicitGemmPersistentTile) -> dict[str, object]:
    g = problem.geometry
    box, seam, _ = turned_box(problem, tile.BLOCK_M)
    upright, _ = groups(problem, tile)
    return (
        geometry_arguments(problem, tile.BLOCK_M)
        | tile.sizes()
        | box
        | dict(
            c_in=g.c_in,
            c_out=g.c_out,
            seam=seam,
            upright=upright.programs,
            turned_slot=upright.rest * upright.parts,
            stride_wt=_tap_stride(problem),
            TRANSPOSED=g.transposed,
            SPLIT=partial_sums(problem, tile) > 0,
            Y_VECTOR=problem.y_vector(g.c_out),
        )
        | _JOINED
    )


def _unsuited(problem: Problem) -> str | None:
    g = problem.geometry
    if any(step != 1 for step in g.stride):
        return f"the stride is {g.stride}, not 1"
    if g.groups > 1:
        return f"it has {g.groups} groups"
    if reason := unboxable(problem):
        return reason
    if problem.w_strides[1] != 1:
        return "the second dimension of its weight is not contiguous"
    if (step := _tap_stride(problem)) is None:
        return "the taps of its weight are not evenly apart"
    if min(step, problem.w_strides[0]) <= 0 or math.gcd(VECTOR_LIMIT, step, problem.w_strides[0]) < 8:
        return "the rows of its weight are not a multiple of 16 bytes apart"
    return None


KERNEL = Kernel(
    name="implicit_gemm_persistent",
    function=implicit_gemm_persistent_kernel,
    tile_type=ImplicitGemmPersistentTile,
    grid=lambda problem, tile: tile.PROGRAMS,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=ImplicitGemmPersistentTile(num_warps=4, num_stages=1, BLOCK_M=32, BLOCK_N=64, BLOCK_K=32),
    descriptors=True,
    join=Join(function=join_parts_kernel, numbers=partial_sums, grid=_joins),
)
