"""Calls past torch's dispatcher of other kinds: deformable and separable convolution, and those in `accelerate`."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, launches, random
from test_eager import LEAVING, Function, Subclass, own_calls

import triton_conv as tc
from triton_conv import calls, dispatch, ops
from triton_conv.autograd_lectures import SeparableCall
from triton_conv.calls_deform import DeformCall

pytestmark = pytest.mark.usefixtures("exact_products")

SHAPES = {"x": (1, 2, 2, 3), "offset": (1, 4, 2, 2), "mask": (1, 2, 2, 2), "weight": (2, 2, 1, 2), "bias": (2,)}
SEPARABLE = {"x": (2, 2, 2, 3), "depthwise": (4, 1, 1, 2), "pointwise": (3, 4, 1, 1), "mid_bias": (4,), "bias": (3,)}


def drawn(shapes, *without):
    return [None if name in without else random(shape, torch.float32, name) for name, shape in shapes.items()]


def deform(x, offset, mask, weight, bias):
    return tc.deform_conv2d(x, offset, weight, bias, mask=mask)


def separable(x, depthwise, pointwise, mid_bias, bias):
    return tc.separable_conv2d(x, depthwise, pointwise, bias, mid_bias=mid_bias, mid_activation="relu")


KINDS = {"deformable": (DeformCall, deform, SHAPES), "separable": (SeparableCall, separable, SEPARABLE)}


# Those ways that call `conv` in this thread as it is; deformable convolution has no forward mode.
IN_MODES = ["a function mode", "a dispatch mode", "a profiler", "make_fx", "a trace", "a subclass", "a negated view"]


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    """A function, its tensors' shapes, and the calls of it that pass no dispatcher."""
    call, function, shapes = KINDS[request.param]
    found, run = [], call.__call__
    monkeypatch.setattr(call, "__call__", lambda self, *tensors: found.append(1) or run(self, *tensors))
    return function, shapes, found


@pytest.mark.filterwarnings("ignore:.torch.jit..* is deprecated")
@pytest.mark.parametrize("name", IN_MODES)
def test_what_leaves_gives_the_same(name, kind, monkeypatch):
    function, shapes, direct = kind
    x, *others = drawn(shapes)
    expected = function(x, *others)
    assert direct == [1]
    monkeypatch.setattr("test_eager.conv", lambda x, w: function(x, *others))
    torch.testing.assert_close(LEAVING[name](x, others[0]), expected)
    assert direct == [1]
    function(x, *others)
    assert direct == [1, 1], "and back"


def test_under_torch_func(kind):
    function, shapes, direct = kind
    x, *others = drawn(shapes)
    expected = function(x, *others)
    found = torch.func.grad_and_value(lambda x: ((y := function(x, *others)).sum(), y), has_aux=True)(x)[1][1]
    torch.testing.assert_close(found, expected)
    # Of each image, with its offsets and its mask.
    images = 3 if function is deform else 1
    tensors = [x, *others]
    given, rest = tensors[:images], tensors[images:]
    found = torch.vmap(lambda *given: function(*(t[None] for t in given), *rest)[0])(*given)
    torch.testing.assert_close(found, expected)
    assert direct == [1]


@pytest.mark.parametrize("without", [(), ("mask", "bias", "mid_bias"), ("x", "weight")], ids=str)
def test_the_same_bits_as_through_the_op(kind, without):
    """Of all tensors, and where some are absent or need no gradient."""
    function, shapes, direct = kind
    absent = [name for name in without if name in ("mask", "bias", "mid_bias")]
    results, made = [], []
    for mode in (contextlib.nullcontext, Function):
        tensors = drawn(shapes, *absent)
        wanted = [t.requires_grad_() for t, name in zip(tensors, shapes, strict=True) if name not in without]
        with mode():
            launches.clear()
            # Twice, so that what was remembered is used.
            for _ in range(2):
                y = function(*tensors)
                gradients = torch.autograd.grad(y, wanted, torch.ones_like(y).mul_(0.5))
            made.append(dict(launches))
        results.append([y.detach(), *gradients])
    assert direct == [1, 1]
    for mine, through in zip(*results, strict=True):
        assert torch.equal(mine, through) and mine.stride() == through.stride()
    assert made[0] == made[1] and made[0]


# --------------------------------------------------------------------------------------------------------- deformable


def reference(x, offset, mask, weight, bias, stride=1):
    from triton_conv.reference import deform_conv2d

    return deform_conv2d(x, offset, weight, bias, (stride, stride), (0, 0), (1, 1), mask)


def test_saved_tensors_that_come_back_otherwise():
    tensors = [t.requires_grad_() for t in drawn(SHAPES)]
    dy = random((1, 2, 2, 2), torch.float32, "dy")
    expected = torch.autograd.grad(reference(*tensors), tensors, dy)
    moved, negated = (lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0)), (lambda t: torch._neg_view(-t))
    for unpack in (moved, negated, lambda t: t.as_subclass(Subclass), torch.clone):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
            found = torch.autograd.grad(deform(*tensors), tensors, dy)
        for mine, others in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.as_subclass(torch.Tensor), others)


def test_deterministic_sums_are_part_of_a_gradient():
    tensors = [t.requires_grad_() for t in drawn(SHAPES)]
    call = DeformCall.like(tensors, ((1, 1), (0, 0, 0, 0), (1, 1)))
    y = deform(*tensors)
    for deterministic in (False, True, False):
        torch.use_deterministic_algorithms(deterministic)
        try:
            torch.autograd.grad(y.sum(), tensors[:2], retain_graph=True)
            with torch.no_grad():
                plans = call.gradients((torch.ones_like(y), *tensors[:4]), (True, True, True, True))
        finally:
            torch.use_deterministic_algorithms(False)
        assert plans.of_input.problem.fixed_point == deterministic


def test_second_derivatives():
    tensors = [t.double().requires_grad_() for t in drawn(SHAPES)]
    found = []
    for function in (deform, reference):
        first = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(g.sum() for g in first), tensors))
    for mine, others in zip(*found, strict=True):
        torch.testing.assert_close(mine, others)


def test_a_deformable_layer_that_changed_computes_what_it_should(monkeypatch):
    found, run = [], DeformCall.__call__
    monkeypatch.setattr(DeformCall, "__call__", lambda self, *tensors: found.append(1) or run(self, *tensors))
    layer = tc.nn.DeformConv2d(2, 2, (1, 2), backend="triton", device=DEVICE)
    x, offset, mask, *_ = drawn(SHAPES)

    def check(*sampled, stride=1):
        found.clear()
        for _ in range(2):
            full = (*sampled, None)[:2]
            torch.testing.assert_close(layer(x, *sampled), reference(x, *full, layer.weight, layer.bias, stride))
        assert found == [1, 1]

    check(offset, mask)
    check(offset)
    check(offset, mask)
    layer.bias = None
    check(offset, mask)
    check(offset)
    layer.weight.data = torch.empty(9, device=DEVICE)[1:].view(2, 2, 1, 2).copy_(layer.weight.data)
    check(offset)
    layer.stride = (2, 2)
    check(offset[:, :, :1, :1], mask[:, :, :1, :1], stride=2)


def test_a_deformable_layer_under_autocast():
    layer = tc.nn.DeformConv2d(2, 2, (1, 2), backend="triton", device=DEVICE)
    x, offset, mask, *_ = drawn(SHAPES)
    for dtype in (torch.bfloat16, None, torch.float16) * 2:
        with torch.autocast(DEVICE, dtype) if dtype else contextlib.nullcontext():
            y = layer(x, offset, mask)
        assert y.dtype is (dtype or torch.float32)
        y.float().sum().backward()
        assert layer.weight.grad.dtype is torch.float32


# ---------------------------------------------------------------------------------------------------------- separable


def test_a_separable_layer_that_changed_computes_what_it_should():
    layer = tc.nn.SeparableConv2d(2, 3, 2, stride=[1, 1], device=DEVICE)
    x = random((2, 2, 4, 5))

    def check():
        for fused in (False, True, None, False):
            with tc.set_separable_fusion(fused):
                launches.clear()
                found = layer(x)
                assert len(launches) == (1 if fused else 2) or fused is None
            mid = F.conv2d(x, layer.depthwise_weight, layer.mid_bias, layer.stride, layer.padding, groups=2)
            torch.testing.assert_close(found, F.conv2d(mid, layer.pointwise_weight, layer.bias))

    check()
    layer.stride = (2, 1)
    check()
    layer.padding = 1
    check()
    layer.bias = None
    check()
    layer.mid_bias = torch.nn.Parameter(random((2,), torch.float32, "mid_bias"))
    check()
    layer.pointwise_weight.data = torch.empty(7, device=DEVICE)[1:].view(3, 2, 1, 1).copy_(layer.pointwise_weight.data)
    check()
    layer.double()
    x = x.double()
    check()
    assert layer(x[0]).shape == layer(x)[0].shape


def test_a_separable_layer_under_autocast():
    layer = tc.nn.SeparableConv2d(2, 3, 2, device=DEVICE)
    x = random((1, 2, 3, 3))
    for dtype in (torch.bfloat16, None) * 2:
        with torch.autocast(DEVICE, dtype) if dtype else contextlib.nullcontext():
            y = layer(x)
        assert y.dtype is (dtype or torch.float32)
        y.float().sum().backward()
        assert layer.depthwise_weight.grad.dtype is torch.float32


# ------------------------------------------------------------------------------------------------------- in accelerate


def test_what_accelerate_remembers(monkeypatch):
    """A call that stays with torch, and one that does not, is decided once; its options are known by their types."""
    x, w, b = random((1, 2, 4, 4)), random((2, 2, 3, 3)), random((2,))
    asked, choose = [], tc.routing.choose
    monkeypatch.setattr(tc.routing, "choose", lambda *given: asked.append(1) or choose(*given))

    def check(count, *options, weight=w, **named):
        asked.clear()
        for _ in range(2):
            torch.testing.assert_close(F.conv2d(x, weight, *options, **named), expected(weight, *options, **named))
        assert len(asked) == count, (options, named)

    def expected(*given, **named):
        with torch._C.DisableTorchFunction():
            return F.conv2d(x, *given, **named)

    for force in (False, True):
        with tc.accelerate(force) as report:
            check(1)
            check(1, b)
            check(1, None, 1)
            check(0, None, 1)
            check(1, None, (1, 1), [1, 1])
            check(1, None, 2)
            check(1, b, padding=1)
            check(1, b, padding="same")
            check(1, weight=w.clone().requires_grad_())
            with torch.no_grad():
                check(1)
            check(0)
            # Not as they usually are, and so decided anew.
            check(2, bias=b)
            check(2, None, torch.Size((1, 1)))
            with pytest.raises(TypeError):
                F.conv2d(x, w, None, 1.0)
            with tc.set_backend("torch"):
                check(0 if force else 2)
            launches.clear()
            check(0)
            assert bool(launches) == force
        assert {row.choice.ours for row in report if row.choice.reason != "asked for" or force} == {force}


def test_what_a_decorator_remembers(monkeypatch):
    asked, choose = [], tc.routing.choose
    monkeypatch.setattr(tc.routing, "choose", lambda *given: asked.append(1) or choose(*given))
    x, w = random((1, 2, 4, 4)), random((2, 2, 3, 3))
    accelerated = tc.accelerate(force=True)(lambda: F.conv2d(x, w))
    for _ in range(3):
        torch.testing.assert_close(accelerated(), F.conv2d(x, w))
    assert asked == [1]


def test_without_a_batch_in_accelerate():
    x, w = random((2, 4, 4)), random((2, 2, 3, 3))
    with tc.accelerate(force=True):
        for _ in range(2):
            assert F.conv2d(x, w).shape == (2, 2, 2) and F.conv2d(x[None], w).shape == (1, 2, 2, 2)


def test_precision_and_autocast_in_accelerate(conv_precision):
    x, w = random((1, 2, 4, 4)), random((2, 2, 3, 3))
    ops.forget_plans()
    with tc.accelerate(force=True):
        for precision in ("ieee", "tf32") * 2:
            conv_precision.fp32_precision = precision
            F.conv2d(x, w)
        for dtype in (torch.bfloat16, torch.float16) * 2:
            with torch.autocast(DEVICE, dtype):
                assert F.conv2d(x, w).dtype is dtype
    assert {call.plan.problem.precision for call in calls._calls.values() if type(call) is calls.Call} >= {
        "ieee",
        "tf32",
    }


# -------------------------------------------------------------------------------------------------------- what it costs


def test_host_time(monkeypatch):
    """Functions of ours on the way to the launch, as in `test_eager`, measured at 2026-11-23."""
    monkeypatch.setattr(dispatch, "launch", lambda *arguments: None)
    layer = tc.nn.DeformConv2d(2, 2, (1, 2), backend="triton", device=DEVICE)
    x, offset, *_ = [t.requires_grad_() for t in drawn(SHAPES)]
    tensors, dy = [x, offset, *layer.parameters()], random((1, 2, 2, 2), torch.float32, "dy")
    assert len(own_calls(lambda: layer(x, offset))) <= 19
    assert len(own_calls(lambda: torch.autograd.grad(layer(x, offset), tensors, dy))) <= 40
    layer = tc.nn.SeparableConv2d(2, 6, 2, device=DEVICE)
    with tc.set_separable_fusion(False):
        assert len(own_calls(lambda: layer(x))) <= 32
    w = random((2, 2, 1, 1))
    with tc.accelerate():
        assert len(own_calls(lambda: F.conv2d(x, w))) <= 9
