"""The kernels of deformable gradients with tiles smaller and larger than the problem."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import DEVICE, DTYPES, channels_last, name_of, random
from test_deformable import tensors
from test_deformable_gradients import GRADIENTS, PRECISION, gradients, planned

from triton_conv.defaults import default_tile
from triton_conv.dispatch import plan
from triton_conv.kernels import KERNELS
from triton_conv.kernels.deformable_input_gradient import DeformableInputGradientTile
from triton_conv.kernels.deformable_weight_gradient import DeformableWeightGradientTile
from triton_conv.problem_deform import DeformInputGradientProblem
from triton_conv.reference import deform_conv2d as defined
from triton_conv.reference import tolerance
from triton_conv.target import KNOWN
from triton_conv.workloads import FLAGSHIPS, INPUT_GRADIENT

_SIZES = [(16, 16, 16), (64, 32, 16), (128, 16, 32)]
INPUT_TILES = [DeformableInputGradientTile(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k) for m, n, k in _SIZES]
WEIGHT_TILES = [
    DeformableWeightGradientTile(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, SPLITS=s)
    for (m, n, k), s in zip(_SIZES, (4, 1, 2), strict=True)
]


def forced(arguments, made, tile):
    """What a forced tile writes, as float64: the gradients of input, offset and mask, or of the weight."""
    made = plan(made.problem, made.target, made.kernel.name, tile)
    grad_output = random(made.problem.geometry.out_shape, arguments["input"].dtype, "grad")
    operands = {f"{name}_ptr": arguments[name] for name in ("offset", "mask")}
    operands |= {"x_ptr": arguments["input"], "w_ptr": arguments["weight"], "dy_ptr": grad_output}
    accumulator = made.problem.accumulator

    def nan(shape, strides):
        return torch.empty_strided(shape, strides, dtype=accumulator, device=DEVICE).fill_(math.nan)

    if isinstance(made.problem, DeformInputGradientProblem):
        problem = made.problem
        results = {
            "dx_ptr": nan(made.out_shape, made.out_strides).zero_(),
            "doffset_ptr": nan(problem.offset_shape, problem.offset_gradient_strides),
            "dmask_ptr": nan(problem.mask_shape, problem.mask_gradient_strides),
        }
    else:
        splits = tile.SPLITS
        size = math.prod(made.out_shape)
        results = {"dw_ptr": nan((splits, *made.out_shape), (size, *made.out_strides))}
    operands |= {"scale_ptr": None} | results
    made.launch(*(operands[name] for name in made.kernel.pointers))
    if "dw_ptr" in results:
        results["dw_ptr"] = results["dw_ptr"].sum(0)
    return [result.double() for result in results.values()], grad_output


def run_forced(arguments, kernel, tile):
    names = ["input", "offset", "mask"] if kernel == "deformable_input_gradient" else ["weight"]
    found, grad_output = forced(arguments, planned(arguments, kernel), tile)
    expected, _ = gradients(defined, arguments, names, grad_output, torch.float64)
    bound = 2 * tolerance(arguments["input"].dtype, grad_output.numel(), PRECISION, 5)
    for name, mine, theirs in zip(names, found, expected, strict=True):
        error = (mine - theirs).abs().max() / theirs.abs().max()
        assert error <= bound, f"{name}: error {error:.3g}"


def short(tile):
    return "-".join(str(value) for value in tile.sizes().values())


@pytest.mark.parametrize(
    "layout", [None, pytest.param(channels_last, marks=pytest.mark.slow)], ids=["contiguous", "channels-last"]
)
@pytest.mark.parametrize("tile", INPUT_TILES + WEIGHT_TILES, ids=short)
def test_forced_tiles(tile, layout):
    kernel = next(name for name, kernel in KERNELS.items() if isinstance(tile, kernel.tile_type))
    run_forced(tensors(3, torch.float32, layout=layout), kernel, tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kernel", GRADIENTS)
def test_safe_tiles(kernel, dtype):
    run_forced(tensors(3, dtype), kernel, KERNELS[kernel].safe_tile)


@pytest.mark.parametrize("kernel", GRADIENTS)
def test_default_tiles_of_a_gpu(kernel):
    arguments = tensors(3, torch.bfloat16, layout=channels_last)
    run_forced(arguments, kernel, default_tile(kernel, planned(arguments, kernel).problem, KNOWN["sm_90"]))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("fixed_point", [False, True])
def test_shared_memory_holds_sums_in_the_dtype_of_the_atomics(arch, fixed_point):
    layer = next(workload for workload in FLAGSHIPS if workload.name == "dcnv2")
    problem = replace(replace(layer, part=INPUT_GRADIENT).problem(), fixed_point=fixed_point)
    tile = DeformableInputGradientTile(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32)
    # Triton 3.7.1 takes 8192 and 16384 bytes on gfx942, where a store of bfloat16 would take 4096.
    assert tile.shared_bytes(problem, KNOWN[arch]) >= 64 * 32 * (8 if fixed_point else 4)
