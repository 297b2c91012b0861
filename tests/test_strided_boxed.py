"""Strides in boxes: phases of the input and of the output, odd boxes and borders, empty phases, operands, refusals."""

import math
from dataclasses import replace

import pytest
import torch
from cases import case
from helpers import channels_last, name_of, random
from test_depthwise_patch import framed
from test_tiles import run
from test_weight_gradient_boxed import wide_frame

import triton_conv as tc
from triton_conv import dispatch
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels import KERNELS
from triton_conv.kernels.strided_boxed import StridedBoxedTile
from triton_conv.target import KNOWN
from triton_conv.workloads import Workload, find

NAME = "strided_boxed"


def layer(id, function, input, weight, **options):
    return case(id, NAME, function, input, weight, x=channels_last, w=channels_last, **options)


FORWARD = [
    layer("1d", "conv1d", (3, 32, 22), (24, 32, 4), stride=2, padding=((3, 0),)),
    layer("2d", "conv2d", (2, 64, 8, 12), (72, 64, 3, 3), stride=2, padding=1),
    layer("one-phase-of-many", "conv2d", (2, 32, 7, 9), (16, 32, 1, 1), stride=(3, 2), activation="silu"),
    layer("one-phase-in-the-padding", "conv2d", (2, 32, 7, 8), (16, 32, 1, 2), stride=2, dilation=2, padding=1),
    layer("kernel-of-the-stride", "conv2d", (3, 32, 6, 8), (16, 32, 2, 2), stride=2),
    layer("phases-of-one-length", "conv2d", (2, 32, 8, 11), (16, 32, 3, 2), stride=(4, 3)),
    layer("groups", "conv2d", (2, 64, 8, 5), (96, 32, 3, 2), stride=(2, 1), padding=1, groups=2),
    layer("dilation", "conv2d", (2, 32, 12, 14), (16, 32, 3, 3), stride=(3, 2), dilation=(1, 3), padding=2),
    layer("asymmetric", "conv2d", (2, 32, 8, 5), (16, 32, 3, 2), stride=(2, 1), padding=((0, 2), (3, 0))),
    layer("3d", "conv3d", (1, 32, 4, 4, 6), (24, 32, 3, 2, 3), stride=(2, 1, 2), padding=((2, 0), (1, 1), (0, 2))),
]
TRANSPOSED = [
    layer("1d", "conv_transpose1d", (2, 16, 9), (16, 32, 5), stride=3, padding=3, output_padding=2),
    layer("2d", "conv_transpose2d", (2, 40, 5, 6), (40, 24, 3, 3), stride=2, padding=1, output_padding=1),
    layer("pixel-shuffle", "conv_transpose2d", (2, 16, 4, 5), (16, 24, 2, 2), stride=2),
    layer("empty-phases", "conv_transpose2d", (2, 16, 4, 5), (16, 24, 1, 2), stride=(2, 3), padding=(0, 1)),
    layer("groups", "conv_transpose2d", (2, 80, 4, 5), (80, 48, 3, 4), stride=(1, 2), groups=2, padding=(0, 2)),
    layer("dilation", "conv_transpose2d", (2, 16, 5, 4), (16, 16, 3, 3), stride=(4, 3), dilation=2, padding=5),
    layer("phases-out-of-reach", "conv_transpose2d", (1, 16, 2, 1), (16, 16, 1, 3), stride=(1, 5), padding=(0, 1)),
    layer("3d", "conv_transpose3d", (1, 16, 3, 4, 3), (16, 24, 2, 3, 2), stride=(2, 2, 1), padding=(1, 0, 1)),
]
SMALL = StridedBoxedTile(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32)
WIDE = StridedBoxedTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_stages=3)
# The interpreter takes longest for the widest tile; these have several boxes, steps and empty phases.
TELLING = ("2d", "empty-phases", "3d")


def tiled(layers, *tiles):
    """Every layer with the first tile, the telling ones with every tile, the others with the long tail."""
    return [
        pytest.param(
            layer, tile, id=f"{layer.id}-{tile.BLOCK_M}{'-together' * tile.TOGETHER}",
            marks=() if i == 0 or layer.id in TELLING else pytest.mark.slow,
        )
        for layer in layers
        for i, tile in enumerate(tiles)
    ]  # fmt: skip


@pytest.mark.parametrize(("layer", "tile"), tiled(FORWARD, SMALL, WIDE))
def test_phases_of_the_input(layer, tile):
    run(layer.function, layer.tensors(torch.bfloat16), NAME, tile)


@pytest.mark.parametrize(
    ("layer", "tile"), tiled(TRANSPOSED, replace(SMALL, TOGETHER=True), WIDE, SMALL, replace(WIDE, TOGETHER=True))
)
def test_phases_of_the_output(layer, tile):
    run(layer.function, layer.tensors(torch.bfloat16), NAME, tile)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layer", [FORWARD[1], TRANSPOSED[1]], ids=["forward", "transposed"])
def test_default_tile(layer, dtype):
    arguments = layer.tensors(dtype)
    problem = tc.plan(getattr(tc, layer.function), **arguments).problem
    run(layer.function, arguments, NAME, default_tile(NAME, problem, KNOWN["sm_90"]))


def test_phases_together_where_their_boxes_fill_the_machine():
    (workload,) = find("decoder_t2d")
    forward, gradient, _ = workload.parts()
    assert default_tile(NAME, forward.problem(), KNOWN["sm_90"]).TOGETHER
    assert not default_tile(NAME, gradient.problem(), KNOWN["sm_90"]).TOGETHER
    small = replace(workload, input=(1, 512, 32, 32)).problem()
    assert not default_tile(NAME, small, KNOWN["sm_90"]).TOGETHER


def inside_nan(tensor):
    """channels_last in a larger tensor of NaN whose pixels are as well aligned."""
    n, c, *size = tensor.shape
    whole = channels_last(torch.full((n + 2, c + 16, *(s + 2 for s in size)), float("nan")).to(tensor))
    return whole[(slice(1, -1), slice(8, -8), *(slice(1, -1) for _ in size))].copy_(tensor)


@pytest.mark.parametrize("layer", [FORWARD[1], FORWARD[6], TRANSPOSED[1]], ids=name_of)
def test_what_lies_around_the_operands_is_not_read(layer):
    arguments = layer.tensors(torch.bfloat16)
    arguments |= {name: inside_nan(arguments[name]) for name in ("input", "weight")}
    run(layer.function, arguments, NAME, replace(SMALL, TOGETHER="transpose" in layer.function))


def launched(layer, tile, arguments):
    """The output of a forced tile, which begins a storage that goes on behind it; all of it was NaN."""
    made = tc.plan(getattr(tc, layer.function), **arguments)
    made = dispatch.plan(made.problem, made.target, NAME, tile)
    size = math.prod(made.out_shape)
    storage = torch.full((2 * size,), float("nan"), dtype=torch.bfloat16, device=arguments["input"].device)
    output = storage.as_strided(made.out_shape, made.out_strides)
    made.launch(arguments["input"], made.arranged(arguments["weight"]), arguments.get("bias"), output)
    return output, storage[size:]


@pytest.mark.parametrize("layer", [FORWARD[0], TRANSPOSED[0], TRANSPOSED[1]], ids=["1d", "transposed-1d", "2d"])
def test_nothing_is_stored_beyond_the_output(layer):
    output, behind = launched(layer, WIDE, layer.tensors(torch.bfloat16))
    assert output.isfinite().all()
    assert behind.isnan().all()


@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
def test_what_no_tap_meets_is_the_bias_whatever_the_input(together):
    layer = TRANSPOSED[3]
    arguments = layer.tensors(torch.bfloat16)
    arguments["input"].fill_(float("nan"))
    output, _ = launched(layer, replace(SMALL, TOGETHER=together), arguments)
    unmet = output[:, :, 1::2]
    assert torch.equal(unmet, arguments["bias"][:, None, None].expand_as(unmet))
    assert not output[:, :, ::2].isfinite().all()


def plan_of(x_shape, w_shape, function="conv2d", dtype=torch.bfloat16, x=channels_last, w=channels_last, **options):
    return tc.plan(getattr(tc, function), x(random(x_shape, dtype)), w(random(w_shape, dtype)), **options)


X, W = (1, 32, 6, 6), (16, 32, 3, 3)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: plan_of(X, W), "its stride is 1"),
        (lambda: plan_of(X, W, x=torch.clone, stride=2), "channels of the input are not contiguous"),
        (lambda: plan_of(X, W, dtype=torch.float32, stride=2), "only 16-bit numbers"),
        (lambda: plan_of(X, W, x=framed, stride=2), "does not begin at"),
        (lambda: plan_of(X, W, x=wide_frame, stride=2), "does not begin at"),
        (lambda: plan_of(X, W, w=torch.clone, stride=2), "second dimension of its weight"),
        (lambda: plan_of(X, W, stride=2, padding=1, padding_mode="circular"), "border is circular"),
        (lambda: plan_of((1, 32, 6, 7), W, stride=2), "phases of an input of 7 pixels, 2 apart, are not of one length"),
        (lambda: plan_of((1, 32, 6, 2), W, stride=(1, 3), padding=1), "phases of an input of 2 pixels, 3 apart"),
        (lambda: plan_of((1, 48, 6, 6), (16, 48, 3, 3), stride=2), "48 channels are no whole steps of 32"),
    ],
)
def test_refused_problems(made, message):
    made = made()
    assert made.kernel.name != NAME
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME)


@pytest.mark.parametrize(
    ("tile", "message"),
    [(replace(SMALL, TOGETHER=True), "output has one phase"), (replace(SMALL, BLOCK_K=64), "no whole steps of 64")],
)
def test_tiles_of_other_problems(tile, message):
    made = plan_of(X, W, stride=2)
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME, tile)


@pytest.mark.parametrize(
    ("name", "size", "stride"), [(NAME, 514, 2), ("implicit_gemm_boxed", 257, 1), ("weight_gradient_boxed", 257, 1)]
)
def test_boxes_of_many_images_are_indexed_wide(name, size, stride):
    # Nothing but 1 divides 257: a box is of a pixel or two of each of 128 images.
    layer = Workload(
        "large", "dilated", "conv2d", (128, 512, size, size), (64, 512, 1, 1), {"stride": stride}, channels_last=True
    )
    part = layer.parts()[2 if name == "weight_gradient_boxed" else 0]
    large, small = (made.problem() for made in (part, replace(part, input=(128, 512, 32, 32))))
    for problem, wide in ((large, True), (small, False)):
        values = KERNELS[name].values(problem, default_tile(name, problem, KNOWN["sm_90"]), KNOWN["sm_90"])
        assert values["INDEX_INT64"] == wide


def test_devices_and_measurements():
    problem = find("decoder_t2d")[0].problem()
    # Not timed on any device yet: it serves where it is asked for.
    assert dispatch.plan(problem, KNOWN["sm_90"]).kernel.name == "transposed_phase"
    assert NAME in [kernel.name for kernel in dispatch.forms(problem, KNOWN["sm_90"])[0]]
    with pytest.raises(PlanError, match="no engine for bulk copies"):
        dispatch.plan(problem, KNOWN["sm_80"], NAME, SMALL)
