"""The analytic default: a tile for any problem on any target, from rules alone.

Each rule states its reason. None of the numbers has been measured yet: they come from counting registers and bytes, and
from what the compiler makes of them (`triton-conv inspect` shows no spill at any of them).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .kernels import Tile
from .kernels.deformable import DeformableTile
from .kernels.deformable_input_gradient import DeformableInputGradientTile
from .kernels.deformable_weight_gradient import DeformableWeightGradientTile
from .kernels.depthwise import DepthwiseTile
from .kernels.depthwise_banded import DepthwiseBandedTile, images_of_tile, tile_count
from .kernels.depthwise_banded_weight_gradient import DepthwiseBandedWeightGradientTile, filter_parts, split_count
from .kernels.depthwise_patch import DepthwisePatchTile
from .kernels.depthwise_patch_weight_gradient import DepthwisePatchWeightGradientTile
from .kernels.depthwise_weight_gradient import DepthwiseWeightGradientTile
from .kernels.grouped_packed import GroupedPackedTile
from .kernels.grouped_packed_weight_gradient import GroupedPackedWeightGradientTile
from .kernels.implicit_gemm import ImplicitGemmTile
from .kernels.kernel import cdiv, columns_read
from .kernels.transposed_phase import TransposedPhaseTile
from .kernels.weight_gradient import WeightGradientTile
from .problem import (
    DeformInputGradientProblem,
    DeformProblem,
    DeformWeightGradientProblem,
    Problem,
    WeightGradientProblem,
)
from .target import Target

# Programs a multiprocessor should have before larger tiles pay: below it, smaller tiles fill the machine better.
_WAVES = 1


def power_of_two(n: int, least: int, most: int) -> int:
    """The smallest power of two of at least `n`, within bounds that are powers of two themselves."""
    return min(max(1 << max(n - 1, 0).bit_length(), least), most)


def warps(target: Target, threads: int) -> int:
    """Warps (AMD: waves of 64) that make up so many threads."""
    return threads // target.warp_size


# Four warps on NVIDIA, unless a rule says why. Triton has miscompiled loops over (tap, channel) with eight (pytorch
# issue 173068, triton issue 1254), with grossly wrong results; all of 364 tiles of eight warps that an H100 tried, with
# Triton 3.6, were right.
_THREADS = 128


def _wide(problem: Problem, target: Target, rows: int) -> tuple[int, int] | None:
    """(BLOCK_M, BLOCK_N) for eight warps, where so many `rows` of the product still fill the machine; else None.

    Half as many bytes a product as 128 x 64. On an H100, bfloat16, 1.3 to 1.5 times as fast as that with four warps:
    dilated_d4, d12, d36, decoder_t2d and their input gradients.
    """
    g = problem.geometry
    if target.arch != "sm_90" or problem.itemsize != 2 or g.N <= 64 or problem.x_vector(g.c_in_group) < 8:
        return None
    block_m, block_n = (128, 256) if g.N > 128 else (256, 128)
    return (block_m, block_n) if cdiv(rows, block_m) * cdiv(g.N, block_n) * g.groups >= target.sms else None


def implicit_gemm(problem: Problem, target: Target) -> ImplicitGemmTile:
    """128 x 64 for aligned channels: 64 accumulator registers a thread, and three blocks to a multiprocessor."""
    g, itemsize = problem.geometry, problem.itemsize
    flat = _flat_k(problem)
    # Narrow loads have an address each, most of them pass through registers: a smaller tile leaves room for them.
    narrow = flat or problem.x_vector(g.c_in_group) * itemsize < 8
    if itemsize == 8:
        # sm_100 has no matrix unit for float64: its products are unrolled into registers.
        return ImplicitGemmTile(
            BLOCK_M=32, BLOCK_N=16, BLOCK_K=16, FLAT_K=flat, num_warps=warps(target, _THREADS), num_stages=1
        )
    if not flat and (wide := _wide(problem, target, g.M)):
        return ImplicitGemmTile(
            BLOCK_M=wide[0], BLOCK_N=wide[1], BLOCK_K=power_of_two(g.c_in_group, 16, 64), num_warps=8, num_stages=3
        )
    block_n = power_of_two(g.N, 16, 32 if flat and itemsize == 4 else 64)
    block_m = 64 if narrow or cdiv(g.M, 128) * cdiv(g.N, block_n) * g.groups < target.sms else 128
    # Bytes of K a step: on sm_90 a whole swizzled row, which wgmma reads from shared memory; elsewhere half of one,
    # since more spills (sm_80 keeps operands in registers, sm_100 is compiled for more blocks at once).
    depth = 128 if target.arch == "sm_90" and not narrow else 64
    block_k = power_of_two(g.K if flat else g.c_in_group, 16, depth // itemsize)
    return ImplicitGemmTile(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        FLAT_K=flat,
        num_warps=warps(target, _THREADS),
        # Narrow loads cannot be asynchronous: more stages would only cost registers.
        num_stages=2 if narrow else _stages(problem, target, (block_m + block_n) * block_k),
    )


def _flat_k(problem: Problem) -> bool:
    g = problem.geometry
    if g.taps == 1:
        return False
    # NCHW with a default weight: reading it tap by tap would touch one sector for each of its elements.
    return (problem.pixels_last and problem.weight_flat) or g.c_in_group < 16


def _stages(problem: Problem, target: Target, values: int) -> int:
    """As many stages as half of the shared memory holds, so that two blocks share a multiprocessor; at most three."""
    return max(1, min(3, target.shared_bytes // 2 // (values * problem.itemsize)))


def grouped_packed(problem: Problem, target: Target) -> GroupedPackedTile:
    """Slabs of 32 channels stay memory-bound; groups of more than 16 need 64 for two of them to fit."""
    g = problem.geometry
    widest = max(g.c_in_group, g.c_out_group)
    slab = 32 if widest <= 16 else 64
    block_m = 64 if slab == 64 or problem.pixels_last else 128
    if problem.itemsize == 8:
        slab = 16 if widest <= 16 else 32
        block_m = 16
    elif problem.itemsize == 4 and problem.pixels_last:
        block_m = 32
    packed = min(slab // widest, g.groups)
    return GroupedPackedTile(
        BLOCK_M=block_m,
        # An output slab may be narrower than an input slab, or the reverse.
        BLOCK_N=power_of_two(packed * g.c_out_group, 16, slab),
        BLOCK_K=power_of_two(packed * g.c_in_group, 16, slab),
        num_warps=warps(target, _THREADS),
        # Taps come from L1, which pipelined loads bypass.
        num_stages=1,
    )


def depthwise(problem: Problem, target: Target) -> DepthwiseTile:
    """One 16-byte vector of channels a thread (NHWC), or four pixels of one channel a thread (NCHW)."""
    g = problem.geometry
    threads = 128
    if problem.pixels_last:
        block_m, block_c = power_of_two(g.M, 64, 4 * threads), 1
    else:
        block_c = power_of_two(g.c_out, 8, 64)
        block_m = power_of_two(threads * 16 // problem.itemsize // block_c, 4, 128)
    return DepthwiseTile(
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        UNROLL=g.kernel[2] * problem.itemsize <= 32,
        num_warps=warps(target, threads),
        num_stages=1,
    )


def depthwise_banded(problem: Problem, target: Target) -> DepthwiseBandedTile:
    """Blocks as wide as reads the fewest columns an output, and up to four rows of them, two a product."""
    g, itemsize = problem.geometry, problem.itemsize
    widths = [w for w in (16, 32, 64) if w <= power_of_two(g.out_size[2], 16, 64)]
    depths = {w: power_of_two(columns_read(problem, w), 16, 4096) for w in widths}
    block_t = min(widths, key=lambda w: depths[w] / w)
    resident = g.kernel[0] * g.kernel[1] <= 9 and itemsize < 8
    rows = power_of_two(g.out_size[1], 1, 4 if itemsize < 8 else 1)
    tile = DepthwiseBandedTile(
        # wgmma takes no fewer than 64 rows; float64 has no such unit.
        BLOCK_M=64 if itemsize < 8 else 16,
        BLOCK_T=block_t,
        BLOCK_K=depths[block_t],
        ROWS=rows,
        FUSED=min(rows, 2) if resident else 1,
        RESIDENT=resident,
        num_warps=warps(target, _THREADS),
        num_stages=1,
    )
    # All input rows of a block are in flight together, of a second depth too: of 255 registers a thread 112 for one.
    depths_read = min(g.kernel[0], 2)
    while tile.ROWS > 1 and (
        _registers(problem, tile) > 112 // depths_read or tile.shared_bytes(problem) > target.shared_bytes
    ):
        tile = replace(tile, ROWS=tile.ROWS // 2, FUSED=min(tile.FUSED, tile.ROWS // 2))
    if _registers(problem, tile) > 112 or tile.shared_bytes(problem) > target.shared_bytes:
        tile = replace(tile, RESIDENT=False)
    # One row of a block is little to wait for at a time, unless its loads are narrow and so many.
    few = problem.x_run() * itemsize >= 16 and itemsize < 8
    while few and 2 * _registers(problem, tile) <= 32 and tile.BLOCK_M < 256:
        if _programs(problem, tile) < 32 * target.sms:
            break
        tile = replace(tile, BLOCK_M=2 * tile.BLOCK_M)
    # Sixteen programs for a multiprocessor (of a large filter, eight: each takes longer); beyond that, each builds its
    # bands for more images.
    groups = cdiv(g.batch, images_of_tile(problem, tile))
    enough = (16 if tile.RESIDENT else 8) * target.sms
    steps = max(min(groups, _programs(problem, tile) // enough, 64), 1)
    return replace(tile, STEPS=1 << steps.bit_length() - 1)


def _registers(problem: Problem, tile: DepthwiseBandedTile) -> int:
    """Registers a thread for the input rows of a block. What is loaded by twos of bytes takes one each at first, and
    part of an address.
    """
    size = problem.itemsize if problem.x_run() * problem.itemsize >= 4 else 5
    return tile.rows_read(problem) * tile.BLOCK_M * tile.BLOCK_K * size // (4 * _THREADS)


def _programs(problem: Problem, tile: DepthwiseBandedTile) -> int:
    """Programs of one step each."""
    return (
        tile_count(problem, tile) * problem.geometry.c_out * cdiv(problem.geometry.batch, images_of_tile(problem, tile))
    )


def depthwise_patch(problem: Problem, target: Target) -> DepthwisePatchTile:
    """A cache line of channels, or half of one where that leaves fewer idle; 64 sums a thread of half precision.

    As 4 x 4 outputs where 9 weights stay in registers (3 x 3 on an H100, bfloat16 (64, 192, 56, 56): 63 us, a copy 57);
    as 8 or 7 in a row of 8 channels where there is one row of taps at a time. Strides read more for each output, so
    that fewer keep up with memory.
    """
    g, line = problem.geometry, 128 // problem.itemsize
    _, h_out, w_out = g.out_size
    channels = line // 8
    block_c = min((line, line // 2), key=lambda block: (cdiv(g.c_out, block) * block, -block))
    unroll = g.kernel[1] * g.kernel[2] <= 9
    if unroll and h_out > 1:
        rows, cols, channels = (4 if g.stride[1] == 1 and problem.itemsize < 8 else 2), 4, min(channels, 4)
    else:
        rows, cols = 1, (8 if g.stride[2] == 1 and g.kernel[2] <= 9 else 4)
        if cols == 8 and h_out > 1 and cdiv(w_out, 7) * 7 < cdiv(w_out, 8) * 8:
            cols = 7
    return DepthwisePatchTile(
        UNROLL=unroll,
        ROWS=rows,
        COLS=cols,
        BLOCK_P=_THREADS * channels // block_c,
        BLOCK_C=block_c,
        num_warps=warps(target, _THREADS),
        # Rows that patches share come from L1, which pipelined loads bypass.
        num_stages=1,
    )


def transposed_phase(problem: Problem, target: Target) -> TransposedPhaseTile:
    """As implicit GEMM, half as deep: the taps of a phase are fewer, and found at run time."""
    g, itemsize = problem.geometry, problem.itemsize
    num_warps = warps(target, _THREADS)
    if itemsize == 8:
        return TransposedPhaseTile(BLOCK_M=32, BLOCK_N=16, BLOCK_K=16, num_warps=num_warps, num_stages=1)
    if wide := _wide(problem, target, g.M):
        return TransposedPhaseTile(
            BLOCK_M=wide[0], BLOCK_N=wide[1], BLOCK_K=power_of_two(g.c_in_group, 16, 64), num_warps=8, num_stages=3
        )
    narrow = problem.x_vector(g.c_in_group) * itemsize < 8
    if g.groups > 1 and max(g.c_in_group, g.c_out_group) <= 16:
        block_n, block_k = 32, 64 // itemsize
    else:
        block_n, block_k = power_of_two(g.N, 16, 64), power_of_two(g.c_in_group, 16, 64 // itemsize)
    tiles = cdiv(cdiv(g.M, g.phases), 128) * g.phases * cdiv(g.N, block_n) * g.groups
    block_m = 64 if narrow or tiles < target.sms else 128
    return TransposedPhaseTile(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
        num_stages=2 if narrow else _stages(problem, target, (block_m + block_n) * block_k),
    )


def deformable(problem: DeformProblem, target: Target) -> DeformableTile:
    """64 pixels by up to 128 output channels: a gather is repeated for every further block of channels.

    On sm_90 128 pixels by up to 256 channels: each gather once. On an H100, bfloat16: dcnv2 223 us against 412.
    """
    g, itemsize = problem.geometry, problem.itemsize
    num_warps = warps(target, _THREADS)
    if target.arch == "sm_90" and itemsize == 2 and g.N > 64 and problem.x_vector(problem.segment) >= 8:
        if g.N > 128:
            return DeformableTile(BLOCK_M=128, BLOCK_N=256, BLOCK_K=32, num_warps=8, num_stages=1)
        return DeformableTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=16, num_warps=num_warps, num_stages=1)
    if itemsize == 8:
        return DeformableTile(BLOCK_M=32, BLOCK_N=16, BLOCK_K=16, num_warps=num_warps, num_stages=1)
    # Four corners of a tile are in flight; narrow loads (NCHW) have an address in registers for each element.
    narrow = problem.x_vector(problem.segment) * itemsize < 8
    return DeformableTile(
        BLOCK_M=64,
        # The channels are the left operand's rows: wgmma takes no fewer than 64.
        BLOCK_N=power_of_two(g.N, 64 if itemsize == 2 else 16, 64 if narrow else 128),
        BLOCK_K=power_of_two(problem.segment, 16, 16 if narrow or itemsize == 4 else 32),
        num_warps=num_warps,
        num_stages=1,
    )


def _most_splits(wanted: int, block: int, problem: WeightGradientProblem) -> int:
    """Partial sums: as many as wanted, each with at least eight steps to add up, and all of them together no more than
    a tenth of the bytes that the gradient reads.
    """
    g = problem.geometry
    reads = problem.itemsize * (g.batch * g.c_in * g.in_pixels + g.M * g.c_out)
    partial = problem.accumulator_bytes * max(math.prod(problem.result_shape), 1)
    return max(min(wanted, g.M // (8 * block), reads // (10 * partial), 1024), 1)


def _splits(programs: int, block: int, problem: WeightGradientProblem, target: Target) -> int:
    """Partial sums, a power of two: enough programs for two to a multiprocessor, if there is work for them."""
    return 1 << _most_splits(cdiv(2 * target.sms, max(programs, 1)), block, problem).bit_length() - 1


def weight_gradient(problem: WeightGradientProblem, target: Target) -> WeightGradientTile:
    """64 x 64 sums, or 128 x 128: operands are read with pixels along K, which neither has contiguous in NHWC."""
    g, itemsize = problem.geometry, problem.itemsize
    flat = g.taps > 1 and g.c_in_group < 16
    most = 16 if itemsize == 8 else 64
    block_m = power_of_two(g.c_out_group, 16, most)
    block_n = power_of_two(g.K if flat else g.c_in_group, 16, 32 if flat and itemsize == 4 else most)
    if itemsize == 2:
        # wgmma takes no fewer than 64 rows.
        block_m = 64
    block_k = 16 if itemsize == 8 else 32
    threads, stages = _THREADS, 2
    vector = min(problem.x_vector(g.c_in_group), problem.y_vector(g.c_out_group))
    if target.arch == "sm_90" and itemsize == 2 and vector * itemsize >= 16 and not flat:
        # Asynchronous copies, three stages of them: 64 x 64 of 64 pixels takes 103 registers, and 128 x 128 in eight
        # warps 153, for half the loads a product.
        block_k, stages = 64, 3
        if min(g.c_in_group, g.c_out_group) >= 128:
            block_m, block_n, threads = 128, 128, 2 * _THREADS
    tiles_n = cdiv(g.K, block_n) if flat else cdiv(g.c_in_group, block_n) * g.taps
    return WeightGradientTile(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        FLAT_N=flat,
        SPLITS=_splits(tiles_n * cdiv(g.c_out_group, block_m) * g.groups, block_k, problem, target),
        num_warps=warps(target, threads),
        num_stages=stages,
    )


def grouped_packed_weight_gradient(problem: WeightGradientProblem, target: Target) -> GroupedPackedWeightGradientTile:
    """Slabs of 16 channels, or of 32 for wider groups, times 4 x 4 taps: more channels would only add zeros."""
    g, itemsize = problem.geometry, problem.itemsize
    widest = max(g.c_in_group, g.c_out_group)
    rows, cols = power_of_two(g.kernel[1], 1, 4), power_of_two(g.kernel[2], 1, 4)
    slab = 16 if widest <= 16 else power_of_two(widest, 32, 64)
    if itemsize == 8:
        rows, cols = 1, 1
    elif itemsize == 2:
        # wgmma takes no fewer than 64 rows.
        slab = max(slab, 64 // rows)
    while slab * slab * rows * cols > 128 * 128:
        rows, cols = (rows // 2, cols) if rows >= cols else (rows, cols // 2)
    packed = min(slab // widest, g.groups)
    block_m = rows * power_of_two(packed * g.c_out_group, 16, slab)
    block_m = max(block_m, 64) if itemsize == 2 else block_m
    block_n = cols * power_of_two(packed * g.c_in_group, 16, slab)
    block_k = {2: 64, 4: 32, 8: 16}[itemsize]
    taps = g.kernel[0] * cdiv(g.kernel[1], rows) * cdiv(g.kernel[2], cols)
    # Eight programs for a multiprocessor: a loop that waits for its loads needs others to run beside it.
    programs = cdiv(cdiv(g.groups, packed) * taps, 4)
    return GroupedPackedWeightGradientTile(
        ROWS=rows,
        COLS=cols,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SPLITS=_splits(programs, block_k, problem, target),
        num_warps=warps(target, _THREADS if block_m * block_n <= 64 * 128 else 2 * _THREADS),
        # Shifted columns come from L1, which pipelined loads bypass.
        num_stages=1,
    )


def depthwise_weight_gradient(problem: WeightGradientProblem, target: Target) -> DepthwiseWeightGradientTile:
    """As depthwise: one 16-byte vector of channels a thread (NHWC), or four pixels of one channel (NCHW)."""
    g = problem.geometry
    if problem.pixels_last:
        block_m, block_c = power_of_two(g.M, 64, 4 * _THREADS), 1
    else:
        block_c = power_of_two(g.c_out, 8, 64)
        block_m = power_of_two(_THREADS * 16 // problem.itemsize // block_c, 4, 128)
    return DepthwiseWeightGradientTile(
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        SPLITS=_splits(g.taps * cdiv(g.c_out, block_c), block_m, problem, target),
        num_warps=warps(target, _THREADS),
        num_stages=1,
    )


def depthwise_patch_weight_gradient(problem: WeightGradientProblem, target: Target) -> DepthwisePatchWeightGradientTile:
    """A cache line of channels, or half of one where that leaves fewer idle, and all filter rows in one thread if its
    sums are 112 registers of 8 or 4 channels: 3 x 3, 5 x 5, 3 x 3 x 3. Rows of larger filters lie side by side, and
    patches are wider. Counted for sm_90 in bfloat16: 20 instructions an output for 3 x 3, 47 for 5 x 5, 95 for 7 x 7.
    """
    g, line, registers = problem.geometry, 128 // problem.itemsize, problem.accumulator_bytes // 4
    rows, taps = g.kernel[0] * g.kernel[1], g.kernel[2]
    block_c = min((line, line // 2), key=lambda block: (cdiv(g.c_out, block) * block, -block))
    vector, lanes, widest = 16 // problem.itemsize, 1, 8
    if min(vector, 4) * rows * taps * registers <= 112:
        vector = vector if vector * rows * taps * registers <= 112 else min(vector, 4)
        held = rows
    else:
        while vector > 1 and vector * taps * registers > 112:
            vector //= 2
        held = min(max(64 // (vector * taps * registers), 1), rows)
        if rows > held:
            # The fewest rows past the filter's last, and of those the most threads that share a patch.
            lanes = min((8, 4, 2), key=lambda count: (cdiv(rows, held * count) * held * count, -count))
        widest = 14 if taps < 10 else 8
    # Columns past the image's last cost as much as others, and each patch reads a filter's width beyond its own.
    widths = (4,) if g.stride[2] > 1 else (4, 7, 8, 14)
    cols = min(
        (width for width in widths if width <= widest),
        key=lambda width: cdiv(g.out_size[2], width) * (width * (taps + 2) + 2 * taps),
    )
    block_p = max(_THREADS * vector // block_c, lanes)
    programs = cdiv(rows, held * lanes) * cdiv(g.c_out, block_c)
    return DepthwisePatchWeightGradientTile(
        ROWS=held,
        COLS=cols,
        LANES=lanes,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        # What is resident at once, by registers, and no program more: all take equally long.
        SPLITS=_most_splits((3 if lanes > 1 else 2) * target.sms // programs, block_p // lanes * cols, problem),
        num_warps=warps(target, _THREADS),
        # Rows that patches share come from L1, which pipelined loads bypass.
        num_stages=1,
    )


def depthwise_banded_weight_gradient(
    problem: WeightGradientProblem, target: Target
) -> DepthwiseBandedWeightGradientTile:
    """Blocks as wide as multiplies the fewest columns; as many filter rows as half of the registers have sums for."""
    g = problem.geometry
    # The input's columns are the left operand's rows: wgmma takes no fewer than 64.
    least = 64 if problem.itemsize == 2 else 16
    widths = [w for w in (16, 32, 64) if w <= power_of_two(g.out_size[2], 16, 64)]
    depths = {w: power_of_two(columns_read(problem, w), least, 4096) for w in widths}
    block_t = min(widths, key=lambda w: (cdiv(g.out_size[2], w) * depths[w], w))
    depth, height, _ = g.kernel
    # Half precision on sm_90 keeps operands in shared memory, fetched ahead. Elsewhere they pass through registers, or
    # (sm_100) a program is compiled for more blocks at once.
    ahead = target.arch == "sm_90" and problem.itemsize == 2
    most = max((144 if ahead else 64) * _THREADS // (depths[block_t] * block_t), 1)
    rows = cdiv(height, cdiv(height, most))
    rows_out = power_of_two(g.out_size[1], 1, 4 if ahead else 2)
    tile = DepthwiseBandedWeightGradientTile(
        BLOCK_M=128 // rows_out if ahead else 32,
        BLOCK_T=block_t,
        BLOCK_K=depths[block_t],
        ROWS=rows_out,
        FILTER_ROWS=rows * depth if ahead and rows * depth <= most else rows,
        num_warps=warps(target, _THREADS),
        num_stages=2 if ahead else 1,
    )
    while tile.ROWS > 1 and (tile.mismatch(problem) or 2 * tile.shared_bytes(problem) > target.shared_bytes):
        tile = replace(tile, ROWS=tile.ROWS // 2)
    if 2 * tile.shared_bytes(problem) > target.shared_bytes:
        tile = replace(tile, BLOCK_M=32, num_stages=1)
    # The sums are read along diagonals at the end, as dear as two steps: eight before it, if programs are enough.
    each = g.c_out * filter_parts(problem, tile)
    while each * split_count(problem, tile) > (4 if tile.STEPS * tile.TILES < 8 else 16) * target.sms:
        longer = replace(tile, STEPS=2 * tile.STEPS)
        if split_count(problem, longer) == split_count(problem, tile):
            longer = replace(tile, TILES=2 * tile.TILES)
        if split_count(problem, longer) == split_count(problem, tile) or longer.STEPS * longer.TILES > 64:
            break
        tile = longer
    # Without a next step there is nothing to fetch ahead.
    return replace(tile, num_stages=1) if tile.STEPS == 1 else tile


def deformable_input_gradient(problem: DeformInputGradientProblem, target: Target) -> DeformableInputGradientTile:
    """64 pixels by 32 channels: the product, a corner and the addresses of the atomics share the registers."""
    g, itemsize = problem.geometry, problem.itemsize
    num_warps = warps(target, _THREADS)
    if itemsize == 8:
        return DeformableInputGradientTile(BLOCK_M=32, BLOCK_N=16, BLOCK_K=32, num_warps=num_warps, num_stages=1)
    # On sm_100 the shallower tile is compiled for more blocks at once, and spills.
    depth = 128 if target.arch == "sm_100" and itemsize == 2 else 64
    return DeformableInputGradientTile(
        BLOCK_M=64,
        BLOCK_N=power_of_two(problem.segment, 16, 32),
        BLOCK_K=power_of_two(g.c_out_group, 16, depth // itemsize),
        num_warps=num_warps,
        num_stages=1,
    )


def deformable_weight_gradient(problem: DeformWeightGradientProblem, target: Target) -> DeformableWeightGradientTile:
    """Up to 128 output channels: every further block of them samples anew."""
    g, itemsize = problem.geometry, problem.itemsize
    narrow = problem.x_vector(problem.segment) * itemsize < 8
    most = 16 if itemsize == 8 else 64 if narrow else 128
    # wgmma takes no fewer than 64 rows.
    block_m = power_of_two(g.c_out_group, 64 if itemsize == 2 else 16, most)
    block_n = power_of_two(problem.segment, 16, 16 if itemsize == 8 else 32)
    block_k = 16 if itemsize == 8 else 32
    tiles_n = g.c_in_group // problem.segment * cdiv(problem.segment, block_n) * g.taps
    return DeformableWeightGradientTile(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SPLITS=_splits(tiles_n * cdiv(g.c_out_group, block_m) * g.groups, block_k, problem, target),
        num_warps=warps(target, _THREADS),
        num_stages=1,
    )


_RULES: dict[str, Callable[[Any, Target], Tile]] = {
    rule.__name__: rule
    for rule in (
        implicit_gemm,
        grouped_packed,
        depthwise,
        depthwise_patch,
        transposed_phase,
        deformable,
        weight_gradient,
        depthwise_weight_gradient,
        depthwise_patch_weight_gradient,
        grouped_packed_weight_gradient,
        depthwise_banded,
        depthwise_banded_weight_gradient,
        deformable_input_gradient,
        deformable_weight_gradient,
    )
}


def default_tile(kernel: str, problem: Problem, target: Target) -> Tile:
    """The analytic default of a kernel for a problem on a target."""
    tile = _RULES[kernel](problem, target)
    if target.interpreted:
        # The interpreter pays about a millisecond for a step of a program, whatever the size of the step.
        along = {
            "weight_gradient": "BLOCK_K", "deformable_weight_gradient": "BLOCK_K", "depthwise_patch": "BLOCK_P",
            "depthwise_patch_weight_gradient": "BLOCK_P",
            "grouped_packed_weight_gradient": "BLOCK_K",
        }.get(kernel, "BLOCK_M")  # fmt: skip
        pixels = cdiv(problem.geometry.M, problem.geometry.phases)
        tile = replace(tile, **{along: power_of_two(pixels, 16, 4096)})  # type: ignore[arg-type]
    return tile
