"""Slabs of narrow groups held in registers: groups and borders, both directions, epilogue, refusals."""

from dataclasses import replace

import pytest
import torch
from cases import case
from helpers import DEVICE, channels_last, launches, name_of, serves_where_timed
from test_tiles import run

import triton_conv as tc
from triton_conv import dispatch
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.kernels import KERNELS
from triton_conv.kernels.grouped_slab import GroupedSlabTile, narrowest
from triton_conv.target import KNOWN
from triton_conv.workloads import WEIGHT_GRADIENT, find

NAME = "grouped_slab"


def layer(id, function, input, weight, **options):
    return case(id, NAME, function, input, weight, x=channels_last, **options)


LAYERS = [
    layer("fours", "conv2d", (2, 24, 5, 7), (24, 4, 3, 3), groups=6, padding=1),
    layer("depthwise", "conv2d", (2, 40, 6, 5), (40, 1, 3, 3), groups=40, padding=1, activation="silu"),
    layer("to-one", "conv2d", (2, 16, 4, 5), (2, 8, 3, 3), groups=2, padding=1),
    layer("to-more", "conv2d", (2, 24, 4, 5), (60, 2, 3, 2), groups=12, padding=(0, 2)),
    layer("threes", "conv2d", (1, 48, 4, 5), (48, 3, 3, 3), groups=16, padding=1, activation="relu"),
    layer("sixteens", "conv2d", (2, 48, 5, 3), (48, 16, 3, 3), groups=3, padding=1),
    layer("twelves", "conv2d", (1, 72, 3, 5), (72, 12, 3, 3), groups=6, padding=1),
    layer("thirty-twos", "conv2d", (1, 64, 4, 5), (64, 32, 3, 3), groups=2, padding=1, bias=False),
    layer("stride-2", "conv2d", (2, 24, 9, 8), (24, 4, 3, 3), groups=6, stride=2, padding=1),
    layer("stride-3", "conv2d", (1, 32, 9, 11), (32, 16, 2, 3), groups=2, stride=(1, 3), padding=1),
    layer("dilation", "conv2d", (2, 24, 7, 9), (24, 8, 3, 3), groups=3, dilation=(3, 2), padding=(3, 2)),
    layer("dilated-stride", "conv2d", (1, 24, 9, 9), (24, 4, 3, 3), groups=6, stride=(3, 2), dilation=2, padding=2),
    layer("asymmetric", "conv2d", (2, 24, 4, 6), (24, 4, 2, 4), groups=6, padding=((0, 2), (3, 0)), activation="gelu"),
    layer("5x5", "conv2d", (1, 16, 6, 5), (16, 8, 5, 5), groups=2, padding=2),
    layer("1x1", "conv2d", (2, 24, 3, 4), (24, 4, 1, 1), groups=6),
    layer("3d", "conv3d", (1, 8, 4, 3, 5), (8, 4, 2, 3, 2), groups=2, padding=1, dilation=(2, 1, 1), stride=(1, 2, 1)),
    layer("transposed", "conv_transpose2d", (2, 24, 5, 6), (24, 4, 3, 3), groups=6, padding=1),
    layer("transposed-to-more", "conv_transpose2d", (1, 24, 4, 5), (24, 8, 3, 2), groups=6, padding=(0, 1), dilation=2),
    layer("transposed-3d", "conv_transpose3d", (1, 16, 3, 3, 4), (16, 8, 2, 3, 3), groups=2, padding=(0, 1, 1)),
]  # fmt: skip
BY_NAME = {layer.id: layer for layer in LAYERS}


def small(problem, **sizes):
    """Several slabs, rows and tiles a program, with the narrowest slabs unless said otherwise."""
    return GroupedSlabTile(**dict(num_warps=2, ROWS=3, SLABS=2, STEPS=2, BLOCK_K=narrowest(problem).BLOCK_K) | sizes)


def planned(layer, dtype=torch.bfloat16):
    arguments = layer.tensors(dtype)
    return arguments, tc.plan(getattr(tc, layer.function), **arguments).problem


@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
def test_narrow_groups(layer):
    arguments, problem = planned(layer)
    run(layer.function, arguments, NAME, small(problem, ROWS=2, BLOCK_P=16))


@pytest.mark.parametrize("block_k", [16, 32])
@pytest.mark.parametrize("name", ["fours", "to-more", "stride-2", "transposed"])
def test_wider_slabs(name, block_k):
    layer = BY_NAME[name]
    arguments, problem = planned(layer, torch.float16)
    run(layer.function, arguments, NAME, small(problem, BLOCK_K=block_k))


def test_default_and_safe_tile():
    layer = BY_NAME["to-one"]
    arguments, problem = planned(layer)
    for tile in (default_tile(NAME, problem, KNOWN["sm_90"]), KERNELS[NAME].safe_tile):
        launches.clear()
        run(layer.function, arguments, NAME, tile)


@pytest.mark.parametrize("name", ["narrow_groups_4", "narrow_groups_8"])
def test_an_input_gradient_is_the_same_kernel(name):
    forward, gradient = (work.problem() for work in find(name)[0].parts() if work.part != WEIGHT_GRADIENT)
    assert gradient.geometry.transposed and NAME in dispatch.family(gradient)[0]
    tiles = [dispatch.plan(problem, KNOWN["sm_90"], NAME).tile for problem in (forward, gradient)]
    assert tiles[0] == tiles[1]


@pytest.mark.parametrize("name", ["fours", "transposed"])
def test_only_a_measurement_prefers_it(name, monkeypatch):
    _, problem = planned(BY_NAME[name])
    target = KNOWN["sm_90"]
    assert NAME in dispatch.family(problem)[0] and dispatch.plan(problem, target).kernel.name != NAME
    serves_where_timed(monkeypatch, NAME, problem, target)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fours", "twelves", "transposed"])
def test_every_candidate(name):
    layer = BY_NAME[name]
    arguments, problem = planned(layer, torch.float16)
    for tile in candidates(NAME, problem, KNOWN["sm_90"]):
        launches.clear()
        run(layer.function, arguments, NAME, tile)


def framed(tensor):
    """channels_last amid NaN: eight channels to either side, so that vectors stay aligned, and pixels around."""
    frame = (2, 16, *[2] * (tensor.dim() - 2))
    whole = channels_last(
        torch.full([a + b for a, b in zip(tensor.shape, frame, strict=True)], float("nan")).to(tensor)
    )
    inner = tuple(slice(extra // 2, -extra // 2) for extra in frame)
    return whole[inner].copy_(tensor)


@pytest.mark.parametrize("name", ["fours", "asymmetric", "twelves", "transposed", "3d"])
def test_an_input_and_a_weight_in_a_frame(name):
    layer = BY_NAME[name]
    arguments, problem = planned(layer)
    arguments |= {"input": framed(arguments["input"]), "weight": framed(arguments["weight"])}
    run(layer.function, arguments, NAME, small(problem, ROWS=2))


@pytest.mark.parametrize(("name", "dim", "first"), [("twelves", 1, 24), ("1x1", 3, 2)], ids=["slab", "patch"])
def test_what_a_slab_or_a_patch_does_not_read_does_not_matter(name, dim, first):
    arguments, problem = planned(BY_NAME[name])
    beyond = arguments["input"].size(dim) - first
    arguments["input"].narrow(dim, first, beyond).fill_(float("nan"))
    made = dispatch.plan(problem, tc.plan(tc.conv2d, **arguments).target, NAME, small(problem))
    output = torch.empty_strided(made.out_shape, made.out_strides, dtype=torch.bfloat16, device=DEVICE)
    made.launch(arguments["input"], made.arranged(arguments["weight"]), arguments["bias"], output)
    assert output.narrow(dim, 0, first).isfinite().all()
    assert not output.narrow(dim, first, beyond).isfinite().any()


@pytest.mark.parametrize("name", ["fours", "transposed"])
def test_wide_indices(name, monkeypatch):
    monkeypatch.setattr("triton_conv.problem.INT32_LIMIT", 0)
    dispatch.plan.cache_clear()
    layer = BY_NAME[name]
    try:
        arguments, problem = planned(layer)
        run(layer.function, arguments, NAME, small(problem))
    finally:
        dispatch.plan.cache_clear()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": None}, "its channels are not contiguous"),
        ({"input": (1, 12, 4, 4), "weight": (12, 4, 3, 3), "arguments": {"groups": 3}}, "in whole vectors"),
        ({"arguments": {"groups": 6, "padding": 1, "padding_mode": "reflect"}}, "its border is reflect"),
        ({"weight": (24, 4, 9, 9), "input": (1, 24, 9, 9)}, "weights of 81 taps take"),
        ({"function": "conv_transpose2d", "arguments": {"groups": 6, "stride": 2}}, "transposed, with a stride"),
    ],
    ids=["nchw", "twelve-channels", "border", "filter", "phases"],
)
def test_refusals(change, reason):
    _, problem = planned(replace(BY_NAME["fours"], **change))
    assert reason in KERNELS[NAME].unsuited(problem)


def test_another_maker_s_matrix_instructions_are_refused():
    _, problem = planned(BY_NAME["fours"])
    suited, notes = dispatch.forms(problem, KNOWN["gfx942"])
    assert KERNELS[NAME] not in suited and "not grouped_slab: the matrix instructions of gfx942" in notes[0]


def test_numbers_of_four_bytes_are_refused():
    _, problem = planned(BY_NAME["fours"], torch.float32)
    assert "only 16-bit numbers" in KERNELS[NAME].unsuited(problem)


def test_warps_without_a_slab_are_refused():
    _, problem = planned(BY_NAME["fours"])
    assert "2 slabs are not one for each of 4 warps" in GroupedSlabTile(num_warps=4, SLABS=2).mismatch(problem)
