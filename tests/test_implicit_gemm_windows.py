"""Implicit GEMM by windows of rows: vectors of every width, taps innermost, strides, groups, borders, refusals."""

import math
from dataclasses import replace

import pytest
import torch
from cases import case
from helpers import DEVICE, amid_nan, channels_last, chosen_tile, compare, launches, limit, name_of, sliced
from test_tiles import run

import triton_conv as tc
from triton_conv import dispatch
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels.implicit_gemm_windows import KERNEL, ImplicitGemmWindowsTile
from triton_conv.kernels.row_windows import vector
from triton_conv.reference import reference
from triton_conv.target import KNOWN
from triton_conv.workloads import INPUT_GRADIENT, find

NAME = "implicit_gemm_windows"


def layer(id, function, input, weight, **options):
    return case(id, NAME, function, input, weight, **options)


# With the elements of a vector.
LAYERS = [
    (layer("1d", "conv1d", (3, 16, 24), (24, 16, 4), padding=((1, 2),)), 8),
    (layer("1d-stride-8", "conv1d", (2, 19, 64), (18, 19, 16), padding=4, stride=8), 8),
    (layer("1d-dilated", "conv1d", (2, 16, 48), (16, 16, 8), padding=((10, 11),), dilation=3), 8),
    (layer("stride-2", "conv2d", (3, 20, 8, 8), (20, 20, 4, 4), stride=2, padding=1), 8),
    (layer("rows-of-16", "conv2d", (2, 20, 6, 16), (24, 20, 4, 4), stride=2, padding=1, activation="silu"), 16),
    (layer("rows-of-32", "conv2d", (1, 17, 3, 32), (20, 17, 2, 4), padding=((0, 1), (1, 2))), 32),
    (layer("rows-of-24", "conv2d", (2, 16, 4, 24), (16, 16, 2, 4), padding=((0, 1), (1, 2)), bias=False), 8),
    (layer("rows-of-four", "conv2d", (3, 16, 5, 4), (16, 16, 4, 2), padding=((1, 1), (0, 1)), activation="relu"), 4),
    (layer("rows-of-two", "conv2d", (9, 16, 3, 6), (16, 16, 2, 2), padding=((0, 1), (0, 1))), 2),
    (layer("padding-past-the-border", "conv2d", (2, 16, 3, 8), (16, 16, 2, 1), padding=(0, 4)), 8),
    (layer("groups", "conv2d", (2, 40, 6, 8), (36, 20, 2, 4), padding=((0, 1), (1, 2)), groups=2), 8),
    (layer("stride-over-kernel", "conv2d", (2, 16, 13, 16), (16, 16, 2, 2), stride=(5, 4)), 16),
    (layer("dilated", "conv2d", (2, 16, 7, 8), (16, 16, 4, 2), padding=((3, 3), (1, 2)), dilation=(2, 3)), 8),
]
BY_NAME = {layer.id: layer for layer, _ in LAYERS}
TILES = {
    "small": ImplicitGemmWindowsTile(BLOCK_M=32, BLOCK_N=16, BLOCK_K=16),
    "wide": ImplicitGemmWindowsTile(BLOCK_M=128, BLOCK_N=64, BLOCK_K=128, num_stages=3),
    "tall": ImplicitGemmWindowsTile(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, num_warps=8, num_stages=2),
}


def problem_of(layer, dtype=torch.bfloat16):
    return tc.plan(getattr(tc, layer.function), **layer.tensors(dtype)).problem


@pytest.mark.parametrize(
    ("at", "tile"),
    [
        pytest.param(
            i, tile, marks=() if i % 3 == j else pytest.mark.slow, id=f"{LAYERS[i][0].id}-{tile}"
        )
        for i in range(len(LAYERS))
        for j, tile in enumerate(TILES)
    ],
)  # fmt: skip
def test_odd_rows(at, tile):
    layer, width = LAYERS[at]
    problem = problem_of(layer)
    assert vector(problem) == width
    # Steps of all taps.
    tile = replace(TILES[tile], BLOCK_K=max(TILES[tile].BLOCK_K, problem.geometry.taps))
    run(layer.function, layer.tensors(torch.bfloat16), NAME, tile)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("tile", ["safe", "sm_90"])
@pytest.mark.parametrize("name", ["stride-2", pytest.param("1d-stride-8", marks=pytest.mark.slow)])
def test_chosen_tiles(name, tile, dtype):
    layer = BY_NAME[name]
    tile = chosen_tile(NAME, problem_of(layer), tile)
    run(layer.function, layer.tensors(dtype), NAME, tile)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stride-2", "rows-of-16", "1d", "groups"])
def test_every_candidate(name):
    layer = BY_NAME[name]
    arguments, tiles = layer.tensors(torch.bfloat16), candidates(NAME, problem_of(layer), KNOWN["sm_90"])
    assert len(tiles) > 10
    for tile in tiles:
        launches.clear()
        run(layer.function, arguments, NAME, tile)


def framed(tensor):
    """Inside a larger tensor of NaN: rows, channels and images are apart, and begin at aligned places."""
    return amid_nan(tensor, 8, 0)


@pytest.mark.parametrize("name", ["stride-2", "groups", "padding-past-the-border"])
def test_what_lies_around_the_operands_is_neither_read_nor_written(name):
    layer = BY_NAME[name]
    arguments = layer.tensors(torch.bfloat16)
    arguments["input"], arguments["weight"] = framed(arguments["input"]), sliced(arguments["weight"])
    made = tc.plan(getattr(tc, layer.function), **arguments)
    made = dispatch.plan(made.problem, made.target, NAME, TILES["wide"])
    size = math.prod(made.out_shape)
    storage = torch.full((2 * size,), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    output = storage.as_strided(made.out_shape, made.out_strides)
    made.launch(arguments["input"], made.arranged(arguments["weight"]), arguments["bias"], output)
    compare(output, reference(layer.function, arguments), limit(made, output))
    assert storage[size:].isnan().all()


@pytest.mark.parametrize("name", ["dcgan_t2d", "vocoder_t1d_s8", "vocoder_t1d_s2"])
def test_the_flagships_it_is_for(name):
    problem = replace(find(name)[0], part=INPUT_GRADIENT).problem()
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        tile = default_tile(NAME, problem, KNOWN[arch])
        assert dispatch.plan(problem, KNOWN[arch], NAME, tile).kernel.name == NAME
    target = KNOWN["sm_90"]
    assert KERNEL.grid(problem, default_tile(NAME, problem, target)) >= 128
    assert 10 <= len(candidates(NAME, problem, target)) <= 300
    # Not timed on any device yet: it serves where it is asked for.
    assert dispatch.plan(problem, target).kernel.name != NAME
    assert NAME in [kernel.name for kernel in dispatch.untimed(problem, target)]


def test_nothing_is_packed():
    arguments = BY_NAME["stride-2"].tensors(torch.bfloat16)
    made = tc.plan(tc.conv2d, **arguments)
    made = dispatch.plan(made.problem, made.target, NAME)
    assert made.arranged(arguments["weight"]) is arguments["weight"]


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        ((1, 16, 5, 8), (16, 16, 2, 3), {"padding": (0, 1)}, "2 x 3 taps are not few powers of two"),
        ((1, 16, 5, 8), (16, 16, 1, 1), {}, "1 x 1 taps are not few powers of two"),
        ((1, 16, 40), (16, 16, 128), {"padding": 64}, "1 x 128 taps"),
        ((1, 16, 5, 5), (16, 16, 2, 2), {}, "no aligned vectors"),
        ((1, 16, 5, 8), (16, 16, 2, 2), {"padding": 1, "padding_mode": "reflect"}, "border is reflect"),
        ((1, 16, 5, 9), (8, 16, 2, 2), {}, "fewer than 16 channels"),
        ((1, 16, 2, 5, 8), (16, 16, 2, 2, 1), {}, "three dimensions"),
        ((0, 16, 5, 9), (16, 16, 2, 2), {}, "no pixel"),
    ],
)
def test_refused_problems(x, w, options, message):
    made = plan_of(x, w, **options)
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME)


def plan_of(x, w, dtype=torch.bfloat16, layout=torch.Tensor.contiguous, **options):
    x, w = layout(torch.empty(x, dtype=dtype, device=DEVICE)), torch.empty(w, dtype=dtype, device=DEVICE)
    return tc.plan({3: tc.conv1d, 4: tc.conv2d, 5: tc.conv3d}[x.dim()], x, w, **options)


def test_other_refusals():
    for options, message in (
        ({"dtype": torch.float32}, "only 16-bit numbers"),
        ({"layout": channels_last}, "neighbouring pixels of the input are not contiguous"),
    ):
        made = plan_of((1, 16, 5, 8), (16, 16, 2, 2), padding=(0, 4), **options)
        with pytest.raises(PlanError, match=message):
            dispatch.plan(made.problem, made.target, NAME)
    x = torch.empty(1, 16, 4, 4, dtype=torch.bfloat16, device=DEVICE)
    made = tc.plan(tc.conv_transpose2d, x, torch.empty(16, 16, 2, 2, dtype=torch.bfloat16, device=DEVICE), stride=2)
    with pytest.raises(PlanError, match="it is transposed"):
        dispatch.plan(made.problem, made.target, NAME)


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (ImplicitGemmWindowsTile(BLOCK_K=8), "16 taps do not fit in a step of 8"),
        (ImplicitGemmWindowsTile(BLOCK_M=2), "a vector serves 4 pixels"),
    ],
)
def test_refused_tiles(tile, message):
    made = plan_of((1, 16, 8, 8), (16, 16, 4, 4), stride=2, padding=1)
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME, tile)
