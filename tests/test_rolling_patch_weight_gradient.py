"""Weight gradients of depthwise patches that roll down the depth, or the height: segments, trips, splits, refusals."""

import itertools
from dataclasses import fields

import pytest
import torch
from helpers import channels_last, chosen_tile, chosen_tiles, serves_where_timed
from test_depthwise_patch import plan_of as plan_forward_of
from test_depthwise_patch_weight_gradient import plan_of, run
from test_large import LIMIT, spread
from test_rolling_patch import LAYERS, flagship, framed

from triton_conv import dispatch
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels import KERNELS
from triton_conv.kernels.depthwise_rolling_patch_weight_gradient import DepthwiseRollingPatchWeightGradientTile
from triton_conv.problem import WeightGradientProblem
from triton_conv.static_model.trips import trips
from triton_conv.target import KNOWN
from triton_conv.workloads import WEIGHT_GRADIENT

assert spread  # a fixture

NAME = "depthwise_rolling_patch_weight_gradient"

# Trips whose last steps are past a segment's end; more splits than segments, of which those without any write zeros.
TILES = {
    "segments": DepthwiseRollingPatchWeightGradientTile(PLANES=3, ROWS=2, COLS=2, BLOCK_P=32, STEPS=2, SPLITS=2),
    "whole": DepthwiseRollingPatchWeightGradientTile(PLANES=16, ROWS=1, COLS=4, BLOCK_P=64, STEPS=1, SPLITS=3),
    "odd": DepthwiseRollingPatchWeightGradientTile(PLANES=2, ROWS=2, COLS=3, BLOCK_P=8, STEPS=3, SPLITS=5),
    "element": DepthwiseRollingPatchWeightGradientTile(PLANES=4, ROWS=1, COLS=1, BLOCK_P=128, SPLITS=1),
}
QUICK = (
    "vectors-whole", "depth-1-element", "flatter-than-filter-segments", "depth-alone-whole", "causal-odd",
    "padding-over-kernel-element", "stride-of-planes-segments", "stride-over-kernel-segments", "dilated-whole",
    "image-segments", "image-stride-2-odd", "row-whole", "empty-whole",
)  # fmt: skip
PAIRS = [
    pytest.param(layer, tile, id=f"{layer}-{tile}", marks=() if f"{layer}-{tile}" in QUICK else pytest.mark.slow)
    for layer in LAYERS
    for tile in TILES
]
CHOSEN = (("safe", torch.float64), ("sm_90", torch.bfloat16))


def forced(layer, dtype, tile, x_layout=torch.clone, y_layout=torch.clone):
    run(LAYERS[layer] if isinstance(layer, str) else layer, dtype, tile, x_layout, y_layout, NAME)


@pytest.mark.parametrize(("layer", "tile"), PAIRS)
def test_weight_gradient(layer, tile):
    forced(layer, torch.float32, TILES[tile])


@chosen_tiles(CHOSEN)
def test_chosen_tiles(tile, dtype):
    def pick(made):
        return chosen_tile(NAME, made.problem, tile)

    forced("vectors", dtype, pick)


def test_several_outputs_a_channel():
    forced(((2, 3, 3, 4, 8), (6, 1, 3, 3, 3), {"padding": 1}), torch.float32, TILES["segments"])


@pytest.mark.parametrize(("x", "dy"), [(framed, channels_last), (torch.clone, framed)])
def test_layouts(x, dy):
    forced("vectors", torch.bfloat16, TILES["segments"], x, dy)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [((1, 2, 8, 4, 8), (3, 2, 3), {"padding": 1}), LAYERS["image"]])
def test_candidates(layer):
    x, kernel, options = layer
    made = plan_of(x, (x[1], 1, *kernel), layout=torch.clone, **options)
    tried = candidates(NAME, made.problem, KNOWN["sm_90"])
    assert len(tried) > 64
    for tile in tried[:: len(tried) // 16]:
        forced(layer, torch.float16, tile)


def test_a_part_that_only_a_measurement_gives_to_it(monkeypatch):
    problem, target = flagship(WEIGHT_GRADIENT), KNOWN["sm_90"]
    assert NAME in [kernel.name for kernel in dispatch.untimed(problem, target)]
    assert dispatch.plan(problem, target).kernel.name != NAME
    serves_where_timed(monkeypatch, NAME, problem, target)


@pytest.mark.parametrize(
    ("planes", "count", "expected"), [(32, 1, (49 / 7, 32)), (16, 2, (98 / 7, 8)), (12, 3, (147 / 7, 11 / 3))]
)
def test_steps_by_hand(planes, count, expected):
    # 8 images of 28 pairs of rows, 7 vectors of columns: 49 blocks of 32. Of 32 planes the last segment of 12 has 8.
    tile = DepthwiseRollingPatchWeightGradientTile(PLANES=planes, BLOCK_P=32, STEPS=count, SPLITS=7)
    assert trips(NAME, flagship(WEIGHT_GRADIENT), tile) == pytest.approx(expected)
    assert KERNELS[NAME].grid(flagship(WEIGHT_GRADIENT), tile) == 7 * 64


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 4, 9), (4, 1, 3)), {}, "rank is 1"),
        (((1, 4, 9, 9, 9), (4, 1, 3, 3, 3)), {"dilation": (2, 1, 1)}, "planes lie 2 input planes apart"),
        (((1, 4, 9, 9), (4, 1, 3, 3)), {"dilation": (3, 1)}, "rows lie 3 input rows apart"),
        (((1, 4, 9, 9, 9), (4, 1, 7, 7, 7)), {}, "343 taps do not fit in registers"),
        (((1, 4, 9, 9, 9), (4, 1, 3, 3, 3)), {"padding": 1, "padding_mode": "reflect"}, "border is reflect"),
        (((1, 4, 9, 9), (4, 1, 3, 3)), {"layout": channels_last}, "neighbouring pixels are not contiguous"),
        (((1, 8, 9, 9), (4, 2, 3, 3)), {"groups": 4}, "a group has 2 input channels"),
    ],
)
def test_refused_problems(shapes, options, message):
    made = plan_of(*shapes, **{"layout": torch.clone} | options)
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME)


def test_it_is_no_forward_form():
    with pytest.raises(PlanError, match="no weight gradient"):
        dispatch.plan(flagship(), KNOWN["sm_90"], NAME)


def test_refused_tiles():
    for changes, message in (
        ({"ROWS": 2, "COLS": 8, "STEPS": 3}, "1296 products are too many to unroll"),
        ({"ROWS": 4, "COLS": 8, "BLOCK_P": 128, "num_warps": 2}, "registers a thread for sums"),
    ):
        tile = DepthwiseRollingPatchWeightGradientTile(**changes)
        with pytest.raises(PlanError, match=message):
            dispatch.plan(flagship(WEIGHT_GRADIENT), KNOWN["sm_90"], NAME, tile)


def backward(problem):
    return WeightGradientProblem(**{f.name: getattr(problem, f.name) for f in fields(problem)})


@pytest.mark.parametrize("target", KNOWN.values(), ids=KNOWN)
def test_defaults_fit(target):
    """A problem that the predicate takes has a default tile that fits."""
    for (taps, stride, width, channels), dtype in itertools.product(
        (
            ((3, 3, 3), 1, 56, 24),
            ((3, 3, 3), 2, 7, 5000),
            ((5, 5, 5), 1, 33, 3),
            ((1, 1, 1), 1, 1, 1),
            ((7, 7), 2, 14, 24),
            ((5, 5), 1, 28, 24),
        ),
        (torch.bfloat16, torch.float32, torch.float64),
    ):
        x = torch.empty(2, channels, *(16,) * (len(taps) - 1), width, device="meta", dtype=dtype)
        w = torch.empty(channels, 1, *taps, device="meta", dtype=dtype)
        problem = backward(plan_forward_of(x, w, stride=stride, padding=taps[0] // 2).problem)
        if KERNELS[NAME].unsuited(problem) is None:
            assert default_tile(NAME, problem, target).unfit(problem, target) is None


@pytest.mark.parametrize("name", [NAME, "depthwise_rolling_patch"])
def test_patches_of_many_deep_images_pass_32_bits(name):
    # A block of 128 patches of one pixel a plane has 128 images, which may lie apart.
    depth = 2**10
    for apart, wide in ((2**20, False), (2**26, True)):
        x = torch.empty_strided((128, 1, depth, 1, 1), (apart, depth, 1, 1, 1), device="meta", dtype=torch.float16)
        problem = plan_forward_of(x, torch.empty(1, 1, 1, 1, 1, device="meta", dtype=torch.float16)).problem
        problem = problem if name != NAME else backward(problem)
        assert KERNELS[name].arguments(problem, KERNELS[name].safe_tile)["INDEX_INT64"] is wide


# A stride that has 64 bits itself, or one of which two planes pass them; of the input and of the output's gradient.
@pytest.mark.parametrize(("dim", "stride"), [(0, LIMIT + 24), (2, LIMIT // 2 + 16)], ids=["batch", "plane"])
def test_beyond_32_bits(dim, stride, spread):
    layer = ((2, 2, 3, 2, 4), (3, 3, 3), {"padding": 1})
    for operand in (0, 1):
        layouts = [torch.clone, torch.clone]
        layouts[operand] = lambda tensor: spread(tensor, dim, stride)
        forced(layer, torch.float16, TILES["segments"], *layouts)
