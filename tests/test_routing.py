"""What a layer remembers of its calls: those that stay with torch, and nothing else."""

import pytest
import torch
from helpers import DEVICE, launches, random

import triton_conv as tc
from triton_conv import ops, policy
from triton_conv.errors import BackendWarning, CaptureError

pytestmark = pytest.mark.usefixtures("nothing_measured", "exact_products")


@pytest.mark.parametrize("kind", ["Conv2d", "ConvTranspose2d"])
def test_a_layer_that_stays_with_torch_is_not_asked_about_again(kind, monkeypatch):
    asked = []
    choose = policy.choose
    monkeypatch.setattr(policy, "choose", lambda *arguments: asked.append(arguments[0]) or choose(*arguments))
    layer = getattr(tc.nn, kind)(2, 2, 3, padding=1, device=DEVICE)
    plain = getattr(torch.nn, kind)(2, 2, 3, padding=1, device=DEVICE)
    plain.load_state_dict(layer.state_dict())
    x = random((1, 2, 5, 5), torch.float32, "input")

    def asks(x):
        asked.clear()
        torch.testing.assert_close(layer(x), plain(x))
        return len(asked)

    assert [asks(x) for _ in range(3)] == [1, 0, 0]
    # Another size, other strides, no gradients, another backend in between: choices of their own.
    assert [asks(x[..., 1:]), asks(x.mT), asks(x)] == [1, 1, 0]
    with torch.no_grad():
        assert [asks(x), asks(x)] == [1, 0]
    with tc.set_backend("triton"):
        launches.clear()
        assert asks(x) == 1 and sum(launches.values()) == 1
    assert asks(x) == 0
    # A training step of the bias alone is one, too.
    layer.weight.requires_grad_(False)
    assert [asks(x[:, :, 1:]), asks(x[:, :, 1:])] == [1, 0]
    layer.bias.requires_grad_(False)
    assert [asks(x[:, :, 1:]), asks(x[:, :, 1:])] == [1, 0]
    layer.requires_grad_()
    # What was read from disk may be another by now.
    ops.forget_plans()
    assert asks(x) == 1
    # A changed layer computes what it should.
    layer.stride = plain.stride = (2, 2)
    assert asks(x) == 0


def test_what_a_capture_leaves_to_torch_is_asked_about_again(monkeypatch):
    layer = tc.nn.Conv2d(2, 2, 3, padding=1, device=DEVICE, backend="triton")
    x = random((1, 2, 5, 5), torch.float32, "input")
    with monkeypatch.context() as patch:
        patch.setattr(policy, "_choose", lambda *arguments: (_ for _ in ()).throw(CaptureError("not seen before")))
        with pytest.warns(BackendWarning, match="not seen before"):
            layer(x)
    launches.clear()
    layer(x)
    assert sum(launches.values()) == 1
