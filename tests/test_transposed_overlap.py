"""Products of taps that are added up where they overlap: odd images and rows, operands as they lie, refusals."""

import math
from dataclasses import replace

import pytest
import torch
from cases import case
from helpers import DEVICE, channels_last, check, compare, launches, limit, name_of, random, sliced, timed
from test_tiles import run

import triton_conv as tc
from triton_conv import dispatch, first_use, ops, ops_conv
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels.transposed_overlap import TransposedOverlapTile
from triton_conv.reference import reference, tolerance
from triton_conv.target import KNOWN
from triton_conv.workloads import Workload, find

NAME = "transposed_overlap"


def layer(id, function, input, weight, **options):
    return case(id, NAME, function, input, weight, **options)


LAYERS = [
    layer("4x4", "conv_transpose2d", (5, 24, 4, 4), (24, 20, 4, 4), stride=2, padding=1),
    layer("1d", "conv_transpose1d", (3, 16, 7), (16, 18, 16), stride=8, padding=4),
    layer("odd", "conv_transpose2d", (3, 17, 5, 3), (17, 19, 3, 3), stride=2, padding=1, output_padding=(1, 0)),
    layer("one-pixel", "conv_transpose2d", (5, 16, 1, 1), (16, 16, 3, 2)),
    layer("no-overlap", "conv_transpose2d", (2, 16, 4, 5), (16, 16, 2, 2), stride=2, activation="silu"),
    layer("no-tap", "conv_transpose2d", (2, 16, 3, 2), (16, 16, 1, 2), stride=2, output_padding=(1, 0)),
    layer("no-stride", "conv_transpose2d", (2, 16, 5, 4), (16, 16, 3, 2), padding=(1, 0), activation="relu"),
    layer("crop", "conv_transpose2d", (2, 16, 4, 3), (16, 16, 5, 4), stride=(3, 2), padding=(4, 2)),
    layer("groups", "conv_transpose2d", (3, 40, 3, 4), (40, 18, 3, 3), stride=2, groups=2, padding=(0, 1)),
    layer("3d", "conv_transpose3d", (2, 16, 2, 3, 2), (16, 16, 2, 3, 2), stride=(2, 1, 3), padding=(1, 1, 0)),
    layer("windows", "conv_transpose1d", (1, 16, 264), (16, 20, 4), stride=2, padding=1),
    layer("odd-windows", "conv_transpose1d", (2, 16, 171), (16, 16, 7), stride=3, padding=5, output_padding=1),
    layer("windows-no-stride", "conv_transpose1d", (1, 16, 136), (16, 16, 5), activation="relu"),
    layer("windows-no-overlap", "conv_transpose1d", (1, 16, 150), (16, 16, 3), stride=4),
    layer("many-pixels", "conv_transpose2d", (2, 16, 9, 8), (16, 16, 3, 3), stride=2, padding=1, bias=False),
]  # fmt: skip
BY_NAME = {layer.id: layer for layer in LAYERS}
SMALL = TransposedOverlapTile(BLOCK_M=128, BLOCK_N=64, BLOCK_K=16, num_warps=8)
WIDE = TransposedOverlapTile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=3)


@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
def test_odd_images_and_rows(layer):
    run(layer.function, layer.tensors(torch.bfloat16), NAME, WIDE)


@pytest.mark.parametrize("name", ["4x4", "1d", "odd", "groups"])
def test_fewer_pairs_than_channels_and_taps(name):
    run(BY_NAME[name].function, BY_NAME[name].tensors(torch.float16), NAME, SMALL)


@pytest.mark.parametrize("name", ["4x4", "3d", "windows"])
def test_default_tile(name):
    layer = BY_NAME[name]
    arguments = layer.tensors(torch.bfloat16)
    problem = tc.plan(getattr(tc, layer.function), **arguments).problem
    run(layer.function, arguments, NAME, default_tile(NAME, problem, KNOWN["sm_90"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["4x4", "1d", "odd", "groups", "windows"])
def test_every_candidate(name):
    layer = BY_NAME[name]
    arguments = layer.tensors(torch.float16)
    problem = tc.plan(getattr(tc, layer.function), **arguments).problem
    for tile in candidates(NAME, problem, KNOWN["sm_90"]):
        launches.clear()
        run(layer.function, arguments, NAME, tile)


def framed(tensor):
    """Images and channels of a larger tensor of NaN, whose pixels stay one run."""
    n, c, *size = tensor.shape
    whole = torch.full((n + 2, c + 3, *size), float("nan")).to(tensor)
    return whole[1:-1, 1:-2].copy_(tensor)


def launched(layer, tile, arguments):
    """The output of a forced tile, which begins a storage that goes on behind it; all of it was NaN."""
    made = tc.plan(getattr(tc, layer.function), **arguments)
    made = dispatch.plan(made.problem, made.target, NAME, tile)
    size = math.prod(made.out_shape)
    storage = torch.full((2 * size,), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    output = storage.as_strided(made.out_shape, made.out_strides)
    made.launch(arguments["input"], made.arranged(arguments["weight"]), arguments["bias"], output)
    return output, storage[size:]


@pytest.mark.parametrize("name", ["4x4", "odd", "odd-windows"])
def test_what_lies_around_the_operands_is_neither_read_nor_written(name):
    layer = BY_NAME[name]
    arguments = layer.tensors(torch.bfloat16)
    arguments["input"], arguments["weight"] = framed(arguments["input"]), sliced(arguments["weight"])
    assert not arguments["weight"].is_contiguous()
    output, behind = launched(layer, WIDE, arguments)
    bound = limit(tc.plan(getattr(tc, layer.function), **arguments), output)
    compare(output, reference(layer.function, arguments), bound)
    assert behind.isnan().all()


def test_what_no_tap_meets_is_the_bias_whatever_the_input():
    layer = BY_NAME["no-tap"]
    arguments = layer.tensors(torch.bfloat16)
    arguments["input"].fill_(float("nan"))
    output, _ = launched(layer, WIDE, arguments)
    unmet = output[:, :, 1::2]
    assert torch.equal(unmet, arguments["bias"][:, None, None].expand_as(unmet))
    assert output[:, :, ::2].isnan().all()


def test_a_pixel_reaches_its_window_alone():
    arguments = BY_NAME["4x4"].tensors(torch.bfloat16)
    arguments["input"][1, 3, 0, 0] = float("nan")
    output, _ = launched(BY_NAME["4x4"], WIDE, arguments)
    assert output[1, :, :3, :3].isnan().all()
    assert output.isnan().sum() == 9 * output.shape[1]


def test_a_program_writes_its_own_channels_alone():
    # The next one would write over what it should not have written.
    layer = BY_NAME["odd"]
    arguments = layer.tensors(torch.bfloat16)
    made = tc.plan(getattr(tc, layer.function), **arguments)
    made = replace(dispatch.plan(made.problem, made.target, NAME, WIDE), grid=1)
    output = torch.full(made.out_shape, float("nan"), dtype=torch.bfloat16, device=DEVICE)
    made.launch(arguments["input"], arguments["weight"], arguments["bias"], output)
    assert output[:, :14].isfinite().all()
    assert output[:, 14:].isnan().all()


def test_groups_apart():
    arguments = BY_NAME["groups"].tensors(torch.bfloat16)
    arguments["input"][:, 20:] = float("nan")
    output, _ = launched(BY_NAME["groups"], WIDE, arguments)
    assert output[:, :18].isfinite().all()
    assert output[:, 18:].isnan().any()


def measured(monkeypatch, problem):
    """As if a device had timed the default tile on this problem."""
    timed(monkeypatch, NAME, problem, KNOWN["sm_90"])
    ops._forget()


@pytest.fixture
def forgotten():
    yield
    ops._forget()


@pytest.mark.usefixtures("forgotten")
def test_only_a_measurement_prefers_it_and_then_nothing_is_packed(monkeypatch):
    arguments = Workload(
        "packed", "transposed", "conv_transpose2d", (1, 16, 16, 16), (16, 16, 2, 2), {"stride": 2}, bias=True
    ).tensors(DEVICE)
    made = tc.plan(tc.conv_transpose2d, **arguments)
    assert (made.kernel.name, made.problem.weight_view) == ("transposed_phase", "packed")
    measured(monkeypatch, made.problem)
    made = tc.plan(tc.conv_transpose2d, **arguments)
    assert (made.kernel.name, made.source) == (NAME, "user tuned")
    assert made.arranged(arguments["weight"]) is arguments["weight"]
    check("conv_transpose2d", arguments, NAME)
    # Nor where its first use is checked.
    assert first_use.difference(made, torch.device(DEVICE)) <= tolerance(torch.bfloat16, made.problem.geometry.K)


def test_the_form_that_serves_instead_reads_its_own_weight(monkeypatch):
    layer = Workload("packed", "transposed", "conv_transpose2d", (1, 16, 16, 16), (16, 16, 2, 2), {"stride": 2})
    arguments = layer.tensors(DEVICE)
    plain = tc.plan(tc.conv_transpose2d, **arguments)
    made = replace(dispatch.plan(plain.problem, plain.target, NAME), pending=True)
    monkeypatch.setattr(first_use, "settle", lambda made, device: plain)
    monkeypatch.setattr(ops, "_forget", lambda: None)
    result = ops_conv.run_conv(made, arguments["input"], arguments["weight"], None)
    compare(result, reference("conv_transpose2d", arguments), limit(plain, result))


@pytest.mark.usefixtures("forgotten")
def test_an_input_gradient(monkeypatch):
    x, w = random((3, 16, 8, 8), torch.bfloat16).requires_grad_(), random((24, 16, 4, 4), torch.bfloat16)
    y = tc.conv2d(x, w, stride=2, padding=1)
    grad = random(y.shape, torch.bfloat16)
    made = tc.plan(tc.conv_transpose2d, grad, w, stride=2, padding=1)
    measured(monkeypatch, made.problem)
    launches.clear()
    (found,) = torch.autograd.grad(y, x, grad)
    assert dict(launches) == {NAME: 1}
    arguments = {"input": grad, "weight": w, "stride": 2, "padding": 1}
    compare(found, reference("conv_transpose2d", arguments), limit(made, found))


def plan_of(x_shape, w_shape, dtype=torch.bfloat16, x=torch.clone, function="conv_transpose2d", **options):
    return tc.plan(getattr(tc, function), x(random(x_shape, dtype)), random(w_shape, dtype), **options)


X, W = (1, 16, 4, 4), (16, 16, 3, 3)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: plan_of(X, W, function="conv2d"), "it is not transposed"),
        (lambda: plan_of(X, W, torch.float32), "only 16-bit numbers"),
        (lambda: plan_of(X, W, dilation=2), r"its dilation is \(1, 2, 2\), not 1"),
        (lambda: plan_of((1, 8, 4, 4), (8, 16, 3, 3)), "fewer than 16 channels"),
        (lambda: plan_of((1, 16, 16, 17), W), "an image of 272 pixels does not fit in a tile"),
        (lambda: plan_of(X, W, x=channels_last), "an image of the input is not one run of pixels"),
        (lambda: plan_of(X, W, x=sliced), "an image of the input is not one run of pixels"),
    ],
)
def test_refused_problems(made, message):
    made = made()
    assert made.kernel.name != NAME
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME)


@pytest.mark.parametrize(
    ("shape", "tile", "message"),
    [
        ((1, 16, 9, 9), replace(SMALL, BLOCK_M=64), "an image of 81 pixels does not fit in 64"),
        (X, replace(SMALL, BLOCK_N=8), "9 taps do not fit in 8 pairs"),
        ((1, 16, 1, 1), replace(WIDE, num_warps=1), "16 pieces of outputs are not unrolled"),
    ],
)
def test_refused_tiles(shape, tile, message):
    made = plan_of(shape, W, stride=2)
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME, tile)


def test_offsets_that_pass_31_bits(monkeypatch):
    made = plan_of(X, W, stride=2)
    monkeypatch.setattr("triton_conv.kernels.transposed_overlap.INT32_LIMIT", 4096)
    with pytest.raises(PlanError, match=r"offsets inside a tile pass 2\^31"):
        dispatch.plan(made.problem, made.target, NAME, SMALL)


@pytest.mark.parametrize("name", ["dcgan_t2d", "modulated_t2d", "vocoder_t1d_s8"])
def test_every_device_has_a_tile(name):
    problem = find(name)[0].problem()
    for target in KNOWN.values():
        assert dispatch.plan(problem, target, NAME, default_tile(NAME, problem, target)).grid >= 128
