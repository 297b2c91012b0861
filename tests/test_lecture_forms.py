"""The forms of a lecture's convolution: shuffled channels stored side by side, rolling columns, one kernel or two."""

import dataclasses

import pytest
import torch
from helpers import DEVICE, channels_last, compare, launches, name_of, random
from test_gradients import compare as compare_derivatives
from test_lectures import CASES, bound, cast, local, shuffled

import triton_conv as tc
from triton_conv import configs, dispatch, ops, ops_fused, ops_local, workloads
from triton_conv.defaults import default_tile
from triton_conv.errors import ArgumentValueError
from triton_conv.kernels.locally_connected_input_gradient_rolling import LocallyConnectedInputGradientRollingTile
from triton_conv.kernels.shuffle_gemm import ShuffleGemmTile
from triton_conv.ops_fused import Chain
from triton_conv.reference import reference
from triton_conv.target import INTERPRETER, KNOWN

# ---------------------------------------------------------------------------------------------------------- shuffled

SHUFFLED = {
    **{name: CASES[name] for name in ("shuffle", "shuffle-3x3", "shuffle-wide", "shuffle-pairs")},
    "shuffle-aligned": shuffled((2, 48, 3, 5), (24, 16, 1, 1), groups=3, activation="relu"),
}


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("sizes", [(16, 16, 16), (32, 64, 32)], ids=str)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("shuffle", torch.float32), ("shuffle-aligned", torch.bfloat16), ("shuffle-3x3", torch.float64),
        ("shuffle-pairs", torch.float16), pytest.param("shuffle-wide", torch.float32, marks=pytest.mark.slow),
    ],
    ids=lambda v: v if isinstance(v, str) else name_of(v),
)  # fmt: skip
def test_the_channels_of_all_groups_in_one_tile(name, dtype, sizes, layout):
    function, arguments = SHUFFLED[name]
    arguments = {k: v for k, v in cast(arguments, dtype, layout).items() if k != "activation"}
    made = tc.plan(getattr(tc, function), **arguments)
    tile = ShuffleGemmTile(**dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), sizes, strict=True)), WHOLE=True)
    made = dispatch.plan(made.problem, made.target, "shuffle_gemm", tile)
    output = torch.full(made.out_shape, float("nan"), dtype=dtype, device=DEVICE)
    output = output.as_strided(made.out_shape, made.out_strides)
    made.launch(arguments["input"], made.arranged(arguments["weight"]), arguments["bias"], output)
    compare(output, reference(function, arguments), bound(made, dtype))


def test_which_shuffled_layers_are_one_tile():
    problem = {name: workloads.find(name)[0].problem() for name in ("shuffle_g3", "shuffle_g8")}
    target = KNOWN["sm_90"]
    tile = default_tile("shuffle_gemm", problem["shuffle_g3"], target)
    assert (tile.WHOLE, tile.BLOCK_N) == (True, 64), "60 channels of a pixel in one run"
    assert not default_tile("shuffle_gemm", problem["shuffle_g8"], target).WHOLE, "NCHW stores along pixels"
    many = dataclasses.replace(
        problem["shuffle_g3"], geometry=dataclasses.replace(problem["shuffle_g3"].geometry, c_in=2400, c_out=2400)
    )
    assert not default_tile("shuffle_gemm", many, target).WHOLE, "mostly products with zeros"
    arguments = cast(SHUFFLED["shuffle-aligned"][1], torch.bfloat16, channels_last)
    assert tc.plan(tc.shuffle_conv2d, **arguments).tile.WHOLE


# ------------------------------------------------------------------------------------ input gradient, rolling columns

ROLLING = "locally_connected_input_gradient_rolling"
LOCAL = {
    "plain": local((2, 3, 5, 6), (3, 4), (4, 3, 3, 3)),
    "images": local((9, 4, 4, 7), (4, 7), (6, 2, 3, 3), padding=1, groups=2),
    "strided rows": local(
        (2, 2, 6, 9), (2, 12), (3, 2, 3, 4), padding=((0, 2), (3, 3)), stride=(2, 1), dilation=(2, 1)
    ),
    "1d": local((3, 2, 11), (15,), (3, 2, 5), padding=4),
    "wide filter": local((2, 2, 2, 5), (2, 3), (2, 2, 1, 7), padding=(0, 2)),
    "3d": local((1, 2, 3, 4, 5), (2, 6, 6), (2, 2, 2, 1, 2), padding=1, stride=(2, 1, 1)),
}
SMALL = LocallyConnectedInputGradientRollingTile(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, COLUMNS=4)


def input_gradient(name, dtype):
    """Ours, and the float64 one, of a layer without its bias."""
    function, arguments = LOCAL[name]
    arguments = {k: v for k, v in cast(arguments, dtype).items() if k != "bias"}
    leaf = arguments["input"].detach().requires_grad_()
    result = getattr(tc, function)(**arguments | {"input": leaf})
    grad = random(result.shape, dtype, "g")
    launches.clear()
    (mine,) = torch.autograd.grad(result, leaf, grad)
    exact = leaf.detach().double().requires_grad_()
    expected = reference(function, {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
                         | {"input": exact})  # fmt: skip
    (theirs,) = torch.autograd.grad(expected, exact, grad.double())
    return mine, theirs


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("tile", [None, SMALL], ids=["default", "small"])
@pytest.mark.parametrize("name", LOCAL)
def test_rolling_columns(name, tile, monkeypatch):
    planned = dispatch.plan

    def forced(problem, target):
        made = planned(problem, target)
        return planned(problem, target, ROLLING, tile) if tile and made.kernel.name == ROLLING else made

    monkeypatch.setattr(ops_local, "plan", forced)
    ops.forget_plans()
    mine, theirs = input_gradient(name, torch.float32)
    ops.forget_plans()
    assert launches[ROLLING] == 1
    compare_derivatives([mine], [theirs], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=name_of)
def test_rolling_columns_in(dtype):
    mine, theirs = input_gradient("images", dtype)
    assert launches[ROLLING] == 1
    compare_derivatives([mine], [theirs], 8 * torch.finfo(dtype).eps)


# The interpreter multiplies the images past the batch too.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_weight_that_no_output_reads_with_spreads_nothing():
    """Masked, not multiplied by zero: an infinite weight reaches only the pixels that it is read with."""
    x, w = random((2, 2, 4, 5)).requires_grad_(), random((2, 3, 3, 2, 3, 3), seed="w")
    w[1, 2, 0, 0, 2, 2] = float("inf")
    result = tc.locally_connected2d(x, w)
    (dx,) = torch.autograd.grad(result.sum(), x)
    assert launches[ROLLING] == 1
    reached = ~dx.isfinite()
    assert reached[:, 0, 3, 4].all()
    assert reached.sum() == 2


def test_which_input_gradients_roll():
    problem = workloads.find("deepface_local")[0].parts()[1].problem()
    assert dispatch.plan(problem, KNOWN["sm_90"]).kernel.name == ROLLING
    problem = workloads.find("local2d")[0].parts()[1].problem()
    made = dispatch.plan(problem, KNOWN["sm_90"])
    assert made.kernel.name == "locally_connected_input_gradient"
    assert f"not {ROLLING}: the filters' taps do not lie side by side" in made.notes


# ----------------------------------------------------------------------------------------------- separable: one or two


@pytest.mark.parametrize(("name", "one", "two"), [("separable_28", 120.5, 57.0), ("separable_56", 155.9, 96.7)])
def test_the_count_agrees_with_what_was_measured(name, one, two):
    """Microseconds on an H100, bfloat16, NHWC, of the default tile and of two kernels."""
    (workload,) = workloads.find(name)
    problem = workload.problem()
    bandwidth = 0.9 * KNOWN["sm_90"].bandwidth
    assert problem.itemsize * problem.moved_fused / bandwidth * 1e6 == pytest.approx(one, rel=0.1)
    assert problem.itemsize * problem.moved_unfused / bandwidth * 1e6 == pytest.approx(two, rel=0.1)
    assert "9 taps in one kernel" in problem.unfused
    # Of this very layer a tile was measured by now, and its time is what two kernels are compared with.
    made = tc.plan(tc.separable_conv2d, **workload.tensors("meta"))
    assert isinstance(made, Chain) and "us, measured, two" in str(made)
    with tc.set_separable_fusion(True):
        assert tc.plan(tc.separable_conv2d, **workload.tensors("meta")).kernel.name == "separable"


def test_few_taps_are_worth_one_kernel():
    x, d, p = random((2, 8, 20)), random((8, 1, 3), seed="d"), random((8, 8, 1), seed="p")
    assert tc.plan(tc.separable_conv1d, x, d, p).kernel.name == "separable"
    tc.separable_conv1d(x, d, p)
    assert dict(launches) == {"separable": 1}
    with tc.set_separable_fusion(False):
        assert tc.plan(tc.separable_conv1d, x, d, p).reason == "asked for"
        assert isinstance(tc.plan(tc.separable_conv1d, x, d, p), Chain)
    with pytest.raises(ArgumentValueError, match="fused: expected True, False or None, got 'both'"):
        tc.set_separable_fusion("both")


@pytest.mark.parametrize("time_us", [40.0, 70.0])
def test_a_measured_tile_decides(time_us, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CONV_HOME", str(tmp_path))
    problem, target = workloads.find("separable_28")[0].problem(), KNOWN["sm_90"]
    entry = configs.Entry(default_tile("separable", problem, target), time_us, (time_us, time_us), time_us, 0.0, 1)
    configs.ConfigFile("separable", target, {}, {problem.describe(): entry}).write(configs.user_folder())
    ops.forget_plans()
    try:
        made = dispatch.plan(problem, target)
        assert made.source == "user tuned"
        reason = ops_fused.unfused(made)
        assert (reason is None) == (time_us == 40.0)
        assert reason is None or "70.0 us, measured, two 52.4 us, by count" in reason
    finally:
        ops.forget_plans()


def test_the_interpreter_decides_by_the_same_count():
    (workload,) = workloads.find("separable_56")
    assert ops_fused.unfused(dispatch.plan(workload.shrunk().problem(), INTERPRETER))


@pytest.mark.usefixtures("one_kernel")
def test_costs_know_them():
    def rows(channels):
        weights = (torch.empty(shape, device=DEVICE) for shape in ((channels, 1, 5, 5), (256, channels, 1, 1)))
        return tc.cost.of(tc.separable_conv2d, torch.empty(1, channels, 12, 12, device=DEVICE), *weights).layers

    (row,) = rows(3)
    assert (row.macs, row.parameters, row.output_shape) == (53_952, 75 + 768, (1, 256, 8, 8))
    (one,) = rows(64)
    with tc.set_separable_fusion(None):
        two = rows(64)
    assert [part.kind for part in two] == ["depthwise", "pointwise"], "25 taps of 64 channels run as two kernels"
    assert sum(part.macs for part in two) == one.macs
    x, w = torch.empty(2, 4, 5, 5), torch.empty(3, 3, 6, 4, 3, 3)
    (row,) = tc.cost.of(tc.locally_connected2d, x, w).layers
    assert row.parameters == tc.cost.partial_sharing(4, 3, 3, 6, 3, 3)
    assert (row.kind, row.macs, row.output_shape) == ("locally connected", 2 * w.numel(), (2, 6, 3, 3))
    assert row.least_bytes == 4 * (x.numel() + w.numel() + 2 * 6 * 9)
