"""CUDA graphs and several GPUs, as far as a machine with neither can show them.

While torch says that a graph is captured, a call that was made before reads no file, waits for no device and looks at
no value. And an op runs with its tensors' device as the current one, which Triton launches on.
"""

import builtins
import contextlib

import pytest
import torch
from helpers import DEVICE, launches, random

import triton_conv as tc
from triton_conv import comparisons, configs, dispatch, ops


def deformed(x):
    torch.use_deterministic_algorithms(True)
    try:
        y = tc.deform_conv2d(x, OFFSET, FILTERS, padding=1, mask=MASK)
        return torch.autograd.grad(y.sum(), x)[0]
    finally:
        torch.use_deterministic_algorithms(False)


FILTERS, OFFSET, MASK = random((3, 4, 3, 3)), random((2, 18, 4, 4)), random((2, 9, 4, 4))
DEPTHWISE, POINTWISE, WIDE = random((4, 1, 3, 3)), random((6, 4, 1, 1)), random((300, 4, 1, 1))
GROUPED, LOCAL = random((6, 2, 1, 1)), random((2, 2, 3, 4, 3, 3))
LAYERS = {
    "grouped": tc.nn.Conv2d(4, 6, 3, groups=2, activation="silu", backend="triton").to(DEVICE),
    "dense": tc.nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect", backend="triton").to(DEVICE),
    "up": tc.nn.ConvTranspose2d(4, 3, 2, stride=2, backend="triton").to(DEVICE),
    "auto": tc.nn.Conv2d(4, 3, 3).to(DEVICE),
}
CALLS = {
    **LAYERS,
    "deformable": deformed,
    "separable": lambda x: tc.separable_conv2d(x, DEPTHWISE, POINTWISE, mid_activation="relu"),
    "two kernels": lambda x: tc.separable_conv2d(x, DEPTHWISE, WIDE),
    "shuffle": lambda x: tc.shuffle_conv2d(x, GROUPED, groups=2),
    "local": lambda x: tc.locally_connected2d(x, LOCAL),
}


def forward_and_backward(call):
    x = random((2, 4, 4, 4)).requires_grad_()
    y = call(x)
    parameters = list(call.parameters()) if isinstance(call, torch.nn.Module) else []
    return torch.autograd.grad(y.sum(), [x, *parameters]) if y.requires_grad else y


@pytest.fixture
def captured(monkeypatch):
    """From its call on torch says that a graph is captured, no kernel is run, and a look at the world is an error."""

    def forbidden(what):
        def fail(*arguments, **named):
            raise AssertionError(f"{what} during a capture")

        return fail

    def begin():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        # Without a GPU the interpreter reads and writes memory in ways of its own.
        monkeypatch.setattr(dispatch, "launch", lambda kernel, *rest: launches.update([kernel.name]))
        monkeypatch.setattr(dispatch, "pack_weight", lambda weight, packed: None)
        monkeypatch.setattr(ops, "sum_partials", lambda partial, result: None)
        monkeypatch.setattr(torch.cuda, "synchronize", forbidden("torch.cuda.synchronize"))
        for kind in (torch.cuda.Stream, torch.cuda.Event):
            monkeypatch.setattr(kind, "synchronize", forbidden(f"{kind.__name__}.synchronize"))
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero"):
            monkeypatch.setattr(torch.Tensor, name, forbidden(f"Tensor.{name}"))
        monkeypatch.setattr(builtins, "open", forbidden("open"))
        monkeypatch.setattr(configs, "files", forbidden("configs.files"))
        monkeypatch.setattr(comparisons, "entries", forbidden("comparisons.entries"))

    return begin


@pytest.mark.skipif(DEVICE == "cuda", reason="test_policy captures for real")
def test_a_warm_call_looks_at_nothing(captured, monkeypatch):
    ran = {}
    for name, call in CALLS.items():
        launches.clear()
        forward_and_backward(call)
        ran[name] = dict(launches)
    captured()
    for name, call in CALLS.items():
        launches.clear()
        forward_and_backward(call)
        assert dict(launches) == ran[name], name
    monkeypatch.undo()
    assert not ran["auto"]
    assert all(found for name, found in ran.items() if name != "auto")


@pytest.mark.skipif(DEVICE == "cuda", reason="test_policy captures for real")
def test_what_is_forbidden_would_be_seen(captured, monkeypatch):
    captured()
    with pytest.raises(AssertionError, match=r"Tensor\.item during a capture"):
        torch.ones(1).item()
    with pytest.raises(tc.errors.CaptureError, match="not seen before"):
        tc.shuffle_conv2d(random((1, 4, 2, 2)), GROUPED, groups=2)
    monkeypatch.undo()


# ------------------------------------------------------------------------------------------------------- several GPUs


class Elsewhere:
    """A tensor on the second GPU, as far as finding its device goes."""

    device, is_cuda = torch.device("cuda:1"), True

    def get_device(self):
        return self.device.index


def test_an_op_runs_on_its_tensors_device(monkeypatch):
    """What `register` gives torch makes their device the current one, for all that the op does."""
    current, registered = [0], {}

    @contextlib.contextmanager
    def device(wanted):
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    class Library:
        @staticmethod
        def impl(name, function, key):
            registered[key] = function

    def implementation(tensor, *others):
        return current[0], others

    # torch.cuda is itself again before anything else asks it.
    with monkeypatch.context() as patch:
        patch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
        patch.setattr(torch.cuda, "device", device)
        patch.setattr(torch.library, "register_fake", lambda *arguments, **named: None)
        patch.setattr(ops, "library", Library)
        patch.setattr(ops, "register_flop_formula", lambda op: lambda formula: None)
        ops.register("conv", implementation, None, None)
        assert registered["CUDA"](Elsewhere(), 2, 3) == (1, (2, 3))
        assert current == [0], "put back"
        current[0] = 1
        patch.setattr(torch.cuda, "device", None)
        assert registered["CUDA"](Elsewhere()) == (1, ()), "nothing to change"
        patch.setattr(torch._C, "_cuda_getDevice", None)
        assert registered["CPU"](torch.zeros(1), 2) == (1, (2,)), "nothing to ask"
