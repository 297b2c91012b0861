"""Separable, shuffled and locally connected convolution with tiles of every size."""

import itertools

import pytest
import torch
from helpers import (
    DEVICE,
    compare,
    name_of,
    random,
)
from test_gradients import compare as compare_derivatives
from test_lectures import CASES, bound, cast, kernel_of

import triton_conv as tc
from triton_conv import dispatch, ops, ops_local, workloads
from triton_conv.defaults import default_tile
from triton_conv.kernels import KERNELS
from triton_conv.kernels.locally_connected import LocallyConnectedTile
from triton_conv.kernels.locally_connected_input_gradient import LocallyConnectedInputGradientTile
from triton_conv.kernels.locally_connected_weight_gradient import LocallyConnectedWeightGradientTile
from triton_conv.kernels.separable import SeparableTile
from triton_conv.kernels.shuffle_gemm import ShuffleGemmTile
from triton_conv.reference import reference
from triton_conv.target import KNOWN

pytestmark = pytest.mark.usefixtures("one_kernel")

SIZES = [(16, 16, 16), (64, 32, 16), (16, 64, 64)]
TILES = {
    "shuffle_gemm": [ShuffleGemmTile(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k) for m, n, k in SIZES],
    "separable": [SeparableTile(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k) for m, n, k in SIZES],
    "locally_connected": [LocallyConnectedTile(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k) for m, n, k in SIZES],
}
FORCED_ON = {
    "shuffle_gemm": ("shuffle-wide", "shuffle-3x3"),
    "separable": ("separable-multiplier", "separable-3d"),
    "locally_connected": ("local-1x1", "local-batch", "local-innermost"),
}
NAMES = {"w_ptr": "weight", "b_ptr": "bias", "x_ptr": "input", "mid_b_ptr": "mid_bias", "pw_ptr": "pointwise_weight"}


def run(name, pick, dtype):
    """The kernel of a case with the tile `pick(problem)`, launched by hand and compared."""
    function, arguments = CASES[name]
    arguments = cast(arguments, dtype)
    arguments = {k: v for k, v in arguments.items() if not k.endswith("activation")}
    made = tc.plan(getattr(tc, function), **arguments)
    made = dispatch.plan(made.problem, made.target, kernel_of(name), pick(made.problem))
    assert made.source == "forced"
    operands = arguments | {"weight": arguments.get("weight", arguments.get("depthwise_weight"))}
    operands["input"] = ops_local._arranged(operands["input"], made.problem.x_strides)
    output = torch.full(made.out_shape, float("nan"), dtype=dtype, device=DEVICE).as_strided(
        made.out_shape, made.out_strides
    )
    made.launch(*(operands.get(NAMES[pointer]) for pointer in made.kernel.pointers[:-1]), output)
    compare(output, reference(function, arguments), bound(made, dtype))


@pytest.mark.parametrize(
    ("name", "tile"),
    [
        pytest.param(name, tile, id=f"{name}-{tile.BLOCK_M}-{tile.BLOCK_N}-{tile.BLOCK_K}")
        for kernel, names in FORCED_ON.items()
        for name, tile in itertools.product(names, TILES[kernel])
    ],
)
def test_forced(name, tile):
    run(name, lambda problem: tile, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=name_of)
@pytest.mark.parametrize("name", ["shuffle", "separable", "local", "local-innermost"])
def test_safe_tile(name, dtype):
    run(name, lambda problem: KERNELS[kernel_of(name)].safe_tile, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("name", ["shuffle-3x3", "separable", "local-batch", "local-innermost"])
def test_default_tile_of_a_gpu(name, dtype):
    run(name, lambda problem: default_tile(kernel_of(name), problem, KNOWN["sm_90"]), dtype)


GRADIENT_TILES = [
    tile_type(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k)
    for tile_type in (LocallyConnectedInputGradientTile, LocallyConnectedWeightGradientTile)
    for m, n, k in SIZES
]


@pytest.mark.parametrize(
    "name", ["local", *(pytest.param(f"local-{n}", marks=pytest.mark.slow) for n in ("groups", "batch", "innermost"))]
)
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("tile", GRADIENT_TILES, ids=lambda t: f"{type(t).__name__[16:24]}-{t.BLOCK_M}-{t.BLOCK_N}")
def test_forced_gradients(name, tile, monkeypatch):
    function, arguments = CASES[name]
    arguments = cast(arguments, torch.float32)
    planned = dispatch.plan

    def forced(problem, target):
        made = planned(problem, target)
        return planned(problem, target, made.kernel.name, tile) if isinstance(tile, made.kernel.tile_type) else made

    monkeypatch.setattr(ops_local, "plan", forced)
    ops.forget_plans()
    leaves = {k: arguments[k].requires_grad_() for k in ("input", "weight")}
    result = getattr(tc, function)(**arguments)
    grad = random(result.shape, seed="g")
    mine = torch.autograd.grad(result, tuple(leaves.values()), grad)
    ops.forget_plans()
    exact = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    theirs = torch.autograd.grad(reference(function, arguments | exact), tuple(exact.values()), grad.double())
    compare_derivatives(mine, theirs, 1e-5)


@pytest.mark.parametrize("target", KNOWN.values(), ids=KNOWN)
def test_tiles_fit(target):
    for workload in workloads.LECTURES:
        for variant in workload.variants(("float16", "bfloat16", "float32", "float64"), both_formats=True):
            for part in variant.parts():
                problem = part.problem()
                kernel = dispatch.forms(problem, target)[0][0]
                for tile in (default_tile(kernel.name, problem, target), kernel.safe_tile):
                    assert tile.unfit(problem, target) is None, part.title
