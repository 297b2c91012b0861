"""The weight gradient by filter rows: vectors of every width, shifts, strides, dilations, parts of rows, refusals."""

from dataclasses import replace

import pytest
import torch
from helpers import amid_nan, apart, channels_last, chosen_tile, dense, name_of, random
from test_depthwise_patch_weight_gradient import run
from test_gradient_tiles import flat
from test_weight_gradient_boxed import plan_of as planned

from triton_conv import dispatch, ops, ops_conv
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels.row_vectors import vector, y_vector
from triton_conv.kernels.weight_gradient_rows import WeightGradientRowsTile
from triton_conv.target import KNOWN
from triton_conv.workloads import WEIGHT_GRADIENT, find

NAME = "weight_gradient_rows"

# (input, weight, options), vectors of the input and of the output's gradient
LAYERS = {
    "1d": (((3, 16, 24), (24, 16, 3), {"padding": 1}), 8, 8),
    "1d-dilated": (((2, 8, 48), (8, 8, 11), {"padding": 25, "dilation": 5}), 8, 16),
    "1d-stride-8": (((2, 9, 64), (10, 9, 16), {"padding": 4, "stride": 8}), 8, 8),
    "1d-stride-3": (((2, 24, 19), (16, 24, 5), {"padding": ((1, 2),), "stride": 3, "dilation": 2}), 1, 1),
    "2d": (((2, 12, 5, 16), (40, 12, 3, 3), {"padding": 1}), 8, 16),
    "2d-stride-2": (((5, 12, 8, 8), (20, 12, 4, 4), {"stride": 2, "padding": 1}), 8, 16),
    "2d-stride-2-wide": (((2, 12, 6, 16), (8, 12, 4, 4), {"stride": 2, "padding": 1}), 8, 8),
    "2d-stride-4": (((2, 8, 8, 12), (8, 8, 3, 5), {"stride": (1, 4), "padding": (1, 2)}), 4, 8),
    "odd-rows": (((2, 16, 7, 11), (16, 16, 3, 3), {"padding": 1}), 1, 1),
    "odd-rows-stride-2": (((1, 32, 9, 9), (32, 16, 3, 3), {"stride": 2}), 1, 16),
    "rows-of-four": (((3, 16, 5, 4), (16, 16, 3, 2), {"padding": ((1, 1), (0, 1))}), 4, 4),
    "rows-of-two": (((9, 16, 3, 6), (16, 16, 3, 3), {"padding": 1}), 2, 2),
    "1x1": (((2, 16, 5, 8), (16, 16, 1, 1), {}), 8, 8),
    "groups": (((2, 24, 6, 8), (36, 8, 3, 3), {"padding": 1}), 8, 16),
    "stride-over-kernel": (((2, 16, 13, 16), (16, 16, 2, 2), {"stride": (5, 4)}), 8, 4),
    "dilation-past-the-border": (((1, 16, 5, 8), (16, 16, 3, 3), {"dilation": 6, "padding": 6}), 8, 8),
    # A row of one vector that serves the outputs of two: the second ones' taps read the vector before.
    "padding-past-the-border": (((2, 16, 3, 8), (16, 16, 1, 3), {"padding": (0, 5)}), 8, 16),
    "narrow-padded": (((2, 16, 3, 4), (16, 16, 3, 3), {"padding": 3}), 4, 8),
    "3d": (
        (
            (2, 16, 5, 4, 8), (24, 16, 3, 2, 3),
            {"stride": (2, 1, 1), "dilation": (1, 2, 1), "padding": ((2, 0), (1, 1), 1)},
        ),
        8, 16,
    ),
}  # fmt: skip
# The most splits are more than there are steps: those without any write zeros.
TILES = {
    "small": WeightGradientRowsTile(BLOCK_M=16, BLOCK_N=8, BLOCK_K=16, TAPS=4, SPLITS=3),
    "wide": WeightGradientRowsTile(BLOCK_M=64, BLOCK_N=32, BLOCK_K=64, TAPS=2, num_stages=3),
    "split": WeightGradientRowsTile(BLOCK_M=32, BLOCK_N=16, BLOCK_K=128, TAPS=16, SPLITS=5, num_stages=2),
}


@pytest.mark.parametrize(
    ("layer", "tile"),
    [
        pytest.param(layer, tile, marks=() if i % len(TILES) == j else pytest.mark.slow)
        for i, layer in enumerate(LAYERS)
        for j, tile in enumerate(TILES)
    ],
)
def test_odd_rows(layer, tile):
    sizes, *widths = LAYERS[layer]
    run(sizes, torch.bfloat16, lambda made: checked(made, TILES[tile], *widths), dense, dense, NAME)


def checked(made, tile, x_width, y_width):
    assert (vector(made.problem), y_vector(made.problem)) == (x_width, y_width)
    # At most four parts of a row.
    return replace(tile, TAPS=max(tile.TAPS, 4)) if made.problem.geometry.kernel[2] > 8 else tile


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("tile", ["safe", "sm_90"])
@pytest.mark.parametrize("layer", ["2d-stride-2", pytest.param("1d-dilated", marks=pytest.mark.slow)])
def test_chosen_tiles(layer, tile, dtype):
    def pick(made):
        return chosen_tile(NAME, made.problem, tile)

    run(LAYERS[layer][0], dtype, pick, dense, dense, NAME)


def cropped(tensor):
    """Inside a larger tensor of NaN in every dimension: rows and channels are apart, and begin at odd places."""
    return amid_nan(tensor, 1, 2)


@pytest.mark.parametrize(("x_layout", "y_layout"), [(cropped, dense), (apart, apart)], ids=name_of)
def test_other_layouts(x_layout, y_layout):
    run(LAYERS["2d-stride-2-wide"][0], torch.bfloat16, TILES["wide"], x_layout, y_layout, NAME)


def test_what_lies_beside_an_image_does_not_matter():
    # Shifted taps at a row's ends read the padding, not the row before or after.
    x, grad_output = random((2, 8, 4, 16), torch.bfloat16), random((2, 8, 4, 16), torch.bfloat16, "output")
    x[:, :, 1] = float("nan")
    made = ops_conv.plan_conv_weight_gradient(x, grad_output, *flat({"groups": 1, "padding": (0, 1)}, (8, 8, 1, 3)))
    made = dispatch.plan(made.problem, made.target, NAME, TILES["wide"])
    grad_output[:, :, 1] = 0
    assert ops.run_partial(made, x, grad_output).isnan().all()
    grad_output = grad_output[:, :, 2:].contiguous()
    made = ops_conv.plan_conv_weight_gradient(
        x[:, :, 2:], grad_output, *flat({"groups": 1, "padding": (0, 1)}, (8, 8, 1, 3))
    )
    made = dispatch.plan(made.problem, made.target, NAME, TILES["wide"])
    assert vector(made.problem) == 8
    assert ops.run_partial(made, x[:, :, 2:], grad_output).isfinite().all()


@pytest.mark.parametrize("name", ["dcgan_t2d", "modulated_t2d", "vocoder_t1d_s8", "vocoder_t1d_s2", "dilated_1d"])
def test_the_flagships_it_is_for(name):
    problem = replace(find(name)[0], part=WEIGHT_GRADIENT).problem()
    for arch in ("sm_80", "sm_90", "gfx942"):
        tile = default_tile(NAME, problem, KNOWN[arch])
        assert dispatch.plan(problem, KNOWN[arch], NAME, tile).kernel.name == NAME
    # Several taps of a filter share what they read.
    assert tile.TAPS >= 4
    assert 20 <= len(candidates(NAME, problem, KNOWN["sm_90"])) <= 200


def plan_of(*shapes, layout=dense, y_layout=dense, **options):
    return planned(*shapes, layout=layout, y_layout=y_layout, **options)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: plan_of((1, 16, 5, 5), (16, 16, 3, 3), layout=channels_last), "neighbouring pixels of the input"),
        (lambda: plan_of((1, 16, 5, 5), (16, 16, 3, 3), y_layout=channels_last), "not one run of pixels"),
        (lambda: plan_of((1, 16, 5, 5), (16, 16, 3, 3), padding=1, padding_mode="reflect"), "border is reflect"),
        (lambda: plan_of((1, 16, 5, 5), (16, 16, 3, 3), dtype=torch.float32), "only 16-bit numbers"),
        (lambda: plan_of((1, 16, 64), (16, 16, 17)), "more than 16"),
        (lambda: plan_of((0, 16, 5, 5), (16, 16, 3, 3)), "no pixel"),
    ],
)
def test_refused_problems(made, message):
    made = made()
    assert made.kernel.name == "weight_gradient"
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME)


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (WeightGradientRowsTile(TAPS=2), "leave more than 4 parts of a row of 11"),
        (WeightGradientRowsTile(BLOCK_K=4), "a vector serves 8 pixels"),
    ],
)
def test_refused_tiles(tile, message):
    made = plan_of((1, 16, 64), (16, 16, 11), padding=5)
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME, tile)
