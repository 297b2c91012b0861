"""Products in turns: turned boxes, taps left out, tiles in parts, both directions, operands in every layout."""

import math

import pytest
import torch
from cases import case
from helpers import channels_last, name_of, random
from test_depthwise_patch import framed
from test_implicit_gemm_boxed import LAYERS as BOXES
from test_implicit_gemm_boxed import layer, plan_of
from test_tiles import run

import triton_conv as tc
from triton_conv import dispatch
from triton_conv.autotune.space import candidates
from triton_conv.configs import code_hash, kernel_hash
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels.implicit_gemm_persistent import KERNEL, ImplicitGemmPersistentTile, groups, partial_sums
from triton_conv.kernels.turned_boxes import mean_taps, turned_box
from triton_conv.target import KNOWN
from triton_conv.workloads import FLAGSHIPS, INPUT_GRADIENT

NAME = "implicit_gemm_persistent"
LAYERS = {
    **{name_of(layer): layer for layer in BOXES if layer.arguments.get("groups", 1) == 1},
    # Of nine columns the last is a box that lies turned.
    "seam": layer("seam", "conv2d", (4, 16, 9, 9), (16, 16, 3, 3), padding=3, dilation=3, activation="relu"),
    "transposed-seam": layer("transposed-seam", "conv_transpose2d", (4, 24, 7, 5), (24, 16, 3, 2), dilation=(1, 4)),
    "seam-3d": layer("seam-3d", "conv3d", (2, 16, 2, 5, 9), (16, 16, 2, 1, 3), padding=(1, 0, 1)),
    # Boxes that no tap reads the input for, in front and behind; a step past the kernel's depth is its next row.
    "all-padding": layer("all-padding", "conv3d", (1, 16, 3, 2, 8), (16, 16, 2, 2, 1), padding=(4, 5, 0)),
}
TILES = {
    "turns": ImplicitGemmPersistentTile(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, PROGRAMS=3),
    "parts": ImplicitGemmPersistentTile(BLOCK_M=32, BLOCK_N=64, BLOCK_K=16, PROGRAMS=7, SPLIT=True),
    "many": ImplicitGemmPersistentTile(BLOCK_M=32, BLOCK_N=64, BLOCK_K=16, PROGRAMS=22, SPLIT=True),
    "wide": ImplicitGemmPersistentTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, PROGRAMS=5, SPLIT=True, num_stages=3),
}
_QUICK = {
    "turns": ("1d", "asymmetric", "transposed", "seam", "seam-3d", "all-padding"),
    "parts": ("1d", "dilation-past-the-border", "transposed-3d", "seam", "transposed-seam"),
    "many": ("seam",),
    "wide": ("1x1",),
}


@pytest.mark.parametrize(
    ("name", "tile"),
    [
        pytest.param(name, tile, marks=() if name in quick else pytest.mark.slow)
        for tile, quick in _QUICK.items()
        for name in LAYERS
    ],
)
def test_odd_boxes(name, tile):
    run(LAYERS[name].function, LAYERS[name].tensors(torch.bfloat16), NAME, TILES[tile])


@pytest.mark.parametrize("name", ["seam", "transposed-seam", "seam-3d"])
def test_layers_with_a_seam_have_one(name):
    problem = tc.plan(getattr(tc, LAYERS[name].function), **LAYERS[name].tensors(torch.bfloat16)).problem
    for tile in ("turns", "parts", "many"):
        shares = groups(problem, TILES[tile])
        assert all(group.tiles for group in shares)
        assert sum(group.programs for group in shares) == TILES[tile].PROGRAMS
    if name == "seam":
        assert all(group.parts > 1 for group in shares)


@pytest.mark.parametrize(("name", "dtype"), [("1x1", torch.float16), ("transposed-1d", torch.bfloat16)], ids=name_of)
def test_default_tile(name, dtype):
    arguments = LAYERS[name].tensors(dtype)
    problem = tc.plan(getattr(tc, LAYERS[name].function), **arguments).problem
    run(LAYERS[name].function, arguments, NAME, default_tile(NAME, problem, KNOWN["sm_90"]))


@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d"])
def test_weights_of_both_kinds_in_a_frame(function):
    # A frame of NaN around the weight: what lies beyond its channels must not be read.
    arguments = case("frame", NAME, function, (1, 24, 3, 4), (24, 24, 3, 3), padding=1, x=channels_last).tensors(
        torch.bfloat16
    )
    whole = channels_last(torch.full((26, 40, 3, 3), float("nan")).to(arguments["weight"]))
    arguments["weight"] = whole[1:-1, 8:32].copy_(arguments["weight"])
    run(function, arguments, NAME, TILES["wide"])


@pytest.mark.parametrize("name", ["dilation-past-the-border", "all-padding"])
def test_taps_in_the_padding_are_left_out(name):
    arguments = LAYERS[name].tensors(torch.bfloat16)
    if name == "dilation-past-the-border":
        arguments["weight"][..., 0, :] = arguments["weight"][..., :, 2] = float("nan")
    made = tc.plan(getattr(tc, LAYERS[name].function), **arguments)
    made = dispatch.plan(made.problem, made.target, NAME, TILES["turns"])
    output = torch.empty_strided(
        made.out_shape, made.out_strides, dtype=torch.bfloat16, device=arguments["input"].device
    )
    made.launch(arguments["input"], made.arranged(arguments["weight"]), arguments["bias"], output)
    assert output.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_taps_as_the_geometry_has_them(name):
    problem = tc.plan(getattr(tc, LAYERS[name].function), **LAYERS[name].tensors(torch.bfloat16)).problem
    g = problem.geometry
    for axis in range(3):
        for side in (1, 2, 4):
            counts = []
            for first in range(0, g.out_size[axis], side):
                outputs = range(first, min(first + side, g.out_size[axis]))
                shift = [k * g.dilation[axis] - g.pad_before[axis] for k in range(g.kernel[axis])]
                sign = -1 if g.transposed else 1
                counts.append(sum(any(0 <= o + sign * s < g.in_size[axis] for o in outputs) for s in shift))
            found = mean_taps(problem, axis, side, 0, g.out_size[axis])
            assert found == pytest.approx(sum(max(count, 1) for count in counts) / len(counts))


def flagships():
    for workload in FLAGSHIPS:
        if workload.channels_last and workload.kind == "dilated":
            yield from (part for part in workload.parts() if part.part in ("forward", INPUT_GRADIENT))


@pytest.mark.parametrize("workload", list(flagships()), ids=lambda w: f"{w.name}-{w.part}")
def test_turns_of_the_flagships(workload):
    problem, target = workload.problem(), KNOWN["sm_90"]
    tile = default_tile(NAME, problem, target)
    assert tile.unfit(problem, target) is None
    box, _, counts = turned_box(problem, tile.BLOCK_M)
    assert sum(counts) * math.prod(box.values()) <= 1.01 * problem.geometry.M
    # Even shares of what is left of the steps, within a tenth.
    shares = groups(problem, tile)
    even = sum(group.tiles * group.steps for group in shares) / target.sms
    assert max(group.longest(tile.SPLIT) for group in shares) <= 1.1 * even


def test_parts_are_joined_where_tiles_are_left():
    problem = plan_of(channels_last(random((2, 16, 8, 8), torch.bfloat16)), weight()).problem
    # Two boxes of 64 pixels: one program each, or two that take half of the taps.
    for programs, splits in ((2, False), (4, True)):
        tile = ImplicitGemmPersistentTile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, PROGRAMS=programs, SPLIT=True)
        values = KERNEL.values(problem, tile, KNOWN["sm_90"])
        assert (values.second is not None) == values["SPLIT"] == splits
    assert values.second.numbers == 4 * 64 * 64


def test_no_candidate_twice():
    problem = next(flagships()).problem()
    tiles = candidates(NAME, problem, KNOWN["sm_90"])
    assert len({(tile.PROGRAMS, tile.SPLIT) for tile in tiles}) >= 3
    assert all(partial_sums(problem, tile) for tile in tiles if tile.SPLIT)


def test_the_second_launch_is_part_of_the_code():
    assert kernel_hash(NAME) != code_hash(KERNEL.function)


def weight(shape=(16, 16, 3, 3)):
    return channels_last(random(shape, torch.bfloat16))


X = (1, 16, 5, 5)


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        (random(X, torch.bfloat16), weight(), {}, "channels of the input are not contiguous"),
        (channels_last(random((1, 32, 5, 5), torch.bfloat16)), weight(), {"groups": 2}, "2 groups"),
        (channels_last(random(X, torch.bfloat16)), weight(), {"stride": 2}, "the stride is"),
        (channels_last(random(X, torch.bfloat16)), framed(weight()), {}, "the weight does not begin at"),
        (channels_last(random(X, torch.bfloat16)), random((16, 16, 3, 3), torch.bfloat16), {}, "second dimension"),
        (channels_last(random(X, torch.bfloat16)), weight((16, 16, 3, 5))[..., :3], {}, "not evenly apart"),
        (
            channels_last(random((1, 20, 5, 5), torch.bfloat16).new_zeros(1, 24, 5, 5))[:, :20],
            weight((16, 20, 3, 3)), {}, "rows of its weight",
        ),
    ],
)  # fmt: skip
def test_refused_problems(x, w, options, message):
    made = plan_of(x, w, **options)
    assert made.kernel.name != NAME
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME)


def test_refused_tiles():
    problem = plan_of(channels_last(random((4, 16, 9, 9), torch.bfloat16)), weight(), padding=1).problem
    one = ImplicitGemmPersistentTile(BLOCK_M=32, PROGRAMS=1)
    assert "both upright and turned" in one.mismatch(problem)
    many = ImplicitGemmPersistentTile(BLOCK_M=256, PROGRAMS=100, SPLIT=True)
    assert "parts of tiles take" in many.mismatch(problem)


def test_devices():
    problem = plan_of(channels_last(random(X, torch.bfloat16)), weight()).problem
    with pytest.raises(PlanError, match="no engine for bulk copies"):
        dispatch.plan(problem, KNOWN["sm_80"], NAME, TILES["wide"])
    # Not timed yet: it runs where a measurement or a caller says so.
    made = dispatch.plan(problem, KNOWN["sm_90"])
    assert NAME in [kernel.name for kernel in dispatch.forms(problem, KNOWN["sm_90"])[0]]
    assert made.kernel.name == "implicit_gemm_boxed"
