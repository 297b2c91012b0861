"""Strides in boxes: phases of the input and of the output, odd boxes and borders, empty phases, operands, refusals."""

from dataclasses import replace

import pytest
import torch
from cases import case
from helpers import channels_last, name_of, random
from test_depthwise_patch import framed
from test_tiles import run
from test_weight_gradient_boxed import wide_frame

import triton_conv as tc
from triton_conv import dispatch
from triton_conv.defaults import default_tile
from triton_conv.errors import ConfigError, PlanError
from triton_conv.kernels.strided_boxed import StridedBoxedTile
from triton_conv.target import KNOWN

NAME = "strided_boxed"


def layer(id, function, input, weight, **options):
    return case(id, NAME, function, input, weight, x=channels_last, w=channels_last, **options)


FORWARD = [
    layer("1d", "conv1d", (3, 32, 22), (24, 32, 4), stride=2, padding=((3, 0),)),
    layer("2d", "conv2d", (2, 64, 8, 12), (72, 64, 3, 3), stride=2, padding=1),
    layer("one-phase-of-many", "conv2d", (2, 32, 7, 9), (16, 32, 1, 1), stride=(3, 2), activation="silu"),
    layer("one-phase-in-the-padding", "conv2d", (2, 32, 7, 8), (16, 32, 1, 2), stride=2, dilation=2, padding=1),
    layer("kernel-of-the-stride", "conv2d", (3, 32, 6, 8), (16, 32, 2, 2), stride=2),
    layer("phases-of-one-length", "conv2d", (2, 32, 8, 11), (16, 32, 3, 2), stride=(4, 3)),
    layer("groups", "conv2d", (2, 64, 8, 5), (96, 32, 3, 2), stride=(2, 1), padding=1, groups=2),
    layer("dilation", "conv2d", (2, 32, 12, 14), (16, 32, 3, 3), stride=(3, 2), dilation=(1, 3), padding=2),
    layer("asymmetric", "conv2d", (2, 32, 8, 5), (16, 32, 3, 2), stride=(2, 1), padding=((0, 2), (3, 0))),
    layer("3d", "conv3d", (1, 32, 4, 4, 6), (24, 32, 3, 2, 3), stride=(2, 1, 2), padding=((2, 0), (1, 1), (0, 2))),
]
TRANSPOSED = [
    layer("1d", "conv_transpose1d", (2, 16, 9), (16, 32, 5), stride=3, padding=3, output_padding=2),
    layer("2d", "conv_transpose2d", (2, 40, 5, 6), (40, 24, 3, 3), stride=2, padding=1, output_padding=1),
    layer("pixel-shuffle", "conv_transpose2d", (2, 16, 4, 5), (16, 24, 2, 2), stride=2),
    layer("empty-phases", "conv_transpose2d", (2, 16, 4, 5), (16, 24, 1, 2), stride=(2, 3), padding=(0, 1)),
    layer("groups", "conv_transpose2d", (2, 80, 4, 5), (80, 48, 3, 4), stride=(1, 2), groups=2, padding=(0, 2)),
    layer("dilation", "conv_transpose2d", (2, 16, 5, 4), (16, 16, 3, 3), stride=(4, 3), dilation=2, padding=5),
    layer("phases-out-of-reach", "conv_transpose2d", (1, 16, 2, 1), (16, 16, 1, 3), stride=(1, 5), padding=(0, 1)),
    layer("3d", "conv_transpose3d", (1, 16, 3, 4, 3), (16, 24, 2, 3, 2), stride=(2, 2, 1), padding=(1, 0, 1)),
]
SMALL = StridedBoxedTile(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32)
WIDE = StridedBoxedTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_stages=3)


@pytest.mark.parametrize("tile", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("layer", FORWARD, ids=name_of)
def test_phases_of_the_input(layer, tile):
    run(layer.function, layer.tensors(torch.bfloat16), NAME, tile)


@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
@pytest.mark.parametrize("tile", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("layer", TRANSPOSED, ids=name_of)
def test_phases_of_the_output(layer, tile, together):
    run(layer.function, layer.tensors(torch.bfloat16), NAME, replace(tile, TOGETHER=together))
