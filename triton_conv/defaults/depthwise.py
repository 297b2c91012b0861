"""Default tiles of depthwise convolution, form by form."""

from __future__ import annotations

from dataclasses import replace

from ..kernels import depthwise_banded_transposed as transposed
from ..kernels.banded_rows import row_columns
from ..kernels.depthwise import DepthwiseTile
from ..kernels.depthwise_banded import DepthwiseBandedTile, images_of_tile, tile_count
from ..kernels.depthwise_banded_transposed import DepthwiseBandedTransposedTile
from ..kernels.depthwise_patch import DepthwisePatchTile
from ..kernels.depthwise_toeplitz import DepthwiseToeplitzTile
from ..kernels.depthwise_toeplitz_weight_gradient import DepthwiseToeplitzWeightGradientTile
from ..kernels.kernel import cdiv
from ..kernels.toeplitz_blocks import width_in, width_out
from ..problem import Problem, WeightGradientProblem
from ..target import Target
from .common import THREADS, power_of_two, staged, warps


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
        # Longer rows spill; on sm_100 those of a 1-D layer of float16, compiled for 48 registers, do as well.
        UNROLL=g.kernel[2] * problem.itemsize <= (16 if target.family == "sm_80" else 32)
        and (target.family != "sm_100" or g.rank > 1),
        num_warps=warps(target, threads),
        num_stages=1,
    )


def depthwise_banded(problem: Problem, target: Target) -> DepthwiseBandedTile:
    """Blocks as wide as reads the fewest columns an output, and up to four rows of them; of 16 columns two rows a
    product, of which tensor cores make twice as many a clock.

    Whole rows read nothing beside them: by the model, 1.1 to 1.9 times as fast on an H100 for 7, 14, 28 and 32 columns,
    3 x 3 to 7 x 7, in bfloat16. Of 64 columns the sums of so many rows leave no registers.
    """
    g, itemsize = problem.geometry, problem.itemsize
    resident = g.kernel[0] * g.kernel[1] <= 9 and itemsize < 8
    most = 32 if resident and g.out_size[2] <= 64 else 64
    widths = [w for w in (16, 32, 64) if w <= power_of_two(g.out_size[2], 16, most)]
    depths = {w: power_of_two(row_columns(problem, w), 16, 4096) for w in widths}
    block_t = min(widths, key=lambda w: depths[w] / w)
    rows = power_of_two(g.out_size[1], 1, 4 if itemsize < 8 else 1)
    # By the model 13 x 13 of 7 columns take 90 us on an H100 so, of a row a product 141; none was tried elsewhere.
    pairs = block_t == 16 and (resident or (target.arch == "sm_90" and itemsize == 2))
    tile = DepthwiseBandedTile(
        # wgmma takes no fewer than 64 rows; float64 has no such unit.
        BLOCK_M=64 if itemsize < 8 else 16,
        BLOCK_T=block_t,
        BLOCK_K=depths[block_t],
        ROWS=rows,
        FUSED=min(rows, 2) if pairs else 1,
        RESIDENT=resident,
        num_warps=warps(target, THREADS),
        num_stages=1,
    )
    # All input rows of a block are in flight together, of a second depth too: of 255 registers a thread 112 for one; 96
    # where wide operands of the product pass through registers too.
    held, depths_read = (96 if target.family == "sm_80" and block_t > 16 else 112), min(g.kernel[0], 2)
    while tile.ROWS > 1 and (
        _registers(problem, tile) > held // depths_read or tile.shared_bytes(problem) > target.shared_bytes
    ):
        tile = replace(tile, ROWS=tile.ROWS // 2, FUSED=min(tile.FUSED, tile.ROWS // 2))
    if _registers(problem, tile) > held or tile.shared_bytes(problem) > target.shared_bytes:
        tile = replace(tile, RESIDENT=False)
    if target.arch == "sm_90" and itemsize < 8 and not tile.RESIDENT and tile.ROWS > 1:
        # Eight warps hold the rows of a large filter's blocks without a spill; of 16 columns four do.
        tile = replace(tile, BLOCK_M=256 // itemsize, num_warps=8 if tile.FUSED == 1 or itemsize > 2 else 4)
    # One row of a block is little to wait for at a time, unless its loads are narrow and so many.
    few = problem.x_run() * itemsize >= 16 and itemsize < 8
    while few and 2 * _registers(problem, tile) <= 32 and tile.BLOCK_M < 256:
        if _programs(problem, tile) < 32 * target.sms:
            break
        tile = replace(tile, BLOCK_M=2 * tile.BLOCK_M)
    # Sixteen programs for a multiprocessor; of a large filter, or of whole rows, eight: each takes longer.
    groups = cdiv(g.batch, images_of_tile(problem, tile))
    enough = (16 if tile.RESIDENT and block_t < g.out_size[2] else 8) * target.sms
    steps = _steps(groups, _programs(problem, tile), enough)
    if tile.RESIDENT and g.kernel[0] * g.kernel[1] > 3 and problem.x_run() * itemsize < 4:
        # An address for each element, beside bands that stay for several steps: 136 to 304 bytes of 7 columns spill.
        steps = 1
    # Of one filter row a band that serves one step is not worth holding: causal_dw1d is 1.04 to 1.08 times as fast.
    return replace(tile, STEPS=steps, RESIDENT=tile.RESIDENT and (steps > 1 or g.kernel[0] * g.kernel[1] > 1))


def _steps(groups: int, programs: int, enough: int) -> int:
    """Groups of images that a program takes: beyond `enough` programs, each builds its bands for more images."""
    return 1 << max(min(groups, programs // enough, 64), 1).bit_length() - 1


def _registers(problem: Problem, tile: DepthwiseBandedTile) -> int:
    """Registers a thread for the input rows of a block. What is loaded by twos of bytes takes one each at first, and
    part of an address.
    """
    size = problem.itemsize if problem.x_run() * problem.itemsize >= 4 else 5
    return tile.rows_read(problem) * tile.BLOCK_M * tile.BLOCK_K * size // (4 * THREADS)


def _programs(problem: Problem, tile: DepthwiseBandedTile) -> int:
    """Programs of one step each."""
    return (
        tile_count(problem, tile) * problem.geometry.c_out * cdiv(problem.geometry.batch, images_of_tile(problem, tile))
    )


def depthwise_banded_transposed(problem: Problem, target: Target) -> DepthwiseBandedTransposedTile:
    """Blocks of up to 32 columns that read the fewest, and four rows, of wider numbers as many as there are phases. By
    the model, (128, 144, 56, 56) 5 x 5 of stride 2 takes 73 us on an H100 in bfloat16, with 144 registers; sums of 64
    columns take 128 alone. Two or three programs run at once: six of them a multiprocessor build the fewest bands, for
    1.05 to 1.1 times the speed of sixteen.
    """
    g, itemsize = problem.geometry, problem.itemsize
    phases = power_of_two(g.stride[1], 1, 8)
    tiles = [
        DepthwiseBandedTransposedTile(
            # wgmma takes no fewer than 64 rows; float64 has no such unit.
            BLOCK_M=64 if itemsize < 8 else 16,
            BLOCK_T=block_t,
            ROWS=max(power_of_two(g.out_size[1], 1, 4 if itemsize == 2 else 1), phases),
            num_warps=warps(target, THREADS),
            num_stages=1,
        )
        for block_t in (16, 32)
        if block_t <= power_of_two(g.out_size[2], 16, 32)
    ]
    tiles = [replace(tile, BLOCK_K=power_of_two(transposed.columns_read(problem, tile), 16, 4096)) for tile in tiles]
    tile = min(
        tiles,
        key=lambda tile: (
            cdiv(g.out_size[2], transposed.block_of(problem, tile)["WIDTH"]) * tile.BLOCK_K, -tile.BLOCK_T
        ),
    )  # fmt: skip
    while phases < tile.ROWS and tile.unfit(problem, target):
        tile = replace(tile, ROWS=tile.ROWS // 2)
    groups = cdiv(g.batch, transposed.images_of_tile(problem, tile))
    return replace(tile, STEPS=_steps(groups, transposed.KERNEL.grid(problem, tile), 6 * target.sms))


def depthwise_patch(problem: Problem, target: Target) -> DepthwisePatchTile:
    """A cache line of channels, or half of one where that leaves fewer idle; 64 sums a thread of half precision.

    As 4 x 4 outputs where 9 weights stay in registers (3 x 3, bfloat16 (64, 192, 56, 56): a prototype took 63 us on an
    H100, a copy 57); as 8 or 7 in a row of 8 channels where there is one row of taps at a time. Strides read more for
    each output, so that fewer keep up with memory.
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
        BLOCK_P=THREADS * channels // block_c,
        BLOCK_C=block_c,
        num_warps=warps(target, THREADS),
        # Rows that patches share come from L1, which pipelined loads bypass.
        num_stages=1,
    )


def depthwise_toeplitz(problem: Problem, target: Target) -> DepthwiseToeplitzTile:
    """128 pairs of images and rows by 256 columns, two rows of 32 a step, in eight warps: what is read goes as the sum
    of a tile's sides, its products as their area. By the model large_dw2d takes 141 us on an H100, 145 and more with
    half the sums in four warps. Elsewhere than on Hopper operands pass through registers, which leaves 128 columns, as
    do activations that take several registers a sum, and addresses of single pixels.

    Images first; groups of rows fill up what few images leave.
    """
    g, hopper = problem.geometry, target.family in ("sm_90", "sm_100")
    narrow = problem.activation in ("gelu", "silu") or problem.x_run() == 1
    most = 256 if hopper and not narrow else 128
    width = width_out(problem)
    block_n = max(power_of_two(g.out_size[1] * width, 16, most), width)
    images = power_of_two(g.batch, 1, 128)
    # wgmma takes no fewer than 64 rows.
    while hopper and images * cdiv(g.out_size[1], block_n // width) < 64 and block_n >= 2 * max(width, 16):
        block_n //= 2
    groups = power_of_two(cdiv(g.out_size[1], block_n // width), 1, 128 // images)
    tile = DepthwiseToeplitzTile(
        BLOCK_M=max(images * groups, 64 if hopper else 16),
        BLOCK_N=block_n,
        BLOCK_K=max(width_in(problem), 64 if hopper else 32),
        GROUPS=groups,
        num_warps=warps(target, 2 * THREADS),
        num_stages=3,
    )
    return staged(tile, problem, target)


def depthwise_toeplitz_weight_gradient(
    problem: WeightGradientProblem, target: Target
) -> DepthwiseToeplitzWeightGradientTile:
    """256 input columns by 64 output columns in four warps, two programs a multiprocessor: one sums diagonals while the
    other multiplies. By the model large_dw2d takes 151 us on an H100, 169 with twice the sums in eight warps. Elsewhere
    than on Hopper operands pass through registers, which leaves 128 columns, as do addresses of one pixel or two.
    """
    g, hopper = problem.geometry, target.family in ("sm_90", "sm_100")
    most = 256 if hopper and problem.x_run() >= 4 else 128
    columns_in, columns_out = width_in(problem), width_out(problem)
    tile = DepthwiseToeplitzWeightGradientTile(
        # wgmma takes no fewer than 64 rows.
        BLOCK_M=max(power_of_two(g.kernel[1] * columns_in, 64, most), columns_in),
        BLOCK_N=max(power_of_two(g.out_size[1] * columns_out, 16, 64), columns_out),
        BLOCK_K=power_of_two(g.batch, 16, 64 if hopper and problem.x_run() > 1 else 32),
        num_warps=warps(target, THREADS),
        num_stages=2,
    )
    return staged(tile, problem, target)
