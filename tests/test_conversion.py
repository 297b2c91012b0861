"""`convert`, `revert` and `plan`: unmodified models, the same results, every layer named, and back again."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, launches, random
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import triton_conv as tc
from triton_conv import conversion
from triton_conv.errors import BackendWarning

pytestmark = pytest.mark.usefixtures("exact_products", "nothing_measured")


class Plain(nn.Conv2d):
    """A subclass that computes what its base does."""


class Padded(nn.Conv2d):
    """One with a forward of its own."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Model(nn.Module):
    """One layer of every kind that conversion tells apart."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(4)
        self.plain = Plain(4, 4, 3, groups=4)
        self.padded = Padded(4, 4, 3)
        self.normed = parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.unused = nn.Conv1d(3, 3, 1)

    def forward(self, x):
        return self.up(self.normed(self.padded(self.plain(self.norm(self.stem(x)).relu()))))


NAMES = ["stem", "plain", "padded", "normed", "up", "unused"]
OURS = ["stem", "plain", "normed", "up"]


@pytest.fixture
def model():
    return Model().to(DEVICE).eval()


def state_of(model):
    """Classes, attributes, parameters by identity, and values."""
    layers = {name: (type(layer), dict(layer.__dict__)) for name, layer in model.named_modules()}
    for _, attributes in layers.values():
        for key in ("_parameters", "_buffers", "_modules"):
            attributes[key] = dict(attributes[key])
    return layers, {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    layers, values = state_of(model)
    assert {name: kind for name, (kind, _) in layers.items()} == {name: kind for name, (kind, _) in before[0].items()}
    assert all(layers[name][1].keys() == before[0][name][1].keys() for name in layers)
    for name, (_, attributes) in layers.items():
        for key, parameter in attributes["_parameters"].items():
            assert parameter is before[0][name][1]["_parameters"][key]
    return all(torch.equal(value, before[1][name]) for name, value in values.items())


def test_by_force_and_back(model):
    x, before = random((2, 3, 6, 6)), state_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = model(x)
    assert tc.convert(model, force=True) is model
    result = model(x)
    assert sum(launches.values()) == len(OURS)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)
    assert tc.revert(model) is model
    assert unchanged(model, before)
    launches.clear()
    assert torch.equal(model(x), expected)
    assert not launches
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in model.parameters()]


def test_without_a_measurement_nothing_is_changed(model):
    before = state_of(model)
    with pytest.warns(BackendWarning, match=r"no measurement for this device .*nothing is converted.*force=True"):
        assert tc.convert(model) is model
    assert unchanged(model, before)


def test_a_report_names_every_layer(model, capsys):
    x, before = random((2, 3, 6, 6)), state_of(model)
    model.train()
    report = tc.plan(model, x)
    assert unchanged(model, before), "following a model changes nothing of it"
    assert not launches
    assert [row.name for row in report] == NAMES
    assert all(not row.choice.ours for row in report)
    assert "no measurement for this device" in report["stem"].choice.reason
    assert report["stem"].kernel == "implicit_gemm"
    assert report["stem"].problem.startswith("n2 c3-4 hw6x6 k3x3 s1x1 p1x1 d1x1 g1 reflect float32")
    assert report["padded"].choice.reason == "Padded has a forward of its own; accelerate() reaches the calls in it"
    assert report["unused"].choice.reason == "not called with these inputs"
    assert report["normed"].layer == "ParametrizedConv2d"
    tc.convert(model, report=True, force=True, example=x)
    printed = capsys.readouterr().out
    assert "Model: 6 convolutions, 4 on our kernels" in printed
    for name in NAMES:
        assert f"\n{name} " in printed
    assert [row.name for row in tc.plan(model, x) if row.choice.ours] == OURS
    # Without an input no size is known.
    assert {row.name: row.choice.backend for row in tc.plan(model)}["stem"] == "triton"
    with pytest.raises(KeyError):
        report["norm"]


def test_a_layer_called_with_two_sizes_has_two_rows():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.conv(self.conv(x))

    report = tc.plan(Twice().to(DEVICE), random((1, 3, 9, 9)))
    assert [row.problem.split()[2] for row in report] == ["hw9x9", "hw7x7"]


def test_a_model_that_looks_at_its_data_is_followed_for_real():
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(x)) if x.sum().item() > 0 else x

    model = Looking().to(DEVICE)
    before = state_of(model)
    report = tc.plan(model, torch.ones(1, 3, 5, 5, device=DEVICE))
    assert report["conv"].problem.startswith("n1 c3-3 hw5x5")
    assert unchanged(model, before)


def test_what_we_cannot_take_runs_on_torch_and_is_said(model):
    layer = nn.Conv2d(3, 3, 1, dtype=torch.complex64).to(DEVICE)
    x = torch.ones(1, 3, 2, 2, dtype=torch.complex64, device=DEVICE)
    expected = layer(x)
    tc.convert(layer, force=True)
    with pytest.warns(BackendWarning, match="a layer runs on torch's kernel"):
        row = next(iter(tc.plan(layer, x)))
    assert (row.name, row.choice.backend) == ("(the model)", "torch")
    assert "no kernel for torch.complex64" in row.choice.reason
    torch.testing.assert_close(layer(x), expected)
    lazy = nn.LazyConv2d(3, 1)
    tc.convert(lazy, force=True)
    assert type(lazy) is nn.LazyConv2d
    assert "run the model once before" in next(iter(tc.plan(lazy))).choice.reason


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_scripted_layer_is_named():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1)))
    assert tc.convert(scripted, force=True) is scripted
    assert [row.choice.reason for row in tc.plan(scripted)] == ["scripted: TorchScript cannot call our kernels"]
    with pytest.raises(TypeError, match=r"torch.jit.script cannot compile triton_conv's Conv2d.*revert"):
        torch.jit.script(nn.Sequential(tc.nn.Conv2d(3, 3, 1)))


def test_a_parametrization_is_removed(model):
    tc.convert(model, force=True)
    x = random((2, 3, 6, 6))
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    parametrize.remove_parametrizations(model.normed, "weight")
    assert type(model.normed) is tc.nn.Conv2d
    torch.testing.assert_close(model(x), expected)
    assert sum(launches.values()) == 3 * len(OURS)
    assert type(tc.revert(model).normed) is nn.Conv2d


def test_a_parametrization_that_comes_between_stays(model):
    """Reverted, the layer keeps it, over the class that it had; removed then, nothing is left of ours."""
    x = random((2, 3, 6, 6))
    expected = model(x)
    tc.convert(model, force=True)
    for layer in (model.stem, model.plain):
        parametrizations.weight_norm(layer)
    torch.testing.assert_close(tc.revert(model)(x), expected)
    assert launches.total() == 0
    for layer in (model.stem, model.plain):
        parametrize.remove_parametrizations(layer, "weight")
    assert (type(model.stem), type(model.plain)) == (nn.Conv2d, Plain)
    torch.testing.assert_close(model(x), expected)


def test_force_reaches_what_was_converted_before(model, monkeypatch):
    monkeypatch.setattr(conversion, "_unmeasured", lambda model: "")
    tc.convert(model)
    assert isinstance(model.stem, tc.nn.Conv2d)
    model(random((2, 3, 6, 6)))
    assert launches.total() == 0
    tc.convert(model, force=True)(random((2, 3, 6, 6)))
    assert launches.total() == len(OURS)


def test_a_traced_model_runs_on_our_kernels_at_other_sizes_too(model):
    """What `torch.jit.trace` sees of sizes are tensors; what it keeps is the op that decides at run time."""
    tc.convert(model, force=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, random((2, 3, 6, 6)))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    x = random((1, 3, 5, 7))
    expected = model(x)
    launches.clear()
    torch.testing.assert_close(loaded(x), expected)
    assert launches.total() == len(OURS)


def test_copies_and_pickles_of_a_converted_model(model):
    # torch itself pickles no parametrized layer.
    model.normed = nn.Conv2d(4, 4, 1).to(DEVICE)
    tc.convert(model, force=True)
    x = random((2, 3, 6, 6))
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        launches.clear()
        torch.testing.assert_close(other(x), expected)
        assert sum(launches.values()) == len(OURS)
        assert type(tc.revert(other).plain) is Plain
        assert type(other.normed) is type(other.stem) is nn.Conv2d


def test_hooks_and_attributes_survive(model):
    seen = []
    model.stem.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    tc.convert(model, force=True)
    model(random((2, 3, 6, 6)))
    assert seen == [(2, 4, 6, 6)]
    assert isinstance(model.stem, nn.Conv2d)
    assert isinstance(model.plain, Plain)


def test_own_modules_are_not_converted_or_reverted():
    layer = tc.nn.Conv2d(3, 4, 3, activation="relu", backend="torch")
    tc.convert(layer, force=True)
    assert layer.backend == "torch"
    assert type(tc.revert(layer)) is tc.nn.Conv2d


def test_converting_twice_is_converting_once(model):
    before = state_of(model)
    tc.convert(tc.convert(model, force=True), force=True)
    assert unchanged(tc.revert(model), before)


def test_a_training_step_of_a_converted_model(model):
    x = random((2, 3, 6, 6))
    twin = tc.convert(copy.deepcopy(model), force=True)
    for net in (model, twin):
        net.train()
        net(x).square().mean().backward()
    for (name, ours), plain in zip(twin.named_parameters(), model.parameters(), strict=True):
        if plain.grad is not None:
            torch.testing.assert_close(ours.grad, plain.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert sum(launches.values()) > 2 * len(OURS)


def test_plan_of_a_function_is_as_before():
    x, w = random((1, 3, 5, 5)), random((4, 3, 3, 3))
    assert tc.plan(tc.conv2d, x, w).kernel.name == "implicit_gemm"
    with pytest.raises(TypeError, match="expected a convolution of triton_conv"):
        tc.plan(F.conv2d, x, w)
