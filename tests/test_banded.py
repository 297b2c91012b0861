"""Depthwise convolution by banded matrices: rows of every width, tiles of other targets, views, 64-bit offsets."""

from dataclasses import replace

import pytest
import torch
from cases import BANDED, case
from helpers import DTYPES, INTERPRETED, channels_last, expanded, name_of, random, shifted, sliced
from test_large import LIMIT, spread
from test_tiles import run

import triton_conv as tc
from triton_conv import dispatch
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels import KERNELS
from triton_conv.kernels.banded_rows import columns_read, row_columns, row_left
from triton_conv.kernels.depthwise_banded import DepthwiseBandedTile
from triton_conv.target import KNOWN
from triton_conv.workloads import FLAGSHIPS

assert spread  # a fixture


def rows_of(tensor):
    """Every second image, channel and row of a larger tensor of NaN: pixels of a row contiguous, nothing else."""
    *outer, width = tensor.shape
    whole = torch.full((*(2 * size for size in outer), width + 3), float("nan"), dtype=tensor.dtype)
    view = whole.to(tensor.device)[(*(slice(1, None, 2) for _ in outer), slice(1, width + 1))]
    return view.copy_(tensor)


def shaped(id, size, kernel, channels=3, batch=2, **arguments):
    rank = len(size)
    x, w = (batch, channels, *size), (channels * arguments.pop("multiplier", 1), 1, *kernel)
    return case(id, BANDED, f"conv{rank}d", x, w, groups=channels, **arguments)


CASES = [
    *(shaped(f"width-{n}", (5, n), (3, 3), padding=1) for n in (1, 2, 7, 8, 15, 16, 17, 28, 33, 56)),
    *(shaped(f"height-{n}", (n, 9), (5, 5), padding=2) for n in (1, 2, 3, 4, 5, 8, 9)),
    *(shaped(f"kernel-{k}", (9, 24), (k, k), padding=k // 2) for k in (1, 2, 4, 5, 6, 7)),
    *(shaped(f"stride-{s}", (11, 40), (5, 5), padding=2, stride=s) for s in (2, 3, 5)),
    *(shaped(f"dilation-{d}", (13, 32), (3, 3), padding=d, dilation=d) for d in (2, 3, 6)),
    shaped("stride-and-dilation", (14, 32), (3, 4), stride=(4, 3), dilation=(6, 2), padding=(5, 2)),
    shaped("dilation-over-stride", (12, 16), (2, 3), stride=(2, 1), dilation=(3, 1)),
    shaped("large", (16, 16), (13, 13), padding=6),
    shaped("large-of-one-row", (1, 70), (1, 31), padding=(0, 15)),
    shaped("causal", (70,), (4,), padding=((3, 0),), activation="silu"),
    shaped("anticausal", (64,), (31,), padding=((0, 30),)),
    shaped("long", (700,), (31,), padding=15),
    shaped("padding-over-kernel", (3, 4), (2, 2), padding=9),
    shaped("pairs", (5, 16), (3, 4), padding=((0, 2), (3, 1))),
    shaped("valid", (7, 32), (7, 9)),
    shaped("3d", (4, 5, 8), (3, 3, 3), padding=1),
    shaped("3d-strided", (5, 6, 9), (2, 3, 3), padding=(1, 0, 1), stride=(2, 2, 1), dilation=(2, 1, 1)),
    shaped("3d-large", (5, 6, 8), (5, 5, 5), padding=2),
    shaped("3d-flat", (1, 1, 8), (1, 1, 3), padding=(1, 1, 1)),
    shaped("multiplier", (5, 8), (3, 3), multiplier=3, padding=1, bias=False, activation="relu"),
    shaped("one-channel", (5, 8), (3, 3), channels=1),
    shaped("many-images", (3, 7), (3, 3), channels=2, batch=37, padding=1),
    *(
        shaped(f"{name}", (6, 16), (3, 3), padding=1, x=x, w=w)
        for name, x, w in (
            ("rows-of-more", rows_of, None),
            ("expanded", expanded, None),
            ("unaligned", shifted, shifted),
            ("sliced-weight", None, sliced),
            ("channels-last-output", None, channels_last),
        )
    ),
]


def default(layer, arguments, target="sm_90"):
    return default_tile(BANDED, tc.plan(getattr(tc, layer.function), **arguments).problem, KNOWN[target])


@pytest.mark.parametrize("layer", CASES, ids=name_of)
def test_default_tile(layer):
    arguments = layer.tensors(torch.bfloat16)
    run(layer.function, arguments, BANDED, default(layer, arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("id", ["width-28", "stride-3", "large", "3d"])
def test_dtypes(id, dtype):
    (layer,) = [layer for layer in CASES if layer.id == id]
    arguments = layer.tensors(dtype)
    run(layer.function, arguments, BANDED, default(layer, arguments, "sm_80"))


@pytest.mark.skipif(not INTERPRETED, reason="of some of these tiles a GPU's compiler makes 50 KB of stack a thread")
@pytest.mark.parametrize("changes", [{"FUSED": 4}, {"RESIDENT": False, "FUSED": 2}, {"ROWS": 8}, {"STEPS": 4}], ids=str)
@pytest.mark.parametrize(
    "id", ["height-5", "stride-and-dilation", "dilation-over-stride", "dilation-2", "3d-strided", "many-images"]
)
def test_tiles_of_the_space(id, changes):
    (layer,) = [layer for layer in CASES if layer.id == id]
    arguments = layer.tensors(torch.float32)
    tile = DepthwiseBandedTile(BLOCK_M=16, BLOCK_K=64, ROWS=4, FUSED=1)
    run(layer.function, arguments, BANDED, replace(tile, **changes))


def test_no_image_is_no_program():
    arguments = shaped("empty", (5, 8), (3, 3), batch=0).tensors(torch.float32)
    made = tc.plan(tc.conv2d, **arguments)
    assert dispatch.plan(made.problem, made.target, BANDED).grid == 0


@pytest.mark.parametrize("stride", [LIMIT + 24, 2**30 + 16])
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "channel", "row"])
@pytest.mark.parametrize("name", ["input", "weight"])
def test_beyond_32_bits(name, dim, stride, spread):
    arguments = shaped("wide", (3, 8), (3, 3), batch=3, padding=1).tensors(torch.float16)
    tensor = arguments[name]
    arguments[name] = spread(tensor, dim, min(stride, (3 * LIMIT - 1) // max(tensor.shape[dim] - 1, 1)))
    run("conv2d", arguments, BANDED, DepthwiseBandedTile(BLOCK_M=16, BLOCK_K=32, ROWS=2, FUSED=2))


@pytest.mark.parametrize(
    ("size", "x", "options", "reason"),
    [
        ((1, 4, 5, 6), channels_last, {}, "not contiguous"),
        ((1, 4, 5, 6), sliced, {}, "not contiguous"),
        ((1, 4, 5, 6), None, {"padding": 1, "padding_mode": "reflect"}, "border is reflect"),
        ((1, 8, 5, 6), None, {}, "2 input channels"),
    ],
)
def test_what_it_is_not_for(size, x, options, reason):
    weight = random((4, size[1] // 4, 3, 3))
    made = tc.plan(tc.conv2d, x(random(size)) if x else random(size), weight, groups=4, **options)
    with pytest.raises(PlanError, match=reason):
        dispatch.plan(made.problem, made.target, BANDED)


def test_tiles_that_do_not_fit_say_why():
    x, w = random((1, 4, 40, 40)), random((4, 1, 11, 11))
    made = tc.plan(tc.conv2d, x, w, groups=4, padding=5)
    assert columns_read(made.problem, 16) == 16 + 10 + 3
    for tile, reason in (
        (DepthwiseBandedTile(BLOCK_T=32, BLOCK_K=32), "read 45 columns, more than 32"),
        (DepthwiseBandedTile(ROWS=8, FUSED=1), "88 products are too many"),
        (DepthwiseBandedTile(ROWS=2, FUSED=4), "cannot make 4 of 2 rows"),
        (DepthwiseBandedTile(BLOCK_M=8), "at least 16"),
    ):
        with pytest.raises(PlanError, match=reason):
            dispatch.plan(made.problem, KNOWN["sm_90"], BANDED, tile)


def test_a_whole_row_reads_the_image_alone():
    problem = tc.plan(tc.conv2d, random((1, 4, 5, 28)), random((4, 1, 5, 5)), groups=4, padding=2).problem
    # In vectors of four columns; a block of a part begins one before its own.
    assert (row_left(problem, 16), row_columns(problem, 16)) == (4, 16 + 4 + 2)
    assert (row_left(problem, 32), row_columns(problem, 32)) == (0, 28)
    narrow = tc.plan(tc.conv2d, random((1, 4, 5, 28)), random((4, 1, 5, 5)), groups=4, stride=(1, 20)).problem
    assert row_columns(narrow, 16) == 20 + 5


@pytest.mark.parametrize("target", KNOWN.values(), ids=KNOWN)
def test_defaults_fit_the_flagships(target):
    for workload in FLAGSHIPS:
        for variant in workload.variants(("float16", "float32", "float64")):
            problem = variant.problem()
            if KERNELS[BANDED].unsuited(problem) is None:
                assert default_tile(BANDED, problem, target).unfit(problem, target) is None, variant.title
