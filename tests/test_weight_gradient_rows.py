"""The weight gradient by filter rows: vectors of every width, shifts, strides and dilations, parts of rows, refusals."""

from dataclasses import replace

import pytest
import torch
from helpers import DEVICE, channels_last, name_of, random
from test_depthwise_patch import framed
from test_depthwise_patch_weight_gradient import run
from test_gradient_tiles import flat

from triton_conv import dispatch, ops
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels.weight_gradient_rows import WeightGradientRowsTile, vector, y_vector
from triton_conv.reference import reference
from triton_conv.target import KNOWN

NAME = "weight_gradient_rows"

# (input, weight, options), vectors of the input and of the output's gradient
LAYERS = {
    "1d": (((3, 16, 24), (24, 16, 3), {"padding": 1}), 8, 8),
    "1d-dilated": (((2, 8, 48), (8, 8, 11), {"padding": 25, "dilation": 5}), 8, 16),
    "1d-stride-8": (((2, 9, 64), (10, 9, 16), {"padding": 4, "stride": 8}), 8, 8),
    "1d-stride-3": (((2, 24, 19), (16, 24, 5), {"padding": ((1, 2),), "stride": 3, "dilation": 2}), 1, 1),
    "2d": (((2, 40, 5, 16), (72, 40, 3, 3), {"padding": 1}), 8, 16),
    "2d-stride-2": (((5, 12, 8, 8), (20, 12, 4, 4), {"stride": 2, "padding": 1}), 8, 16),
    "2d-stride-2-wide": (((2, 12, 6, 16), (8, 12, 4, 4), {"stride": 2, "padding": 1}), 8, 8),
    "2d-stride-4": (((2, 8, 8, 12), (8, 8, 3, 5), {"stride": (1, 4), "padding": (1, 2)}), 4, 8),
    "odd-rows": (((2, 16, 7, 11), (16, 16, 3, 3), {"padding": 1}), 1, 1),
    "odd-rows-stride-2": (((1, 32, 9, 9), (32, 16, 3, 3), {"stride": 2}), 1, 16),
    "rows-of-four": (((3, 16, 5, 4), (16, 16, 3, 2), {"padding": ((1, 1), (0, 1))}), 4, 4),
    "rows-of-two": (((9, 16, 3, 6), (16, 16, 3, 3), {"padding": 1}), 2, 2),
    "1x1": (((2, 16, 5, 8), (16, 16, 1, 1), {}), 8, 8),
    "groups": (((2, 48, 6, 8), (72, 16, 3, 3), {"padding": 1}), 8, 16),
    "stride-over-kernel": (((2, 16, 13, 16), (16, 16, 2, 2), {"stride": (5, 4)}), 8, 4),
    "dilation-past-the-border": (((1, 16, 5, 8), (16, 16, 3, 3), {"dilation": 6, "padding": 6}), 8, 8),
    "3d": (
        ((2, 16, 5, 4, 8), (24, 16, 3, 2, 3), {"stride": (2, 1, 1), "dilation": (1, 2, 1), "padding": ((2, 0), (1, 1), 1)}),
        8, 16,
    ),
}  # fmt: skip
# The most splits are more than there are steps: those without any write zeros.
TILES = {
    "small": WeightGradientRowsTile(BLOCK_M=16, BLOCK_N=8, BLOCK_K=16, TAPS=4, SPLITS=3),
    "wide": WeightGradientRowsTile(BLOCK_M=64, BLOCK_N=32, BLOCK_K=64, TAPS=2, num_stages=3),
    "split": WeightGradientRowsTile(BLOCK_M=32, BLOCK_N=16, BLOCK_K=128, TAPS=16, SPLITS=5, num_stages=2),
}


@pytest.mark.parametrize(("layer", "tile"), [(layer, tile) for layer in LAYERS for tile in TILES])
def test_odd_rows(layer, tile, monkeypatch):
    sizes, x_width, y_width = LAYERS[layer]
    run(sizes, torch.bfloat16, lambda made: checked(made, TILES[tile], x_width, y_width), monkeypatch, torch.clone, torch.clone, NAME)


def checked(made, tile, x_width, y_width):
    assert (vector(made.problem), y_vector(made.problem)) == (x_width, y_width)
    # At most four parts of a row.
    return replace(tile, TAPS=max(tile.TAPS, 4)) if made.problem.geometry.kernel[2] > 8 else tile
