"""Real models, unmodified: converted they compute the same, every layer is named, and reverting leaves no trace."""

import copy

import pytest
import torch
from helpers import DEVICE, launches, random
from torch import nn

import triton_conv as tc
from perf_plots.models import MODELS, SMALL, Scale
from triton_conv.conversion import LAYERS

pytestmark = pytest.mark.usefixtures("exact_products")

# These on every change; the rest takes half a minute in the interpreter.
QUICK = ("resnext50", "dcgan", "convnext_tiny")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def small(name):
    """The model at a small scale, its batch statistics those of nothing in particular, and an input."""
    torch.manual_seed(0)
    model = MODELS[name].build(SMALL).to(DEVICE).eval()
    return model, random((2, *MODELS[name].small))


def convolutions(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, tuple(LAYERS))]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_converts_and_reverts(name):
    model, x = small(name)
    names, kinds = convolutions(model), [type(layer) for layer in model.modules()]
    with torch.no_grad():
        expected = model(x)
        assert tc.convert(model, force=True) is model
        report = tc.plan(model, x)
        assert [row.name for row in report] == names
        assert all(row.choice.ours for row in report)
        launches.clear()
        result = model(x)
        assert sum(launches.values()) == len(names)
        torch.testing.assert_close(result, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)
        tc.revert(model)
        assert [type(layer) for layer in model.modules()] == kinds
        assert torch.equal(model(x), expected)
    assert sum(launches.values()) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shufflenet_v2", "resnext50"])
def test_a_training_step_of_a_model(name):
    model, x = small(name)
    twin = tc.convert(copy.deepcopy(model), force=True)
    for net in (model, twin):
        net(x).square().mean().backward()
    for (key, ours), plain in zip(twin.named_parameters(), model.parameters(), strict=True):
        scale = max(float(plain.grad.abs().max()), 1e-8)
        assert (ours.grad - plain.grad).abs().max() < 1e-3 * scale, key


@pytest.mark.parametrize("name", MODELS)
def test_a_model_at_its_real_size_is_planned(name):
    """On meta tensors nothing is computed; the plans are those of an H100."""
    with torch.device("meta"):
        model = MODELS[name].build(Scale())
    tc.convert(model, force=True)
    report = tc.plan(model, torch.empty(8, *MODELS[name].input, device="meta"))
    assert {row.name for row in report} == set(convolutions(model))
    assert all(row.choice.ours and row.choice.plan.target.arch == "sm_90" for row in report)


def test_the_definitions_are_the_published_sizes():
    """Parameters in millions, classifiers of ten classes apart, as the papers and their code have them."""
    published = {"mobilenet_v2": 2.2, "shufflenet_v2": 1.25, "convnext_tiny": 27.8, "resnext50": 23.0, "dcgan": 3.6}
    for name, millions in published.items():
        with torch.device("meta"):
            model = MODELS[name].build(Scale())
        classifier = sum(p.numel() for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters())
        count = (sum(p.numel() for p in model.parameters()) - classifier) / 1e6
        assert count == pytest.approx(millions, rel=0.03), name
