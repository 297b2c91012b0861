"""The weight gradient in boxes: odd boxes, strides and borders, operands in every layout, splits, refusals."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import DEVICE, channels_last, name_of, random
from test_depthwise_patch import framed
from test_depthwise_patch_weight_gradient import run
from test_gradient_tiles import flat

from triton_conv import dispatch, ops, ops_conv
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels.boxes import box
from triton_conv.kernels.weight_gradient_boxed import WeightGradientBoxedTile
from triton_conv.reference import reference
from triton_conv.target import KNOWN
from triton_conv.workloads import FLAGSHIPS, WEIGHT_GRADIENT

NAME = "weight_gradient_boxed"

# (input, weight, options)
LAYERS = {
    "1d": ((3, 16, 21), (24, 16, 4), {"padding": ((3, 0),)}),
    "1d-strided": ((2, 24, 19), (16, 24, 5), {"padding": ((1, 2),), "stride": 3, "dilation": 2}),
    "2d": ((2, 40, 7, 11), (72, 40, 3, 3), {"padding": 1}),
    "many-images": ((9, 16, 3, 5), (16, 16, 3, 3), {"padding": 1}),
    "1x1": ((2, 16, 5, 4), (16, 16, 1, 1), {}),
    "groups": ((2, 48, 6, 5), (72, 16, 3, 2), {"padding": 1}),
    "stride": ((2, 16, 9, 8), (16, 16, 3, 3), {"stride": 2, "padding": 1}),
    "stride-over-kernel": ((2, 16, 13, 14), (16, 16, 2, 2), {"stride": (5, 3)}),
    "stride-and-dilation": ((2, 16, 12, 13), (16, 16, 3, 3), {"stride": (3, 2), "dilation": (1, 3), "padding": 2}),
    "dilation-past-the-border": ((1, 16, 5, 4), (16, 16, 3, 3), {"dilation": 6, "padding": 6}),
    "asymmetric": ((2, 16, 6, 5), (16, 16, 3, 2), {"padding": ((0, 2), (3, 0)), "stride": (1, 2)}),
    "3d": (
        (2, 16, 5, 4, 6), (24, 16, 3, 2, 3),
        {"stride": (2, 1, 1), "dilation": (1, 2, 1), "padding": ((2, 0), (1, 1), (0, 2))},
    ),
}  # fmt: skip
# The most splits are more than there are boxes: those without any write zeros.
TILES = {
    "small": WeightGradientBoxedTile(BLOCK_M=64, BLOCK_N=16, BLOCK_K=32, SPLITS=3),
    "wide": WeightGradientBoxedTile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, SPLITS=1, num_stages=3),
    "split": WeightGradientBoxedTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, SPLITS=5, num_stages=2),
}


@pytest.mark.parametrize(
    ("layer", "tile"),
    [
        pytest.param(
            layer, tile, marks=pytest.mark.slow if tile == "wide" and layer not in ("2d", "stride", "3d") else ()
        )
        for layer in LAYERS
        for tile in TILES
    ],
)
def test_odd_boxes(layer, tile):
    run(LAYERS[layer], torch.bfloat16, TILES[tile], name=NAME)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_default_tile(dtype):
    run(LAYERS["2d"], dtype, lambda made: default_tile(NAME, made.problem, KNOWN["sm_90"]), name=NAME)


def wide_frame(tensor):
    """channels_last inside a larger tensor of NaN, one channel in: no pixel begins at a multiple of 16 bytes."""
    n, c, *size = tensor.shape
    whole = torch.full((n, -(-c // 8) * 8 + 8, *size), float("nan"))
    return channels_last(whole.to(tensor))[:, 1 : c + 1].copy_(tensor)


@pytest.mark.parametrize("layer", ["2d", "groups"])
def test_an_unaligned_gradient(layer):
    run(LAYERS[layer], torch.bfloat16, TILES["wide"], y_layout=wide_frame, name=NAME)


def test_what_no_output_reads_does_not_matter():
    # Of nine columns the last is read by the last tap alone. A box of eight outputs reaches past the five that there
    # are: other taps of the missing ones lie on that column, and their gradients are zero, but zero times NaN is not.
    x = channels_last(random((1, 16, 8, 9), torch.bfloat16))
    x[..., -1] = float("nan")
    grad_output = channels_last(random((1, 16, 8, 5), torch.bfloat16, "output"))
    made = ops_conv.plan_conv_weight_gradient(x, grad_output, *flat({"groups": 1}, (16, 16, 1, 5)))
    made = dispatch.plan(made.problem, made.target, NAME, TILES["wide"])
    assert made.values["BOX_W"] == 8
    found = ops.run_partial(made, x, grad_output)
    assert found[..., :4].isfinite().all()
    assert found[..., 4].isnan().all()


@pytest.mark.parametrize(
    "workload", [w for w in FLAGSHIPS if w.channels_last and w.kind == "dilated"], ids=lambda w: w.name
)
def test_boxes_of_the_flagships_waste_little(workload):
    problem = replace(workload, part=WEIGHT_GRADIENT).problem()
    sides = tuple(box(problem, 64).values())
    sizes = (problem.geometry.batch, *problem.geometry.out_size)
    covered = math.prod(-(-size // side) * side for size, side in zip(sizes, sides, strict=True))
    assert math.prod(sides) == 64
    assert covered <= 1.07 * math.prod(sizes)


def plan_of(x_shape, w_shape, layout=channels_last, dtype=torch.bfloat16, y_layout=None, **options):
    options = {"groups": x_shape[1] // w_shape[1]} | options
    x = layout(torch.empty(x_shape, device=DEVICE, dtype=dtype))
    w = torch.empty(w_shape, dtype=torch.float64, device=DEVICE)
    y = reference(f"conv{x.dim() - 2}d", {"input": x, "weight": w, **options})
    return ops_conv.plan_conv_weight_gradient(x, (y_layout or layout)(y.to(dtype)), *flat(options, w_shape))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda: plan_of((1, 16, 5, 5), (16, 16, 3, 3), layout=torch.clone),
            "channels of the input are not contiguous",
        ),
        (lambda: plan_of((1, 8, 5, 5), (16, 8, 3, 3)), "fewer than 16"),
        (lambda: plan_of((1, 20, 5, 5), (16, 20, 3, 3)), "not a multiple of 16 bytes apart"),
        (lambda: plan_of((1, 16, 5, 5), (16, 16, 3, 3), layout=framed), "does not begin at a multiple of 16"),
        (lambda: plan_of((1, 16, 5, 5), (16, 16, 3, 3), padding=1, padding_mode="reflect"), "border is reflect"),
        (lambda: plan_of((1, 16, 5, 5), (16, 16, 3, 3), dtype=torch.float32), "only 16-bit numbers"),
        (lambda: plan_of((1, 16, 5, 5), (16, 16, 1, 1), stride=7), "larger than the input"),
        (lambda: plan_of((1, 16, 5, 5), (16, 16, 3, 3), layout=wide_frame), "does not begin at a multiple of 16"),
        (lambda: plan_of((1, 72, 5, 5), (16, 36, 3, 3)), "groups of 36 channels"),
        (lambda: plan_of((0, 16, 5, 5), (16, 16, 3, 3)), "no pixel"),
    ],
)
def test_refused_problems(made, message):
    made = made()
    assert made.kernel.name in ("weight_gradient", "weight_gradient_rows")
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME)


def test_devices_without_bulk_copies():
    problem = plan_of((2, 16, 5, 5), (16, 16, 3, 3)).problem
    for target in ("sm_80", "gfx942"):
        with pytest.raises(PlanError, match="no engine for bulk copies"):
            dispatch.plan(problem, KNOWN[target], NAME, WeightGradientBoxedTile())
        assert dispatch.plan(problem, KNOWN[target]).kernel.name == "weight_gradient"
