"""Depthwise products of whole rows with blocks laid out before: strides, dilations, groups of rows, refusals."""

import math
from dataclasses import replace

import pytest
import torch
from cases import case
from helpers import (
    DEVICE,
    amid_nan,
    chosen_tile,
    compare,
    launches,
    limit,
    name_of,
    permuted,
    serves_where_timed,
    sliced,
)
from test_tiles import run

import triton_conv as tc
from triton_conv import configs, dispatch
from triton_conv.autotune.space import candidates
from triton_conv.errors import PlanError
from triton_conv.kernels import launching, toeplitz_blocks
from triton_conv.kernels.depthwise_toeplitz import KERNEL, DepthwiseToeplitzTile, block_numbers
from triton_conv.reference import reference
from triton_conv.static_model.trips import trips
from triton_conv.target import KNOWN
from triton_conv.workloads import FORWARD, INPUT_GRADIENT, find

NAME = "depthwise_toeplitz"

# (input, filter, options): rows above and below the image, rows that nothing reads, vectors of every width.
LAYERS = {
    "large-filter": ((5, 2, 9, 8), (9, 9), {"padding": 4}),
    "filter-over-image": ((3, 2, 5, 6), (13, 11), {"padding": (6, 5)}),
    "odd": ((5, 3, 7, 7), (5, 5), {"padding": 2}),
    "prime": ((7, 2, 11, 13), (3, 7), {"padding": (1, 3)}),
    "vectors": ((3, 2, 6, 16), (5, 5), {"padding": 2}),
    "no-padding": ((4, 2, 8, 12), (4, 6), {}),
    "before": ((3, 2, 6, 9), (4, 5), {"padding": ((3, 0), (4, 0))}),
    "behind": ((3, 2, 6, 9), (4, 5), {"padding": ((0, 3), (0, 4))}),
    "padding-over-filter": ((2, 2, 3, 4), (2, 2), {"padding": ((4, 5), (3, 6))}),
    "stride-2": ((5, 2, 13, 10), (5, 5), {"padding": 2, "stride": 2}),
    "stride-over-filter": ((3, 2, 11, 14), (2, 3), {"stride": (3, 4)}),
    "dilated": ((3, 2, 9, 8), (3, 3), {"padding": (4, 3), "dilation": (4, 3)}),
    "stride-and-dilation": (
        (3, 2, 17, 12),
        (4, 3),
        {"padding": ((5, 4), (2, 3)), "stride": (4, 2), "dilation": (6, 3)},
    ),
    "dilation-over-stride": ((3, 2, 14, 9), (3, 2), {"padding": (2, 1), "stride": (2, 1), "dilation": (3, 5)}),
    "rows-of-one": ((3, 2, 9, 1), (3, 1), {"padding": (1, 0)}),
    "one-row": ((5, 2, 1, 24), (3, 5), {"padding": (1, 2)}),
    "widest": ((2, 1, 3, 64), (3, 15), {"padding": (1, 7)}),
    "signal": ((9, 3, 21), (9,), {"padding": 4}),
    "signal-stride-2": ((3, 2, 40), (11,), {"padding": ((7, 3),), "stride": 2}),
}
TILES = {
    "small": DepthwiseToeplitzTile(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, num_stages=2),
    "groups": DepthwiseToeplitzTile(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, GROUPS=4),
    "image": DepthwiseToeplitzTile(BLOCK_M=64, BLOCK_N=256, BLOCK_K=64, GROUPS=2, num_warps=8, num_stages=3),
    "rows-together": DepthwiseToeplitzTile(BLOCK_M=32, BLOCK_N=64, BLOCK_K=128, GROUPS=16),
}
QUICK = (
    "large-filter-small", "large-filter-groups", "filter-over-image-rows-together", "odd-groups", "prime-small",
    "vectors-groups", "no-padding-image", "before-groups", "behind-rows-together", "padding-over-filter-groups",
    "stride-2-groups", "stride-over-filter-small", "dilated-groups", "stride-and-dilation-rows-together",
    "stride-and-dilation-groups", "dilation-over-stride-groups", "rows-of-one-groups", "one-row-image", "widest-image",
    "signal-groups", "signal-stride-2-rows-together",
)  # fmt: skip
PAIRS = [
    pytest.param(layer, tile, id=f"{layer}-{tile}", marks=() if f"{layer}-{tile}" in QUICK else pytest.mark.slow)
    for layer in LAYERS
    for tile in TILES
]


def of(layer):
    return f"conv{len(LAYERS[layer][1])}d"


def tensors(layer, dtype=torch.bfloat16, multiplier=1, **more):
    x, kernel, options = LAYERS[layer]
    weight = (multiplier * x[1], 1, *kernel)
    return case(layer, NAME, of(layer), x, weight, groups=x[1], **options, **more).tensors(dtype)


def problem_of(layer, **more):
    return tc.plan(getattr(tc, of(layer)), **tensors(layer, **more)).problem


def widened(tile, problem):
    """The tile, or one that takes the problem's rows."""
    wide = toeplitz_blocks.width_in(problem), toeplitz_blocks.width_out(problem)
    return replace(tile, BLOCK_K=max(tile.BLOCK_K, wide[0]), BLOCK_N=max(tile.BLOCK_N, wide[1]))


@pytest.mark.parametrize(("layer", "tile"), PAIRS)
def test_forward(layer, tile):
    run(of(layer), tensors(layer), NAME, widened(TILES[tile], problem_of(layer)))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("tile", ["safe", "sm_90", "sm_80"])
def test_chosen_tiles(tile, dtype):
    arguments = tensors("large-filter", dtype, multiplier=2, activation="silu")
    problem = tc.plan(tc.conv2d, **arguments).problem
    run("conv2d", arguments, NAME, chosen_tile(NAME, problem, tile))


@pytest.mark.slow
def test_every_candidate():
    arguments = case("many", NAME, "conv2d", (70, 2, 16, 15), (2, 1, 9, 9), groups=2, padding=4).tensors(torch.float16)
    tiles = candidates(NAME, tc.plan(tc.conv2d, **arguments).problem, KNOWN["sm_90"])
    assert len(tiles) > 20
    for tile in tiles:
        launches.clear()
        run("conv2d", arguments, NAME, tile)


def framed(tensor):
    """Inside a larger tensor of NaN, a vector of columns in: strides that no dense tensor has."""
    return amid_nan(tensor, 8, 8)


@pytest.mark.parametrize(
    ("layer", "input", "weight"),
    [("vectors", framed, permuted), ("odd", framed, sliced), ("stride-2", torch.clone, framed)],
)
def test_what_lies_around_the_operands_is_neither_read_nor_written(layer, input, weight):
    arguments = tensors(layer, bias=False)
    arguments |= {"input": input(arguments["input"]), "weight": weight(arguments["weight"])}
    made = tc.plan(tc.conv2d, **arguments)
    made = dispatch.plan(made.problem, made.target, NAME, TILES["groups"])
    size = math.prod(made.out_shape)
    storage = torch.full((2 * size,), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    output = storage.as_strided(made.out_shape, made.out_strides)
    made.launch(arguments["input"], made.arranged(arguments["weight"]), None, output)
    compare(output, reference("conv2d", arguments), limit(made, output))
    assert storage[size:].isnan().all()


@pytest.mark.parametrize("layer", ["odd", "dilated", "before"])
def test_input_gradient_is_the_same_kernel(layer):
    # A transposed convolution of stride 1 is planned as a forward one whose weight has negative strides.
    x, kernel, options = LAYERS[layer]
    options = options | ({"padding": 1} if layer == "before" else {})
    function = f"conv_transpose{len(kernel)}d"
    arguments = case("flip", NAME, function, x, (x[1], 1, *kernel), groups=x[1], **options).tensors(torch.float16)
    made = tc.plan(getattr(tc, function), **arguments)
    assert made.problem.weight_view == "flipped"
    run(function, arguments, NAME, TILES["groups"])


def test_one_launch_by_name_and_memory_for_its_blocks(monkeypatch):
    problem = problem_of("odd")
    taken = []
    memory = launching.memory
    monkeypatch.setattr(launching, "memory", lambda *given: taken.append(given) or memory(*given))
    run("conv2d", tensors("odd"), NAME, TILES["groups"])
    assert [(numbers, dtype) for numbers, _, dtype in taken] == [(block_numbers(problem), torch.bfloat16)]
    assert block_numbers(problem) == 3 * 7 * 5 * 8


def test_a_changed_layout_of_the_blocks_makes_stored_tiles_stale():
    assert configs.kernel_hash(NAME) == configs.code_hash(KERNEL.function, KERNEL.ahead.function)
    assert configs.kernel_hash(NAME) != configs.code_hash(KERNEL.function)


def layer_of(name, part=FORWARD):
    (layer,) = [layer for layer in find(name) if layer.dtype == "bfloat16"]
    return next(each for each in layer.parts() if each.part == part).problem()


@pytest.mark.parametrize("part", [FORWARD, INPUT_GRADIENT])
def test_the_flagship_it_is_for(part):
    problem = layer_of("large_dw2d", part)
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert dispatch.plan(problem, KNOWN[arch], NAME).kernel is KERNEL
    target = KNOWN["sm_90"]
    assert 10 <= len(candidates(NAME, problem, target)) <= 300
    # Not timed on any device yet: it serves where it is asked for.
    assert dispatch.plan(problem, target).kernel.name == "depthwise_banded"
    assert NAME in [kernel.name for kernel in dispatch.untimed(problem, target)]


def test_it_serves_where_it_was_timed(monkeypatch):
    serves_where_timed(monkeypatch, NAME, layer_of("large_dw2d"), KNOWN["sm_90"])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("tile", TILES)
def test_steps_are_those_for_which_a_row_is_in_the_image(layer, tile):
    problem = problem_of(layer)
    g, tile = problem.geometry, widened(TILES[tile], problem)
    together, hop, lag = tile.BLOCK_K // toeplitz_blocks.width_in(problem), *toeplitz_blocks.hops(problem)
    rows = tile.output_rows(problem)
    (counted,) = trips(NAME, problem, tile)
    blocks = KERNEL.grid(problem, tile) // (g.c_out * -(-g.batch // (tile.BLOCK_M // tile.GROUPS)))
    read = 0
    for block in range(blocks):
        first = block % hop + block // hop * hop * tile.GROUPS * rows
        firsts = [h for group in range(tile.GROUPS) if (h := first + group * rows * hop) < g.out_size[1]]
        inside = [
            r for r in range(g.kernel[1] + (rows - 1) * lag)
            if any(0 <= h * g.stride[1] - g.pad_before[1] + r * g.dilation[1] < g.in_size[1] for h in firsts)
        ]  # fmt: skip
        read += max(-(-(max(inside) - min(inside) + 1) // together), 1) if inside else 1
    # Of a last group that begins past the image the last row is counted.
    assert read / blocks <= counted <= read / blocks + 1


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        ((2, 4, 6, 6), (4, 2, 3, 3), {"groups": 2}, "a group has 2 input channels, not 1"),
        ((2, 4, 3, 6, 6), (4, 1, 3, 3, 3), {"groups": 4}, "three dimensions"),
        ((2, 4, 6, 6), (4, 1, 3, 3), {"groups": 4, "padding": 1, "padding_mode": "reflect"}, "its border is reflect"),
        ((2, 4, 6, 65), (4, 1, 3, 31), {"groups": 4}, "65 columns is wider than 64"),
        ((2, 4, 6, 64), (4, 1, 3, 7), {"groups": 4}, "of 64 columns of a row a filter reads 7"),
        ((2, 40, 64, 64), (40, 1, 31, 31), {"groups": 40}, "10158080 bytes, more than half of input and output"),
        ((0, 4, 6, 6), (4, 1, 3, 3), {"groups": 4}, "no pixel"),
    ],
)
def test_refused_problems(x, w, options, message):
    made = plan_of(x, w, **options)
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME)


def plan_of(x, w, dtype=torch.bfloat16, **options):
    x, w = (torch.empty(shape, dtype=dtype, device=DEVICE) for shape in (x, w))
    return tc.plan({3: tc.conv1d, 4: tc.conv2d, 5: tc.conv3d}[x.dim()], x, w, **options)


def test_other_refusals():
    last = torch.empty(2, 4, 6, 6, dtype=torch.float16, device=DEVICE, memory_format=torch.channels_last)
    filters = torch.empty(4, 1, 3, 3, dtype=torch.float16, device=DEVICE)
    for made, message in (
        (plan_of((2, 4, 6, 6), (4, 1, 3, 3), torch.float32, groups=4), "only 16-bit numbers"),
        (tc.plan(tc.conv2d, last, filters, groups=4), "neighbouring pixels are not contiguous"),
        (tc.plan(tc.conv_transpose2d, last.contiguous(), filters, groups=4, stride=2), "it is transposed"),
    ):
        with pytest.raises(PlanError, match=message):
            dispatch.plan(made.problem, made.target, NAME)


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (DepthwiseToeplitzTile(BLOCK_M=8), "at least 16 of each dimension"),
        (DepthwiseToeplitzTile(BLOCK_K=16), "an input row of 32 columns does not fit in a step of 16"),
        (DepthwiseToeplitzTile(BLOCK_N=16), "an output row of 32 columns does not fit in 16"),
        (DepthwiseToeplitzTile(BLOCK_M=16, GROUPS=32), "32 groups of rows in 16"),
    ],
)
def test_refused_tiles(tile, message):
    made = plan_of((2, 4, 8, 24), (4, 1, 3, 3), groups=4, padding=1)
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME, tile)


def test_images_far_apart():
    # Offsets inside a program pass 2^31 only where images are that far apart: then they are 64-bit.
    problem = problem_of("odd")
    tile = TILES["small"]
    assert not KERNEL.arguments(problem, tile)["INDEX_INT64"]
    apart = replace(problem, x_strides=(2**30, *problem.x_strides[1:]))
    assert KERNEL.arguments(apart, tile)["INDEX_INT64"]
