"""The registered ops: what torch's own checks say of them, and that shapes are known without running anything."""

import contextlib
from functools import partial

import pytest
import test_lectures
import torch
import torch.nn.functional as F
from cases import CASES
from helpers import DEVICE, check, launches, name_of, random
from test_deformable import tensors as deformable_tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import triton_conv as tc
from triton_conv import eager, ops, ops_conv, ops_deform
from triton_conv.kernels import launching
from triton_conv.ops_fused import set_separable_fusion

SMALL = CASES["smoke"] + CASES["transposed"] + CASES["empty"] + CASES["strided-views"]


def op_arguments():
    """(op, its positional arguments) by name, as `functional` passes them."""
    x, w, b = random((2, 4, 5, 6)), random((6, 4, 3, 2)), random((6,))
    deform = deformable_tensors(2, torch.float32)
    tensors = [deform[name] for name in ("input", "offset", "mask", "weight", "bias")]
    pads, geometry = (1, 1, 0, 0), ([2, 1], [1, 1, 0, 0], [2, 1])
    gradient = random(ops_deform.deform_conv(*tensors, *geometry).shape)
    forward = ((1, 1), pads, (1, 1), 1, False, (0, 0), "zeros", "none")
    return {
        "conv": (ops_conv.conv, (x, w, b, *forward)),
        "conv-no-bias": (ops_conv.conv, (x, w, None, *forward[:-2], "reflect", "gelu")),
        "conv-channels-last": (ops_conv.conv, (x.contiguous(memory_format=torch.channels_last), w, b, *forward)),
        "transposed": (
            ops_conv.conv,
            (x, random((4, 6, 3, 2)), b, (2, 2), pads, (1, 1), 1, True, (1, 0), "zeros", "silu"),
        ),
        "deform_conv": (ops_deform.deform_conv, (*tensors, *geometry)),
        "deform_conv-v1": (ops_deform.deform_conv, (tensors[0], tensors[1], None, tensors[3], None, *geometry)),
        "conv_weight_gradient": (
            ops_conv.conv_weight_gradient,
            (x, random((2, 6, 5, 5)), [3, 2], (1, 1), pads, (1, 1), 1, "replicate"),
        ),
        "deform_conv_input_gradient": (
            ops_deform.deform_conv_input_gradient,
            (*tensors[:4], gradient, *geometry, [True, True, True], False),
        ),
        "deform_conv_input_gradient-fixed": (
            ops_deform.deform_conv_input_gradient,
            (*tensors[:4], gradient, *geometry, [True, False, False], True),
        ),
        "deform_conv_weight_gradient": (
            ops_deform.deform_conv_weight_gradient,
            (*tensors[:3], gradient, tensors[3].shape[2:], *geometry, tensors[0].shape[1] // tensors[3].shape[1]),
        ),
        "routed_conv": (torch.ops.triton_conv.routed_conv.default, (x, w, b, *forward, "triton")),
        "routed_deform_conv": (torch.ops.triton_conv.routed_deform_conv.default, (*tensors, *geometry, "triton")),
    }


def test_every_op_is_checked():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("triton_conv::")}
    checked = op_arguments() | test_lectures.op_arguments()
    assert {op.name() for op, _ in checked.values()} == names


# In the interpreter the deformable ones take five seconds each.
QUICK = ("conv", "transposed", "conv_weight_gradient", "routed_conv")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in op_arguments()]
)
def test_opcheck(name):
    op, arguments = op_arguments()[name]
    torch.library.opcheck(op, arguments)


# Of torch 2.15's own tracing.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in op_arguments() if not name.endswith("-fixed")])
def test_opcheck_with_gradients(name):
    op, arguments = op_arguments()[name]
    needed = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(op, needed)


def on_meta(arguments):
    return {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def described(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_fake_results_are_like_real_ones(case):
    arguments = case.tensors(torch.float32)
    real = getattr(tc, case.function)(**arguments)
    launches.clear()
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        fake = getattr(tc, case.function)(**fakes)
    assert described(fake) == described(real)
    assert not launches


@pytest.mark.parametrize("case", CASES["smoke"] + CASES["networks"], ids=name_of)
def test_meta_tensors(case):
    arguments = case.tensors(torch.bfloat16)
    real = getattr(tc, case.function)(**arguments)
    launches.clear()
    result = getattr(tc, case.function)(**on_meta(arguments))
    assert described(result) == (real.shape, real.stride(), torch.bfloat16, torch.device("meta"))
    assert not launches


def test_meta_deformable():
    result = tc.deform_conv2d(**on_meta(deformable_tensors(33, torch.float16)))
    assert (result.shape, result.device.type) == ((33, 2, 2, 3), "meta")
    assert not launches


def test_a_plan_is_made_once_and_printed_but_runs_nothing():
    arguments = {"input": random((2, 12, 6, 5)), "weight": random((6, 4, 3, 3)), "groups": 3, "padding": 1}
    made = tc.plan(tc.conv2d, **arguments)
    assert not launches
    text = str(made)
    for words in (
        "grouped_packed on ", "n2 c12-6 hw6x5 k3x3 s1x1 p1x1 d1x1 g3 float32", "several fill one tile",
        str(made.tile), f"source   {made.source}", "M=60 N=2 K=36 groups=3", "GFLOP", "MB",
    ):  # fmt: skip
        assert words in text
    assert tc.plan(tc.conv2d, **arguments) is made
    positional = (arguments["input"], arguments["weight"], None, 1, 1, 1, 3)
    assert tc.plan(tc.conv2d, *positional) is made
    assert tc.plan(tc.conv2d, arguments["input"][:1], arguments["weight"], padding=1, groups=3) is not made


def test_a_plan_cannot_be_changed():
    made = tc.plan(tc.conv2d, random((1, 2, 3, 3)), random((2, 2, 1, 1)))
    g = made.problem.geometry
    for thing, name in ((made, "grid"), (made.problem, "dtype"), (made.tile, "BLOCK_M"), (g, "batch")):
        with pytest.raises(AttributeError):
            setattr(thing, name, 1)


def test_a_call_allocates_one_output_and_no_padded_copy(monkeypatch):
    made = []

    def counted(allocate):
        def call(*args, **kwargs):
            made.append(allocate(*args, **kwargs))
            return made[-1]

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_strided"), (eager, f"_empty_{DEVICE}")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    result = tc.conv2d(random((2, 3, 5, 5)), random((4, 3, 3, 3)), padding=1, padding_mode="circular")
    assert [tensor.data_ptr() for tensor in made] == [result.data_ptr()]


def test_an_empty_result_launches_nothing():
    assert tc.conv2d(random((0, 3, 5, 5)), random((4, 3, 3, 3))).shape == (0, 4, 3, 3)
    assert not launches


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_tensors_that_require_gradients_in(context):
    x, w = random((1, 3, 5, 5)).requires_grad_(), random((4, 3, 3, 3)).requires_grad_()
    with context():
        result = tc.conv2d(x, w)
    assert not result.requires_grad


def test_results_are_the_same_bits_twice():
    arguments = CASES["networks"][0].tensors(torch.float32)
    assert torch.equal(tc.conv2d(**arguments), tc.conv2d(**arguments))


def test_a_bias_may_be_a_view_of_the_weight():
    w = random((4, 3, 3, 3))
    check("conv2d", {"input": random((1, 3, 4, 4)), "weight": w, "bias": w[:, 0, 0, 0]})


def counted(call, *tensors, backward=True):
    """Operations of a call, and of the gradients of all its tensors, by torch's own counter."""
    with FlopCounterMode(display=False) as counter, contextlib.nullcontext() if backward else torch.no_grad():
        output = call(*(tensor.detach().requires_grad_() for tensor in tensors))
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


def test_torch_counts_our_operations():
    x, w, offset = random((2, 4, 6, 5)), random((8, 4, 3, 3)), random((2, 18, 4, 3))
    plain = counted(F.conv2d, x, w)
    assert counted(tc.conv2d, x, w) == plain > 0
    assert counted(tc.deform_conv2d, x, offset, w) == plain
    # Of groups torch counts the forward pass alone right.
    ours, shuffled, torchs = (partial(f, groups=2) for f in (tc.conv2d, tc.shuffle_conv2d, F.conv2d))
    forward = counted(torchs, x, w[:, :2], backward=False)
    assert counted(ours, x, w[:, :2]) == counted(shuffled, x, w[:, :2]) == 3 * forward == plain // 2
    ours, torchs = (partial(f, stride=2, padding=1) for f in (tc.conv_transpose2d, F.conv_transpose2d))
    assert counted(ours, x, random((4, 3, 3, 2))) == counted(torchs, x, random((4, 3, 3, 2)))
    depthwise, pointwise = random((4, 1, 3, 3)), random((7, 4, 1, 1))
    with set_separable_fusion(True):
        fused = counted(tc.separable_conv2d, x, depthwise, pointwise, backward=False)
    assert fused == 2 * 2 * 4 * 3 * (4 * 9 + 4 * 7)
    places = random((4, 3, 2, 4, 3, 3))
    assert counted(tc.locally_connected2d, x, places) == 3 * 2 * 2 * places.numel()


def test_what_the_tests_see_of_unwritten_memory():
    """The fixture that all tests of kernels rely on."""
    like = random((1,), torch.float16)
    assert ops.allocate((2, 3), (3, 1), like).isnan().all()
    assert ops.allocate((2,), (1,), like, torch.float32).isnan().all()
    assert launching.memory(3, like.device).isnan().all()
