"""The weight gradient of all taps in one program: odd rows and borders, splits, what lies around, refusals."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import channels_last, random
from test_depthwise_patch_weight_gradient import run
from test_gradient_tiles import flat
from test_weight_gradient_boxed import plan_of, wide_frame

from triton_conv import dispatch, ops, ops_conv
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels.weight_gradient_taps import KERNEL, WeightGradientTapsTile
from triton_conv.static_model.trips import trips
from triton_conv.target import KNOWN
from triton_conv.workloads import find

NAME = "weight_gradient_taps"
# (input, weight, options)
LAYERS = {
    "groups": ((2, 48, 3, 5), (80, 24, 3, 3), {"padding": 1}),
    "many-images": ((9, 16, 3, 5), (24, 16, 2, 3), {"padding": ((1, 0), (1, 1))}),
    "dilation": ((2, 16, 5, 6), (16, 16, 3, 2), {"padding": 3, "dilation": (3, 2)}),
    "valid": ((2, 24, 5, 4), (16, 24, 5, 2), {}),
    "more-channels-than-a-tile": ((1, 16, 3, 4), (72, 16, 2, 2), {"padding": 1}),
    "one-column": ((3, 16, 6, 1), (16, 16, 4, 1), {"padding": ((2, 1), (0, 0))}),
}
TILES = {
    "small": WeightGradientTapsTile(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, SPLITS=3),
    # More parts than rows: some are zero.
    "idle": WeightGradientTapsTile(BLOCK_M=64, BLOCK_N=16, BLOCK_K=64, SPLITS=7),
    "wide": WeightGradientTapsTile(BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, num_stages=3),
}
_QUICK = {"small": tuple(LAYERS), "idle": ("one-column",), "wide": ("many-images",)}


@pytest.mark.parametrize(
    ("layer", "tile"),
    [
        pytest.param(layer, tile, marks=() if layer in quick else pytest.mark.slow)
        for tile, quick in _QUICK.items()
        for layer in LAYERS
    ],
)
def test_odd_rows(layer, tile):
    run(LAYERS[layer], torch.bfloat16, TILES[tile], name=NAME)


def test_default_tile():
    def tile(made):
        return replace(default_tile(NAME, made.problem, KNOWN["sm_90"]), SPLITS=2)

    run(LAYERS["many-images"], torch.float16, tile, name=NAME)


def planned(layer):
    x, w, options = LAYERS[layer]
    return plan_of(x, w, **options).problem


@pytest.mark.slow
def test_every_candidate():
    layer = (9, 40, 3, 8), (72, 40, 3, 3), {"padding": 1}
    problem = plan_of(*layer[:2], **layer[2]).problem
    tiles = {replace(tile, SPLITS=2): None for tile in candidates(NAME, problem, KNOWN["sm_90"])}
    assert len(tiles) > 10
    for tile in tiles:
        run(layer, torch.bfloat16, tile, name=NAME)


def test_an_unaligned_gradient():
    run(LAYERS["many-images"], torch.bfloat16, TILES["small"], y_layout=wide_frame, name=NAME)


def test_other_groups_do_not_matter():
    x = channels_last(random((1, 48, 2, 4), torch.bfloat16))
    grad_output = channels_last(random((1, 80, 2, 4), torch.bfloat16, "output"))
    x[:, 24:] = grad_output[:, 40:] = float("nan")
    made = ops_conv.plan_conv_weight_gradient(x, grad_output, *flat({"groups": 2, "padding": 1}, (80, 24, 3, 3)))
    found = ops.run_partial(dispatch.plan(made.problem, made.target, NAME, TILES["small"]), x, grad_output)
    assert found[:40].isfinite().all()
    assert not found[40:].isfinite().any()


def test_steps_cover_all_rows():
    problem = planned("many-images")
    sides = TILES["small"].sides(problem)
    assert sides["BOX_H"] == sides["BOX_D"] == 1
    boxes = math.prod(-(-size // side) for size, side in ((9, sides["BOX_N"]), (5, sides["BOX_W"])))
    assert trips(NAME, problem, TILES["small"]) == (-(-boxes * 3 // 3),)
    assert trips(NAME, problem, TILES["idle"]) == (1,)


def test_wide_groups_take_a_program_a_multiprocessor():
    problem, target = find("wide_groups_56")[0].parts()[2].problem(), KNOWN["sm_90"]
    tile = default_tile(NAME, problem, target)
    assert tile.unfit(problem, target) is None
    assert KERNEL.grid(problem, tile) == target.sms
    # Not timed on any device yet: it serves where it is asked for.
    assert dispatch.plan(problem, target).kernel.name == "weight_gradient_boxed"
    assert NAME in [kernel.name for kernel in dispatch.untimed(problem, target)]


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        ((1, 16, 9), (16, 16, 3), {}, "no rows of a filter"),
        ((1, 16, 5, 5), (16, 16, 1, 3), {}, "no rows of a filter"),
        ((1, 16, 5, 5), (16, 16, 3, 3), {"stride": 2}, r"the stride is \(1, 2, 2\), not 1"),
        ((1, 16, 7, 7), (16, 16, 5, 5), {}, "sums of 25 taps"),
        ((1, 72, 5, 5), (80, 72, 3, 3), {}, "groups of 72 to 80 channels"),
        ((1, 16, 5, 5), (16, 16, 3, 3), {"padding": 1, "padding_mode": "reflect"}, "border is reflect"),
        ((1, 72, 5, 5), (16, 36, 3, 3), {}, "groups of 36 channels"),
    ],
)
def test_refused_problems(x, w, options, message):
    made = plan_of(x, w, **options)
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME)


def test_tiles_that_hold_too_much():
    tile = WeightGradientTapsTile(BLOCK_K=32, num_warps=4)
    with pytest.raises(PlanError, match="288 registers a thread for the sums of 9 taps"):
        dispatch.plan(planned("groups"), KNOWN["sm_90"], NAME, tile)
