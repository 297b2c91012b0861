"""Default tiles of shuffled, separable and locally connected convolution. None of them was measured yet."""

from __future__ import annotations

from ..kernels.locally_connected import LocallyConnectedTile
from ..kernels.locally_connected_input_gradient import LocallyConnectedInputGradientTile
from ..kernels.locally_connected_input_gradient_rolling import LocallyConnectedInputGradientRollingTile
from ..kernels.locally_connected_input_gradient_shifted import LocallyConnectedInputGradientShiftedTile
from ..kernels.locally_connected_weight_gradient import LocallyConnectedWeightGradientTile
from ..kernels.separable import SeparableTile
from ..kernels.separable_whole import SeparableWholeTile
from ..kernels.shuffle_gemm import ShuffleGemmTile
from ..problem_lectures import (
    LocalInputGradientProblem,
    LocalProblem,
    LocalWeightGradientProblem,
    SeparableProblem,
    ShuffleProblem,
)
from ..target import Target
from .common import THREADS, power_of_two, warps
from .products import implicit_gemm


def shuffle_gemm(problem: ShuffleProblem, target: Target) -> ShuffleGemmTile:
    """The product is implicit GEMM's, and so is the tile; a step is over channels alone.

    In NHWC the channels of all groups are one tile, so that they are stored side by side, as long as the products with
    zeros take at most about twice as long as the memory: 600 TFLOP/s and 3 TB/s of an H100 in 16 bits.
    """
    g = problem.geometry
    products, moved = g.c_out * g.c_in * g.taps / 300, (g.c_in + g.c_out) * problem.itemsize / 3
    if problem.y_strides[1] == 1 and problem.itemsize == 2 and products <= 2 * moved and g.c_out > 1:
        return ShuffleGemmTile(
            BLOCK_M=64,
            BLOCK_N=power_of_two(g.c_out, 16, 128),
            BLOCK_K=power_of_two(g.c_in, 16, 64),
            num_warps=warps(target, THREADS),
            # Of shuffle_g8 three spill on sm_80.
            num_stages=2 if target.family == "sm_80" else 3,
            WHOLE=True,
        )
    like = implicit_gemm(problem, target)
    return ShuffleGemmTile(
        # Where channels alternate, every element is stored to an address of its own.
        BLOCK_M=like.BLOCK_M if problem.y_strides[1] != 1 else min(like.BLOCK_M, 16 if problem.itemsize == 8 else 64),
        BLOCK_N=like.BLOCK_N,
        BLOCK_K=power_of_two(problem.geometry.c_in_group, 16, like.BLOCK_K),
        num_warps=like.num_warps,
        num_stages=like.num_stages,
    )


def separable(problem: SeparableProblem, target: Target) -> SeparableTile:
    """All output channels, up to 256, beside 64 pixels: the input is filtered once. 32 channels of it at a time."""
    itemsize = problem.itemsize
    if itemsize == 8:
        return SeparableTile(BLOCK_M=32, BLOCK_N=16, BLOCK_K=16, num_warps=warps(target, THREADS), num_stages=1)
    # wgmma takes no fewer than 64 rows, which the output channels are; tf32's operands take twice the room.
    block_n = power_of_two(problem.c_final, 64 if itemsize == 2 else 16, 256 if itemsize == 2 else 128)
    return SeparableTile(
        BLOCK_M=64,
        BLOCK_N=block_n,
        BLOCK_K=power_of_two(problem.geometry.c_out, 16, 32 if itemsize == 2 else 16),
        num_warps=warps(target, THREADS if block_n <= 128 else 2 * THREADS),
        num_stages=1,
    )


def separable_whole(problem: SeparableProblem, target: Target) -> SeparableWholeTile:
    """64 pixels in patches of 4 x 4, of which a thread holds four channels; 128 of them at a time, of many 256.

    Of up to 256 channels an H100 then holds two programs a multiprocessor or more: some filter while others multiply.
    Of more than 25 taps registers have room for the weights of two channels.
    """
    g = problem.geometry
    rows = power_of_two(g.out_size[1], 1, 4)
    cols = power_of_two(g.out_size[2], 1, 4 if rows > 1 else 8)
    wide = g.c_out > 256
    threads = 2 * THREADS if wide else THREADS
    block_k = power_of_two(g.c_out, 16, 256 if wide else 128)
    block_p = (4 if g.kernel[1] * g.kernel[2] <= 25 else 2) * threads // block_k
    # Of all channels together no more than two thirds of the shared memory holds.
    most = target.shared_bytes * 2 // 3 // (problem.itemsize * rows * cols * max(g.c_out, 16))
    return SeparableWholeTile(
        ROWS=rows,
        COLS=cols,
        # Of few channels more patches would hold them, but a product has sums of no more than 256 pixels.
        BLOCK_P=max(min(block_p, 1 << most.bit_length() - 1, 256 // (rows * cols)), 16 // (rows * cols)),
        # wgmma takes no fewer than 64 rows a warp group.
        BLOCK_N=64 * threads // THREADS,
        BLOCK_K=block_k,
        num_warps=warps(target, threads),
        num_stages=1,
    )


def _images(batch: int, itemsize: int) -> int:
    """Images beside each other, as many as fit in registers: each weight is then read once."""
    return power_of_two(batch, 16, 128 if itemsize == 2 else 64 if itemsize == 4 else 16)


def locally_connected(problem: LocalProblem, target: Target) -> LocallyConnectedTile:
    """64 output channels by all images: a filter streams through shared memory, 64 products of a row at a time.

    Few channels are no 64: deepface_local, with 16, would issue 72 us of instructions on an H100, by count, and 45 with
    16 rows and two warps.
    """
    g, itemsize = problem.geometry, problem.itemsize
    block_n = power_of_two(g.N, 16, 64 if itemsize < 8 else 16)
    return LocallyConnectedTile(
        BLOCK_M=_images(g.batch, itemsize),
        BLOCK_N=block_n,
        BLOCK_K=power_of_two(g.K if problem.flat else g.c_in_group, 16, 128 // itemsize),
        num_warps=warps(target, THREADS if block_n > 16 else THREADS // 2),
        num_stages=3 if problem.weight_vector() * itemsize >= 8 and itemsize < 8 else 1,
    )


def locally_connected_input_gradient(
    problem: LocalInputGradientProblem, target: Target
) -> LocallyConnectedInputGradientTile:
    """As forward, with the channels exchanged."""
    g, itemsize = problem.geometry, problem.itemsize
    aligned = not problem.flat and problem.weight_vector() * itemsize >= 8
    return LocallyConnectedInputGradientTile(
        BLOCK_M=_images(g.batch, itemsize),
        BLOCK_N=64 if itemsize == 2 else power_of_two(g.c_in_group, 16, 64 if itemsize == 4 else 16),
        BLOCK_K=power_of_two(g.c_out_group, 16, (64 if aligned else 32) if itemsize == 2 else 16),
        num_warps=warps(target, THREADS),
        num_stages=3 if aligned and itemsize < 8 else 1,
    )


def locally_connected_input_gradient_rolling(
    problem: LocalInputGradientProblem, target: Target
) -> LocallyConnectedInputGradientRollingTile:
    """Whole rows of the input, and as many products a step as keep enough weights under way."""
    g, itemsize = problem.geometry, problem.itemsize
    pairs = g.c_out_group * g.kernel[0] * g.kernel[1]
    block_m = min(_images(g.batch, itemsize), 64)
    return LocallyConnectedInputGradientRollingTile(
        BLOCK_M=block_m,
        # With 32 some 130 bytes spill on an A100, and 240 on an H100 with Triton 3.7.
        BLOCK_N=16,
        # In one step addresses are the same for every pixel: 356 instructions in the loop, 650 in each of two steps.
        BLOCK_K=power_of_two(pairs, 16, 256 if itemsize == 2 else 64 if itemsize == 4 else 16),
        COLUMNS=power_of_two(g.in_size[2], 16, 128),
        # 64 images in four warps spill 60 bytes on an H100 with Triton 3.7.
        num_warps=warps(target, 2 * THREADS if block_m == 64 else THREADS),
        num_stages=1,
    )


def locally_connected_input_gradient_shifted(
    problem: LocalInputGradientProblem, target: Target
) -> LocallyConnectedInputGradientShiftedTile:
    """One warp, which exchanges nothing with others: 32 images by 8 channels, three filter rows under way together.

    Runs of columns read a filter's width less one anew: of 9 taps and 71 columns three of 24 a third more than one, but
    an H100 has too few programs of any longer ones. More than nine taps lie in three vectors, not two.
    """
    wide = problem.geometry.kernel[2] > 9
    return LocallyConnectedInputGradientShiftedTile(
        BLOCK_M=16 if wide else power_of_two(problem.geometry.batch, 16, 32),
        BLOCK_N=8,
        BLOCK_K=16,
        COLUMNS=24,
        TOGETHER=2 if wide else 3,
        num_warps=1,
        num_stages=1,
    )


def locally_connected_weight_gradient(
    problem: LocalWeightGradientProblem, target: Target
) -> LocallyConnectedWeightGradientTile:
    """64 x 64 of the gradient: it is written once, and the batch is soon summed.

    Of few channels 16 x 128: finding out which pixels its columns read is most of what a program does. deepface_local
    would issue 170 us of instructions on an H100 with 64 x 64, by count, and 66 so.
    """
    g, itemsize = problem.geometry, problem.itemsize
    columns = g.K if problem.flat else g.c_in_group
    block_m = power_of_two(g.c_out_group, 16, 64 if itemsize < 8 else 16)
    few = block_m == 16 and itemsize == 2
    return LocallyConnectedWeightGradientTile(
        BLOCK_M=block_m,
        BLOCK_N=power_of_two(columns, 16, 128 if few else 64 if itemsize < 8 else 16),
        BLOCK_K=power_of_two(g.batch, 16, 64 // itemsize if itemsize < 8 else 16),
        num_warps=warps(target, THREADS // 2 if few else THREADS),
        num_stages=1,
    )
