"""What is remembered of eager calls, and what may change between them."""

import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, launches, random

import triton_conv as tc
from triton_conv import calls, ops, routing

pytestmark = pytest.mark.usefixtures("exact_products")


def test_what_is_remembered_once():
    """Of a layer with a bias and of one without: what a call is like is told from what the calls before were like."""
    for bias in (True, False):
        layer = tc.nn.Conv2d(2, 2, 3, bias=bias, backend="triton", device=DEVICE)
        x = random((1, 2, 3, 3)).requires_grad_()
        for _ in range(2):
            layer(x).sum().backward()
        (known,) = routing._known[layer][x.shape]
        ((*_, gradients),) = known.call._gradients
        assert gradients.of_input and gradients.of_weight


def test_a_changed_layer_is_remembered_as_it_is_now():
    layer, x = tc.nn.Conv2d(2, 2, 3, backend="triton", device=DEVICE), random((1, 2, 5, 5))
    for stride in (1, 2):
        layer.stride = (stride, stride)
        for _ in range(3):
            assert torch.equal(layer(x), tc.conv2d(x, layer.weight, layer.bias, stride))
        assert len(routing._known[layer][x.shape]) == stride


def other_places(tensor, first):
    """The same numbers from that element of other memory on."""
    return torch.empty(tensor.numel() + first, device=DEVICE)[first:].view(tensor.shape).copy_(tensor)


# How a weight comes to lie elsewhere.
NEW = {
    "other memory": lambda w: other_places(w, 0),
    "not at a multiple of 16 bytes": lambda w: other_places(w, 1),
    "other strides": lambda w: w.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("between", ["calls", "forward and backward"])
def test_a_weight_whose_data_is_swapped(name, between):
    """As sharded training does: neither the parameter nor its version changes."""
    found = []
    for kind, backend in ((tc.nn.Conv2d, {"backend": "triton"}), (torch.nn.Conv2d, {})):
        layer = kind(2, 2, 3, padding=1, device=DEVICE, **backend)
        layer.weight.data, layer.bias.data = random((2, 2, 3, 3), torch.float32, "w"), random((2,), torch.float32, "b")
        x = random((1, 2, 3, 3)).requires_grad_()
        tensors = [x, *layer.parameters()]
        torch.autograd.grad(layer(x).sum(), tensors)
        y = layer(x)
        layer.weight.data = NEW[name](layer.weight.data)
        y = layer(x) if between == "calls" else y
        found.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for mine, torchs in zip(*found, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4)


def test_operands_at_other_places():
    """Inputs and gradients that begin at multiples of 16 bytes and then do not, in every combination."""
    layer = tc.nn.Conv2d(2, 2, 3, padding=1, backend="triton", device=DEVICE)
    x, dy = random((1, 2, 3, 3)), random((1, 2, 3, 3), torch.float32, "dy")
    x.requires_grad_()
    expected = torch.autograd.grad(F.conv2d(x, layer.weight, layer.bias, padding=1), (x, layer.weight, layer.bias), dy)
    for first in (0, 1, 0):
        for last in (0, 1, 0):
            moved = other_places(x.detach(), first).requires_grad_()
            found = torch.autograd.grad(layer(moved), (moved, layer.weight, layer.bias), other_places(dy, last))
            for mine, torchs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, torchs)
    assert {known.call.plan.problem.aligned for known in routing._known[layer][x.shape]} == {True, False}


def test_gradients_are_planned_for_where_their_operands_begin():
    window = (1, 1), (1, 1, 1, 1), (1, 1), 1, False, (0, 0), "zeros", "none"
    tensors = random((1, 2, 3, 3)), random((1, 2, 3, 3)), random((2, 2, 3, 3))
    call = calls.Call.like((*tensors[1:], None), window)
    for firsts in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        moved = [other_places(tensor, first) for tensor, first in zip(tensors, firsts, strict=True)]
        with torch.no_grad():
            plans = call.gradients(moved, (True, True))
        grad, input, weight = firsts
        assert plans.of_input.problem.aligned == (not grad and not weight)
        assert plans.of_weight.problem.aligned == (not input)


def test_gradients_are_planned_where_they_are_needed():
    window = (1, 1), (1, 1, 1, 1), (1, 1), 1, False, (0, 0), "zeros", "none"
    grad, input, weight = random((1, 2, 3, 3)), random((1, 2, 3, 3)), random((2, 2, 3, 3))
    call = calls.Call.like((input, weight, None), window)
    with torch.no_grad():
        for needed in ((True, True), (True, False), (False, True), (True, True)):
            plans = call.gradients((grad, input, weight), needed)
            assert (plans.of_input is not None, plans.of_weight is not None) == needed


def test_what_needs_a_gradient_may_change():
    layer = tc.nn.Conv2d(2, 2, 3, backend="triton", device=DEVICE)
    x = random((1, 2, 4, 4))
    for weight, bias, input in ((1, 1, 0), (0, 1, 0), (0, 0, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0)):
        layer.weight.requires_grad_(bool(weight)), layer.bias.requires_grad_(bool(bias))
        given = x.detach().requires_grad_(bool(input))
        y = layer(given)
        wanted = [t for t in (given, layer.weight, layer.bias) if t.requires_grad]
        assert y.requires_grad == bool(wanted)
        if not wanted:
            continue
        expected = torch.autograd.grad(F.conv2d(given, layer.weight, layer.bias).sum(), wanted)
        launches.clear()
        for mine, torchs in zip(torch.autograd.grad(y.sum(), wanted), expected, strict=True):
            torch.testing.assert_close(mine, torchs)
        # A bias's gradient is a sum.
        assert sum(launches.values()) == weight + input


def test_gradients_of_many_at_once():
    """Under vmap, what comes back has no memory of its own."""
    x, w = random((2, 4, 3, 3)).requires_grad_(), random((4, 2, 3, 3), torch.float32, "weight").requires_grad_()
    dy = random((3, 2, 4, 3, 3), torch.float32, "dy")
    y, expected = (conv(x, w, padding=1, groups=2) for conv in (tc.conv2d, F.conv2d))
    torch.autograd.grad(y, (x, w), dy[0], retain_graph=True)
    found = torch.autograd.grad(y, (x, w), dy, is_grads_batched=True)
    for mine, torchs in zip(found, torch.autograd.grad(expected, (x, w), dy, is_grads_batched=True), strict=True):
        torch.testing.assert_close(mine, torchs)


def test_one_tensor_twice():
    x = random((2, 2, 3, 3)).requires_grad_()
    for _ in range(2):
        (found,) = torch.autograd.grad(tc.conv2d(x, x, padding=1).sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(F.conv2d(x, x, padding=1).sum(), x)[0])


def test_backward_in_another_thread():
    """A GPU's backward passes run in one of torch's; modes are each thread's own."""
    layer = tc.nn.Conv2d(2, 2, 3, backend="triton", device=DEVICE)
    x = random((1, 2, 4, 4)).requires_grad_()
    expected = torch.autograd.grad(F.conv2d(x, layer.weight, layer.bias).sum(), (x, layer.weight))
    found = []
    for _ in range(2):
        y = layer(x).sum()
        with torch.overrides.BaseTorchFunctionMode():
            thread = threading.Thread(target=lambda y=y: found.append(torch.autograd.grad(y, (x, layer.weight))))
            thread.start()
            thread.join()
    for each in found:
        for mine, torchs in zip(each, expected, strict=True):
            torch.testing.assert_close(mine, torchs)


def test_threads_at_once():
    """Who calls first plans, whoever that is; the interpreter is one, and waited for."""
    layer, plain = (kind(4, 4, 3, groups=4, device=DEVICE) for kind in (tc.nn.Conv2d, torch.nn.Conv2d))
    layer.backend = "triton"
    layer.load_state_dict(plain.state_dict())
    x, found = random((2, 4, 7, 5)).requires_grad_(), []
    parameters = list(layer.parameters())
    ops.forget_plans()
    start = threading.Barrier(4)

    def call():
        start.wait()
        found.append(torch.autograd.grad(layer(x).square().sum(), (x, *parameters)))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = torch.autograd.grad(plain(x).square().sum(), (x, *plain.parameters()))
    assert len(found) == 4
    for each in found:
        for mine, torchs in zip(each, expected, strict=True):
            torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4)


def test_autocast_to_another_dtype():
    layer = tc.nn.Conv2d(2, 2, 3, backend="triton", device=DEVICE)
    x = random((1, 2, 4, 4))
    for dtype in (torch.bfloat16, torch.float16) * 2:
        with torch.autocast(DEVICE, dtype):
            assert layer(x).dtype is dtype
    assert len(routing._known[layer][x.shape]) == 2
