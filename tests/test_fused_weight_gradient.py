"""Depthwise weight gradients, whole rows and several of them a product: every pairing of rows, both kinds of blocks."""

import functools
from dataclasses import replace

import pytest
import torch
from helpers import channels_last, shifted
from test_banded import CASES, rows_of
from test_banded_weight_gradient import LAYERS, operands, planned, run
from test_large import LIMIT, spread

from triton_conv import dispatch
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels import KERNELS
from triton_conv.kernels.depthwise_fused_weight_gradient import DepthwiseFusedWeightGradientTile
from triton_conv.target import KNOWN
from triton_conv.workloads import FLAGSHIPS, WEIGHT_GRADIENT

assert spread  # a fixture

NAME = "depthwise_fused_weight_gradient"
SMALL = DepthwiseFusedWeightGradientTile(BLOCK_M=16, BLOCK_T=16, BLOCK_K=64, ROWS=4)
TARGETS = {name: () if name == "sm_90" else pytest.mark.slow for name in KNOWN}
run_fused = functools.partial(run, kernel=NAME)


def default(target):
    return lambda problem: default_tile(NAME, problem, KNOWN[target])


QUICK = (
    "width-28", "width-33", "height-3", "kernel-4", "stride-3", "causal", "padding-over-kernel", "pairs", "3d-strided",
    "many-images", "unaligned",
)  # fmt: skip


@pytest.mark.parametrize("id", [pytest.param(id, marks=() if id in QUICK else pytest.mark.slow) for id in LAYERS])
def test_default_tile(id):
    run_fused(LAYERS[id], torch.bfloat16, default("sm_90"), x=LAYERS[id].x)


@pytest.mark.parametrize("id", ["width-28", "3d"])
def test_float32(id):
    run_fused(LAYERS[id], torch.float32, default("sm_80"))


# Steps beyond the images and tiles beyond the blocks add zeros; blocks of 16 columns are a part of a row of 32.
@pytest.mark.parametrize("changes", [{"FUSED": 1, "STEPS": 4}, {"TILES": 2}, {"FUSED": 4, "FILTER_ROWS": 2}], ids=str)
@pytest.mark.parametrize(
    "id",
    [
        "stride-and-dilation", "dilation-2",
        *(pytest.param(id, marks=pytest.mark.slow) for id in ("height-5", "stride-2", "dilation-over-stride", "3d")),
    ],
)  # fmt: skip
def test_pairings_of_rows(id, changes):
    run_fused(LAYERS[id], torch.float32, lambda problem: replace(SMALL, **changes))


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 3, 6, 9])
def test_parts_of_a_filter(rows):
    tile = replace(SMALL, ROWS=2, FILTER_ROWS=rows)
    if rows == 6:
        with pytest.raises(PlanError, match="no whole part"):
            run_fused(LAYERS["3d"], torch.float32, lambda problem: tile)
    else:
        run_fused(LAYERS["3d"], torch.float32, lambda problem: tile)


@pytest.mark.parametrize("dy", [rows_of, channels_last])
@pytest.mark.parametrize("x", [rows_of, shifted])
def test_views(x, dy):
    run_fused(LAYERS["width-16"], torch.float16, default("sm_90"), x, dy)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "channel", "row"])
@pytest.mark.parametrize("name", ["x", "dy"])
def test_beyond_32_bits(name, dim, spread):
    def wide(tensor):
        return spread(tensor, dim, min(LIMIT + 24, (3 * LIMIT - 1) // max(tensor.shape[dim] - 1, 1)))

    layer = replace(LAYERS["width-8"], input=(3, 3, 3, 8))
    run_fused(layer, torch.float16, lambda problem: replace(SMALL, BLOCK_K=16, FILTER_ROWS=3), **{name: wide})


def test_it_is_not_for_a_multiplier():
    (layer,) = [layer for layer in CASES if layer.id == "multiplier"]
    x, grad_output, _ = operands(layer, torch.float16)
    made = planned(x, grad_output, layer)
    with pytest.raises(PlanError, match="3 output channels"):
        dispatch.plan(made.problem, made.target, NAME)


def test_tiles_that_do_not_fit_say_why():
    x, grad_output, _ = operands(LAYERS["width-28"], torch.float16)
    problem = planned(x, grad_output, LAYERS["width-28"]).problem
    for changes, reason in (
        ({"BLOCK_T": 32, "BLOCK_K": 16}, "read 28 columns, more than 16"),
        ({"ROWS": 2, "FUSED": 4}, "do not meet the rows of a filter with 4"),
        ({"BLOCK_M": 8}, "at least 16"),
    ):
        assert reason in replace(SMALL, **changes).mismatch(problem)


@pytest.mark.parametrize("target", [pytest.param(KNOWN[name], marks=marks, id=name) for name, marks in TARGETS.items()])
def test_defaults_fit_the_flagships(target):
    for workload in FLAGSHIPS:
        for variant in workload.variants(("float16", "float32")) if workload.kind == "depthwise" else ():
            problem = replace(variant, part=WEIGHT_GRADIENT).problem()
            if KERNELS[NAME].unsuited(problem) is None:
                assert default_tile(NAME, problem, target).unfit(problem, target) is None, variant.title
