"""Depthwise patches beyond what every kernel is tested for: odd patches, operands in every layout, refusals."""

import pytest
import torch
from cases import PATCH, case
from helpers import INTERPRETED, channels_last, compare, limit, name_of, permuted, random
from test_tiles import run

import triton_conv as tc
from triton_conv import dispatch
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels.depthwise_patch import DepthwisePatchTile
from triton_conv.reference import reference
from triton_conv.target import KNOWN


def framed(tensor):
    """channels_last inside a larger tensor of NaN, one channel in: strides that no dense tensor has."""
    whole = channels_last(torch.full([size + 2 for size in tensor.shape], float("nan")).to(tensor))
    return whole[tuple(slice(1, -1) for _ in tensor.shape)].copy_(tensor)


LAYERS = {
    "3x3": case("3x3", PATCH, "conv2d", (2, 9, 11, 15), (9, 1, 3, 3), groups=9, padding=1),
    "7x7": case("7x7", PATCH, "conv2d", (1, 6, 9, 8), (6, 1, 7, 7), groups=6, padding=3),
    "13x13": case("13x13", PATCH, "conv2d", (1, 2, 8, 5), (2, 1, 13, 13), groups=2, padding=6),
    "1x1": case("1x1", PATCH, "conv2d", (2, 3, 5, 4), (3, 1, 1, 1), groups=3),
    "5x1": case("5x1", PATCH, "conv2d", (2, 4, 8, 3), (4, 1, 5, 1), groups=4, padding=((1, 4), (0, 0))),
    "stride-over-kernel": case("stride", PATCH, "conv2d", (2, 3, 13, 14), (3, 1, 2, 2), groups=3, stride=(5, 3)),
    "dilation-past-the-border": case(
        "past", PATCH, "conv2d", (1, 3, 5, 4), (3, 1, 3, 3), groups=3, dilation=6, padding=6
    ),
    "stride-and-dilation": case(
        "both", PATCH, "conv2d", (2, 3, 12, 13), (3, 1, 3, 3), groups=3, stride=(3, 2), dilation=(1, 3), padding=2
    ),
    "rank-3": case(
        "rank-3", PATCH, "conv3d", (2, 5, 5, 4, 6), (5, 1, 3, 2, 3), groups=5, stride=(2, 1, 1), dilation=(1, 2, 1),
        padding=((2, 0), (1, 1), (0, 2)),
    ),
    "empty": case("empty", PATCH, "conv2d", (0, 4, 5, 5), (4, 1, 3, 3), groups=4, padding=1),
}  # fmt: skip
TILES = {
    "odd": DepthwisePatchTile(UNROLL=True, ROWS=3, COLS=7, BLOCK_P=8, BLOCK_C=4),
    "odd-rows-looped": DepthwisePatchTile(UNROLL=False, ROWS=3, COLS=5, BLOCK_P=4, BLOCK_C=16, num_warps=2),
    "row": DepthwisePatchTile(UNROLL=False, ROWS=1, COLS=14, BLOCK_P=16, BLOCK_C=2),
    "pixel": DepthwisePatchTile(UNROLL=True, ROWS=1, COLS=1, BLOCK_P=64, BLOCK_C=8),
}


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("layer", LAYERS)
def test_odd_patches(layer, tile):
    arguments = LAYERS[layer].tensors(torch.float32)
    arguments["input"] = channels_last(arguments["input"])
    made = tc.plan(getattr(tc, LAYERS[layer].function), **arguments)
    if not INTERPRETED and tile == "odd" and layer in ("13x13", "dilation-past-the-border"):
        pytest.skip("a GPU's compiler takes more than four minutes to unroll it")
    if TILES[tile].unfit(made.problem, made.target) is None:
        run(LAYERS[layer].function, arguments, PATCH, TILES[tile])


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.float64))],
    ids=name_of,
)
@pytest.mark.parametrize("weight", [None, channels_last, permuted, framed], ids=lambda f: f.__name__ if f else "stored")
@pytest.mark.parametrize("input", [channels_last, framed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("unroll", [False, True], ids=["looped", "unrolled"])
def test_layouts(unroll, input, weight, dtype):
    arguments = case("layouts", PATCH, "conv2d", (2, 24, 6, 7), (24, 1, 3, 3), groups=24, padding=1).tensors(dtype)
    arguments["input"] = input(arguments["input"])
    if weight:
        arguments["weight"] = weight(arguments["weight"])
    run("conv2d", arguments, PATCH, DepthwisePatchTile(UNROLL=unroll, ROWS=2, COLS=4, BLOCK_P=8, BLOCK_C=16))


@pytest.mark.parametrize("length", [7, 16, 33])
@pytest.mark.parametrize("cols", [1, 2, 4, 16])
def test_outputs_along_the_pixels(length, cols):
    # torch has no channels_last of rank 1: its output is contiguous whatever its input is.
    arguments = case("nlc", PATCH, "conv1d", (2, 6, length), (6, 1, 3), groups=6, padding=((2, 0),)).tensors(
        torch.float32
    )
    arguments["input"] = channels_last(arguments["input"])
    run("conv1d", arguments, PATCH, DepthwisePatchTile(ROWS=1, COLS=cols, BLOCK_P=4, BLOCK_C=4))


def test_input_gradient_is_the_same_kernel():
    # A transposed convolution of stride 1 is planned as a forward one whose weight has negative strides.
    arguments = case("flip", PATCH, "conv_transpose2d", (2, 5, 6, 7), (5, 1, 3, 2), groups=5, padding=1).tensors(
        torch.float32
    )
    arguments["input"] = channels_last(arguments["input"])
    made = tc.plan(tc.conv_transpose2d, **arguments)
    forced = dispatch.plan(made.problem, made.target, PATCH)
    output = torch.empty_strided(forced.out_shape, forced.out_strides, device=arguments["input"].device).fill_(
        float("nan")
    )
    forced.launch(arguments["input"], forced.arranged(arguments["weight"]), arguments["bias"], output)
    compare(output, reference("conv_transpose2d", arguments), limit(forced, output))


def plan_of(x, w, **arguments):
    return tc.plan(getattr(tc, f"conv{x.dim() - 2}d"), x, w, groups=x.shape[1], **arguments)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: plan_of(random((1, 4, 5, 5)), random((4, 1, 3, 3))), "not contiguous"),
        (lambda: plan_of(channels_last(random((1, 4, 5, 5))), random((8, 1, 3, 3))), "2 output channels"),
        (
            lambda: plan_of(
                channels_last(random((1, 4, 5, 5))), random((4, 1, 3, 3)), padding=1, padding_mode="reflect"
            ),
            "border is reflect",
        ),
        (lambda: plan_of(channels_last(random((1, 4, 5, 20))), random((4, 1, 3, 14))), "14 taps of a filter row"),
        (
            lambda: tc.plan(
                tc.conv_transpose2d, channels_last(random((1, 4, 5, 5))), random((4, 1, 3, 3)), stride=2, groups=4
            ),
            "transposed",
        ),
    ],
)
def test_refused_problems(made, message):
    made = made()
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, PATCH)


def test_refused_tiles():
    image = plan_of(channels_last(random((1, 64, 9, 9))), random((64, 1, 5, 5)), dilation=2).problem
    line = plan_of(channels_last(random((1, 64, 9))), random((64, 1, 3))).problem
    for problem, tile, message in (
        (image, DepthwisePatchTile(UNROLL=False, ROWS=2), "share no input"),
        (image, DepthwisePatchTile(ROWS=8, COLS=8), "accumulator registers"),
        (image, DepthwisePatchTile(ROWS=4, COLS=4, BLOCK_P=16), "registers a thread for sums and weights"),
        (line, DepthwisePatchTile(ROWS=1, COLS=7), "7 columns"),
    ):
        with pytest.raises(PlanError, match=message):
            dispatch.plan(problem, KNOWN["sm_90"], PATCH, tile)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("target", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("kernel", [(4,), (3, 3), (5, 5), (7, 7), (13, 13), (3, 3, 3), (7, 7, 7)], ids=str)
def test_defaults_fit(kernel, target, dtype):
    for channels in (3, 24, 64, 192):
        x = torch.empty(2, channels, *[32] * len(kernel), device="meta", dtype=getattr(torch, dtype))
        w = torch.empty(channels, 1, *kernel, device="meta", dtype=x.dtype)
        for stride in (1, 2):
            problem = plan_of(channels_last(x), w, stride=stride).problem
            assert default_tile(PATCH, problem, target).unfit(problem, target) is None
