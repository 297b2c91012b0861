"""torchvision's deformable convolution in models that are converted or accelerated.

torchvision is not installed where these tests run. A module stands for it in `sys.modules`: the same names, the same
constructor and `forward`, and below them an op of the same name and schema, which computes the definition.
"""

import copy
import importlib.util
import math
import pickle
import sys
import types

import pytest
import torch
from helpers import DEVICE, launches, random
from torch import nn

import triton_conv as tc
from triton_conv import reference, routing

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="torchvision is here, and has defined the op itself"
)
SCHEMA = (
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask) -> Tensor"
)
calls = []


def computed(input, weight, offset, mask, bias, sh, sw, ph, pw, dh, dw, groups, offset_groups, use_mask):
    calls.append(tuple(input.shape))
    assert groups == input.shape[1] // weight.shape[1]
    window = (sh, sw), (ph, pw), (dh, dw)
    return reference.deform_conv2d(input, offset, weight, bias, *window, mask if use_mask else None)


def deform_conv2d(input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None):
    """torchvision's signature, and what it passes on."""
    groups, taps = input.shape[1] // weight.shape[1], math.prod(weight.shape[2:])
    given = mask if mask is not None else input.new_zeros(input.shape[0], 1)
    bias = bias if bias is not None else input.new_zeros(weight.shape[0])
    offset_groups, window = offset.shape[1] // (2 * taps), (*stride, *padding, *dilation)
    return torch.ops.torchvision.deform_conv2d(
        input, weight, offset, given, bias, *window, groups, offset_groups, mask is not None
    )


class DeformConv2d(nn.Module):
    """torchvision's layer: its constructor, parameters and forward."""

    __module__ = "torchvision.ops.deform_conv"

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True
    ):  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        pairs = [v if isinstance(v, tuple) else (v, v) for v in (kernel_size, stride, padding, dilation)]
        self.kernel_size, self.stride, self.padding, self.dilation = pairs
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels // groups, *self.kernel_size))
        if bias:
            self.bias = nn.Parameter(torch.randn(out_channels))
        else:
            self.register_parameter("bias", None)

    def forward(self, input, offset, mask=None):
        window = dict(stride=self.stride, padding=self.padding, dilation=self.dilation)
        return deform_conv2d(input, offset, self.weight, self.bias, mask=mask, **window)


class Subclass(DeformConv2d):
    """One of a user's, which computes what its base does."""

    __module__ = __name__


class Predicting(DeformConv2d):
    """One with a forward of its own, as detectors have."""

    __module__ = __name__

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.predict = nn.Conv2d(self.in_channels, 18, 3, padding=1)

    def forward(self, input):
        return super().forward(input, self.predict(input))


@pytest.fixture
def torchvision(monkeypatch):
    """A module in torchvision's place, and its op."""
    module, ops, deform = (types.ModuleType(f"torchvision{n}") for n in ("", ".ops", ".ops.deform_conv"))
    module.ops, ops.DeformConv2d, ops.deform_conv2d = ops, DeformConv2d, deform_conv2d
    ops.deform_conv, deform.DeformConv2d = deform, DeformConv2d
    for made in (module, ops, deform):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    routing._torchvision.cache_clear()
    calls.clear()
    with torch.library._scoped_library("torchvision", "FRAGMENT") as library:
        library.define(SCHEMA)
        library.impl("deform_conv2d", computed, "CompositeImplicitAutograd")
        yield module
    routing._torchvision.cache_clear()


@pytest.fixture
def tensors():
    return random((2, 4, 5, 6)), random((2, 36, 5, 6)), random((2, 18, 5, 6)).sigmoid()


def test_a_layer_converts_and_reverts(torchvision, tensors):
    torch.manual_seed(0)
    layer = torchvision.ops.DeformConv2d(4, 6, 3, padding=1, groups=2, bias=False).to(DEVICE)
    expected = [layer(*tensors), layer(*tensors[:2])]
    assert next(iter(tc.plan(layer, *tensors))).layer == "DeformConv2d"
    calls.clear()
    tc.convert(layer, force=True)
    for result, exact in zip((layer(*tensors), layer(*tensors[:2])), expected, strict=True):
        torch.testing.assert_close(result, exact, atol=1e-4, rtol=1e-4)
    assert dict(launches) == {"deformable": 2}
    assert not calls
    assert list(layer.state_dict()) == ["weight"]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(*tensors), layer(*tensors))
        assert type(tc.revert(other)) is DeformConv2d
    assert type(tc.revert(layer)) is DeformConv2d
    assert torch.equal(layer(*tensors), expected[0])


def test_without_a_measurement_it_is_torchvisions(torchvision, tensors):
    """The layer of ours asks torchvision's function, if there is one."""
    layer = tc.nn.DeformConv2d(4, 6, 3, padding=1).to(DEVICE)
    layer(*tensors)
    assert len(calls) == 1
    assert not launches


def test_subclasses(torchvision, tensors):
    torch.manual_seed(0)
    model = nn.ModuleDict({"plain": Subclass(4, 6, 3, padding=1), "predicting": Predicting(4, 6, 3, padding=1)})
    model.to(DEVICE)
    x = tensors[0]
    expected = model["plain"](*tensors), model["predicting"](x)
    report = tc.plan(tc.convert(model, force=True))
    assert [row.name for row in report] == ["plain", "predicting", "predicting.predict"]
    assert "Predicting has a forward of its own; accelerate() reaches the calls in it" in str(report)
    torch.testing.assert_close(model["plain"](*tensors), expected[0], atol=1e-4, rtol=1e-4)
    assert isinstance(model["plain"], Subclass)
    assert launches["deformable"] == 1
    launches.clear()
    with tc.accelerate(force=True) as report:
        torch.testing.assert_close(model["predicting"](x), expected[1], atol=1e-4, rtol=1e-4)
    assert launches["deformable"] == 1
    assert type(tc.revert(model)["plain"]) is Subclass


def test_accelerate(torchvision, tensors):
    x, offset, mask = tensors
    weight = random((6, 2, 3, 3)).requires_grad_()
    options = dict(padding=(1, 1), mask=mask)
    expected = torchvision.ops.deform_conv2d(x, offset, weight, **options)
    with tc.accelerate(force=True) as report:
        result = torchvision.ops.deform_conv2d(x, offset, weight, **options)
        plain = torchvision.ops.deform_conv2d(x, offset, weight, padding=(1, 1))
    assert len(calls) == 1
    assert [row.name for row in report] == ["deform_conv2d", "deform_conv2d"]
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain, tc.deform_conv2d(x, offset, weight, padding=1))
    (grad,) = torch.autograd.grad(result.sum(), weight)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), weight)[0], atol=1e-3, rtol=1e-3)
    # Nothing is measured here: left alone.
    with tc.accelerate() as report:
        assert torch.equal(torchvision.ops.deform_conv2d(x, offset, weight, **options), expected)
    assert [row.choice.ours for row in report] == [False]
