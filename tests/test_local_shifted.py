"""Input gradients of locally connected layers by filters read in vectors: borders, alignments, plans, refusals."""

import pytest
import torch
from helpers import DEVICE, launches, random
from test_gradients import compare as compare_derivatives
from test_lectures import cast, local

import triton_conv as tc
from triton_conv import configs, dispatch, ops, ops_local
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.kernels import KERNELS
from triton_conv.kernels.locally_connected_input_gradient_shifted import LocallyConnectedInputGradientShiftedTile
from triton_conv.problem_lectures import LocalInputGradientProblem
from triton_conv.reference import reference
from triton_conv.target import KNOWN
from triton_conv.workloads import find

NAME = "locally_connected_input_gradient_shifted"
H100 = KNOWN["sm_90"]
SMALL = LocallyConnectedInputGradientShiftedTile(BLOCK_M=16, BLOCK_N=8, BLOCK_K=16, COLUMNS=4, TOGETHER=2)

LAYERS = {
    "plain": local((2, 8, 3, 5), (2, 3), (3, 8, 2, 3)),
    "nine": local((2, 8, 1, 11), (1, 3), (2, 8, 1, 9)),
    "one": local((2, 8, 4, 2), (2, 2), (3, 8, 3, 1)),
    "images": local((17, 8, 1, 3), (1, 2), (20, 8, 1, 4), padding=(0, 1)),
    "groups": local((2, 16, 2, 3), (2, 3), (6, 8, 1, 3), padding=(0, 1), groups=2),
    "strided-rows": local((1, 8, 4, 3), (2, 2), (2, 8, 2, 2), padding=((1, 0), (0, 0)), stride=(2, 1), dilation=(2, 1)),
    "padded": local((2, 8, 3), (7,), (2, 8, 5), padding=4),
    "3d": local((1, 2, 2, 2, 3), (1, 1, 2), (2, 2, 2, 2, 2)),
}  # fmt: skip


def input_gradient(name, tile, dtype, monkeypatch):
    """The gradient by this kernel with a tile, or with that of `tile(problem)`, and the float64 one."""
    function, arguments = LAYERS[name]
    arguments = {k: v for k, v in cast(arguments, dtype).items() if k != "bias"}
    leaf = arguments["input"].detach().requires_grad_()
    result = getattr(tc, function)(**arguments | {"input": leaf})
    grad = random(result.shape, dtype, "g")
    plain = dispatch.plan

    def forced(problem, target):
        if not isinstance(problem, LocalInputGradientProblem):
            return plain(problem, target)
        return plain(problem, target, NAME, tile(problem) if callable(tile) else tile)

    monkeypatch.setattr(ops_local, "plan", forced)
    ops.forget_plans()
    launches.clear()
    (mine,) = torch.autograd.grad(result, leaf, grad)
    ops.forget_plans()
    assert dict(launches) == {NAME: 1}
    exact = leaf.detach().double().requires_grad_()
    doubled = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    (theirs,) = torch.autograd.grad(reference(function, doubled | {"input": exact}), exact, grad.double())
    return mine, theirs


def check(name, tile, dtype, monkeypatch):
    mine, theirs = input_gradient(name, tile, dtype, monkeypatch)
    compare_derivatives([mine], [theirs], 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, monkeypatch):
    check(name, SMALL, torch.bfloat16, monkeypatch)


@pytest.mark.parametrize("name", ["nine", pytest.param("plain", marks=pytest.mark.slow)])
def test_default_and_safe_tile(name, monkeypatch):
    check(name, lambda problem: default_tile(NAME, problem, H100), torch.float16, monkeypatch)
    check(name, KERNELS[NAME].safe_tile, torch.float16, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["groups", "nine"])
def test_every_candidate(name, monkeypatch):
    found = []
    with monkeypatch.context() as patch:
        check(name, lambda problem: found.append(problem) or SMALL, torch.float16, patch)
    for tile in candidates(NAME, found[0], H100):
        with monkeypatch.context() as patch:
            check(name, tile, torch.float16, patch)


def test_wide_indices(monkeypatch):
    monkeypatch.setattr("triton_conv.problem_lectures.INT32_LIMIT", 0)
    check("groups", SMALL, torch.bfloat16, monkeypatch)


# The interpreter multiplies the images past the batch too.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_weight_that_no_output_reads_with_spreads_nothing(monkeypatch):
    """Neighbours in a vector take no part: an infinite weight reaches only what it is read with."""
    weight = LAYERS["plain"][1]["weight"].clone()
    weight[1, 2, 0, 0, 1, 2] = float("inf")
    function, arguments = LAYERS["plain"]
    monkeypatch.setitem(LAYERS, "infinite", (function, arguments | {"weight": weight}))
    mine, _ = input_gradient("infinite", SMALL, torch.bfloat16, monkeypatch)
    reached = ~mine.isfinite()
    assert reached[:, 0, 2, 4].all() and reached.sum() == 2


def problem_of(layer, dtype=torch.bfloat16):
    function, arguments = layer
    arguments = {k: v for k, v in cast(arguments, dtype).items() if k != "bias"}
    shape = getattr(tc, function)(**arguments).shape
    rank = len(shape) - 2
    window = [arguments.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    stride, padding, dilation = ((value,) * rank if isinstance(value, int) else value for value in window)
    return ops_local.plan_local_conv_input_gradient(
        random(shape, dtype), arguments["weight"], arguments["input"].shape[2:], stride,
        [side for pair in padding for side in ([pair] * 2 if isinstance(pair, int) else pair)], dilation,
        arguments.get("groups", 1), False,
    ).problem  # fmt: skip


def moved(layer, dtype):
    """The same layer, its weight one element further on in memory."""
    function, arguments = layer
    weight = arguments["weight"].to(dtype)
    place = torch.empty(weight.numel() + 1, dtype=dtype, device=DEVICE)[1:]
    return function, arguments | {"weight": place.copy_(weight.flatten()).view(weight.shape)}


@pytest.mark.parametrize(
    ("layer", "dtype", "reason"),
    [
        (LAYERS["plain"], torch.float32, "only 16-bit numbers"),
        (local((2, 8, 3, 3), (2, 2), (3, 8, 2, 2), innermost=True), torch.float16, "do not lie side by side"),
        (local((2, 8, 3, 5), (2, 2), (3, 8, 2, 2), stride=(1, 2)), torch.float16, "one column further"),
        (local((2, 3, 3, 3), (2, 2), (2, 3, 2, 2)), torch.float16, "begin at whole vectors"),
        (moved(LAYERS["plain"], torch.float16), torch.float16, "begin at whole vectors"),
        (local((1, 8, 18), (2,), (2, 8, 17)), torch.float16, "17 taps do not fit"),
    ],
    ids=["float32", "innermost", "stride", "odd-filter", "unaligned", "long-filter"],
)
def test_refusals(layer, dtype, reason):
    assert reason in KERNELS[NAME].unsuited(problem_of(layer, dtype))


@pytest.mark.parametrize("taps", [1, 9, 10, 16])
def test_the_default_fits(taps):
    problem = problem_of(local((64, 8, taps), (1,), (2, 8, taps)))
    assert default_tile(NAME, problem, H100).unfit(problem, H100) is None


def test_only_a_measurement_prefers_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CONV_HOME", str(tmp_path))
    problem = find("deepface_local")[0].parts()[1].problem()
    tile = default_tile(NAME, problem, H100)
    assert NAME in dispatch.family(problem)[0] and dispatch.plan(problem, H100).kernel.name != NAME
    entry = configs.Entry(tile, 140.0, (140.0, 141.0), 150.0, 0.0, 8)
    configs.ConfigFile(NAME, H100, {}, {problem.describe(): entry}).write(configs.user_folder())
    ops.forget_plans()
    try:
        made = dispatch.plan(problem, H100)
        assert (made.kernel.name, made.tile, made.source) == (NAME, tile, "user tuned")
    finally:
        ops.forget_plans()


@pytest.mark.parametrize(
    ("sizes", "reason"), [({"TOGETHER": 5}, "272 registers"), ({"BLOCK_M": 128}, "registers")], ids=str
)
def test_tiles_that_no_program_runs(sizes, reason):
    problem = find("deepface_local")[0].parts()[1].problem()
    tile = LocallyConnectedInputGradientShiftedTile(**{"num_warps": 1} | sizes)
    assert reason in tile.unfit(problem, H100)
