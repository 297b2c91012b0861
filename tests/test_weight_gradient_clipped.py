"""The weight gradient of the pixels that a tap reads: odd spans, strides and borders, splits, what is left out."""

import pytest
import torch
from helpers import channels_last, random
from test_depthwise_patch_weight_gradient import run
from test_gradient_tiles import flat
from test_weight_gradient_boxed import plan_of

from triton_conv import dispatch, ops, ops_conv
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels.weight_gradient_clipped import WeightGradientClippedTile, spans
from triton_conv.static_model.trips import trips
from triton_conv.target import KNOWN
from triton_conv.workloads import FLAGSHIPS, WEIGHT_GRADIENT

NAME = "weight_gradient_clipped"
# (input, weight, options)
LAYERS = {
    "1d": ((3, 16, 37), (24, 16, 4), {"padding": 12, "dilation": 8}),
    "2d": ((3, 24, 6, 6), (24, 24, 3, 3), {"padding": 3, "dilation": 3}),
    "groups": ((2, 32, 4, 5), (48, 16, 3, 2), {"padding": 2, "dilation": 2}),
    "stride": ((2, 16, 9, 8), (16, 16, 3, 3), {"stride": (2, 3), "padding": 3, "dilation": (3, 2)}),
    "one-sided": ((2, 16, 6, 5), (16, 16, 3, 2), {"padding": ((0, 4), (3, 0)), "dilation": (2, 3)}),
    "past-the-border": ((1, 16, 5, 4), (16, 16, 3, 3), {"dilation": 6, "padding": 6}),
    "3d": (
        (2, 16, 5, 3, 4), (24, 16, 3, 2, 3),
        {"stride": (2, 1, 1), "dilation": (2, 2, 1), "padding": ((4, 0), (1, 1), (0, 2))},
    ),
}  # fmt: skip
TILES = {
    "small": WeightGradientClippedTile(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, SPLITS=2),
    "wide": WeightGradientClippedTile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, SPLITS=2, num_stages=3),
}


@pytest.mark.parametrize(
    ("layer", "tile"),
    [
        pytest.param(layer, tile, marks=pytest.mark.slow if tile == "wide" and layer != "stride" else ())
        for layer in LAYERS
        for tile in TILES
    ],
)
def test_odd_spans(layer, tile):
    run(LAYERS[layer], torch.bfloat16, TILES[tile], name=NAME)


def test_default_tile():
    run(
        LAYERS["2d"],
        torch.float16,
        lambda made: default_tile(NAME, made.problem, KNOWN["sm_90"]),
        name=NAME,
    )


def planned(layer):
    x, w, options = LAYERS[layer]
    return plan_of(x, w, **options).problem


@pytest.mark.parametrize("layer", LAYERS)
def test_spans(layer):
    g = planned(layer).geometry
    for axis in range(3):
        for tap, found in enumerate(spans(planned(layer), axis)):
            reads = torch.arange(g.out_size[axis]) * g.stride[axis] + tap * g.dilation[axis] - g.pad_before[axis]
            assert found == int(((reads >= 0) & (reads < g.in_size[axis])).sum())


def test_taps_that_read_nothing_are_zero():
    # Of these taps the middle one alone reads the input: 6 x 0 is no gradient where the input holds no number.
    x = channels_last(torch.full((1, 16, 5, 4), float("nan"), dtype=torch.bfloat16)).to(random((1,)).device)
    grad_output = channels_last(random((1, 16, 5, 4), torch.bfloat16, "output"))
    arguments = flat({"groups": 1, "padding": 6, "dilation": 6}, (16, 16, 3, 3))
    made = ops_conv.plan_conv_weight_gradient(x, grad_output, *arguments)
    found = ops.run_partial(dispatch.plan(made.problem, made.target, NAME, TILES["wide"]), x, grad_output)
    assert found[..., 1, 1].isnan().all()
    found[..., 1, 1] = 0
    assert (found == 0).all()


@pytest.mark.parametrize(
    ("name", "share"), [("dilated_d12", 0.81), ("dilated_d36", 0.42)], ids=["dilated_d12", "dilated_d36"]
)
def test_steps_of_the_flagships(name, share):
    workload = next(workload for workload in FLAGSHIPS if workload.name == name)
    problem = next(part for part in workload.parts() if part.part == WEIGHT_GRADIENT).problem()
    tile = default_tile(NAME, problem, KNOWN["sm_90"])
    assert tile.unfit(problem, KNOWN["sm_90"]) is None
    (clipped,), (whole,) = (trips(kernel, problem, tile) for kernel in (NAME, "weight_gradient_boxed"))
    assert clipped < share * whole


def test_partial_sums_are_counted_as_they_are_stored():
    # As compiled for sm_90 (dilated_d36) all of them turn into the layout of their store at once.
    tile = WeightGradientClippedTile(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=2)
    assert tile.shared_bytes(planned("2d"), KNOWN["sm_90"]) == 4 * 128 * 256


def test_refused_problems():
    made = plan_of((2, 16, 40, 40), (16, 16, 3, 3), padding=1)
    with pytest.raises(PlanError, match=r"read the input for 9\d% of the pixels"):
        dispatch.plan(made.problem, made.target, NAME)
    # Not timed yet: it runs where a measurement or a caller says so.
    problem = planned("2d")
    assert NAME in [kernel.name for kernel in dispatch.forms(problem, KNOWN["sm_90"])[0]]
    assert dispatch.plan(problem, KNOWN["sm_90"]).kernel.name == "weight_gradient_boxed"
