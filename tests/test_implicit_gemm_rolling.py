"""Rows that roll through registers: cuts in strips, odd boxes and borders, both directions, garbage near, refusals."""

import math
from dataclasses import replace

import pytest
import torch
from cases import case
from helpers import channels_last, launches, name_of, random
from test_depthwise_patch import framed
from test_implicit_gemm_boxed import layer, plan_of
from test_tiles import run

import triton_conv as tc
from triton_conv import dispatch
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels.implicit_gemm_rolling import KERNEL, ImplicitGemmRollingTile
from triton_conv.static_model.trips import trips
from triton_conv.target import KNOWN
from triton_conv.workloads import find

NAME = "implicit_gemm_rolling"
LAYERS = [
    layer("groups", "conv2d", (2, 80, 3, 7), (96, 40, 3, 3), padding=1, groups=2),
    layer("many-images", "conv2d", (9, 16, 3, 5), (24, 16, 3, 3), padding=1, activation="silu"),
    layer("more-channels-than-a-tile", "conv2d", (2, 56, 4, 9), (72, 56, 2, 2), padding=((1, 0), (0, 1))),
    layer("valid", "conv2d", (9, 16, 5, 4), (16, 16, 4, 2), activation="relu"),
    layer("dilated-columns", "conv2d", (1, 16, 4, 7), (16, 16, 3, 3), dilation=(1, 3), padding=(1, 4)),
    layer("far-into-the-padding", "conv2d", (2, 16, 3, 4), (16, 16, 2, 3), padding=((4, 3), (3, 0))),
    layer("one-row-of-output", "conv2d", (5, 16, 4, 3), (16, 16, 4, 1)),
    layer("transposed", "conv_transpose2d", (2, 40, 5, 6), (40, 24, 3, 2), padding=1, dilation=(1, 2)),
    layer("transposed-groups", "conv_transpose2d", (2, 80, 4, 5), (80, 48, 3, 3), groups=2, padding=(0, 2)),
    layer("transposed-wide", "conv_transpose2d", (1, 16, 4, 3), (16, 72, 2, 3)),
]
SMALL = ImplicitGemmRollingTile(BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, PROGRAMS=6)
TILES = {
    "cuts": SMALL,
    # More programs than rows: some have nothing to do.
    "idle": replace(SMALL, PROGRAMS=24),
    "one": ImplicitGemmRollingTile(BLOCK_M=32, BLOCK_N=128, BLOCK_K=64, PROGRAMS=1, num_stages=2),
}
_QUICK = {
    "cuts": [name_of(layer) for layer in LAYERS if layer.id != "transposed-groups"],
    "idle": ("one-row-of-output",),
    "one": ("more-channels-than-a-tile", "transposed-groups"),
}


@pytest.mark.parametrize(
    ("layer", "tile"),
    [
        pytest.param(layer, tile, id=f"{layer.id}-{tile}", marks=() if layer.id in quick else pytest.mark.slow)
        for tile, quick in _QUICK.items()
        for layer in LAYERS
    ],
)
def test_odd_rows(layer, tile):
    run(layer.function, layer.tensors(torch.bfloat16), NAME, TILES[tile])


def planned(layer, dtype=torch.bfloat16):
    arguments = layer.tensors(dtype)
    return arguments, tc.plan(getattr(tc, layer.function), **arguments).problem


def test_default_tile():
    arguments, problem = planned(LAYERS[7], torch.float16)
    tile = default_tile(NAME, problem, KNOWN["sm_90"])
    assert tile.unfit(problem, KNOWN["sm_90"]) is None
    run(LAYERS[7].function, arguments, NAME, replace(tile, PROGRAMS=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer",
    [
        layer("conv2d", "conv2d", (9, 40, 3, 8), (72, 40, 3, 3), padding=1),
        layer("conv_transpose2d", "conv_transpose2d", (9, 40, 3, 8), (40, 72, 3, 3), padding=1),
    ],
    ids=name_of,
)
def test_every_candidate(layer):
    arguments, problem = planned(layer)
    # Most programs are idle here, whatever their number.
    tiles = {replace(tile, PROGRAMS=5): None for tile in candidates(NAME, problem, KNOWN["sm_90"])}
    assert len(tiles) > 10
    for tile in tiles:
        launches.clear()
        run(layer.function, arguments, NAME, tile)


@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d"])
def test_a_weight_in_a_frame(function):
    # A frame of NaN around the weight: what lies beyond its channels must not be read.
    arguments = case("frame", NAME, function, (1, 24, 2, 4), (24, 24, 2, 3), padding=1, x=channels_last).tensors(
        torch.bfloat16
    )
    whole = channels_last(torch.full((26, 40, 2, 3), float("nan")).to(arguments["weight"]))
    arguments["weight"] = whole[1:-1, 8:32].copy_(arguments["weight"])
    run(function, arguments, NAME, SMALL)


def launched(layer, arguments, tile):
    """The output, whose memory was zero, and what lies behind it."""
    made = tc.plan(getattr(tc, layer.function), **arguments)
    made = dispatch.plan(made.problem, made.target, NAME, tile)
    size = math.prod(made.out_shape)
    storage = torch.zeros(2 * size, dtype=torch.bfloat16, device=arguments["input"].device)
    output = storage.as_strided(made.out_shape, made.out_strides)
    made.launch(arguments["input"], made.arranged(arguments["weight"]), arguments["bias"], output)
    return output, storage[size:]


@pytest.mark.parametrize("programs", [1, 3])
def test_a_strip_leaves_nothing_to_the_next_nor_behind_the_output(programs):
    # Without padding the last row of an image has a share in rows that do not exist.
    layer = LAYERS[3]
    arguments = layer.tensors(torch.bfloat16)
    arguments["input"][3] = float("nan")
    output, behind = launched(layer, arguments, replace(SMALL, PROGRAMS=programs))
    assert output[3].isnan().all()
    assert output[[0, 1, 2, 4, 5, 6, 7, 8]].isfinite().all()
    assert not behind.any()


def test_channels_of_the_next_group_do_not_matter():
    layer = LAYERS[0]
    arguments = layer.tensors(torch.bfloat16)
    arguments["input"][:, 40:] = float("nan")
    output, _ = launched(layer, arguments, SMALL)
    assert output[:, :48].isfinite().all()
    assert not output[:, 48:].isfinite().any()


@pytest.mark.parametrize("shares", [1, 3, 5, 40])
def test_steps_are_those_of_the_busiest_program(shares):
    _, problem = planned(LAYERS[1])
    tile = replace(SMALL, PROGRAMS=shares)
    height, above = problem.geometry.out_size[1], problem.geometry.kernel[1] - 1
    strips = math.prod(-(-size // side) for size, side in ((9, tile.strip(problem)["BOX_N"]), (5, 8)))
    assert tile.strip(problem)["BOX_W"] == 8
    steps = [0] * shares
    for share in range(shares):
        rows = range(strips * height * share // shares, strips * height * (share + 1) // shares)
        steps[share] = len(rows) + above * len({row // height for row in rows})
    assert trips(NAME, problem, tile) == (max(steps),)


def test_wide_groups_share_their_input():
    problem, target = find("wide_groups_56")[0].problem(), KNOWN["sm_90"]
    tile = default_tile(NAME, problem, target)
    # A program a multiprocessor, within a tenth of its even share of rows.
    assert KERNEL.grid(problem, tile) == target.sms
    assert tile.steps(problem) <= 1.1 * 4 * 64 * 56 * 56 / 128 / target.sms
    # Not timed on any device yet: it serves where it is asked for.
    assert dispatch.plan(problem, target).kernel.name != NAME
    assert NAME in [kernel.name for kernel in dispatch.untimed(problem, target)]


X, W = (1, 16, 5, 5), (16, 16, 3, 3)


def made(x=X, w=W, function="conv2d", x_layout=channels_last, w_layout=channels_last, dtype=torch.bfloat16, **options):
    return plan_of(x_layout(random(x, dtype)), w_layout(random(w, dtype)), function, **options)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda: made((1, 16, 9), (16, 16, 3), "conv1d"), "no rows of a filter"),
        (lambda: made(w=(16, 16, 1, 3)), "no rows of a filter"),
        (lambda: made(stride=2), r"its stride is \(1, 2, 2\)"),
        (lambda: made(dilation=(2, 1)), r"its dilation \(1, 2, 1\)"),
        (lambda: made((1, 72, 5, 5), (16, 72, 3, 3)), "9 taps of 72 channels do not stay"),
        (lambda: made(w=(16, 16, 5, 5)), "25 taps of 16 channels do not stay"),
        (lambda: made((1, 32, 5, 5), (24, 16, 3, 3), groups=2), "groups of 12 channels do not begin at"),
        (lambda: made(function="conv_transpose2d", padding=3), "more padding than its filter reaches"),
        (lambda: made(x_layout=torch.clone), "channels of the input are not contiguous"),
        (lambda: made(x_layout=framed), "does not begin at"),
        (lambda: made(dtype=torch.float32), "only 16-bit numbers"),
        (lambda: made(w_layout=torch.clone), "second dimension of its weight"),
    ],
)
def test_refused_problems(plan, message):
    plan = plan()
    assert plan.kernel.name != NAME
    with pytest.raises(PlanError, match=message):
        dispatch.plan(plan.problem, plan.target, NAME)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"BLOCK_K": 16}, "groups have 40 channels"),
        ({"BLOCK_M": 128, "num_warps": 4}, "256 registers a thread"),
        ({"BLOCK_M": 128, "num_warps": 8, "num_stages": 4}, "bytes of shared memory of"),
    ],
)
def test_tiles_of_other_problems(changes, message):
    _, problem = planned(LAYERS[0])
    with pytest.raises(PlanError, match=message):
        dispatch.plan(problem, KNOWN["sm_90"], NAME, replace(SMALL, **changes))


@pytest.mark.parametrize(
    ("target", "message"),
    [("sm_80", "no engine for bulk copies"), ("gfx942", "no engine"), ("sm_100", "no memory for so many products")],
)
def test_devices_that_cannot_run_it(target, message):
    problem = made(padding=1).problem
    with pytest.raises(PlanError, match=message):
        dispatch.plan(problem, KNOWN[target], NAME, SMALL)
    assert dispatch.plan(problem, KNOWN[target]).kernel.name != NAME
