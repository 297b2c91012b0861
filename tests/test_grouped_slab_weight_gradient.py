"""Weight gradients of narrow groups whose rows roll down slabs: groups and borders, segments, splits, refusals."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import channels_last, chosen_tile, name_of, random, serves_where_timed
from test_depthwise_patch_weight_gradient import plan_of, run
from test_gradient_tiles import flat
from test_grouped_slab import framed

from triton_conv import dispatch, ops, ops_conv
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels import KERNELS
from triton_conv.kernels.grouped_slab_weight_gradient import GroupedSlabWeightGradientTile
from triton_conv.static_model.trips import trips
from triton_conv.target import KNOWN
from triton_conv.workloads import WEIGHT_GRADIENT, find

NAME = "grouped_slab_weight_gradient"

# (input, weight, options)
LAYERS = {
    "fours": ((2, 24, 5, 7), (24, 4, 3, 3), {"padding": 1}),
    "ones": ((2, 40, 4, 5), (40, 1, 3, 3), {"padding": 1}),
    "eights": ((1, 104, 4, 6), (104, 8, 3, 3), {"padding": 1}),
    "sixteens": ((2, 48, 5, 3), (48, 16, 3, 3), {"padding": 1}),
    "to-fewer": ((2, 32, 4, 5), (16, 8, 3, 3), {"padding": 1}),
    "to-more": ((2, 24, 4, 5), (48, 4, 3, 2), {"padding": ((0, 0), (2, 2))}),
    "stride-2": ((2, 24, 9, 8), (24, 4, 3, 3), {"stride": 2, "padding": 1}),
    "stride-over-kernel": ((1, 32, 11, 9), (32, 16, 2, 1), {"stride": (4, 3)}),
    "dilated-columns": ((2, 24, 5, 9), (24, 8, 3, 3), {"dilation": (1, 3), "padding": (1, 2)}),
    "dilated-stride": ((1, 24, 7, 12), (24, 4, 3, 2), {"stride": (3, 4), "dilation": (1, 6), "padding": 2}),
    "asymmetric": ((2, 24, 4, 6), (24, 4, 2, 4), {"padding": ((0, 2), (3, 0))}),
    "5x1": ((1, 16, 6, 5), (16, 8, 5, 1), {"padding": (2, 0)}),
    "1x1": ((2, 24, 3, 4), (24, 4, 1, 1), {}),
    "padding-over-kernel": ((1, 16, 2, 3), (16, 8, 2, 3), {"padding": 4}),
    "1d": ((3, 24, 13), (24, 4, 5), {"padding": ((4, 0),), "stride": 2}),
}
# Strips of one column and of odd columns; segments that end past the image; splits without a segment, that write zeros.
TILES = {
    "segments": GroupedSlabWeightGradientTile(num_warps=2, ROWS=2, COLS=2, SLABS=2, SPLITS=3),
    "whole": GroupedSlabWeightGradientTile(num_warps=1, ROWS=64, COLS=3, SLABS=1, BLOCK_P=32, SPLITS=1),
    "idle": GroupedSlabWeightGradientTile(num_warps=4, ROWS=3, COLS=1, SLABS=8, BLOCK_P=16, SPLITS=9),
}
PAIRS = [
    pytest.param(layer, tile, id=f"{layer}-{tile}", marks=() if tile == "segments" or i % 5 == j else pytest.mark.slow)
    for i, layer in enumerate(LAYERS)
    for j, tile in enumerate(TILES)
]


def forced(layer, tile=TILES["segments"], dtype=torch.bfloat16, x_layout=channels_last, y_layout=channels_last):
    x, w, options = LAYERS[layer] if isinstance(layer, str) else layer
    run((x, w, options), dtype, tile, x_layout, y_layout, NAME)


def planned(layer, **changes):
    x, w, options = LAYERS[layer]
    return plan_of(
        x, w, **{"layout": lambda t: channels_last(t.bfloat16()), "groups": x[1] // w[1]} | options | changes
    )


@pytest.mark.parametrize(("layer", "tile"), PAIRS)
def test_narrow_groups(layer, tile):
    forced(layer, TILES[tile], torch.float16 if layer == "to-fewer" else torch.bfloat16)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("tile", ["safe", "sm_90"])
def test_chosen_tiles(tile, dtype):
    def pick(made):
        return chosen_tile(NAME, made.problem, tile)

    forced("eights", pick, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["fours", "stride-2"])
def test_every_candidate(layer):
    tried = candidates(NAME, planned(layer).problem, KNOWN["sm_90"])
    assert len(tried) > 8
    for tile in tried:
        forced(layer, replace(tile, SPLITS=min(tile.SPLITS, 5)), torch.float16)


@pytest.mark.parametrize(("x", "dy"), [(framed, channels_last), (channels_last, framed)])
def test_layouts(x, dy):
    forced("asymmetric", x_layout=x, y_layout=dy)


def test_wide_indices(monkeypatch):
    monkeypatch.setattr("triton_conv.problem.INT32_LIMIT", 0)
    dispatch.plan.cache_clear()
    try:
        forced("stride-2")
    finally:
        dispatch.plan.cache_clear()


def test_other_slabs_and_columns_do_not_matter():
    """A NaN of the input reaches its own slab alone, and there the taps that its row meets."""
    x_shape, w_shape, options = LAYERS["sixteens"]
    x, dy = (channels_last(random(x_shape, torch.bfloat16, seed)) for seed in ("x", "dy"))
    x[:, 16:32].fill_(float("nan"))
    made = ops_conv.plan_conv_weight_gradient(x, dy, *flat(options | {"groups": 3}, w_shape))
    found = ops.run_partial(dispatch.plan(made.problem, made.target, NAME, TILES["segments"]), x, dy)
    assert found[:16].isfinite().all() and found[32:].isfinite().all() and found[16:32].isnan().all()


@pytest.mark.parametrize("name", ["narrow_groups_4", "narrow_groups_8"])
def test_a_part_that_only_a_measurement_gives_to_it(name, monkeypatch):
    (problem,) = (work.problem() for work in find(name)[0].parts() if work.part == WEIGHT_GRADIENT)
    target = KNOWN["sm_90"]
    assert dispatch.family(problem)[0][0] == NAME and dispatch.plan(problem, target).kernel.name != NAME
    serves_where_timed(monkeypatch, NAME, problem, target)


@pytest.mark.parametrize(
    ("rows", "cols", "splits", "expected"), [(56, 4, 8, (56 / 8, 56)), (28, 2, 7, (2 * 112 / 7, 28))]
)
def test_steps_by_hand(rows, cols, splits, expected):
    # 64 images of 56 / COLS strips: 56 or 112 blocks of 16. Of 256 channels 16 slabs, four to a program.
    (problem,) = (work.problem() for work in find("narrow_groups_4")[0].parts() if work.part == WEIGHT_GRADIENT)
    tile = GroupedSlabWeightGradientTile(ROWS=rows, COLS=cols, SPLITS=splits)
    assert trips(NAME, problem, tile) == pytest.approx(expected)
    assert KERNELS[NAME].grid(problem, tile) == 4 * splits


@pytest.mark.parametrize(
    ("layer", "changes", "reason"),
    [
        ("fours", {"layout": lambda t: t.bfloat16()}, "its channels are not contiguous"),
        ("fours", {"layout": channels_last}, "only 16-bit numbers"),
        ("fours", {"padding_mode": "reflect"}, "its border is reflect"),
        ("fours", {"dilation": 2}, "filter rows lie 2 input rows apart"),
        (((1, 52, 4, 4), (52, 13, 3, 3), {}), {}, "no groups of 13 to 13 channels are whole vectors of 16"),
        (((1, 64, 4, 4), (64, 32, 3, 3), {}), {}, "no groups of 32 to 32 channels"),
        (((1, 12, 4, 4), (12, 4, 3, 3), {}), {}, "in whole vectors of 16 bytes"),
        (((1, 16, 3, 4, 4), (16, 8, 3, 3, 3), {"padding": 1}), {}, "its rank is 3"),
        (((1, 16, 9, 9), (16, 8, 5, 5), {}), {}, "25 taps do not fit in registers"),
        (((1, 16, 4, 4), (16, 16, 3, 3), {}), {}, "there are no groups"),
    ],
)  # fmt: skip
def test_refused_problems(layer, changes, reason, monkeypatch):
    if not isinstance(layer, str):
        monkeypatch.setitem(LAYERS, "given", layer)
        layer = "given"
    made = planned(layer, **changes)
    with pytest.raises(PlanError, match=reason):
        dispatch.plan(made.problem, made.target, NAME)


def test_another_maker_s_matrix_instructions_are_refused():
    suited, notes = dispatch.forms(planned("fours").problem, KNOWN["gfx942"])
    assert KERNELS[NAME] not in suited and f"not {NAME}: the matrix instructions of gfx942" in notes[0]


def test_it_is_no_forward_form():
    problem = find("narrow_groups_4")[0].problem()
    with pytest.raises(PlanError, match="no weight gradient"):
        dispatch.plan(problem, KNOWN["sm_90"], NAME)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLABS": 2}, "2 slabs are not one for each of 4 warps"),
        ({"BLOCK_P": 8}, "a product sums over 16 strips, not 8"),
        ({"COLS": 8}, "registers a thread for sums and columns"),
        ({"SPLITS": 4096}, "partial sums take"),
    ],
)
def test_refused_tiles(changes, message):
    (problem,) = (work.problem() for work in find("narrow_groups_4")[0].parts() if work.part == WEIGHT_GRADIENT)
    with pytest.raises(PlanError, match=message):
        dispatch.plan(problem, KNOWN["sm_90"], NAME, GroupedSlabWeightGradientTile(**changes))


def test_defaults_fit():
    """A problem that the predicate takes has a default tile that fits."""
    targets = [target for target in KNOWN.values() if target.vendor == "nvidia"]
    for (kernel, stride), channels, size in itertools.product(
        (((3, 3), 1), ((3, 3), 2), ((1, 1), 1), ((4, 4), 1), ((1, 7), 1)), (1, 4, 16), (1, 7, 28)
    ):
        shape, weight = (2, 64, size, size), (64, channels, *kernel)
        made = plan_of(
            shape, weight, layout=lambda t: channels_last(t.half()), groups=64 // channels, padding=3, stride=stride
        )
        if KERNELS[NAME].unsuited(made.problem) is None:
            for target in targets:
                assert default_tile(NAME, made.problem, target).unfit(made.problem, target) is None
