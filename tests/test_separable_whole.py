"""Separable convolution that filters once for all output channels: borders, blocks, epilogues, plans, refusals."""

from dataclasses import replace

import pytest
import torch
from helpers import DEVICE, channels_last, compare_activated, launches
from test_lectures import bound, cast, separable

import triton_conv as tc
from triton_conv import configs, dispatch, ops, ops_fused
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.kernels import KERNELS
from triton_conv.kernels.separable_whole import SeparableWholeTile
from triton_conv.ops_fused import Chain
from triton_conv.reference import reference
from triton_conv.target import KNOWN
from triton_conv.workloads import find

NAME = "separable_whole"
H100 = KNOWN["sm_90"]
SMALL = SeparableWholeTile(ROWS=2, COLS=2, BLOCK_P=8, BLOCK_N=16, BLOCK_K=32)

LAYERS = {
    "odd": separable((2, 21, 5, 7), (21, 1, 3, 3), 19, padding=1, activation="silu"),
    "aligned": separable((1, 40, 5, 6), (40, 1, 3, 3), 24, padding=1, mid_bias=True, mid_activation="relu6"),
    "strided": separable((2, 24, 9, 6), (24, 1, 3, 2), 20, stride=2, padding=((1, 0), (0, 1)), mid_bias=True),
    "dilated": separable((1, 16, 9, 8), (16, 1, 3, 3), 33, dilation=(2, 3), padding=2, bias=False, activation="gelu"),
    "causal": separable((2, 20, 11), (20, 1, 4), 18, padding=((3, 0),), mid_activation="silu"),
    "3d": separable((1, 16, 3, 4, 5), (16, 1, 2, 2, 3), 17, padding=1, stride=(2, 1, 1), activation="relu"),
    "5x5": separable((1, 16, 4, 4), (16, 1, 5, 5), 8, padding=2, bias=False),
    "1x1": separable((3, 8, 3, 2), (8, 1, 1, 1), 5),
}


def innermost(x):
    """Channels side by side; torch has no such format of one dimension."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 3 else channels_last(x)


def planned(name, dtype=torch.bfloat16, layout=innermost):
    function, arguments = LAYERS[name]
    arguments = cast(arguments, dtype, layout)
    with tc.set_separable_fusion(True):
        return function, arguments, tc.plan(getattr(tc, function), **arguments)


def run(name, tile, dtype=torch.bfloat16, layout=innermost):
    """The kernel with this tile, over NaN, compared."""
    function, arguments, plain = planned(name, dtype, layout)
    made = dispatch.plan(plain.problem, plain.target, NAME, tile)
    output = torch.full(made.out_shape, float("nan"), dtype=dtype, device=DEVICE)
    output = output.as_strided(made.out_shape, made.out_strides)
    names = ("input", "depthwise_weight", "mid_bias", "pointwise_weight", "bias")
    launches.clear()
    made.launch(*(arguments.get(name) for name in names), output)
    assert dict(launches) == {NAME: 1}
    before = reference(function, arguments | {"activation": None})
    compare_activated(output, reference(function, arguments), before, bound(made, dtype))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "dilated" else n for n in LAYERS])
def test_layers(name):
    run(name, SMALL)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 8, 2, 64, 64),
        *(pytest.param(s, marks=pytest.mark.slow) for s in [(4, 4, 1, 16, 16), (4, 2, 2, 32, 16), (2, 4, 16, 16, 64)]),
    ],
    ids=str,
)  # fmt: skip
def test_tiles(sizes):
    """Several blocks of channels and patches past an image's border; all channels of all images in one."""
    names = ("ROWS", "COLS", "BLOCK_P", "BLOCK_N", "BLOCK_K")
    run("aligned", SeparableWholeTile(**dict(zip(names, sizes, strict=True))), torch.float16)


@pytest.mark.parametrize("name", ["odd", pytest.param("causal", marks=pytest.mark.slow)])
def test_default_and_safe_tile(name):
    problem = planned(name)[2].problem
    for tile in (default_tile(NAME, problem, H100), KERNELS[NAME].safe_tile):
        run(name, tile)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aligned", "strided"])
def test_every_candidate(name):
    for tile in candidates(NAME, planned(name)[2].problem, H100):
        run(name, tile)


def test_wide_indices(monkeypatch):
    monkeypatch.setattr("triton_conv.problem_lectures.INT32_LIMIT", 0)
    dispatch.plan.cache_clear()
    try:
        assert planned("strided")[2].problem.wide_index(1)
        run("strided", SMALL)
    finally:
        dispatch.plan.cache_clear()


def test_an_input_in_a_frame_of_nan():
    def framed(x):
        whole = channels_last(torch.full([n + 2 * (i > 1) for i, n in enumerate(x.shape)], float("nan"))).to(x)
        return whole[:, :, 1:-1, 1:-1].copy_(x)

    run("strided", SMALL, layout=framed)


@pytest.mark.parametrize(("time_us", "one"), [(40.0, True), (70.0, False)])
def test_only_a_measurement_prefers_it(time_us, one, tmp_path, monkeypatch):
    """To the other form of one kernel, and to two kernels, which take 52 us by count."""
    monkeypatch.setenv("TRITON_CONV_HOME", str(tmp_path))
    (workload,) = find("separable_28")
    problem = workload.problem()
    assert NAME in dispatch.family(problem)[0] and dispatch.plan(problem, H100).kernel.name == "separable"
    entry = configs.Entry(default_tile(NAME, problem, H100), time_us, (time_us, time_us), 90.0, 0.0, 8)
    configs.ConfigFile(NAME, H100, {}, {problem.describe(): entry}).write(configs.user_folder())
    ops.forget_plans()
    try:
        chosen = dispatch.plan(problem, H100)
        assert (chosen.kernel.name, chosen.source) == (NAME, "user tuned")
        assert (ops_fused.unfused(chosen) is None) == one
        made = tc.plan(tc.separable_conv2d, **workload.tensors("meta"))
        assert isinstance(made, Chain) != one
    finally:
        ops.forget_plans()


@pytest.mark.parametrize(
    ("layer", "dtype", "layout", "reason"),
    [
        (separable((1, 8, 4, 4), (16, 1, 3, 3), 4), torch.float16, channels_last, "1 input channels and 2 output"),
        (LAYERS["odd"], torch.float32, channels_last, "only of 16-bit numbers"),
        (LAYERS["odd"], torch.float16, None, "its input are not contiguous"),
        (separable((1, 8, 9, 9), (8, 1, 3, 9), 4), torch.float16, channels_last, "9 taps in a row"),
        (separable((1, 520, 3, 3), (520, 1, 3, 3), 4), torch.float16, channels_last, "hold 520 channels"),
    ],
    ids=["multiplier", "float32", "nchw", "filter", "channels"],
)
def test_refusals(layer, dtype, layout, reason, monkeypatch):
    monkeypatch.setitem(LAYERS, "refused", layer)
    assert reason in KERNELS[NAME].unsuited(planned("refused", dtype, layout)[2].problem)


def test_tiles_that_no_program_runs():
    problem = find("separable_28")[0].problem()
    assert "4 pixels and 128 channels" in SeparableWholeTile(ROWS=1, COLS=2, BLOCK_P=2).mismatch(problem)
    assert "16 blocks of channels" in SeparableWholeTile(BLOCK_K=16).mismatch(problem)
    assert "of shared memory" in SeparableWholeTile(BLOCK_P=64, BLOCK_K=64, num_warps=8).unfit(problem, H100)
    assert "a thread for sums" in SeparableWholeTile(ROWS=4).unfit(planned("5x5")[2].problem, H100)


@pytest.mark.parametrize("name", ["separable_56", "separable_28"])
def test_four_channels_of_a_patch_by_default(name):
    tile = default_tile(NAME, find(name)[0].problem(), H100)
    assert (tile.load_bytes(find(name)[0].problem(), H100), tile.pixels) == (8, 64)


@pytest.mark.parametrize("channels", [2, 8, 16])
def test_few_channels_have_a_default_that_fits(channels):
    problem = planned("1x1")[2].problem
    geometry = replace(problem.geometry, c_in=channels, c_out=channels, groups=channels, in_size=(1, 40, 40))
    problem = replace(problem, geometry=geometry)
    for arch in ("sm_80", "sm_90", "gfx942"):
        assert default_tile(NAME, problem, KNOWN[arch]).unfit(problem, KNOWN[arch]) is None
