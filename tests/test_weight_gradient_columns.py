"""The weight gradient by columns: rows of any length, every rank, padding by bits, splits, layouts, refusals."""

from dataclasses import replace

import pytest
import torch
from helpers import amid_nan, apart, channels_last, chosen_tile, dense, launches, name_of, random
from test_depthwise_patch_weight_gradient import run
from test_gradient_tiles import flat
from test_weight_gradient_boxed import plan_of as planned

from triton_conv import dispatch, ops, ops_conv
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels.weight_gradient_columns import KERNEL, WeightGradientColumnsTile, padded
from triton_conv.problem import WeightGradientProblem
from triton_conv.target import KNOWN
from triton_conv.workloads import WEIGHT_GRADIENT, find

NAME = "weight_gradient_columns"

# (input, weight, options), and whether a tap reads padding
LAYERS = {
    "1d": (((3, 6, 21), (20, 6, 3), {"padding": 1}), True),
    "1d-dilated": (((2, 4, 48), (8, 4, 11), {"padding": 25, "dilation": 5}), True),
    "1d-stride-3": (((2, 24, 19), (16, 24, 5), {"padding": ((1, 2),), "stride": 3, "dilation": 2}), True),
    "2d-odd": (((2, 6, 5, 7), (40, 6, 3, 3), {"padding": 1}), True),
    "transposed": (((1, 32, 9, 9), (32, 16, 3, 3), {"stride": 2}), False),
    "first-layer": (((1, 3, 13, 12), (20, 3, 7, 7), {"stride": 2, "padding": 3}), True),
    "asymmetric": (((2, 5, 6, 5), (9, 5, 2, 4), {"padding": ((0, 3), (1, 4)), "stride": (1, 2)}), True),
    "padded-after": (((2, 5, 6, 5), (9, 5, 3, 3), {"padding": ((0, 0), (0, 1))}), True),
    "1x1": (((2, 17, 5, 8), (16, 17, 1, 1), {}), False),
    "groups": (((2, 12, 6, 6), (36, 4, 3, 3), {"padding": 1}), True),
    "stride-over-kernel": (((2, 8, 13, 14), (8, 8, 2, 2), {"stride": (5, 3)}), False),
    "dilation-past-the-border": (((1, 8, 5, 4), (8, 8, 3, 3), {"dilation": 6, "padding": 6}), True),
    "3d": (
        (
            (2, 4, 5, 4, 6), (8, 4, 3, 2, 3),
            {"stride": (2, 1, 1), "dilation": (1, 2, 1), "padding": ((2, 0), (1, 1), (0, 2))},
        ),
        True,
    ),
}  # fmt: skip
# The most splits are more than there are steps: those without any write zeros.
TILES = {
    "small": WeightGradientColumnsTile(BLOCK_M=16, BLOCK_N=16, BLOCK_K=32, SPLITS=3),
    "wide": WeightGradientColumnsTile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_stages=3),
    "split": WeightGradientColumnsTile(BLOCK_M=32, BLOCK_N=128, BLOCK_K=128, SPLITS=5, num_stages=2),
}


@pytest.mark.parametrize(
    ("layer", "tile"),
    [
        pytest.param(
            layer, tile, marks=(pytest.mark.smoke,) if i == 4 and j == 1 else () if i % 3 == j else (pytest.mark.slow,)
        )
        for i, layer in enumerate(LAYERS)
        for j, tile in enumerate(TILES)
    ],
)
def test_odd_layers(layer, tile):
    sizes, reads_padding = LAYERS[layer]

    def pick(made):
        assert padded(made.problem) == reads_padding
        return TILES[tile]

    run(sizes, torch.bfloat16, pick, dense, dense, NAME)
    assert launches[NAME] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("tile", ["safe", "sm_90"])
@pytest.mark.parametrize("layer", ["transposed", pytest.param("1d-dilated", marks=pytest.mark.slow)])
def test_chosen_tiles(layer, tile, dtype):
    def pick(made):
        return chosen_tile(NAME, made.problem, tile)

    run(LAYERS[layer][0], dtype, pick, dense, dense, NAME)


@pytest.mark.slow
def test_every_candidate():
    layer = (2, 10, 9, 9), (72, 10, 3, 3), {"stride": 2, "padding": 1}
    problem = planned(*layer[:2], layout=dense, **layer[2]).problem
    tiles = {replace(tile, SPLITS=2): None for tile in candidates(NAME, problem, KNOWN["sm_90"])}
    assert len(tiles) > 5
    for tile in tiles:
        run(layer, torch.bfloat16, tile, dense, dense, NAME)


def cropped(tensor):
    """Inside a larger tensor of NaN in every dimension: rows and channels are apart, and begin at odd places."""
    return amid_nan(tensor, 1, 2)


@pytest.mark.parametrize(("x_layout", "y_layout"), [(cropped, dense), (apart, apart)], ids=name_of)
def test_other_layouts(x_layout, y_layout):
    run(LAYERS["2d-odd"][0], torch.bfloat16, TILES["wide"], x_layout, y_layout, NAME)


def test_indices_of_64_bits(monkeypatch):
    monkeypatch.setattr(WeightGradientProblem, "wide_index", lambda problem, block_m: True)
    layer = (2, 3, 3, 4, 7), (9, 3, 2, 2, 3), {"padding": 1, "stride": (1, 2, 1)}

    def pick(made):
        assert KERNEL.arguments(made.problem, TILES["wide"])["INDEX_INT64"]
        return TILES["wide"]

    run(layer, torch.bfloat16, pick, dense, dense, NAME)


def test_a_nan_stays_with_its_channel():
    """Past the last column, the last pixel, and in the padding, nothing is read that could spoil others."""
    x, grad_output = random((2, 5, 4, 7), torch.bfloat16), random((2, 20, 4, 7), torch.bfloat16, "output")
    x[:, 4] = grad_output[:, 7] = float("nan")
    made = ops_conv.plan_conv_weight_gradient(x, grad_output, *flat({"groups": 1, "padding": 1}, (20, 5, 3, 3)))
    found = ops.run_partial(dispatch.plan(made.problem, made.target, NAME, TILES["wide"]), x, grad_output)
    assert found[7].isnan().all() and found[:, 4].isnan().all()
    found[7], found[:, 4] = 0, 0
    assert found.isfinite().all()


@pytest.mark.parametrize("name", ["modulated_t2d", "dcgan_t2d", "dilated_1d", "vocoder_t1d_s8"])
def test_layers_that_it_takes(name):
    problem = replace(find(name)[0], part=WEIGHT_GRADIENT).problem()
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        tile = default_tile(NAME, problem, KNOWN[arch])
        assert dispatch.plan(problem, KNOWN[arch], NAME, tile).kernel.name == NAME
    assert 5 <= len(candidates(NAME, problem, KNOWN["sm_90"])) <= 200
    # Not timed on any device yet: it serves where it is asked for.
    assert dispatch.plan(problem, KNOWN["sm_90"]).kernel.name == "weight_gradient_rows"
    assert NAME in [kernel.name for kernel in dispatch.untimed(problem, KNOWN["sm_90"])]


def plan_of(*shapes, layout=dense, y_layout=dense, **options):
    return planned(*shapes, layout=layout, y_layout=y_layout, **options)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: plan_of((1, 16, 5, 8), (16, 16, 3, 3), layout=channels_last), "neighbouring pixels of the input"),
        (lambda: plan_of((1, 16, 5, 8), (16, 16, 3, 3), padding=1, y_layout=channels_last), "not one run of pixels"),
        (lambda: plan_of((1, 16, 5, 8), (16, 16, 3, 3), padding=1, padding_mode="reflect"), "border is reflect"),
        (lambda: plan_of((1, 16, 5, 8), (16, 16, 3, 3), dtype=torch.float32), "only 16-bit numbers"),
        (lambda: plan_of((1, 16, 64), (16, 16, 29)), "more than 30 taps long"),
        (lambda: plan_of((0, 16, 5, 8), (16, 16, 3, 3)), "no pixel"),
    ],
)
def test_refused_problems(made, message):
    made = made()
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME)


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (WeightGradientColumnsTile(BLOCK_K=16), "a warp reads 32 pixels, more than 16"),
        (WeightGradientColumnsTile(BLOCK_N=8), "a product has no 8 columns"),
    ],
)
def test_refused_tiles(tile, message):
    made = plan_of((1, 16, 64), (16, 16, 3))
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME, tile)
