"""Default tiles of the matrix products: dense, grouped, transposed, deformable."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from ..kernels.deformable import DeformableTile
from ..kernels.grouped_packed import KERNEL as GROUPED_PACKED
from ..kernels.grouped_packed import GroupedPackedTile
from ..kernels.grouped_slab import KERNEL as GROUPED_SLAB
from ..kernels.grouped_slab import GroupedSlabTile, narrowest
from ..kernels.implicit_gemm import ImplicitGemmTile
from ..kernels.implicit_gemm_boxed import ImplicitGemmBoxedTile
from ..kernels.implicit_gemm_persistent import ImplicitGemmPersistentTile, groups
from ..kernels.implicit_gemm_rolling import ImplicitGemmRollingTile
from ..kernels.implicit_gemm_rows import ImplicitGemmRowsTile, window_values
from ..kernels.kernel import cdiv
from ..kernels.strided_boxed import StridedBoxedTile
from ..kernels.transposed_overlap import TransposedOverlapTile, image_columns, pieces
from ..kernels.transposed_phase import KERNEL as TRANSPOSED_PHASE
from ..kernels.transposed_phase import TransposedPhaseTile
from ..problem import Problem
from ..problem_deform import DeformProblem
from ..target import Target
from .common import THREADS, aligned, first_fit, gathered, power_of_two, staged, stages, warps


def implicit_gemm(problem: Problem, target: Target) -> ImplicitGemmTile:
    """128 x 64 for aligned channels: 64 accumulator registers a thread, and three blocks to a multiprocessor."""
    g, itemsize = problem.geometry, problem.itemsize
    flat = _flat_k(problem)
    # Narrow loads have an address each, most of them pass through registers: a smaller tile leaves room for them.
    narrow = flat or problem.x_vector(g.c_in_group) * itemsize < 8
    if itemsize == 8:
        # sm_100 has no matrix unit for float64: its products are unrolled into registers.
        return ImplicitGemmTile(
            BLOCK_M=32, BLOCK_N=16, BLOCK_K=16, FLAT_K=flat, num_warps=warps(target, THREADS), num_stages=1
        )

    def tiles(m: int, n: int) -> int:
        return cdiv(g.M, m) * cdiv(g.N, n) * g.groups

    if not flat and (blocks := aligned(problem, target, tiles)):
        block_m, block_n, block_k, threads = blocks
        return ImplicitGemmTile(
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps(target, threads), num_stages=3
        )
    if not flat and (blocks := gathered(problem, target, problem.w_vector(g.c_in_group), tiles)):
        block_m, block_n, block_k, threads = blocks
        return ImplicitGemmTile(
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps(target, threads), num_stages=2
        )
    block_n = power_of_two(g.N, 16, 32 if flat and itemsize == 4 else 64)
    block_m = 64 if narrow or tiles(128, block_n) < target.sms else 128
    if flat and itemsize == 4 and target.family == "sm_80":
        # Its operands pass through registers: 64 rows spill.
        block_m = 32
    # Bytes of K a step: on sm_90 a whole swizzled row, which wgmma reads from shared memory; elsewhere half of one,
    # since more spills (sm_80 keeps operands in registers, sm_100 is compiled for more blocks at once).
    # Of tf32 half of one is two instructions, which wait for each other (C7515).
    depth = 128 if target.arch == "sm_90" and (not narrow or (itemsize == 4 and not flat)) else 64
    block_k = power_of_two(g.K if flat else g.c_in_group, 16, depth // itemsize)
    return ImplicitGemmTile(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        FLAT_K=flat,
        num_warps=warps(target, THREADS),
        # Narrow loads cannot be asynchronous: more stages would only cost registers.
        num_stages=2 if narrow else stages(problem, target, (block_m + block_n) * block_k),
    )


def _flat_k(problem: Problem) -> bool:
    g = problem.geometry
    if g.taps == 1:
        return False
    # NCHW with a default weight: reading it tap by tap would touch one sector for each of its elements.
    return (problem.pixels_last and problem.weight_flat) or g.c_in_group < 16


def implicit_gemm_boxed(problem: Problem, target: Target) -> ImplicitGemmBoxedTile:
    """128 x 256, of L2's bytes 43 products each, or the widest tile that half of the multiprocessors have one of.

    Where each has one at most, the wait for a step's copies binds: steps of 128 channels are half as many. By the
    model, 256 channels of 14 x 14 pixels, 3 x 3, take 18 us on an H100 so, with 128 x 128 x 64 28.
    """
    g = problem.geometry
    # wgmma takes no fewer than 64 rows: output channels.
    most_n, most_m = power_of_two(g.c_out_group, 64, 128), power_of_two(g.M, 64, 256)
    for wide_m, wide_n in ((256, 128), (128, 128), (128, 64), (64, 64)):
        block_m, block_n = min(wide_m, most_m), min(wide_n, most_n)
        programs = g.groups * cdiv(g.c_out_group, block_n) * cdiv(g.M, block_m)
        if programs >= target.sms // 2:
            break
    few = block_m * block_n <= 64 * 128
    # Elsewhere operands pass through registers: of 128 channels 16 bytes spill on sm_120.
    deep = few and g.c_in_group > 64 and target.arch == "sm_90"
    tile = ImplicitGemmBoxedTile(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=128 if deep else 64 if g.c_in_group > 32 else 32,
        num_warps=warps(target, THREADS if few else 2 * THREADS),
        num_stages=4,
    )
    return staged(tile, problem, target)


# Steps of 256 x 128 x 64 that writing parts, a second launch and reading them take, by count: 0.7 us each.
_JOIN_STEPS = 12


def implicit_gemm_persistent(problem: Problem, target: Target) -> ImplicitGemmPersistentTile:
    """As `implicit_gemm_boxed`; tiles are split where that saves more than the second launch costs."""
    like = implicit_gemm_boxed(problem, target)
    tile = ImplicitGemmPersistentTile(
        BLOCK_M=like.BLOCK_M,
        BLOCK_N=like.BLOCK_N,
        BLOCK_K=like.BLOCK_K,
        # Upright boxes and turned ones have programs of their own.
        PROGRAMS=max(target.sms, 2),
        num_warps=like.num_warps,
        num_stages=3,
    )
    # Sums that wait beside the operands take 64 KiB of 256 x 128.
    tile = first_fit([tile, replace(tile, BLOCK_M=min(tile.BLOCK_M, 128))], problem, target)
    split = replace(tile, SPLIT=True)
    longest = [max(group.longest(form.SPLIT) for group in groups(problem, form)) for form in (tile, split)]
    saves = longest[0] > longest[1] + _JOIN_STEPS
    return split if saves and split.unfit(problem, target) is None else tile


def implicit_gemm_rolling(problem: Problem, target: Target) -> ImplicitGemmRollingTile:
    """128 pixels of a row for two warp groups, one of which multiplies while the other adds; fewer where shared memory
    or registers have no room for them beside the weights. One program a multiprocessor. Rows are copied two ahead: one
    ahead a copy begins when the last product of the row before it is done, and has nothing to hide behind.
    """
    g = problem.geometry
    tiles = [
        ImplicitGemmRollingTile(
            BLOCK_M=block_m,
            # wgmma takes no fewer than 64 rows: output channels.
            BLOCK_N=64,
            BLOCK_K=power_of_two(g.c_in_group, 16, 64),
            PROGRAMS=target.sms,
            num_warps=warps(target, 2 * THREADS if block_m > 64 else THREADS),
            num_stages=stages_,
        )
        for block_m in (128, 64, 32)
        for stages_ in (3, 2)
        if block_m == 32 or block_m < 2 * g.batch * g.out_size[2]
    ]
    return first_fit(tiles, problem, target)


def implicit_gemm_rows(problem: Problem, target: Target) -> ImplicitGemmRowsTile:
    """64 pixels of each column phase by 128 channels, 128 channels a step: on an H100 dcgan_t2d's dx took 44 us with
    it, 81 us with 64 channels a step and two stages. In long rows 256 by 128 where every multiprocessor has a tile.

    Segments of four outputs, of which a tap's tile is stored eight bytes at a time, or of eight in long rows, where a
    window reads less beside its own columns. As many channels a step as registers hold of windows beside the sums.
    """
    g = problem.geometry
    phases = g.stride[2] if g.transposed else 1
    columns = cdiv(g.out_size[2], phases)
    block_t = 8 if columns >= 64 and (g.transposed or g.stride[2] == 1) else power_of_two(columns, 1, 4)
    # Loads of one or two elements have an address each, and pass through registers.
    narrow = problem.x_run(block_t * (1 if g.transposed else g.stride[2])) < 4
    hopper = target.arch == "sm_90"
    large = hopper and not narrow and g.c_out_group > 64 and cdiv(g.M, 256) * cdiv(g.N, 128) * g.groups >= target.sms
    deep = hopper and not narrow and min(g.c_in_group, g.c_out_group) > 64 and block_t <= 4
    large &= not deep
    threads = 2 * THREADS if large or deep else THREADS
    # wgmma takes no fewer than 64 rows: output channels, 16 a warp. Elsewhere operands pass through registers.
    block_m, block_n = (256, 128) if large else (128 * phases if hopper else 64, 64)
    if deep:
        block_m, block_n = 64 * phases, 128
    while block_m > 32 * phases and cdiv(g.M, block_m) * cdiv(g.N, block_n) * g.groups < target.sms * 3 // 4:
        block_m //= 2
    # Two stages spill elsewhere: 8 bytes of vocoder_t1d_s8's dx on sm_80, 60 of a 1x1 layer's on sm_100.
    depths = ((128, 1) if deep else (64, 2), (32, 2), (16, 2), (16, 1)) if hopper else ((32, 1), (16, 1))
    for block_k, stages_ in depths:
        tile = ImplicitGemmRowsTile(
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_T=block_t, num_warps=warps(target, threads),
            num_stages=stages_,
        )  # fmt: skip
        # Two numbers to a register; an address takes two.
        windows = window_values(problem, tile) * 2 if narrow else window_values(problem, tile) // 2
        held = (block_m * block_n + windows) // threads
        if held <= (200 if hopper else 60) and block_k < 2 * g.c_in_group and tile.unfit(problem, target) is None:
            break
    return tile


def strided_boxed(problem: Problem, target: Target) -> StridedBoxedTile:
    """As `implicit_gemm_boxed`. Phases of an output together where their boxes alone fill the machine: of decoder_t2d's
    128 programs each takes as long as any other, makes one descriptor, and copies the next phase's input while it
    stores the last one's output.
    """
    g, tile = problem.geometry, implicit_gemm_boxed(problem, target)
    boxes = cdiv(cdiv(g.M, g.phases), tile.BLOCK_M) * cdiv(g.c_out_group, tile.BLOCK_N) * g.groups
    strided = StridedBoxedTile(
        TOGETHER=g.phases > 1 and boxes >= target.sms * 3 // 4,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K if g.transposed else math.gcd(tile.BLOCK_K, g.c_in_group),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return staged(strided, problem, target)


def grouped_packed(problem: Problem, target: Target) -> GroupedPackedTile:
    """Slabs of 32 channels stay memory-bound, in half precision in NCHW of 16, which have fewer zeros; groups of more
    than 16 need 64 for two of them to fit. The more pixels a program has, the fewer put weights together.
    """
    g, itemsize = problem.geometry, problem.itemsize
    widest, threads = max(g.c_in_group, g.c_out_group), THREADS
    slab = 32 if widest <= 16 else 64
    block_m = 64 if slab == 64 or problem.pixels_last else 128
    if itemsize == 8:
        slab = 16 if widest <= 16 else 32
        block_m = 16
        # Of float64 an NCHW tile has an address for each of its elements: more threads share them.
        threads = 2 * THREADS if problem.pixels_last else THREADS
    elif itemsize == 4 and problem.pixels_last:
        block_m = 32
    elif slab == 32 and problem.pixels_last:
        slab, block_m = 16, 256
    elif slab == 32 and target.arch == "sm_90":
        block_m, threads = 256, 2 * THREADS
    packed = min(slab // widest, g.groups)
    tile = GroupedPackedTile(
        BLOCK_M=block_m,
        # An output slab may be narrower than an input slab, or the reverse.
        BLOCK_N=power_of_two(packed * g.c_out_group, 16, slab),
        BLOCK_K=power_of_two(packed * g.c_in_group, 16, slab),
        num_warps=warps(target, threads),
        # Taps come from L1, which pipelined loads bypass.
        num_stages=1,
    )
    while tile.BLOCK_M > 128 and GROUPED_PACKED.grid(problem, tile) < target.sms:
        tile = replace(tile, BLOCK_M=tile.BLOCK_M // 2, num_warps=warps(target, THREADS))
    return tile


def grouped_slab(problem: Problem, target: Target) -> GroupedSlabTile:
    """The narrowest slabs, with the fewest zeros; of rows as many as registers hold, so that the fewest are read.

    Four warps have neighbouring slabs: together they read whole lines of memory. Weights are put together once for up
    to eight tiles of patches, as long as every multiprocessor has three programs.
    """
    g, tile = problem.geometry, narrowest(problem)
    tiles = [replace(tile, ROWS=rows, SLABS=4, num_warps=4) for rows in (8, 7, 4, 2, 1)]
    fitting = [tile for tile in tiles if tile.unfit(problem, target) is None] or tiles[-1:]
    tile = min(fitting, key=lambda t: cdiv(g.out_size[1], t.ROWS) * ((t.ROWS - 1) * g.stride[1] + g.extent[1]))
    programs = GROUPED_SLAB.grid(problem, tile)
    return replace(tile, STEPS=next((steps for steps in (8, 4, 2) if programs >= 3 * steps * target.sms), 1))


def transposed_phase(problem: Problem, target: Target) -> TransposedPhaseTile:
    """As implicit GEMM."""
    g, itemsize = problem.geometry, problem.itemsize
    num_warps = warps(target, THREADS)
    if itemsize == 8:
        return TransposedPhaseTile(BLOCK_M=32, BLOCK_N=16, BLOCK_K=16, num_warps=num_warps, num_stages=1)
    if g.groups > 1 and max(g.c_in_group, g.c_out_group) <= 16:
        return _transposed_narrow(problem, target)

    def tiles(m: int, n: int) -> int:
        return cdiv(cdiv(g.M, g.phases), m) * g.phases * cdiv(g.N, n) * g.groups

    if blocks := aligned(problem, target, tiles):
        block_m, block_n, block_k, threads = blocks
        return TransposedPhaseTile(
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps(target, threads), num_stages=3
        )
    if blocks := gathered(problem, target, problem.w_vector(g.c_out_group), tiles):
        block_m, block_n, block_k, threads = blocks
        return TransposedPhaseTile(
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps(target, threads), num_stages=2
        )
    narrow = problem.x_vector(g.c_in_group) * itemsize < 8
    depth = 128 if target.arch == "sm_90" and not narrow else 64
    block_n, block_k = power_of_two(g.N, 16, 64), power_of_two(g.c_in_group, 16, depth // itemsize)
    block_m = 64 if narrow or _spilling(problem, target) or tiles(128, block_n) < target.sms else 128
    return TransposedPhaseTile(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
        num_stages=2 if narrow else stages(problem, target, (block_m + block_n) * block_k),
    )


def _spilling(problem: Problem, target: Target) -> bool:
    """Operands of float32 in 128 rows spill on sm_80; on sm_100 those of several groups do."""
    grouped = problem.geometry.groups > 1
    return problem.itemsize == 4 and (target.family == "sm_80" or (target.family == "sm_100" and grouped))


def _transposed_narrow(problem: Problem, target: Target) -> TransposedPhaseTile:
    """Several groups side by side. In NCHW pixels are read alike for wide slabs and for the narrowest, which multiply
    the fewest zeros, and of which registers hold 256 pixels; in NHWC 16 channels are one sector of memory alone.

    On an H100, bfloat16: mobile_dw5s2's dx takes 357 us, of slabs of 32 437.
    """
    slab, most = (16, 256) if problem.pixels_last and problem.itemsize == 2 else (32, 128)
    tile = TransposedPhaseTile(
        BLOCK_M=64 if (problem.itemsize == 4 and problem.pixels_last) or _spilling(problem, target) else most,
        BLOCK_N=slab,
        BLOCK_K=min(slab, 64 // problem.itemsize),
        num_warps=warps(target, THREADS),
        # Taps come from L1, which pipelined loads bypass.
        num_stages=1,
    )
    while tile.BLOCK_M > 64 and TRANSPOSED_PHASE.grid(problem, tile) < target.sms:
        tile = replace(tile, BLOCK_M=tile.BLOCK_M // 2)
    return tile


def transposed_overlap(problem: Problem, target: Target) -> TransposedOverlapTile:
    """128 pixels, or an image of more, by 256 pairs where every multiprocessor has a tile, else 128: L2's bytes bind.
    Of long rows 256 pixels, since what windows overlap with is read and multiplied twice.

    128 sums a thread; 64 where they stay in registers beside several pieces of outputs, and elsewhere than on sm_90.
    """
    g, hopper = problem.geometry, target.arch == "sm_90"
    image = min(image_columns(problem), 256)
    enough = cdiv(g.batch * g.in_pixels, 128) * cdiv(g.c_out_group * g.taps, 256) * g.groups >= target.sms
    for block_n, block_m, threads in itertools.product(
        (256, 128, 64) if hopper and enough else (128, 64),
        (max(image, 128), max(image, 64)),
        # Of sixteen warps sm_100 has no matrix instruction of its own.
        (2 * THREADS, 4 * THREADS) if hopper else (2 * THREADS,),
    ):
        tile = TransposedOverlapTile(
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=power_of_two(g.c_in_group, 16, 64 if hopper else 32),
            num_warps=warps(target, threads),
            num_stages=3 if hopper else 2,
        )
        if tile.unfit(problem, target) is None:
            sums = 128 if hopper and pieces(problem, tile)[1] == 1 else 64
            if tile.accumulator_values() <= sums * threads:
                break
    return tile


def deformable(problem: DeformProblem, target: Target) -> DeformableTile:
    """64 pixels by up to 128 output channels: a gather is repeated for every further block of channels.

    On sm_90 128 pixels by up to 256 channels: each gather once. On an H100, bfloat16: dcnv2 223 us against 412.
    """
    g, itemsize = problem.geometry, problem.itemsize
    num_warps = warps(target, THREADS)
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
