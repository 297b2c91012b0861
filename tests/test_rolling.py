"""Depthwise rows that roll down the image, forward and weight gradient: segments, strips, layouts, 64-bit offsets."""

import itertools
from dataclasses import fields, replace

import pytest
import torch
from cases import case
from helpers import (
    channels_last,
    chosen_tile,
    chosen_tiles,
    compare,
    launches,
    limit,
    permuted,
    random,
    serves_where_timed,
)
from test_depthwise_patch import framed, plan_of
from test_depthwise_patch_weight_gradient import plan_of as plan_gradient_of
from test_depthwise_patch_weight_gradient import run as run_gradient
from test_large import LIMIT, spread
from test_tiles import run

import triton_conv as tc
from triton_conv import dispatch
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels import KERNELS
from triton_conv.kernels.depthwise_rolling import DepthwiseRollingTile
from triton_conv.kernels.depthwise_rolling_weight_gradient import DepthwiseRollingWeightGradientTile
from triton_conv.problem import WeightGradientProblem
from triton_conv.reference import reference
from triton_conv.static_model.trips import trips
from triton_conv.target import KNOWN
from triton_conv.workloads import FORWARD, WEIGHT_GRADIENT, find

assert spread  # a fixture

NAME, GRADIENT = "depthwise_rolling", "depthwise_rolling_weight_gradient"

# (input, filter, options): borders above and below a segment, fewer rows than a filter, rows that nothing reads.
LAYERS = {
    "3x3": ((2, 9, 11, 15), (3, 3), {"padding": 1}),
    "5x5": ((1, 6, 9, 8), (5, 5), {"padding": 2}),
    "7x7": ((1, 2, 8, 7), (7, 7), {"padding": 3}),
    "lower-than-filter": ((2, 3, 3, 5), (7, 3), {"padding": (3, 1)}),
    "no-padding": ((1, 3, 9, 8), (4, 2), {}),
    "one-row": ((2, 3, 1, 9), (1, 3), {"padding": 1}),
    "causal": ((2, 4, 8, 3), (5, 1), {"padding": ((4, 0), (0, 0))}),
    "ahead": ((2, 4, 8, 5), (4, 3), {"padding": ((0, 3), (2, 0))}),
    "padding-over-kernel": ((1, 3, 4, 4), (2, 3), {"padding": ((5, 6), (4, 5))}),
    "stride-2": ((2, 3, 13, 12), (5, 5), {"padding": 2, "stride": 2}),
    "stride-2-of-3": ((2, 3, 12, 9), (3, 3), {"padding": 1, "stride": 2}),
    "stride-over-kernel": ((2, 3, 13, 14), (2, 2), {"stride": (5, 3)}),
    "unlike-strides": ((2, 3, 9, 13), (3, 3), {"stride": (1, 2), "padding": 2}),
    "dilated-columns": ((2, 3, 12, 13), (3, 3), {"stride": (3, 2), "dilation": (1, 3), "padding": 2}),
    "empty": ((0, 4, 5, 5), (3, 3), {"padding": 1}),
}
TILES = {
    "segments": {"ROWS": 3, "COLS": 4, "BLOCK_P": 8, "BLOCK_C": 4},
    "whole": {"ROWS": 16, "COLS": 7, "BLOCK_P": 4, "BLOCK_C": 16},
    "row": {"ROWS": 1, "COLS": 5, "BLOCK_P": 2, "BLOCK_C": 8},
}
CHOSEN = (("safe", torch.float64), ("sm_90", torch.bfloat16))
QUICK = (
    "5x5-whole", "lower-than-filter-row", "no-padding-segments", "one-row-whole", "ahead-segments",
    "padding-over-kernel-segments", "stride-2-segments", "stride-over-kernel-whole", "dilated-columns-segments",
    "empty-whole",
)  # fmt: skip
PAIRS = [
    pytest.param(layer, tile, id=f"{layer}-{tile}", marks=() if f"{layer}-{tile}" in QUICK else pytest.mark.slow)
    for layer in LAYERS
    for tile in TILES
]


def tensors(layer, dtype=torch.float32, **more):
    x, kernel, options = LAYERS[layer]
    arguments = case(layer, NAME, "conv2d", x, (x[1], 1, *kernel), groups=x[1], **options, **more).tensors(dtype)
    return arguments | {"input": channels_last(arguments["input"])}


@pytest.mark.parametrize(("layer", "tile"), PAIRS)
def test_forward(layer, tile):
    run("conv2d", tensors(layer), NAME, DepthwiseRollingTile(**TILES[tile], AHEAD=tile != "whole"))


# Three splits of what may be a single segment: those without any write zeros.
@pytest.mark.parametrize(("layer", "tile"), PAIRS)
def test_weight_gradient(layer, tile):
    rolling = DepthwiseRollingWeightGradientTile(**TILES[tile], SPLITS=3)
    run_gradient(LAYERS[layer], torch.float32, rolling, name=GRADIENT)


@chosen_tiles(CHOSEN)
def test_chosen_tiles(tile, dtype):
    def pick(made, name):
        return chosen_tile(name, made.problem, tile)

    arguments = tensors("3x3", dtype, activation="silu")
    run("conv2d", arguments, NAME, pick(tc.plan(tc.conv2d, **arguments), NAME))
    run_gradient(LAYERS["3x3"], dtype, lambda made: pick(made, GRADIENT), name=GRADIENT)


@pytest.mark.parametrize(("input", "weight"), [(channels_last, permuted), (framed, framed)])
def test_layouts(input, weight):
    arguments = case("layouts", NAME, "conv2d", (2, 24, 6, 7), (24, 1, 3, 3), groups=24, padding=1).tensors(
        torch.bfloat16
    )
    arguments |= {"input": input(arguments["input"]), "weight": weight(arguments["weight"])}
    run("conv2d", arguments, NAME, DepthwiseRollingTile(ROWS=4, COLS=4, BLOCK_P=8, BLOCK_C=16))


@pytest.mark.parametrize(("x_layout", "y_layout"), [(channels_last, torch.clone), (framed, framed)])
def test_layouts_of_gradients(x_layout, y_layout):
    tile = DepthwiseRollingWeightGradientTile(**TILES["segments"], SPLITS=2)
    run_gradient(LAYERS["3x3"], torch.bfloat16, tile, x_layout, y_layout, GRADIENT)


def test_input_gradient_is_the_same_kernel():
    # A transposed convolution of stride 1 is planned as a forward one whose weight has negative strides.
    arguments = case("flip", NAME, "conv_transpose2d", (2, 5, 6, 7), (5, 1, 3, 2), groups=5, padding=1).tensors(
        torch.float32
    )
    arguments["input"] = channels_last(arguments["input"])
    made = tc.plan(tc.conv_transpose2d, **arguments)
    forced = dispatch.plan(made.problem, made.target, NAME)
    output = torch.full(forced.out_shape, float("nan"), device=arguments["input"].device)
    output = output.as_strided(forced.out_shape, forced.out_strides)
    forced.launch(arguments["input"], forced.arranged(arguments["weight"]), arguments["bias"], output)
    compare(output, reference("conv_transpose2d", arguments), limit(forced, output))


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["3x3", "stride-2"])
def test_every_candidate(layer):
    arguments = tensors(layer, torch.float16)
    for tile in candidates(NAME, tc.plan(tc.conv2d, **arguments).problem, KNOWN["sm_90"]):
        launches.clear()
        run("conv2d", arguments, NAME, tile)
    x, kernel, options = LAYERS[layer]
    made = plan_gradient_of(x, (x[1], 1, *kernel), **options)
    for tile in candidates(GRADIENT, made.problem, KNOWN["sm_90"]):
        run_gradient(LAYERS[layer], torch.float16, tile, name=GRADIENT)


@pytest.mark.parametrize("name", [NAME, GRADIENT])
def test_a_part_that_only_a_measurement_gives_to_it(name, monkeypatch):
    (layer,) = [layer for layer in find("convnext_dw7") if layer.dtype == "bfloat16"]
    part = FORWARD if name == NAME else WEIGHT_GRADIENT
    problem = replace(next(each for each in layer.parts() if each.part == part).problem(), stride_b=2)
    target = KNOWN["sm_90"]
    assert name in [kernel.name for kernel in dispatch.forms(problem, target)[0]]
    assert dispatch.plan(problem, target).kernel.name != name
    serves_where_timed(monkeypatch, name, problem, target)


def test_steps_by_hand():
    (layer,) = [layer for layer in find("convnext_dw7") if layer.dtype == "bfloat16"]
    problem = layer.problem()
    # Of 56 rows the input has no more; of two halves each reads three rows of the other.
    assert trips(NAME, problem, DepthwiseRollingTile(ROWS=56)) == (56,)
    assert trips(NAME, problem, DepthwiseRollingTile(ROWS=28)) == (31,)
    assert trips(NAME, problem, DepthwiseRollingTile(ROWS=14)) == (18.5,)
    # 64 images of 8 strips, in fours: 128 blocks of two segments.
    tile = DepthwiseRollingWeightGradientTile(ROWS=28, SPLITS=64)
    assert trips(GRADIENT, problem, tile) == (4, 28)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 4, 9), (4, 1, 3)), {}, "rank is 1, not 2"),
        (((1, 4, 9, 9), (4, 1, 3, 3)), {"dilation": (2, 1)}, "2 input rows apart"),
        (((1, 4, 16, 16), (4, 1, 15, 15)), {}, "225 taps do not fit in registers"),
        (((1, 4, 9, 9), (8, 1, 3, 3)), {}, "2 output channels"),
        (((1, 4, 9, 9), (4, 1, 3, 3)), {"padding": 1, "padding_mode": "reflect"}, "border is reflect"),
    ],
)
@pytest.mark.parametrize("name", [NAME, GRADIENT])
def test_refused_problems(shapes, options, message, name):
    if name == NAME:
        made = plan_of(channels_last(random(shapes[0])), random(shapes[1]), **options)
    else:
        made = plan_gradient_of(*shapes, **options)
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, name)


def test_refused_tiles():
    image = plan_of(channels_last(random((1, 64, 9, 9))), random((64, 1, 7, 7)), padding=3).problem
    gradient = plan_gradient_of((1, 64, 9, 9), (64, 1, 7, 7), padding=3).problem
    for problem, name, tile, message in (
        (image, NAME, DepthwiseRollingTile(COLS=14), "686 products are too many to unroll"),
        (image, NAME, DepthwiseRollingTile(BLOCK_P=8), "registers a thread for sums and weights"),
        (gradient, GRADIENT, DepthwiseRollingWeightGradientTile(BLOCK_P=8), "registers a thread for sums and weights"),
    ):
        with pytest.raises(PlanError, match=message):
            dispatch.plan(problem, KNOWN["sm_90"], name, tile)


@pytest.mark.parametrize("target", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("name", [NAME, GRADIENT])
def test_defaults_fit(name, target):
    """A problem that the predicate takes has a default tile that fits."""
    for (channels, taps, stride), dtype in itertools.product(
        ((3, 1, 1), (24, 3, 2), (192, 7, 1), (64, 8, 2), (24, 13, 1)), (torch.bfloat16, torch.float32, torch.float64)
    ):
        x = channels_last(torch.empty(2, channels, 32, 32, device="meta", dtype=dtype))
        w = torch.empty(channels, 1, taps, taps, device="meta", dtype=dtype)
        problem = plan_of(x, w, stride=stride).problem
        if name == GRADIENT:
            problem = WeightGradientProblem(**{f.name: getattr(problem, f.name) for f in fields(problem)})
        if KERNELS[name].unsuited(problem) is None:
            assert default_tile(name, problem, target).unfit(problem, target) is None


# A stride that has 64 bits itself, or one of which two rows pass them.
@pytest.mark.parametrize(("dim", "stride"), [(0, LIMIT + 24), (2, LIMIT // 2 + 16)], ids=["batch", "row"])
def test_beyond_32_bits(dim, stride, spread):
    arguments = case("wide", NAME, "conv2d", (2, 4, 4, 4), (4, 1, 3, 3), groups=4, padding=1).tensors(torch.float16)
    arguments["input"] = spread(channels_last(arguments["input"]), dim, stride)
    run("conv2d", arguments, NAME, DepthwiseRollingTile(**TILES["segments"]))
    layer, tile = ((2, 4, 4, 4), (3, 3), {"padding": 1}), DepthwiseRollingWeightGradientTile(**TILES["segments"])
    run_gradient(
        layer,
        torch.float16,
        tile,
        y_layout=lambda dy: spread(channels_last(dy), dim, stride),
        name=GRADIENT,
    )
