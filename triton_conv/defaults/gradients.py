"""Default tiles of the gradients that have kernels of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from ..kernels.banded_rows import columns_read, row_columns
from ..kernels.banded_sums import filter_parts, split_count
from ..kernels.deformable_input_gradient import DeformableInputGradientTile
from ..kernels.deformable_weight_gradient import DeformableWeightGradientTile
from ..kernels.depthwise_banded_weight_gradient import DepthwiseBandedWeightGradientTile
from ..kernels.depthwise_fused_weight_gradient import DepthwiseFusedWeightGradientTile
from ..kernels.depthwise_patch_weight_gradient import DepthwisePatchWeightGradientTile
from ..kernels.depthwise_weight_gradient import DepthwiseWeightGradientTile
from ..kernels.grouped_packed_weight_gradient import GroupedPackedWeightGradientTile
from ..kernels.kernel import cdiv
from ..kernels.weight_gradient import WeightGradientTile
from ..kernels.weight_gradient_boxed import WeightGradientBoxedTile
from ..kernels.weight_gradient_clipped import WeightGradientClippedTile
from ..kernels.weight_gradient_rows import WeightGradientRowsTile
from ..kernels.weight_gradient_taps import WeightGradientTapsTile
from ..problem import WeightGradientProblem
from ..problem_deform import DeformInputGradientProblem, DeformWeightGradientProblem
from ..target import Target
from .common import THREADS, power_of_two, splits_of_waves, staged, warps

_Banded = TypeVar("_Banded", DepthwiseBandedWeightGradientTile, DepthwiseFusedWeightGradientTile)


def _most_splits(wanted: int, block: int, problem: WeightGradientProblem, held: int = 0) -> int:
    """Partial sums: as many as wanted, each with at least eight steps to add up, and all of them together no more than
    a tenth of the bytes that the gradient reads, or than `held`.
    """
    most = max(problem.read_bytes // 10, held) // max(problem.partial_bytes, 1)
    return max(min(wanted, problem.geometry.M // (8 * block), most, 1024), 1)


def _splits(programs: int, block: int, problem: WeightGradientProblem, target: Target, held: int = 0) -> int:
    """Partial sums, a power of two: enough programs for two to a multiprocessor, if there is work for them."""
    return 1 << _most_splits(cdiv(2 * target.sms, max(programs, 1)), block, problem, held).bit_length() - 1


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
        if flat and target.family == "sm_80":
            # An address for each element: 64 columns of them spill.
            block_n = 32
    block_k = 16 if itemsize == 8 else 32
    # A copy ahead takes 8 bytes at a time of a flat tile of float64.
    threads, stages = THREADS, 1 if itemsize == 8 and flat else 2
    vector = min(problem.x_vector(g.c_in_group), problem.y_vector(g.c_out_group))
    if target.family == "sm_100" and itemsize == 4 and vector == 1:
        # An address for each element: 64 columns of them spill.
        block_n = min(block_n, 32)
    if target.arch == "sm_90" and itemsize == 2 and vector * itemsize >= 16 and not flat:
        # Asynchronous copies, three stages of them: 64 x 64 of 64 pixels takes 103 registers, and 128 x 128 in eight
        # warps 153, for half the loads a product.
        block_k, stages = 64, 3
        if min(g.c_in_group, g.c_out_group) >= 128:
            block_m, block_n, threads = 128, 128, 2 * THREADS
    if target.arch == "sm_90" and itemsize == 2 and vector == 1 and min(g.c_in_group, g.c_out_group) >= 128:
        # Of two bytes at a time a wide tile makes twice the products a load, where parts of the pixels fill the device:
        # dilated_1d takes 252 us on an H100, with 64 x 64 x 32 sums 713.
        programs = g.taps * cdiv(g.c_out_group, 128) * cdiv(g.c_in_group, 128) * g.groups
        splits = 1 << splits_of_waves(programs, 64, problem, target).bit_length() - 1
        if splits > 1:
            return WeightGradientTile(
                BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, SPLITS=splits, num_warps=warps(target, 2 * THREADS), num_stages=2
            )
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


def weight_gradient_boxed(problem: WeightGradientProblem, target: Target) -> WeightGradientBoxedTile:
    """The widest tile that two warp groups hold: of L2's bytes 128 x 256 makes 43 products each, 64 x 64 16. A smaller
    one where half of the multiprocessors would have none, with the parts that there is memory for; of the smallest two
    128 pixels a step. By the model, 256 channels of (32, 14, 14) pixels, 3 x 3, take 39 us on an H100 so, with
    128 x 256 81; measured, 64 x 64 x 128 in eight warps is the fastest of 41 tiles for wide_groups_56.
    """
    g = problem.geometry
    # Its sums leave through shared memory in float32: those of 128 x 256 are more than the 99 KiB of sm_120.
    widest = (128, 256 if target.shared_bytes >= 4 * 128 * 256 else 128)
    for wide_m, wide_n in (widest, (128, 128), (64, 128), (64, 64)):
        # wgmma takes no fewer than 64 rows.
        block_m = power_of_two(g.c_out_group, 64, wide_m)
        block_n = power_of_two(g.c_in_group, 64, wide_n)
        programs = cdiv(g.c_in_group, block_n) * g.taps * cdiv(g.c_out_group, block_m) * g.groups
        splits = splits_of_waves(programs, 64, problem, target)
        if programs * splits >= target.sms // 2:
            break
    few = block_m * block_n <= 64 * 128
    # Elsewhere operands pass through registers: of 128 pixels 8 bytes spill on sm_120.
    deep = few and target.arch == "sm_90" and 256 * splits <= g.M
    tile = WeightGradientBoxedTile(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=128 if deep else 64,
        SPLITS=splits,
        num_warps=warps(target, THREADS if few and not deep else 2 * THREADS),
        num_stages=4,
    )
    return staged(tile, problem, target)


def weight_gradient_clipped(problem: WeightGradientProblem, target: Target) -> WeightGradientClippedTile:
    """As all pixels in boxes: taps with fewer pixels make room for programs of the others."""
    return WeightGradientClippedTile(**weight_gradient_boxed(problem, target).asdict())


def weight_gradient_rows(problem: WeightGradientProblem, target: Target) -> WeightGradientRowsTile:
    """128 x 128 sums in eight warps: 108 registers for vocoder_t1d_s2, so that two programs share a multiprocessor."""
    g = problem.geometry
    # Taps a stride apart are elements of one vector.
    taps = power_of_two(g.kernel[2], 1, min(max(4, 2 * power_of_two(g.stride[2], 1, 8)), 16))
    columns = 128 if target.arch == "sm_90" else 64
    # wgmma takes no fewer than 64 rows. Rows of the result that are not aligned have an address for each element, of
    # which those of 128 rows spill 576 bytes.
    unaligned = g.c_in_group % 8 > 0
    block_m = power_of_two(g.c_out_group, 64, 64 if unaligned else columns)
    block_n = power_of_two(g.c_in_group, 1, max(columns // taps, 1))
    while block_n * taps < 16:
        block_n *= 2
    programs = cdiv(g.c_in_group, block_n) * g.kernel[0] * g.kernel[1] * cdiv(g.kernel[2], taps)
    programs *= cdiv(g.c_out_group, block_m) * g.groups
    return WeightGradientRowsTile(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=64 if target.arch == "sm_90" else 32,
        TAPS=taps,
        SPLITS=splits_of_waves(programs, 64, problem, target),
        num_warps=warps(target, THREADS if block_m * block_n * taps <= 64 * 128 and not unaligned else 2 * THREADS),
        num_stages=3 if target.arch == "sm_90" else 2,
    )


def weight_gradient_taps(problem: WeightGradientProblem, target: Target) -> WeightGradientTapsTile:
    """64 x 64 sums of all taps in two warp groups: of 3 x 3 144 registers. A program a multiprocessor, where parts
    do not take too much memory; steps of 64 pixels leave room for four of them in flight.
    """
    g = problem.geometry
    programs = cdiv(g.c_in_group, 64) * cdiv(g.c_out_group, 64) * g.groups
    tile = WeightGradientTapsTile(
        BLOCK_K=power_of_two(g.batch * g.out_size[2], 16, 64),
        SPLITS=max(min(target.sms // programs, problem.most_partial_bytes // max(problem.partial_bytes, 1)), 1),
        num_warps=warps(target, 2 * THREADS),
        num_stages=4,
    )
    return tile if tile.unfit(problem, target) is None else replace(tile, num_stages=2)


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
    vector = min(problem.x_vector(packed * g.c_in_group, g.c_in), problem.y_vector(packed * g.c_out_group, g.c_out))
    return GroupedPackedWeightGradientTile(
        ROWS=rows,
        COLS=cols,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SPLITS=_splits(programs, block_k, problem, target),
        num_warps=warps(target, THREADS if block_m * block_n <= 64 * 128 else 2 * THREADS),
        # Shifted columns come from L1, which pipelined loads bypass; an H100 ran each of four tiles, three of
        # narrow_groups_8 and one of narrow_groups_4, 1.5 to 1.7 times as fast with three stages all the same.
        num_stages=3 if target.arch == "sm_90" and itemsize == 2 and vector >= 4 else 1,
    )


def depthwise_weight_gradient(problem: WeightGradientProblem, target: Target) -> DepthwiseWeightGradientTile:
    """As depthwise: one 16-byte vector of channels a thread (NHWC), or four pixels of one channel (NCHW)."""
    g = problem.geometry
    if problem.pixels_last:
        block_m, block_c = power_of_two(g.M, 64, 4 * THREADS), 1
    else:
        block_c = power_of_two(g.c_out, 8, 64)
        block_m = power_of_two(THREADS * 16 // problem.itemsize // block_c, 4, 128)
    return DepthwiseWeightGradientTile(
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        SPLITS=_splits(g.taps * cdiv(g.c_out, block_c), block_m, problem, target),
        num_warps=warps(target, THREADS),
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
    if held * taps > 25 or taps > 16:
        # As many sums leave no registers for wider patches.
        widest = 4
    # Columns past the image's last cost as much as others, and each patch reads a filter's width beyond its own.
    widths = (4,) if g.stride[2] > 1 else (4, 7, 8, 14)
    cols = min(
        (width for width in widths if width <= widest),
        key=lambda width: cdiv(g.out_size[2], width) * (width * (taps + 2) + 2 * taps),
    )
    block_p = max(THREADS * vector // block_c, lanes)
    programs = cdiv(rows, held * lanes) * cdiv(g.c_out, block_c)
    return DepthwisePatchWeightGradientTile(
        ROWS=held,
        COLS=cols,
        LANES=lanes,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        # What is resident at once, by registers, and no program more: all take equally long.
        SPLITS=_most_splits((3 if lanes > 1 else 2) * target.sms // programs, block_p // lanes * cols, problem),
        num_warps=warps(target, THREADS),
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
    most = max((144 if ahead else 64) * THREADS // (depths[block_t] * block_t), 1)
    rows = cdiv(height, cdiv(height, most))
    rows_out = power_of_two(g.out_size[1], 1, 4 if ahead else 2)
    tile = DepthwiseBandedWeightGradientTile(
        BLOCK_M=128 // rows_out if ahead else 32,
        BLOCK_T=block_t,
        BLOCK_K=depths[block_t],
        ROWS=rows_out,
        FILTER_ROWS=rows * depth if ahead and rows * depth <= most else rows,
        num_warps=warps(target, THREADS),
        num_stages=2 if ahead else 1,
    )
    return _lengthened(tile, problem, target)


def depthwise_fused_weight_gradient(problem: WeightGradientProblem, target: Target) -> DepthwiseFusedWeightGradientTile:
    """Blocks as wide as reads the fewest columns, and as many input rows a product as have the 64 columns that wgmma
    takes at least. Blocks of 64 x 64 columns hold no more than four rows of a filter.
    """
    g = problem.geometry
    ahead = target.arch == "sm_90" and problem.itemsize == 2
    widths = [w for w in (16, 32, 64) if w <= power_of_two(g.out_size[2], 16, 64 if ahead and g.kernel[1] <= 4 else 32)]
    rows_out = power_of_two(g.out_size[1], 1, 4 if ahead else 2)
    least = 64 if problem.itemsize == 2 else 16
    depths = {w: power_of_two(row_columns(problem, w), max(least // rows_out, 16), 4096) for w in widths}
    block_t = min(widths, key=lambda w: (cdiv(g.out_size[2], w) * depths[w], w))
    fused = min(max(least // depths[block_t], 1), rows_out)
    # A group of rows begins at each row of the filter, and before it.
    most = max((144 if ahead else 32) * THREADS // (fused * depths[block_t] * block_t) - fused + 1, 1)
    depth, height, _ = g.kernel
    rows = cdiv(height, cdiv(height, most))
    tile = DepthwiseFusedWeightGradientTile(
        BLOCK_M=128 // rows_out if ahead else 32,
        BLOCK_T=block_t,
        BLOCK_K=depths[block_t],
        ROWS=rows_out,
        FUSED=fused,
        FILTER_ROWS=rows * depth if ahead and rows * depth <= most else rows,
        num_warps=warps(target, THREADS),
        num_stages=2 if ahead else 1,
    )
    return _lengthened(tile, problem, target)


def _lengthened(tile: _Banded, problem: WeightGradientProblem, target: Target) -> _Banded:
    """A tile of a banded weight gradient that fits twice, and whose programs take as many steps as leave enough."""
    while getattr(tile, "FUSED", 1) < tile.ROWS and (
        tile.mismatch(problem) or 2 * tile.shared_bytes(problem) > target.shared_bytes
    ):
        tile = replace(tile, ROWS=tile.ROWS // 2)
    if 2 * tile.shared_bytes(problem) > target.shared_bytes:
        tile = replace(tile, BLOCK_M=32, num_stages=1)
    # The sums are read along diagonals at the end, as dear as two steps: eight before it, if programs are enough.
    each = problem.geometry.c_out * filter_parts(problem, tile)
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
    num_warps = warps(target, THREADS)
    if itemsize == 8:
        return DeformableInputGradientTile(BLOCK_M=32, BLOCK_N=16, BLOCK_K=32, num_warps=num_warps, num_stages=1)
    # On sm_100 the shallower tile is compiled for more blocks at once, and spills.
    depth = 128 if target.family == "sm_100" and itemsize == 2 else 64
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
    # Eight programs for a multiprocessor, as of packed groups; samples take far longer than adding up sums.
    programs = cdiv(tiles_n * cdiv(g.c_out_group, block_m) * g.groups, 4)
    return DeformableWeightGradientTile(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SPLITS=_splits(programs, block_k, problem, target, problem.most_partial_bytes),
        num_warps=warps(target, THREADS),
        num_stages=1,
    )
