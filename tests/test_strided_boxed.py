"""Strides in boxes: phases of the input and of the output, odd boxes and borders, empty phases, chunks, refusals."""

import pytest
import torch
from cases import case
from helpers import channels_last, name_of, random
from test_tiles import run

import triton_conv as tc
from triton_conv import dispatch
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels.strided_boxed import StridedBoxedTile
from triton_conv.target import KNOWN

NAME = "strided_boxed"


def layer(id, function, input, weight, **options):
    return case(id, NAME, function, input, weight, x=channels_last, w=channels_last, **options)


LAYERS = [
    layer("1d", "conv1d", (3, 16, 21), (24, 16, 4), stride=2, padding=((3, 0),)),
    layer("2d", "conv2d", (2, 40, 9, 12), (72, 40, 3, 3), stride=2, padding=1),
    layer("one-phase-of-many", "conv2d", (2, 24, 7, 9), (16, 24, 1, 1), stride=(3, 2), activation="silu"),
    layer("kernel-of-the-stride", "conv2d", (3, 16, 6, 7), (16, 16, 2, 2), stride=2),
    layer("groups", "conv2d", (2, 80, 7, 6), (96, 40, 3, 2), stride=(2, 1), padding=1, groups=2),
    layer("dilation", "conv2d", (2, 16, 12, 13), (16, 16, 3, 3), stride=(3, 2), dilation=(1, 3), padding=2),
    layer("dilation-of-one-phase", "conv2d", (1, 16, 12, 11), (16, 16, 3, 3), stride=(4, 2), dilation=(2, 2), padding=3),
    layer("asymmetric", "conv2d", (2, 16, 7, 5), (16, 16, 3, 2), stride=(2, 1), padding=((0, 2), (3, 0))),
    layer("3d", "conv3d", (2, 16, 5, 4, 6), (24, 16, 3, 2, 3), stride=(2, 1, 2), padding=((2, 0), (1, 1), (0, 2))),
    layer("transposed-1d", "conv_transpose1d", (2, 16, 9), (16, 32, 5), stride=3, padding=3, output_padding=2),
    layer("transposed-2d", "conv_transpose2d", (2, 40, 5, 6), (40, 24, 3, 3), stride=2, padding=1, output_padding=1),
    layer("transposed-pixels", "conv_transpose2d", (2, 16, 4, 5), (16, 24, 2, 2), stride=2),
    layer("transposed-empty-phases", "conv_transpose2d", (2, 16, 4, 5), (16, 24, 1, 2), stride=(2, 3), padding=(0, 1)),
    layer("transposed-groups", "conv_transpose2d", (2, 80, 4, 5), (80, 48, 3, 4), stride=(1, 2), groups=2, padding=(0, 2)),
    layer("transposed-dilation", "conv_transpose2d", (2, 16, 5, 4), (16, 16, 3, 3), stride=(4, 3), dilation=(2, 2), padding=5),
    layer("transposed-3d", "conv_transpose3d", (1, 16, 3, 4, 5), (16, 24, 2, 3, 2), stride=(2, 2, 1), padding=(1, 0, 1)),
]
TILES = {
    "small": StridedBoxedTile(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32),
    "wide": StridedBoxedTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_stages=3),
}


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
def test_odd_boxes(layer, tile):
    run(layer.function, layer.tensors(torch.bfloat16), NAME, TILES[tile])
