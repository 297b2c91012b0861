"""Products in boxes: odd boxes and borders, both directions, operands in every layout, epilogue, refusals."""

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
from triton_conv.errors import PlanError
from triton_conv.kernels.implicit_gemm_boxed import ImplicitGemmBoxedTile
from triton_conv.target import KNOWN

NAME = "implicit_gemm_boxed"


def layer(id, function, input, weight, **options):
    return case(id, NAME, function, input, weight, x=channels_last, w=channels_last, **options)


LAYERS = [
    layer("1d", "conv1d", (3, 16, 21), (24, 16, 4), padding=((3, 0),)),
    layer("2d", "conv2d", (2, 40, 7, 11), (72, 40, 3, 3), padding=1),
    layer("many-images", "conv2d", (9, 16, 3, 5), (16, 16, 3, 3), padding=1, activation="silu"),
    layer("1x1", "conv2d", (2, 24, 5, 4), (16, 24, 1, 1)),
    layer("groups", "conv2d", (2, 80, 6, 5), (96, 40, 3, 2), padding=1, groups=2),
    layer("dilation-past-the-border", "conv2d", (1, 16, 5, 4), (16, 16, 3, 3), dilation=6, padding=6),
    layer("asymmetric", "conv2d", (2, 16, 6, 5), (16, 16, 3, 2), padding=((0, 2), (3, 0)), activation="relu"),
    layer("valid", "conv2d", (2, 16, 6, 9), (16, 16, 3, 4), dilation=(2, 1)),
    layer("3d", "conv3d", (2, 16, 5, 4, 6), (24, 16, 3, 2, 3), dilation=(1, 2, 1), padding=((2, 0), (1, 1), (0, 2))),
    layer("transposed", "conv_transpose2d", (2, 40, 5, 6), (40, 24, 3, 2), padding=1, dilation=(1, 2)),
    layer("transposed-groups", "conv_transpose2d", (2, 80, 4, 5), (80, 48, 3, 3), groups=2, padding=(0, 2)),
    layer("transposed-1d", "conv_transpose1d", (2, 16, 9), (16, 32, 5), padding=3),
    layer("transposed-3d", "conv_transpose3d", (1, 16, 3, 4, 5), (16, 24, 2, 3, 2), padding=(1, 0, 1)),
]
TILES = {
    "small": ImplicitGemmBoxedTile(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32),
    "wide": ImplicitGemmBoxedTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_stages=3),
}


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
def test_odd_boxes(layer, tile):
    run(layer.function, layer.tensors(torch.bfloat16), NAME, TILES[tile])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layer", [LAYERS[1], LAYERS[9]], ids=name_of)
def test_default_tile(layer, dtype):
    arguments = layer.tensors(dtype)
    problem = tc.plan(getattr(tc, layer.function), **arguments).problem
    run(layer.function, arguments, NAME, default_tile(NAME, problem, KNOWN["sm_90"]))


@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d"])
def test_weights_of_both_kinds_in_a_frame(function):
    # A frame of NaN around the weight: what lies beyond its channels must not be read.
    arguments = case("frame", NAME, function, (1, 24, 5, 6), (24, 24, 3, 3), padding=1, x=channels_last).tensors(
        torch.bfloat16
    )
    whole = channels_last(torch.full((26, 40, 3, 3), float("nan")).to(arguments["weight"]))
    arguments["weight"] = whole[1:-1, 8:32].copy_(arguments["weight"])
    run(function, arguments, NAME, TILES["wide"])


def test_channels_of_the_next_group_do_not_matter():
    arguments = LAYERS[4].tensors(torch.bfloat16)
    arguments["input"][:, 40:] = float("nan")
    made = tc.plan(tc.conv2d, **arguments)
    made = dispatch.plan(made.problem, made.target, NAME, TILES["wide"])
    output = torch.empty_strided(
        made.out_shape, made.out_strides, dtype=torch.bfloat16, device=arguments["input"].device
    )
    made.launch(arguments["input"], made.arranged(arguments["weight"]), arguments["bias"], output)
    assert output[:, :48].isfinite().all()
    assert not output[:, 48:].isfinite().any()


def plan_of(x, w, function="conv2d", **options):
    return tc.plan(getattr(tc, function), x, w, **options)


X, W = (1, 16, 5, 5), (16, 16, 3, 3)


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        (random(X, torch.bfloat16), random(W, torch.bfloat16), {}, "channels of the input are not contiguous"),
        (channels_last(random(X)), channels_last(random(W)), {}, "only 16-bit numbers"),
        (framed(random(X, torch.bfloat16)), channels_last(random(W, torch.bfloat16)), {}, "does not begin at"),
        (wide_frame(random(X, torch.bfloat16)), channels_last(random(W, torch.bfloat16)), {}, "does not begin at"),
        (
            channels_last(random(X, torch.bfloat16)), channels_last(random(W, torch.bfloat16)), {"stride": 2},
            "the stride is",
        ),
        (
            channels_last(random(X, torch.bfloat16)), channels_last(random(W, torch.bfloat16)),
            {"padding": 1, "padding_mode": "circular"}, "border is circular",
        ),
        (
            channels_last(random(X, torch.bfloat16)), random(W, torch.bfloat16), {"dilation": 2},
            "second dimension of its weight",
        ),
    ],
)  # fmt: skip
def test_refused_problems(x, w, options, message):
    made = plan_of(x, w, **options)
    assert made.kernel.name != NAME
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME)


def test_devices_without_bulk_copies():
    problem = plan_of(channels_last(random(X, torch.bfloat16)), channels_last(random(W, torch.bfloat16))).problem
    for target in ("sm_80", "gfx942"):
        with pytest.raises(PlanError, match="no engine for bulk copies"):
            dispatch.plan(problem, KNOWN[target], NAME, TILES["wide"])
        assert dispatch.plan(problem, KNOWN[target]).kernel.name == "implicit_gemm"
