"""Depthwise patches that roll down the depth, or the height: segments, patches, layouts, 64-bit offsets, refusals."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import case
from helpers import (
    amid_nan,
    chosen_tile,
    chosen_tiles,
    compare,
    launches,
    limit,
    permuted,
    random,
    serves_where_timed,
)
from test_depthwise_patch import plan_of
from test_large import LIMIT, spread
from test_tiles import run

import triton_conv as tc
from triton_conv import dispatch
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels import KERNELS
from triton_conv.kernels.depthwise_rolling_patch import DepthwiseRollingPatchTile
from triton_conv.kernels.planes import row_pieces
from triton_conv.reference import reference
from triton_conv.static_model.trips import trips
from triton_conv.target import KNOWN
from triton_conv.workloads import FORWARD, INPUT_GRADIENT, find

assert spread  # a fixture

NAME = "depthwise_rolling_patch"

# (input, filter, options): borders of a segment, planes fewer than a filter's, planes and columns that nothing reads.
LAYERS = {
    "3x3x3": ((2, 2, 5, 4, 9), (3, 3, 3), {"padding": 1}),
    "vectors": ((1, 3, 3, 4, 16), (3, 3, 3), {"padding": 1}),
    "depth-1": ((2, 2, 1, 4, 8), (3, 3, 3), {"padding": 1}),
    "flatter-than-filter": ((1, 3, 2, 3, 8), (5, 2, 3), {"padding": (2, 1, 1)}),
    "no-padding": ((1, 2, 6, 4, 9), (4, 2, 2), {}),
    "depth-alone": ((2, 2, 6, 3, 8), (5, 1, 1), {"padding": (2, 0, 0)}),
    "planes-alone": ((2, 2, 3, 5, 8), (1, 3, 3), {"padding": (0, 1, 1)}),
    "causal": ((1, 2, 5, 3, 7), (4, 1, 3), {"padding": ((3, 0), (0, 0), (2, 0))}),
    "ahead": ((1, 2, 5, 3, 6), (3, 2, 2), {"padding": ((0, 2), (1, 0), (0, 3))}),
    "padding-over-kernel": ((1, 2, 2, 3, 4), (2, 2, 3), {"padding": ((4, 3), (2, 3), (5, 4))}),
    "stride-2": ((1, 3, 6, 7, 16), (3, 3, 5), {"padding": (1, 1, 2), "stride": 2}),
    "stride-of-planes": ((1, 3, 4, 6, 12), (3, 3, 3), {"padding": 1, "stride": (1, 2, 2)}),
    "stride-over-kernel": ((1, 2, 7, 6, 9), (2, 1, 2), {"stride": (3, 2, 4)}),
    "dilated": ((1, 2, 4, 6, 12), (2, 3, 3), {"padding": (1, 2, 3), "dilation": (1, 2, 3)}),
    "image": ((2, 3, 9, 12), (5, 5), {"padding": 2}),
    "image-stride-2": ((2, 3, 8, 9), (3, 4), {"padding": ((1, 0), (2, 1)), "stride": 2, "dilation": (1, 2)}),
    "row": ((2, 3, 1, 8), (3, 3), {"padding": 1}),
    "empty": ((0, 4, 5, 5, 5), (3, 3, 3), {"padding": 1}),
}
TILES = {
    "segments": DepthwiseRollingPatchTile(PLANES=2, ROWS=2, COLS=4, BLOCK_P=32),
    "whole": DepthwiseRollingPatchTile(PLANES=16, ROWS=1, COLS=8, BLOCK_P=64, num_warps=2),
    "odd": DepthwiseRollingPatchTile(PLANES=3, ROWS=3, COLS=5, BLOCK_P=16),
    "element": DepthwiseRollingPatchTile(PLANES=4, ROWS=1, COLS=1, BLOCK_P=128),
}
QUICK = (
    "3x3x3-segments", "vectors-whole", "depth-1-element", "flatter-than-filter-segments", "no-padding-odd",
    "depth-alone-whole", "planes-alone-segments", "causal-whole", "ahead-segments", "padding-over-kernel-element",
    "stride-2-segments", "stride-of-planes-whole", "stride-over-kernel-odd", "dilated-segments", "image-whole",
    "image-stride-2-segments", "row-whole", "empty-whole",
)  # fmt: skip
PAIRS = [
    pytest.param(layer, tile, id=f"{layer}-{tile}", marks=() if f"{layer}-{tile}" in QUICK else pytest.mark.slow)
    for layer in LAYERS
    for tile in TILES
]
CHOSEN = (("safe", torch.float64), ("sm_90", torch.bfloat16), ("sm_90", torch.float16))


def tensors(layer, dtype=torch.float32, multiplier=1, **more):
    x, kernel, options = LAYERS[layer]
    weight = (multiplier * x[1], 1, *kernel)
    return case(layer, NAME, of(layer), x, weight, groups=x[1], **options, **more).tensors(dtype)


def of(layer):
    return f"conv{len(LAYERS[layer][1])}d"


def flagship(part=FORWARD):
    (layer,) = [layer for layer in find("dw3d") if layer.dtype == "bfloat16"]
    return next(each for each in layer.parts() if each.part == part).problem()


@pytest.mark.parametrize(("layer", "tile"), PAIRS)
def test_forward(layer, tile):
    run(of(layer), tensors(layer), NAME, TILES[tile])


@chosen_tiles(CHOSEN)
def test_chosen_tiles(tile, dtype):
    arguments = tensors("vectors", dtype, multiplier=2, activation="silu")
    problem = tc.plan(tc.conv3d, **arguments).problem
    run(
        "conv3d",
        arguments,
        NAME,
        chosen_tile(NAME, problem, tile),
    )


def framed(tensor):
    """Inside a larger tensor of NaN, a vector of columns in: strides that no dense tensor has."""
    return amid_nan(tensor, 4, 4)


@pytest.mark.parametrize(("input", "weight", "activation"), [(framed, permuted, "gelu"), (torch.clone, framed, None)])
def test_layouts(input, weight, activation):
    arguments = tensors("vectors", torch.bfloat16, activation=activation, bias=activation is None)
    arguments |= {"input": input(arguments["input"]), "weight": weight(arguments["weight"])}
    run("conv3d", arguments, NAME, TILES["segments"])


def test_input_gradient_is_the_same_kernel():
    # A transposed convolution of stride 1 is planned as a forward one whose weight has negative strides.
    arguments = case("flip", NAME, "conv_transpose3d", (1, 3, 3, 4, 8), (3, 1, 3, 2, 3), groups=3, padding=1).tensors(
        torch.float32
    )
    made = tc.plan(tc.conv_transpose3d, **arguments)
    forced = dispatch.plan(made.problem, made.target, NAME)
    output = torch.full(forced.out_shape, float("nan"), device=arguments["input"].device)
    forced.launch(arguments["input"], forced.arranged(arguments["weight"]), arguments["bias"], output)
    compare(output, reference("conv_transpose3d", arguments), limit(forced, output))


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["vectors", "stride-of-planes", "image"])
def test_every_candidate(layer):
    arguments = tensors(layer, torch.float16)
    made = tc.plan(getattr(tc, of(layer)), **arguments)
    tried = candidates(NAME, made.problem, KNOWN["sm_90"])
    assert len(tried) > 4
    for tile in tried:
        launches.clear()
        run(of(layer), arguments, NAME, tile)


@pytest.mark.parametrize("part", [FORWARD, INPUT_GRADIENT])
def test_a_part_that_only_a_measurement_gives_to_it(part, monkeypatch):
    problem, target = replace(flagship(part), stride_b=2), KNOWN["sm_90"]
    assert NAME in [kernel.name for kernel in dispatch.untimed(problem, target)]
    assert dispatch.plan(problem, target).kernel.name != NAME
    serves_where_timed(monkeypatch, NAME, problem, target)


def test_steps_by_hand():
    # Of 32 planes the input has no more; of two halves each reads a plane of the other, and of four the inner ones two.
    problem = flagship()
    for planes, steps in ((32, 32), (16, 17), (8, 9.5)):
        assert trips(NAME, problem, DepthwiseRollingPatchTile(PLANES=planes)) == (steps,)
    # 8 images of 64 channels, 28 pairs of rows, 7 vectors of columns.
    assert KERNELS[NAME].grid(problem, DepthwiseRollingPatchTile(PLANES=16, BLOCK_P=128)) == 2 * 784


@pytest.mark.parametrize(
    ("layer", "columns", "dtype", "lengths"),
    [
        ("vectors", 8, torch.bfloat16, [1, 8, 1]),
        ("vectors", 8, torch.float32, [1, 4, 4, 1]),
        ("vectors", 14, torch.bfloat16, [1, 2, 2, 2, 2, 2, 2, 2, 1]),
        ("stride-2", 4, torch.bfloat16, [2, 8, 1]),
        ("3x3x3", 4, torch.bfloat16, [1] * 6),
    ],
)
def test_rows_are_loaded_as_aligned_vectors(layer, columns, dtype, lengths):
    problem = tc.plan(getattr(tc, of(layer)), **tensors(layer, dtype)).problem
    assert row_pieces(problem, DepthwiseRollingPatchTile(COLS=columns)) == lengths


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 4, 9), (4, 1, 3)), {}, "rank is 1"),
        (((1, 4, 9, 9, 9), (4, 1, 3, 3, 3)), {"dilation": (2, 1, 1)}, "planes lie 2 input planes apart"),
        (((1, 4, 9, 9), (4, 1, 3, 3)), {"dilation": (3, 1)}, "rows lie 3 input rows apart"),
        (((1, 4, 9, 9, 9), (4, 1, 7, 7, 7)), {}, "343 taps do not fit in registers"),
        (((1, 4, 9, 9, 9), (4, 1, 3, 3, 3)), {"padding": 1, "padding_mode": "reflect"}, "border is reflect"),
    ],
)
def test_refused_problems(shapes, options, message):
    made = plan_of(*(random(shape) for shape in shapes), **options)
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME)


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        (random((1, 4, 9, 9, 18))[..., ::2], random((4, 1, 3, 3, 3)), "neighbouring pixels are not contiguous"),
        (random((1, 8, 9, 9, 9)), random((4, 2, 3, 3, 3)), "a group has 2 input channels"),
    ],
)
def test_refused_operands(x, w, message):
    made = tc.plan(tc.conv3d, x, w, groups=4)
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME)


def test_refused_tiles():
    for tile, message in (
        (DepthwiseRollingPatchTile(ROWS=7, COLS=7), "1323 products are too many to unroll"),
        (DepthwiseRollingPatchTile(ROWS=4, COLS=8, BLOCK_P=128, num_warps=2), "registers a thread for sums"),
    ):
        with pytest.raises(PlanError, match=message):
            dispatch.plan(flagship(), KNOWN["sm_90"], NAME, tile)


@pytest.mark.parametrize("target", KNOWN.values(), ids=KNOWN)
def test_defaults_fit(target):
    """A problem that the predicate takes has a default tile that fits."""
    for (taps, stride, width), dtype in itertools.product(
        (
            ((3, 3, 3), 1, 56),
            ((3, 3, 3), 2, 7),
            ((5, 5, 5), 1, 33),
            ((1, 1, 1), 1, 1),
            ((7, 7), 2, 14),
            ((5, 5), 1, 28),
        ),
        (torch.bfloat16, torch.float32, torch.float64),
    ):
        x = torch.empty(2, 24, *(16,) * (len(taps) - 1), width, device="meta", dtype=dtype)
        w = torch.empty(24, 1, *taps, device="meta", dtype=dtype)
        problem = plan_of(x, w, stride=stride, padding=taps[0] // 2).problem
        if KERNELS[NAME].unsuited(problem) is None:
            assert default_tile(NAME, problem, target).unfit(problem, target) is None


def test_more_patches_than_32_bits_count():
    for batch, wide in ((2**19, False), (2**20, True)):
        x = torch.empty(batch, 2**11, 1, 1, 1, device="meta", dtype=torch.float16)
        problem = plan_of(x, torch.empty(2**11, 1, 1, 1, 1, device="meta", dtype=torch.float16)).problem
        assert not problem.wide_index(64)
        assert KERNELS[NAME].arguments(problem, KERNELS[NAME].safe_tile)["INDEX_INT64"] is wide


# A stride that has 64 bits itself, or one of which two planes pass them.
@pytest.mark.parametrize(("dim", "stride"), [(0, LIMIT + 24), (2, LIMIT // 2 + 16)], ids=["batch", "plane"])
def test_beyond_32_bits(dim, stride, spread):
    arguments = case("wide", NAME, "conv3d", (2, 2, 3, 2, 4), (2, 1, 3, 3, 3), groups=2, padding=1).tensors(
        torch.float16
    )
    arguments["input"] = spread(arguments["input"], dim, stride)
    run("conv3d", arguments, NAME, TILES["segments"])
