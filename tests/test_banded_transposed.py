"""Transposed depthwise convolution by banded matrices: every phase, rows of every width, views, 64-bit offsets."""

from dataclasses import replace

import pytest
import torch
from cases import case
from helpers import DTYPES, channels_last, launches, name_of, random, serves_where_timed, shifted, sliced
from test_banded import rows_of
from test_large import LIMIT, spread
from test_tiles import run

import triton_conv as tc
from triton_conv import dispatch
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels import KERNELS
from triton_conv.kernels.depthwise_banded_transposed import DepthwiseBandedTransposedTile, block_of
from triton_conv.target import KNOWN
from triton_conv.workloads import FLAGSHIPS, INPUT_GRADIENT, find

assert spread  # a fixture

NAME = "depthwise_banded_transposed"
SMALL = DepthwiseBandedTransposedTile(BLOCK_M=16, BLOCK_T=16, BLOCK_K=64, ROWS=4)
TARGETS = {name: () if name == "sm_90" else pytest.mark.slow for name in KNOWN}


def shaped(id, size, kernel, channels=3, batch=2, **arguments):
    rank = len(size)
    x, w = (batch, channels, *size), (channels, arguments.pop("multiplier", 1), *kernel)
    return case(id, NAME, f"conv_transpose{rank}d", x, w, groups=channels, **arguments)


CASES = [
    *(
        shaped(f"width-{n}", (3, n), (3, 5), padding=(1, 2), stride=2, output_padding=1)
        for n in (1, 4, 7, 8, 14, 16, 17, 28)
    ),
    *(shaped(f"height-{n}", (n, 4), (5, 3), padding=(2, 1), stride=2) for n in (1, 2, 3, 4)),
    *(shaped(f"kernel-{k}", (4, 12), (k, k), padding=k // 2, stride=2) for k in (1, 2, 4, 7)),
    *(shaped(f"stride-{s}", (3, 14), (5, 5), padding=2, stride=s) for s in (3, 4, 5, 8)),
    *(shaped(f"dilation-{d}", (4, 12), (3, 3), padding=d, dilation=d, stride=2) for d in (2, 3)),
    shaped("stride-and-dilation", (4, 12), (3, 4), stride=(4, 3), dilation=(6, 2), padding=(5, 2)),
    shaped("unlike-strides", (5, 12), (3, 3), stride=(1, 2), padding=1),
    shaped("padding-over-kernel", (9, 40), (2, 2), stride=2, padding=5),
    shaped("phases-without-tap", (3, 20), (1, 2), stride=(2, 4), activation="relu"),
    shaped("1d", (70,), (4,), stride=2, padding=1, activation="silu"),
    shaped("3d", (3, 3, 10), (3, 3, 3), stride=2, padding=1),
    shaped("3d-depth-of-one-tap", (2, 3, 6), (1, 3, 3), stride=(3, 2, 1), dilation=(2, 1, 1), output_padding=(1, 0, 0)),
    shaped("3d-dilated", (4, 2, 6), (3, 2, 2), stride=(2, 1, 2), dilation=(3, 1, 1), padding=(2, 0, 1)),
    shaped("multiplier", (4, 8), (3, 3), multiplier=3, stride=2, padding=1, bias=False),
    shaped("stride-1-multiplier", (4, 8), (3, 3), multiplier=2, padding=1),
    shaped("many-images", (2, 7), (3, 3), channels=2, batch=37, stride=2, padding=1),
    *(
        shaped(name, (4, 8), (3, 3), stride=2, padding=1, x=x, w=w)
        for name, x, w in (
            ("rows-of-more", rows_of, None),
            ("unaligned", shifted, shifted),
            ("sliced-weight", None, sliced),
            ("channels-last-output", None, channels_last),
        )
    ),
]
BY_NAME = {layer.id: layer for layer in CASES}


def problem_of(layer, dtype=torch.bfloat16):
    return tc.plan(getattr(tc, layer.function), **layer.tensors(dtype)).problem


QUICK = (
    "width-4", "width-28", "height-3", "kernel-1", "stride-3", "dilation-2", "unlike-strides", "stride-and-dilation",
    "phases-without-tap", "3d", "multiplier", "many-images", "rows-of-more", "channels-last-output",
)  # fmt: skip
PARTED = ("width-28", "stride-5", "padding-over-kernel", "stride-and-dilation", "3d-dilated")


def some(quick):
    """All layers, those that are not quick with the long tail."""
    return [pytest.param(layer, id=layer.id, marks=() if layer.id in quick else pytest.mark.slow) for layer in CASES]


@pytest.mark.parametrize("layer", some(QUICK))
def test_default_tile(layer):
    run(layer.function, layer.tensors(torch.bfloat16), NAME, default_tile(NAME, problem_of(layer), KNOWN["sm_90"]))


@pytest.mark.parametrize("layer", some(PARTED))
def test_blocks_of_a_part_of_a_row(layer):
    tile = replace(SMALL, ROWS=8)
    assert tile.mismatch(problem_of(layer)) is None
    run(layer.function, layer.tensors(torch.float32), NAME, tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_dtypes(dtype):
    layer = BY_NAME["width-28"]
    run(layer.function, layer.tensors(dtype), NAME, default_tile(NAME, problem_of(layer, dtype), KNOWN["sm_80"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["width-28", "stride-and-dilation"])
def test_every_candidate(name):
    layer = BY_NAME[name]
    arguments = layer.tensors(torch.float16)
    for tile in candidates(NAME, problem_of(layer, torch.float16), KNOWN["sm_90"]):
        launches.clear()
        run(layer.function, arguments, NAME, tile)


def test_blocks_by_hand():
    problem = problem_of(shaped("by-hand", (28, 28), (5, 5), padding=2, stride=2, output_padding=1))
    # 56 columns from the whole row of 28; 32 of them from one column before the sixteen of their own, in vectors of 4.
    assert block_of(problem, replace(SMALL, BLOCK_T=64)) == {
        "HEIGHT": 4, "WIDTH": 64, "X_VECTOR": 4, "Y_VECTOR": 8, "LEFT": 0, "ABOVE": 2,
    }  # fmt: skip
    assert block_of(problem, replace(SMALL, BLOCK_T=32)) == {
        "HEIGHT": 4, "WIDTH": 32, "X_VECTOR": 4, "Y_VECTOR": 8, "LEFT": 4, "ABOVE": 2,
    }  # fmt: skip
    # Of 16 columns of stride 3 a block has four vectors' worth of one phase: twelve, and three of four rows.
    third = block_of(problem_of(shaped("by-threes", (9, 28), (3, 3), stride=3)), SMALL)
    assert (third["HEIGHT"], third["WIDTH"], third["X_VECTOR"]) == (3, 12, 4)


def test_an_input_gradient_that_only_a_measurement_gives_to_it(monkeypatch):
    (layer,) = [layer for layer in find("mobile_dw5s2") if layer.dtype == "bfloat16"]
    problem = next(part for part in layer.parts() if part.part == INPUT_GRADIENT).problem()
    target = KNOWN["sm_90"]
    assert NAME in [kernel.name for kernel in dispatch.forms(problem, target)[0]]
    assert dispatch.plan(problem, target).kernel.name == "transposed_phase"
    serves_where_timed(monkeypatch, NAME, problem, target)


@pytest.mark.parametrize("name", ["input", "weight"])
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "channel", "row"])
def test_beyond_32_bits(name, dim, spread):
    arguments = shaped("wide", (3, 8), (3, 3), batch=3, stride=2, padding=1).tensors(torch.float16)
    tensor = arguments[name]
    arguments[name] = spread(tensor, dim, min(LIMIT + 24, (3 * LIMIT - 1) // max(tensor.shape[dim] - 1, 1)))
    run("conv_transpose2d", arguments, NAME, SMALL)


def test_no_image_is_no_program():
    made = tc.plan(tc.conv_transpose2d, **shaped("empty", (5, 8), (3, 3), batch=0, stride=2).tensors(torch.float32))
    assert dispatch.plan(made.problem, made.target, NAME).grid == 0


@pytest.mark.parametrize(
    ("function", "x", "shape", "options", "reason"),
    [
        ("conv2d", None, (4, 1, 3, 3), {"groups": 4, "stride": 2}, "it is not transposed"),
        ("conv_transpose2d", channels_last, (4, 1, 3, 3), {"groups": 4, "stride": 2}, "not contiguous"),
        ("conv_transpose2d", None, (4, 2, 3, 3), {"groups": 2, "stride": 2}, "2 input channels"),
        ("conv_transpose2d", None, (4, 1, 3, 3), {"groups": 4, "stride": (2, 9)}, "2 x 9 phases do not fit"),
    ],
)
def test_what_it_is_not_for(function, x, shape, options, reason):
    tensor = random((1, 4, 5, 6))
    made = tc.plan(getattr(tc, function), x(tensor) if x else tensor, random(shape), **options)
    with pytest.raises(PlanError, match=reason):
        dispatch.plan(made.problem, made.target, NAME)


def test_tiles_that_do_not_fit_say_why():
    problem = problem_of(shaped("refused", (9, 40), (9, 9), padding=4, stride=4))
    for changes, reason in (
        ({"BLOCK_T": 64, "BLOCK_K": 16}, "read 25 columns, more than 16"),
        ({"ROWS": 2}, "2 x 16 outputs are not of all 4 x 4 phases"),
        ({"ROWS": 32}, "72 products are too many"),
        ({"BLOCK_M": 8}, "at least 16"),
    ):
        assert reason in replace(SMALL, **changes).mismatch(problem)


@pytest.mark.parametrize("target", [pytest.param(KNOWN[name], marks=marks, id=name) for name, marks in TARGETS.items()])
def test_defaults_fit_the_flagships(target):
    for workload in FLAGSHIPS:
        for variant in workload.variants(("float16", "float32", "float64")) if workload.kind == "depthwise" else ():
            problem = replace(variant, part=INPUT_GRADIENT).problem()
            if KERNELS[NAME].unsuited(problem) is None:
                assert default_tile(NAME, problem, target).unfit(problem, target) is None, variant.title
