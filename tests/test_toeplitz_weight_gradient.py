"""Depthwise weight gradients as products of whole rows over images: every pairing of rows, tiles, views, refusals."""

from dataclasses import replace

import pytest
import torch
from cases import case
from helpers import (
    DEVICE,
    INTERPRETED,
    channels_last,
    chosen_tile,
    compare,
    launches,
    name_of,
    serves_where_timed,
    shifted,
)
from test_banded_weight_gradient import operands, planned
from test_toeplitz import LAYERS, framed, of

from triton_conv import dispatch
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels.depthwise_toeplitz_weight_gradient import DepthwiseToeplitzWeightGradientTile
from triton_conv.kernels.depthwise_toeplitz_weight_gradient import row_blocks as blocks_of
from triton_conv.kernels.toeplitz_blocks import hops, width_in, width_out
from triton_conv.reference import tolerance
from triton_conv.static_model.trips import trips
from triton_conv.target import KNOWN
from triton_conv.workloads import WEIGHT_GRADIENT, find

NAME = "depthwise_toeplitz_weight_gradient"
TILES = {
    "small": DepthwiseToeplitzWeightGradientTile(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, num_stages=2),
    "tall": DepthwiseToeplitzWeightGradientTile(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16),
    "wide": DepthwiseToeplitzWeightGradientTile(BLOCK_M=32, BLOCK_N=128, BLOCK_K=32, num_warps=8),
    "whole": DepthwiseToeplitzWeightGradientTile(BLOCK_M=512, BLOCK_N=256, BLOCK_K=64, num_warps=16),
}
QUICK = (
    "large-filter-tall", "filter-over-image-wide", "odd-small", "prime-tall", "vectors-wide", "no-padding-whole",
    "before-tall", "behind-wide", "padding-over-filter-tall", "stride-2-tall", "stride-over-filter-wide",
    "dilated-wide", "stride-and-dilation-wide", "dilation-over-stride-tall", "rows-of-one-tall", "one-row-tall",
    "signal-wide", "signal-stride-2-small",
)  # fmt: skip
PAIRS = [
    pytest.param(layer, tile, id=f"{layer}-{tile}", marks=() if f"{layer}-{tile}" in QUICK else pytest.mark.slow)
    for layer in LAYERS
    for tile in TILES
]


def layer_of(name, batch=None):
    x, kernel, options = LAYERS[name]
    x = (batch or x[0], *x[1:])
    return case(name, NAME, of(name), x, (x[1], 1, *kernel), groups=x[1], **options)


def widened(tile, problem):
    """The tile, or one that takes the problem's rows."""
    return replace(
        tile, BLOCK_M=max(tile.BLOCK_M, width_in(problem)), BLOCK_N=max(tile.BLOCK_N, width_out(problem))
    )  # fmt: skip


def run(layer, tile, dtype=torch.bfloat16, x=None, dy=None):
    """Every part is written, and together they are the gradient."""
    x, grad_output, expected = operands(layer, dtype, x, dy)
    made = planned(x, grad_output, layer)
    made = dispatch.plan(made.problem, made.target, NAME, tile(made.problem))
    (parts, *shape), _ = made.partial or ((1, *made.out_shape), None)
    partial = torch.full((parts, *shape), float("nan"), dtype=torch.float32 if made.partial else dtype, device=DEVICE)
    made.launch(x, grad_output, partial)
    assert dict(launches) == {NAME: 1}
    precision = "ieee" if INTERPRETED else made.problem.precision
    bound = tolerance(dtype, made.problem.geometry.M, precision)
    compare(partial.double().sum(0).to(dtype).reshape(expected.shape), expected, bound)


@pytest.mark.parametrize(("layer", "tile"), PAIRS)
def test_gradient(layer, tile):
    run(layer_of(layer), lambda problem: widened(TILES[tile], problem))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("tile", ["safe", "sm_90", "sm_80"])
def test_chosen_tiles(tile, dtype):
    # More images than a step takes.
    run(
        layer_of("vectors", 70),
        lambda problem: chosen_tile(NAME, problem, tile),
        dtype,
    )


@pytest.mark.slow
def test_every_candidate():
    layer = case("many", NAME, "conv2d", (70, 2, 16, 15), (2, 1, 9, 9), groups=2, padding=4)
    x, dy, _ = operands(layer, torch.float16)
    tiles = candidates(NAME, planned(x, dy, layer).problem, KNOWN["sm_90"])
    assert len(tiles) > 10
    for tile in tiles:
        launches.clear()
        run(layer, lambda problem, tile=tile: tile, torch.float16)


@pytest.mark.parametrize("dy", [torch.clone, framed, channels_last], ids=name_of)
@pytest.mark.parametrize("x", [framed, shifted], ids=name_of)
def test_views(x, dy):
    run(layer_of("vectors"), lambda problem: TILES["tall"], torch.float16, x, dy)


def layer_problem():
    (layer,) = [layer for layer in find("large_dw2d") if layer.dtype == "bfloat16"]
    return replace(layer, part=WEIGHT_GRADIENT).problem()


def test_the_flagship_it_is_for(monkeypatch):
    problem, target = layer_problem(), KNOWN["sm_90"]
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        made = dispatch.plan(problem, KNOWN[arch], NAME)
        assert made.tile == default_tile(NAME, problem, KNOWN[arch])
        assert made.tile.parts(problem) * problem.partial_bytes <= problem.most_partial_bytes
    assert 10 <= len(candidates(NAME, problem, target)) <= 300
    # Not timed on any device yet: it serves where it is asked for.
    assert dispatch.plan(problem, target).kernel.name != NAME
    assert NAME in [kernel.name for kernel in dispatch.untimed(problem, target)]
    serves_where_timed(monkeypatch, NAME, problem, target)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("tile", TILES)
def test_steps_are_those_with_a_row_in_the_image(layer, tile):
    x, dy, _ = operands(layer_of(layer), torch.float16)
    problem = planned(x, dy, layer_of(layer)).problem
    tile = widened(TILES[tile], problem)
    g, hop, rows = problem.geometry, hops(problem)[0], tile.BLOCK_M // width_in(problem)
    read = 0
    for block in range(count := blocks_of(problem, tile)):
        inside = {
            h
            for h in range(g.out_size[1])
            for f in range(rows)
            if 0 <= h * g.stride[1] - g.pad_before[1] + (block * rows + f) * g.dilation[1] < g.in_size[1]
        }
        span = hop * tile.parts(problem)
        # All phases of the blocks of output rows from the first to the last of these.
        steps = (max(inside) // span - min(inside) // span + 1) * hop if inside else 1
        read += steps * -(-g.batch // tile.BLOCK_K)
    (counted,) = trips(NAME, problem, tile)
    assert read / count <= counted <= read / count + hop * -(-g.batch // tile.BLOCK_K)


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        ((16, 4, 6, 6), (8, 1, 3, 3), {"groups": 4}, "2 output channels, not one each"),
        ((16, 4, 3, 6, 6), (4, 1, 3, 3, 3), {"groups": 4}, "three dimensions"),
        ((16, 4, 6, 65), (4, 1, 3, 31), {"groups": 4}, "65 columns is wider than 64"),
        ((16, 4, 6, 64), (4, 1, 3, 7), {"groups": 4}, "of 64 columns of a row a filter reads 7"),
    ],
)
def test_refused_problems(x, w, options, message):
    layer = case("refused", NAME, f"conv{len(x) - 2}d", x, w, **options)
    x, dy, _ = operands(layer, torch.float16)
    made = planned(x, dy, layer)
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME)


def test_other_refusals():
    layer = layer_of("odd")
    for dtype, layout, message in (
        (torch.float32, None, "only 16-bit numbers"),
        (torch.float16, channels_last, "neighbouring pixels are not contiguous"),
    ):
        x, dy, _ = operands(layer, dtype, layout)
        made = planned(x, dy, layer)
        with pytest.raises(PlanError, match=message):
            dispatch.plan(made.problem, made.target, NAME)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"BLOCK_K": 8}, "at least 16 of each dimension"),
        ({"BLOCK_M": 32}, "an input row of 64 columns does not fit in 32"),
        ({"BLOCK_N": 32}, "an output row of 64 columns does not fit in 32"),
    ],
)
def test_refused_tiles(changes, message):
    x, dy, _ = operands(layer_of("widest"), torch.float16)
    made = planned(x, dy, layer_of("widest"))
    tile = DepthwiseToeplitzWeightGradientTile(**{"BLOCK_M": 64, "BLOCK_N": 64} | changes)
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME, tile)
