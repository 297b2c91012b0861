"""Calls past torch's dispatcher: what they give, what leaves them, and what they remember."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, launches, random
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import triton_conv as tc
from triton_conv import calls, dispatch, ops, ops_conv
from triton_conv.eager import plain

pytestmark = pytest.mark.usefixtures("exact_products")


class Function(TorchFunctionMode):
    """Changes nothing; but it could."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def direct(monkeypatch):
    """Counts the convolutions that pass no dispatcher."""
    found = []
    run = calls.Call.__call__
    monkeypatch.setattr(calls.Call, "__call__", lambda self, *tensors: found.append(1) or run(self, *tensors))
    return found


@pytest.fixture(scope="module")
def operands():
    return random((2, 4, 3, 3)), random((4, 2, 3, 3), torch.float32, "weight")


def conv(x, w):
    return tc.conv2d(x, w, padding=1, groups=2)


def in_mode(mode):
    def call(x, w):
        with mode():
            return conv(x, w)

    return call


def dual(x, w):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(conv(forward_ad.make_dual(x, x), w)).primal


# How to make a call that is none of the plain ones, and yet the same.
LEAVING = {
    "a function mode": in_mode(Function),
    "a dispatch mode": in_mode(Dispatch),
    "a default device": in_mode(lambda: torch.device(DEVICE)),
    "a profiler": in_mode(lambda: torch.profiler.profile(acc_events=True)),
    "vmap": lambda x, w: torch.vmap(conv, (0, None))(x[:, None], w)[:, 0],
    "grad": lambda x, w: torch.func.grad_and_value(lambda x: ((y := conv(x, w)).sum(), y), has_aux=True)(x)[1][1],
    "forward mode": dual,
    "make_fx": lambda x, w: make_fx(conv)(x, w)(x, w),
    "a trace": lambda x, w: torch.jit.trace(conv, (x, w), check_trace=False)(x, w),
    "a subclass": lambda x, w: conv(x.as_subclass(Subclass), w).as_subclass(torch.Tensor),
    "a negated view": lambda x, w: conv(torch._neg_view(-x), w),
}


@pytest.mark.filterwarnings("ignore:.torch.jit..* is deprecated")
@pytest.mark.parametrize("name", LEAVING)
def test_what_leaves_gives_the_same(name, direct, operands):
    expected = conv(*operands)
    assert direct == [1]
    found = LEAVING[name](*operands)
    assert direct == [1]
    torch.testing.assert_close(found, expected)
    conv(*operands)
    assert direct == [1, 1], "and back"


def test_what_is_not_plain():
    x = random((2, 3))
    assert plain(x) and plain(torch.nn.Parameter(x), None) and plain(x.mT)
    with torch.inference_mode():
        assert plain(x.clone()) and plain(x)
    with torch.autocast(DEVICE), torch.no_grad():
        assert plain(x)
    with FakeTensorMode() as mode:
        assert not plain(mode.from_tensor(x))
    others = x.to("meta"), x.to_sparse(), torch._efficientzerotensor((2,)), torch._to_functional_tensor(x), "x"
    assert not any(map(plain, others)) and not plain(x, others[0])
    kept = []
    torch.func.grad(lambda x: kept.append(x) or x.sum())(x)
    assert not plain(*kept), "what a transform left behind"


def test_the_op_is_what_modes_and_profiles_see(operands):
    with Dispatch() as mode, torch.no_grad():
        conv(*operands)
    assert ops_conv.conv in mode.seen
    with torch.profiler.profile() as profile:
        conv(*operands)
    assert "triton_conv::conv" in {event.name for event in profile.events()}


# ----------------------------------------------------------------------------------------------------- the same results

SHAPES = {"conv2d": ((1, 4, 4, 5), (6, 2, 2, 3)), "conv_transpose2d": ((1, 4, 2, 3), (4, 3, 2, 3))}
KINDS = {
    "plain": ("conv2d", {"padding": 1}),
    "relu": ("conv2d", {"stride": 2, "padding": (0, 1), "activation": "relu"}),
    "gelu": ("conv2d", {"dilation": (2, 1), "activation": "gelu"}),
    "reflected": ("conv2d", {"padding": ((1, 0), (0, 2)), "padding_mode": "reflect"}),
    "transposed": ("conv_transpose2d", {"stride": 2, "padding": 1}),
    "more than the padding": ("conv_transpose2d", {"stride": 2, "output_padding": 1}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_as_through_the_op(kind):
    function, arguments = KINDS[kind]
    x, w = (random(shape, torch.float32, str(shape)) for shape in SHAPES[function])
    if kind in ("plain", "transposed"):
        x = x.contiguous(memory_format=torch.channels_last)
    b = random((6,), torch.float32, "bias")
    results, made = [], []
    for mode in (contextlib.nullcontext, Function):
        tensors = [t.detach().clone().requires_grad_() for t in (x, w, b)]
        with mode():
            launches.clear()
            # Twice, so that what was remembered is used.
            for _ in range(2):
                y = getattr(tc, function)(*tensors, groups=2, **arguments)
                gradients = torch.autograd.grad(y, tensors, torch.ones_like(y).mul_(0.5))
            made.append(dict(launches))
        results.append([y.detach(), *gradients])
    for mine, through in zip(*results, strict=True):
        assert torch.equal(mine, through) and mine.stride() == through.stride()
    assert made[0] == made[1] and made[0]


BAD = {
    "channels": lambda x, w: tc.conv2d(x, w, groups=1),
    "groups": lambda x, w: tc.conv2d(x, w, groups=5),
    "dtype": lambda x, w: tc.conv2d(x, w.double(), groups=2),
    "integers": lambda x, w: tc.conv2d(x.int(), w.int(), groups=2),
    "bias": lambda x, w: tc.conv2d(x, w, x, groups=2),
    "size": lambda x, w: tc.conv2d(x, w, dilation=9, groups=2),
    "stride": lambda x, w: tc.conv2d(x, w, stride=(1.0, 1.0), groups=2),
    "no tensor": lambda x, w: tc.conv2d(x, [1], groups=2),
    "padding mode": lambda x, w: tc.conv2d(x, w, groups=2, padding_mode="mirror"),
    "devices": lambda x, w: tc.conv2d(x, w.to("meta"), groups=2),
}


@pytest.mark.parametrize("name", BAD)
def test_the_same_errors_as_through_the_op(name, operands):
    conv(*operands)
    told = []
    for mode in (contextlib.nullcontext, Function):
        with mode(), pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
            BAD[name](*operands)
        told.append((type(caught.value), str(caught.value)))
    assert told[0] == told[1] and told[0][1]


# ------------------------------------------------------------------------------------------------------------- backward


def gradients_of(function, tensors, dy):
    return torch.autograd.grad(function(*tensors, padding=1), tensors, dy)


def test_gradients_of_other_strides():
    """Of one call, by contiguous, expanded and transposed gradients of its output."""
    x, w, b = random((2, 3, 4, 4)), random((2, 3, 3, 3)), random((2,))
    tensors = [t.requires_grad_() for t in (x, w, b)]
    dy = random((2, 2, 4, 4), torch.float32, "dy")
    for grad in (dy, dy[:1, :1, :1, :1].expand(2, 2, 4, 4), dy.mT, dy.contiguous(memory_format=torch.channels_last)):
        for mine, torchs in zip(*(gradients_of(f, tensors, grad) for f in (tc.conv2d, F.conv2d)), strict=True):
            torch.testing.assert_close(mine, torchs)


def test_saved_tensors_that_come_back_otherwise():
    """Hooks may give back other strides, views that are to be negated, and even tensors of other types."""
    x, w, b = (t.requires_grad_() for t in (random((2, 3, 4, 4)), random((2, 3, 3, 3)), random((2,))))
    dy = random((2, 2, 4, 4), torch.float32, "dy")
    expected = gradients_of(F.conv2d, (x, w, b), dy)
    moved, negated = (lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0)), (lambda t: torch._neg_view(-t))
    for unpack in (moved, negated, lambda t: t.as_subclass(Subclass), torch.clone):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
            found = gradients_of(tc.conv2d, (x, w, b), dy)
        for mine, torchs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.as_subclass(torch.Tensor), torchs)


def test_a_saved_tensor_must_not_change():
    x, w = random((1, 2, 4, 4)).requires_grad_(), random((2, 2, 3, 3)).requires_grad_()
    y = tc.conv2d(x, w)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("mode", [contextlib.nullcontext, Function], ids=["plain", "through the op"])
def test_what_no_gradient_reads_may_change(mode):
    """A bias, as with torch's convolution; the gradient of gelu reads it."""
    x, w, b = (t.requires_grad_() for t in (random((1, 2, 4, 4)), random((2, 2, 3, 3)), random((2,))))
    for activation in (None, "relu", "gelu"):
        with mode():
            y = tc.conv2d(x, w, b, activation=activation)
        with torch.no_grad():
            b.add_(1)
        with pytest.raises(RuntimeError, match="inplace") if activation == "gelu" else contextlib.nullcontext():
            y.sum().backward()


def test_second_derivatives(direct):
    found = []
    tensors = [t.requires_grad_() for t in (random((1, 2, 4, 4), torch.float64), random((2, 2, 3, 3), torch.float64))]
    for function in (tc.conv2d, F.conv2d):
        dx, dw = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad((dx * dw.sum()).sum(), tensors))
    assert direct
    for mine, torchs in zip(*found, strict=True):
        torch.testing.assert_close(mine, torchs)


# --------------------------------------------------------------------------------------------------- what is remembered


def test_precision_is_part_of_a_call(conv_precision):
    """That of the forward pass and that of the backward pass, which may be another."""
    x, w = random((1, 2, 4, 4)), random((2, 2, 3, 3))
    window = (1, 1), (0, 0, 0, 0), (1, 1), 1, False, (0, 0), "zeros", "none"
    made = {}
    for precision in ("ieee", "tf32"):
        conv_precision.fp32_precision = precision
        made[precision] = calls.Call.like((x, w, None), window)
        assert made[precision].plan.problem.precision == precision
        assert made[precision] is calls.Call.like((x.clone(), w, None), window)
    grad = random(made["ieee"].plan.out_shape)
    for precision in ("ieee", "tf32", "ieee"):
        conv_precision.fp32_precision = precision
        for call in made.values():
            with torch.no_grad():
                plans = call.gradients((grad, x, w), (True, True))
            assert plans.of_input.problem.precision == plans.of_weight.problem.precision == precision


def test_forgotten_plans_are_made_anew():
    x, w = random((1, 2, 4, 4)), random((2, 2, 3, 3))
    window = (1, 1), (0, 0, 0, 0), (1, 1), 1, False, (0, 0), "zeros", "none"
    before = calls.Call.like((x, w, None), window)
    ops.forget_plans()
    assert calls.Call.like((x, w, None), window) is not before


def test_a_layer_that_changed_computes_what_it_should(direct):
    layer = tc.nn.Conv2d(4, 4, 3, padding=1, groups=2, backend="triton", device=DEVICE)
    x = random((2, 4, 6, 6))

    def check(count, **like):
        """The layer gives what torch's functions give for it, and `count` of two calls are remembered ones."""
        direct.clear()
        asked = []
        for _ in range(2):
            before = len(direct)
            found = layer(x)
            asked.append(len(direct) - before)
        window = layer.stride, layer.padding, layer.dilation, layer.groups
        expected = F.conv2d(x, layer.weight, layer.bias, *window)
        torch.testing.assert_close(found, expected.relu() if layer.activation else expected)
        assert sum(asked) == count

    check(2)
    layer.stride = (2, 2)
    check(2)
    layer.activation = "relu"
    check(2)
    layer.bias = None
    check(2)
    layer.weight = torch.nn.Parameter(layer.weight.detach()[..., :1, :])
    check(2)
    layer.double()
    x = x.double()
    check(2)
    with Function():
        check(0)


def test_a_layer_under_autocast(direct):
    layer = tc.nn.Conv2d(4, 4, 3, backend="triton", device=DEVICE)
    x = random((2, 4, 6, 6))
    for _ in range(2):
        assert layer(x).dtype is torch.float32
        with torch.autocast(DEVICE, torch.bfloat16):
            y = layer(x)
        assert y.dtype is torch.bfloat16 and y.requires_grad
        y.float().sum().backward()
        assert layer.weight.grad.dtype is torch.float32
    assert len(direct) == 4


def test_an_input_without_a_batch(direct):
    layer = tc.nn.ConvTranspose2d(4, 3, 3, backend="triton", device=DEVICE)
    x = random((4, 5, 5))
    for _ in range(2):
        torch.testing.assert_close(layer(x), F.conv_transpose2d(x, layer.weight, layer.bias))
    assert layer(x[None]).shape == (1, 3, 7, 7) == layer(x[None]).shape
    assert layer(x[None], output_size=(7, 7)).shape == (1, 3, 7, 7)


# -------------------------------------------------------------------------------------------------------- what it costs


def own_calls(call):
    """How many functions of the library a call calls."""
    made, package = [], str(Path(tc.__file__).parent)

    def count(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            made.append(f"{frame.f_code.co_filename.removeprefix(package)}:{frame.f_code.co_name}")

    call()
    sys.setprofile(count)
    call()
    sys.setprofile(None)
    return made


def test_host_time(monkeypatch):
    """By what does not depend on the machine: functions of ours on the way to the launch, measured at 2026-11-23."""
    monkeypatch.setattr(dispatch, "launch", lambda *arguments: None)
    layer = tc.nn.Conv2d(4, 4, 3, padding=1, groups=4, backend="triton", device=DEVICE)
    x = random((1, 4, 8, 8)).requires_grad_()
    tensors, dy = [x, *layer.parameters()], random((1, 4, 8, 8), torch.float32, "dy")
    assert len(own_calls(lambda: tc.conv2d(x, layer.weight, padding=1, groups=4))) <= 34
    # One is `forward`: of torch's own there were 18, and 6 below.
    assert len(own_calls(lambda: layer(x))) <= 19
    assert len(own_calls(lambda: torch.autograd.grad(layer(x), tensors, dy))) <= 37
    # Of a layer that stays with torch.
    layer.backend = None
    assert len(own_calls(lambda: layer(x))) <= 7
