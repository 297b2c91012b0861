"""Products of rows of pixels: odd rows and borders, both directions, weights in every layout, epilogue, refusals."""

import pytest
import torch
from cases import case
from helpers import DEVICE, amid_nan, channels_last, launches, name_of, random, serves_where_timed, sliced
from test_tiles import run

import triton_conv as tc
from triton_conv import dispatch
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels.implicit_gemm_rows import ImplicitGemmRowsTile, window
from triton_conv.target import KNOWN
from triton_conv.workloads import INPUT_GRADIENT, find

NAME = "implicit_gemm_rows"


def layer(id, function, input, weight, **options):
    return case(id, NAME, function, input, weight, w=channels_last, **options)


LAYERS = [
    layer("1d", "conv1d", (3, 16, 21), (24, 16, 4), padding=((3, 0),)),
    layer("whole-row", "conv2d", (2, 16, 4, 8), (32, 16, 4, 4), stride=2, padding=1),
    layer("stride-2", "conv2d", (2, 40, 7, 11), (72, 40, 3, 3), stride=2, padding=1, activation="silu"),
    layer("stride-3", "conv1d", (2, 16, 37), (24, 16, 5), stride=3, padding=1),
    layer("stride-8", "conv1d", (2, 24, 48), (16, 24, 16), stride=8, padding=4),
    layer("1x1", "conv2d", (2, 24, 5, 4), (16, 24, 1, 1)),
    layer("groups", "conv2d", (2, 80, 6, 5), (96, 40, 3, 2), padding=1, groups=2, stride=(1, 2)),
    layer("dilation-past-the-border", "conv2d", (1, 16, 5, 4), (16, 16, 3, 3), dilation=6, padding=6),
    layer("asymmetric", "conv2d", (2, 16, 6, 5), (16, 16, 3, 2), padding=((0, 2), (3, 0)), activation="relu"),
    layer("no-padding", "conv2d", (2, 16, 6, 9), (16, 16, 3, 4), dilation=(2, 1), stride=(3, 2)),
    layer("3d", "conv3d", (2, 16, 5, 4, 6), (24, 16, 3, 2, 3), dilation=(1, 2, 1), padding=((2, 0), (1, 1), (0, 2))),
    layer("transposed", "conv_transpose2d", (2, 40, 5, 6), (40, 24, 3, 2), padding=1, dilation=(1, 2)),
    layer("phases", "conv_transpose2d", (3, 16, 4, 4), (16, 24, 4, 4), stride=2, padding=1),
    layer("phases-groups", "conv_transpose2d", (2, 80, 4, 5), (80, 48, 3, 3), groups=2, stride=2, padding=(0, 2)),
    layer("output-padding", "conv_transpose2d", (1, 16, 5, 7), (16, 16, 3, 3), stride=2, padding=1, output_padding=1),
    layer("phases-dilated", "conv_transpose1d", (2, 16, 9), (16, 32, 5), stride=2, padding=3, dilation=3),
    layer("a-phase-without-tap", "conv_transpose2d", (2, 16, 3, 5), (16, 16, 1, 3), stride=(3, 2), dilation=(1, 2)),
    layer("phases-3d", "conv_transpose3d", (1, 16, 3, 4, 5), (16, 24, 2, 3, 2), stride=(2, 3, 1), padding=(1, 0, 1)),
]  # fmt: skip
BY_NAME = {layer.id: layer for layer in LAYERS}
TILES = {
    "small": ImplicitGemmRowsTile(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, BLOCK_T=1),
    "wide": ImplicitGemmRowsTile(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, BLOCK_T=4, num_stages=2),
    "segments": ImplicitGemmRowsTile(BLOCK_M=128, BLOCK_N=64, BLOCK_K=16, BLOCK_T=8, num_stages=2),
}


@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
def test_odd_rows(layer):
    arguments = layer.tensors(torch.bfloat16)
    made = tc.plan(getattr(tc, layer.function), **arguments)
    if reason := TILES["wide"].unfit(made.problem, made.target):
        # The interpreter runs them all.
        pytest.skip(f"the device is too small for the tile: {reason}")
    run(layer.function, arguments, NAME, TILES["wide"])


@pytest.mark.parametrize("tile", ["small", "segments"])
@pytest.mark.parametrize("name", ["1d", "stride-3", "whole-row", "asymmetric", "phases", "output-padding"])
def test_segments_of_one_and_eight(name, tile):
    run(BY_NAME[name].function, BY_NAME[name].tensors(torch.bfloat16), NAME, TILES[tile])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("name", ["whole-row", "phases"])
def test_default_tile(name, dtype):
    layer = BY_NAME[name]
    arguments = layer.tensors(dtype)
    made = tc.plan(getattr(tc, layer.function), **arguments)
    run(layer.function, arguments, NAME, default_tile(NAME, made.problem, KNOWN["sm_90"]))


def test_only_a_measurement_prefers_it(monkeypatch):
    layer = BY_NAME["whole-row"]
    made = tc.plan(getattr(tc, layer.function), **layer.tensors(torch.bfloat16))
    assert NAME in dispatch.family(made.problem)[0] and made.kernel.name == "implicit_gemm"
    serves_where_timed(monkeypatch, NAME, made.problem, KNOWN["sm_90"])


def test_rows_that_are_not_aligned_are_not_preferred():
    layer = BY_NAME["groups"]
    made = tc.plan(getattr(tc, layer.function), **layer.tensors(torch.bfloat16))
    assert NAME not in dispatch.family(made.problem)[0]
    assert dispatch.plan(made.problem, made.target, NAME).kernel.name == NAME


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stride-8", "phases-groups", "output-padding"])
def test_every_candidate(name):
    layer = BY_NAME[name]
    arguments = layer.tensors(torch.float16)
    problem = tc.plan(getattr(tc, layer.function), **arguments).problem
    for tile in candidates(NAME, problem, KNOWN["sm_90"]):
        launches.clear()
        run(layer.function, arguments, NAME, tile)


def framed(tensor):
    """NCHW inside a larger tensor of NaN: what lies beside a row must not be read, and no row is aligned."""
    return amid_nan(tensor, 1, 1)


@pytest.mark.parametrize("name", ["stride-2", "whole-row", "phases"])
def test_an_input_and_a_weight_in_a_frame(name):
    layer = BY_NAME[name]
    arguments = layer.tensors(torch.bfloat16)
    arguments["input"] = framed(arguments["input"])
    weight = arguments["weight"]
    frame = channels_last(torch.full([size + 2 for size in weight.shape], float("nan")).to(weight))
    arguments["weight"] = frame[tuple(slice(1, -1) for _ in weight.shape)].copy_(weight)
    run(layer.function, arguments, NAME, TILES["wide"])


@pytest.mark.parametrize("name", ["stride-2", "phases"])
def test_wide_indices(name, monkeypatch):
    monkeypatch.setattr("triton_conv.problem.INT32_LIMIT", 0)
    dispatch.plan.cache_clear()
    layer = BY_NAME[name]
    try:
        run(layer.function, layer.tensors(torch.bfloat16), NAME, TILES["wide"])
    finally:
        dispatch.plan.cache_clear()


def test_channels_of_the_next_group_do_not_matter():
    arguments = BY_NAME["groups"].tensors(torch.bfloat16)
    arguments["input"][:, 40:] = float("nan")
    made = tc.plan(tc.conv2d, **arguments)
    made = dispatch.plan(made.problem, made.target, NAME, TILES["wide"])
    output = torch.empty_strided(made.out_shape, made.out_strides, dtype=torch.bfloat16, device=DEVICE)
    made.launch(arguments["input"], made.arranged(arguments["weight"]), arguments["bias"], output)
    assert output[:, :48].isfinite().all()
    assert not output[:, 48:].isfinite().any()


def test_windows_by_hand():
    # Outputs 0..3 of stride 2 and padding 1 read columns -1..8: vectors of eight -1, 0 and 1; transposed, both phases
    # of inputs 0..3 read columns -1..4: vectors of four -1, 0 and 1.
    forward = next(iter(find("dcgan_t2d")))
    gradient = next(part for part in forward.parts() if part.part == INPUT_GRADIENT)
    assert window(gradient.problem(), 4) == (8, -1, 3)
    assert window(forward.problem(), 4) == (4, -1, 3)


X, W = (1, 16, 5, 5), (16, 16, 3, 3)


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        (channels_last(random(X, torch.bfloat16)), random(W, torch.bfloat16), {}, "neighbouring pixels are not"),
        (
            sliced(random(X, torch.bfloat16)), channels_last(random(W, torch.bfloat16)), {},
            "neighbouring pixels are not",
        ),
        (random(X), channels_last(random(W)), {}, "only 16-bit numbers"),
        (random(X, torch.bfloat16), random(W, torch.bfloat16), {}, "second dimension of its weight"),
        (
            random(X, torch.bfloat16), channels_last(random(W, torch.bfloat16)),
            {"padding": 1, "padding_mode": "circular"}, "border is circular",
        ),
        (
            random(X, torch.bfloat16), channels_last(random(W, torch.bfloat16)),
            {"function": "conv_transpose2d", "stride": 4}, "a row has 4 phases",
        ),
        (
            random((1, 8, 5, 5), torch.bfloat16), channels_last(random((16, 8, 3, 3), torch.bfloat16)), {},
            "fewer than 16 channels",
        ),
        (
            random((1, 16, 300), torch.bfloat16), channels_last(random((16, 16, 17), torch.bfloat16)),
            {"function": "conv1d"}, "17 taps of a filter row",
        ),
        (
            random((1, 16, 300), torch.bfloat16), channels_last(random((16, 16, 3), torch.bfloat16)),
            {"function": "conv1d", "dilation": 100}, "vectors is not unrolled",
        ),
    ],
)  # fmt: skip
def test_refused_problems(x, w, options, message):
    options = dict(options)
    made = tc.plan(getattr(tc, options.pop("function", "conv2d")), x, w, **options)
    assert made.kernel.name != NAME
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME)


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (ImplicitGemmRowsTile(BLOCK_T=16), "segments of at most 8 pixels"),
        (ImplicitGemmRowsTile(BLOCK_M=16, BLOCK_T=8), "no product of 16 columns"),
    ],
)
def test_refused_tiles(tile, message):
    problem = tc.plan(tc.conv_transpose2d, **BY_NAME["phases"].tensors(torch.bfloat16)).problem
    assert message in tile.unfit(problem, KNOWN["sm_90"])
