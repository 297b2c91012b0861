"""What models in the wild are made of: old and new weight normalisation, spectral norm, shared and tied layers, half
and double precision, copies and pickles; converted, they compute the same, and reverting leaves no trace.
"""

import copy
import io
import warnings

import pytest
import torch
from helpers import DEVICE, launches, random
from torch import nn
from torch.nn.utils import parametrizations

import triton_conv as tc

pytestmark = pytest.mark.usefixtures("exact_products")


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Conv2d(3, 4, 3, padding=1))


def shared():
    layer = nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(layer, nn.ReLU(), layer)


def tied():
    """An encoder and a decoder of one weight: both names of it are in the state_dict, and stay one tensor."""
    model = nn.Sequential(nn.Conv2d(3, 5, 2, stride=2), nn.ConvTranspose2d(5, 3, 2, stride=2))
    model[1].weight = model[0].weight
    return model


# How to make it, the convolutions that a call of it runs.
MODELS = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1)), 1),
    "old weight_norm": (old_weight_norm, 1),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, padding=1)), 1),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.ConvTranspose2d(3, 4, 2, stride=2)), 1),
    "shared": (shared, 2),
    "tied": (tied, 2),
    "frozen": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)).requires_grad_(False), 2),
    "double": (lambda: nn.Conv2d(3, 4, 3).double(), 1),
    "half": (lambda: nn.Conv2d(3, 4, 3).half(), 1),
    "bfloat16": (lambda: nn.Conv2d(3, 4, 3).bfloat16(), 1),
    "channels_last": (lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), 1),
}
# torch pickles no parametrized layer, and copies no old norm's computed weight that asks for gradients.
NOT_PICKLED = ("weight_norm", "spectral_norm")


def values_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def dtype_of(model):
    return next(model.parameters()).dtype


def close(found, expected):
    # Half-precision results are rounded once by either library.
    bound = 4 * torch.finfo(expected.dtype).eps * float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, atol=max(bound, 1e-5 if found.dtype == torch.float32 else 0), rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_converted_and_reverted(name):
    torch.manual_seed(0)
    build, convolutions = MODELS[name]
    model = build().to(DEVICE).eval()
    x = random((2, 3, 6, 5), dtype_of(model))
    kinds, state = [type(m) for m in model.modules()], values_of(model)
    parameters, hooks = dict(model.named_parameters()), [len(m._forward_pre_hooks) for m in model.modules()]
    expected = model(x)
    tc.convert(model, force=True)
    launches.clear()
    result = model(x)
    assert sum(launches.values()) == convolutions
    close(result, expected)
    assert result.stride() == expected.stride()
    # Every distinct layer has its row.
    layers = {id(m) for m in model.modules() if isinstance(m, tc.nn.Routed)}
    assert len({row.name for row in tc.plan(model, x)}) == len(layers)
    tc.revert(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(model.get_parameter(key) is value for key, value in parameters.items())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_PICKLED])
def test_a_copy_and_a_file_of_a_converted_model(name):
    torch.manual_seed(0)
    model = tc.convert(MODELS[name][0]().to(DEVICE).eval(), force=True)
    x = random((1, 3, 6, 5), dtype_of(model))
    with torch.no_grad():
        expected = model(x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), expected)
            if name == "tied":
                assert other[0].weight is other[1].weight
            if name == "shared":
                assert other[0] is other[2]
            assert not any(isinstance(m, tc.nn.Routed) for m in tc.revert(other).modules())


@pytest.mark.parametrize("name", ["weight_norm", "old spectral_norm", "tied"])
def test_gradients_reach_what_a_weight_is_made_of(name):
    torch.manual_seed(0)
    model = MODELS[name][0]().to(DEVICE).train()
    twin = copy.deepcopy(model)
    tc.convert(model, force=True)
    x = random((2, 3, 6, 5))
    for net in (model, twin):
        net(x).square().sum().backward()
    for (key, ours), plain in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, atol=1e-3, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_our_own_layers_are_in_the_report():
    model = nn.Sequential(
        tc.nn.SeparableConv2d(3, 4, 3), tc.nn.ShuffleConv2d(4, 4, 1, groups=2), tc.nn.LocallyConnected2d(4, 2, 4, 3)
    ).to(DEVICE)
    kinds = [type(layer) for layer in model]
    report = tc.plan(tc.convert(model, force=True), random((1, 3, 6, 6)))
    assert [(row.name, row.choice.ours) for row in report] == [("0", True), ("1", True), ("2", True)]
    assert "torch has no such layer: always ours" in str(report)
    assert [type(layer) for layer in tc.revert(model)] == kinds


class Remembering(nn.Module):
    """Keeps what it saw: in place, by another tensor of that name, and in a buffer that was None."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, device=DEVICE), nn.BatchNorm2d(2, device=DEVICE)
        self.register_buffer("mean", torch.zeros((), device=DEVICE))
        self.register_buffer("last", None)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean()
        self.last = x
        return self.norm(self.conv(x))


@pytest.mark.parametrize("run", [tc.plan, tc.warmup], ids=["plan", "warmup"])
def test_what_a_model_remembers_stays(run):
    model, x = Remembering(), random((1, 2, 5, 5))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kept = dict(model.named_buffers())
    run(model, x)
    assert dict(model.named_buffers()).keys() == kept.keys() and model.last is None
    for name, buffer in model.named_buffers():
        assert buffer is kept[name] and torch.equal(buffer, before[name]), name
