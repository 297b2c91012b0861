"""Depthwise weight gradients by banded matrices: rows of every width, tiles of other targets, views, 64-bit offsets."""

from dataclasses import replace

import pytest
import torch
from helpers import DEVICE, INTERPRETED, channels_last, compare, expanded, launches, name_of, random, shifted, sliced
from test_banded import CASES, rows_of
from test_gradient_tiles import flat
from test_large import LIMIT, spread

from triton_conv import dispatch, ops_conv
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels import KERNELS
from triton_conv.kernels.depthwise_banded_weight_gradient import DepthwiseBandedWeightGradientTile
from triton_conv.reference import reference, tolerance
from triton_conv.target import KNOWN
from triton_conv.workloads import FLAGSHIPS, WEIGHT_GRADIENT

assert spread  # a fixture

BANDED = "depthwise_banded_weight_gradient"
LAYERS = {layer.id: layer for layer in CASES if layer.id != "multiplier"}


def planned(x, grad_output, layer):
    """The plan of the layer's weight gradient; float32 as tf32, which the interpreter multiplies exactly."""
    made = ops_conv.plan_conv_weight_gradient(x, grad_output, *flat(layer.arguments, layer.weight))
    problem = made.problem
    if problem.dtype == torch.float32:
        problem = replace(problem, precision="tf32")
    return dispatch.plan(problem, made.target)


def operands(layer, dtype, x=None, dy=None):
    """Input, output gradient, and the weight's gradient in float64."""
    arguments = layer.tensors(dtype)
    arguments = {name: value for name, value in arguments.items() if name not in ("bias", "activation")}
    arguments["input"] = (x or (lambda tensor: tensor))(arguments["input"])
    weight = arguments["weight"].detach().double().requires_grad_()
    output = reference(layer.function, arguments | {"weight": weight})
    grad_output = (dy or (lambda tensor: tensor))(random(output.shape, dtype, "output"))
    (expected,) = torch.autograd.grad(output, weight, grad_output.double())
    return arguments["input"], grad_output, expected


def run(layer, dtype, pick, x=None, dy=None, kernel=BANDED):
    """Every partial sum is written, and together they are the gradient."""
    x, grad_output, expected = operands(layer, dtype, x, dy)
    made = planned(x, grad_output, layer)
    assert made.kernel.name == BANDED
    made = dispatch.plan(made.problem, made.target, kernel, pick(made.problem))
    partial = torch.full((made.values["SPLITS"], *made.out_shape), float("nan"), dtype=torch.float32, device=DEVICE)
    launches.clear()
    made.launch(x, grad_output, partial)
    assert dict(launches) == {kernel: 1}
    precision = "ieee" if INTERPRETED else made.problem.precision
    compare(partial.double().sum(0).to(dtype), expected, tolerance(dtype, made.problem.geometry.M, precision))


def default(target):
    return lambda problem: default_tile(BANDED, problem, KNOWN[target])


@pytest.mark.parametrize("id", LAYERS)
def test_default_tile(id):
    run(LAYERS[id], torch.bfloat16, default("sm_90"), x=LAYERS[id].x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=name_of)
@pytest.mark.parametrize("id", ["width-28", "stride-3", "large", "3d", "causal"])
def test_dtypes(id, dtype):
    run(LAYERS[id], dtype, default("sm_80"))


# Steps beyond the images and tiles beyond the blocks add zeros.
@pytest.mark.parametrize(
    "changes",
    [{}, {"ROWS": 8, "STEPS": 4}, {"ROWS": 1, "TILES": 4}, {"FILTER_ROWS": 2, "TILES": 2, "STEPS": 2}],
    ids=str,
)
@pytest.mark.parametrize(
    "id", ["height-5", "stride-and-dilation", "dilation-over-stride", "dilation-2", "3d-strided", "many-images"]
)
def test_tiles_of_the_space(id, changes):
    tile = DepthwiseBandedWeightGradientTile(BLOCK_M=16, BLOCK_T=16, ROWS=2)
    run(LAYERS[id], torch.float32, lambda problem: replace(tile, **changes))


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 9])
def test_parts_of_a_filter(rows):
    tile = DepthwiseBandedWeightGradientTile(BLOCK_M=16, BLOCK_T=16, ROWS=2, FILTER_ROWS=rows)
    layer = LAYERS["3d"]
    if rows == 6:
        with pytest.raises(PlanError, match="no whole part"):
            run(layer, torch.float32, lambda problem: tile)
    else:
        run(layer, torch.float32, lambda problem: tile)


@pytest.mark.parametrize("dy", [None, rows_of, shifted, sliced, channels_last, expanded], ids=name_of)
@pytest.mark.parametrize("x", [None, rows_of, shifted, expanded], ids=name_of)
def test_views(x, dy):
    run(LAYERS["width-16"], torch.float16, default("sm_90"), x, dy)


@pytest.mark.parametrize("stride", [LIMIT + 24, 2**30 + 16])
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "channel", "row"])
@pytest.mark.parametrize("name", ["x", "dy"])
def test_beyond_32_bits(name, dim, stride, spread):
    def wide(tensor):
        return spread(tensor, dim, min(stride, (3 * LIMIT - 1) // max(tensor.shape[dim] - 1, 1)))

    layer = replace(LAYERS["width-8"], input=(3, 3, 3, 8))
    tile = DepthwiseBandedWeightGradientTile(BLOCK_M=16, BLOCK_T=16, BLOCK_K=32, ROWS=2, FILTER_ROWS=3)
    run(layer, torch.float16, lambda problem: tile, **{name: wide})


@pytest.mark.parametrize(
    ("id", "dtype", "x", "reason"),
    [
        ("width-8", torch.float16, channels_last, "not contiguous"),
        ("width-8", torch.float64, None, "exact products"),
        ("multiplier", torch.float16, None, "3 output channels"),
    ],
)
def test_what_it_is_not_for(id, dtype, x, reason):
    (layer,) = [layer for layer in CASES if layer.id == id]
    x, grad_output, _ = operands(layer, dtype, x)
    made = planned(x, grad_output, layer)
    assert made.kernel.name != BANDED
    with pytest.raises(PlanError, match=reason):
        dispatch.plan(made.problem, made.target, BANDED)


@pytest.mark.parametrize("target", KNOWN.values(), ids=KNOWN)
def test_defaults_fit_the_flagships(target):
    for workload in FLAGSHIPS:
        for variant in workload.variants(("float16", "float32")) if workload.kind == "depthwise" else ():
            problem = replace(variant, part=WEIGHT_GRADIENT).problem()
            if KERNELS[BANDED].unsuited(problem) is None:
                assert default_tile(BANDED, problem, target).unfit(problem, target) is None, variant.title
