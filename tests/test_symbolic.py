"""torch.fx's symbolic tracing: calls of functions and of layers of ours are nodes, as those of torch's are."""

import copy
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, launches, random
from torch import fx, nn
from torch.nn.utils import parametrizations

import triton_conv as tc

pytestmark = pytest.mark.usefixtures("exact_products")


class Padded(tc.nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Doubled(tc.nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, 2 * weight, bias) + 1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.normed = parametrizations.weight_norm(nn.Conv2d(2, 4, 1))
        self.active = tc.nn.Conv2d(4, 2, 3, padding=((1, 0), (0, 1)), activation="gelu", backend="triton")
        self.deformed = tc.nn.DeformConv2d(2, 3, 3, padding=1, predict=True, backend="triton")
        self.filters = nn.Parameter(torch.randn(2, 3, 3, 3))

    def forward(self, x):
        y = self.deformed(self.active(self.normed(self.up(self.stem(x)))))
        y = tc.conv2d(y, self.filters, padding=((1, 0), (1, 0)), padding_mode="reflect", activation="relu")
        return tc.conv_transpose2d(y, self.filters, None, 2, output_padding=1)


def test_a_model():
    model, x = tc.convert(Model().to(DEVICE), force=True), random((1, 3, 5, 4))
    expected = model(x)
    ran = dict(launches)
    graph = fx.symbolic_trace(model)
    nodes = [(node.op, node.target) for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    layers = [("call_module", name) for name in ("stem", "up", "normed", "active", "deformed")]
    calls = [("call_function", tc.conv2d), ("call_function", tc.conv_transpose2d)]
    assert nodes == [*layers, ("get_attr", "filters"), *calls]
    for made in (graph, copy.deepcopy(graph)):
        launches.clear()
        assert torch.equal(made(x), expected)
        assert dict(launches) == ran
    # The graph's layers are the model's: to revert the one is to revert the other.
    tc.revert(model)
    launches.clear()
    torch.testing.assert_close(graph(x), expected, atol=1e-4, rtol=1e-4)
    assert sum(launches.values()) == sum(ran.values()) - 3


class Lectures(nn.Module):
    """What torch has no layer of, as layers and as functions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            tc.nn.SeparableConv2d(4, 4, 2, mid_activation="relu"),
            tc.nn.ShuffleConv2d(4, 4, 1, groups=2, activation="silu"),
            tc.nn.LocallyConnected2d(4, 4, (3, 4), 2),
            tc.nn.ChannelShuffle(2),
        )
        self.depthwise, self.pointwise = nn.Parameter(torch.randn(4, 1, 2)), nn.Parameter(torch.randn(4, 4, 1))
        self.filters, self.local = nn.Parameter(torch.randn(4, 2, 1, 1)), nn.Parameter(torch.randn(2, 4, 4, 2))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        y = self.layers(x)
        y = tc.shuffle_conv2d(y, self.filters, groups=2, activation="relu6")[:, :, 0]
        y = tc.separable_conv1d(y, self.depthwise, self.pointwise, padding=1, mid_bias=self.bias, activation="gelu")
        return tc.channel_shuffle(tc.locally_connected1d(y[..., :3], self.local), 2)


def test_what_torch_has_no_layer_of():
    model, x = Lectures().to(DEVICE), random((2, 4, 4, 5))
    expected = model(x)
    graph = fx.symbolic_trace(model)
    nodes = [(node.op, node.target) for node in graph.graph.nodes if node.op[:5] == "call_"]
    calls = [tc.shuffle_conv2d, operator.getitem, tc.separable_conv1d, operator.getitem, tc.locally_connected1d]
    assert nodes == [
        *(("call_module", f"layers.{i}") for i in range(4)),
        *(("call_function", function) for function in (*calls, tc.channel_shuffle)),
    ]
    assert torch.equal(graph(x), expected)


@pytest.mark.parametrize("kind", [tc.nn.SeparableConv2d, tc.nn.ShuffleConv2d, tc.nn.LocallyConnected2d])
def test_a_subclass_of_those(kind):
    class Turned(kind):
        def forward(self, x):
            return -super().forward(x)

    size = (4,) if kind is tc.nn.LocallyConnected2d else ()
    layer, x = nn.Sequential(Turned(2, 2, *size, 1)).to(DEVICE), random((1, 2, 4, 4))
    graph = fx.symbolic_trace(layer)
    assert "neg" in [node.name for node in graph.graph.nodes]
    assert torch.equal(graph(x), layer(x))


def test_a_graph_is_pickled():
    graph, x = fx.symbolic_trace(nn.Sequential(tc.nn.Conv1d(2, 3, 2, backend="triton"))).to(DEVICE), random((1, 2, 4))
    assert torch.equal(pickle.loads(pickle.dumps(graph))(x), graph(x))


@pytest.mark.parametrize("kind", [Padded, Doubled])
def test_what_a_subclass_does_is_in_the_graph(kind):
    layer, x = nn.Sequential(kind(2, 3, 3, backend="triton")).to(DEVICE), random((1, 2, 4, 4))
    torch.testing.assert_close(fx.symbolic_trace(layer)(x), layer(x))


def test_a_traced_layer_is_torchs_calls():
    """It is the module that is traced, and so no node of its own graph."""
    layer, x = tc.nn.Conv2d(2, 3, 3, backend="triton", device=DEVICE), random((1, 2, 4, 4))
    torch.testing.assert_close(fx.symbolic_trace(layer)(x), layer(x))


class StandsIn:
    """No tensor, but something that torch's functions ask."""

    @staticmethod
    def __torch_function__(function, types, args=(), kwargs=None):
        return function, args, kwargs


def test_what_stands_for_a_tensor_is_asked():
    x, w = StandsIn(), random((2, 2, 1))
    assert tc.conv1d(x, w, groups=2)[:2] == (tc.conv1d, (x, w, None, 1, 0, 1, 2))
    assert tc.conv_transpose1d(w, x)[0] is tc.conv_transpose1d
    assert tc.deform_conv1d(w, x, w, mask=x) == (tc.deform_conv1d, (w, x, w, None, 1, 0, 1, x), {})
    with pytest.raises(TypeError, match=r"^input: conv1d\(\) expects a Tensor, got list"):
        tc.conv1d([x], w)
