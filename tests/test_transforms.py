"""torch.func: vmap, grad of vmap, forward-mode derivatives; each against torch's own convolutions under the same."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, launches, random
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

import triton_conv as tc
from triton_conv.reference import deform_conv2d

# Forward mode has torch script its own formulas, at the first use in a process.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
D = torch.float64
# Which of input, weight and bias are in a batch.
BATCHES = [(0, 0, 0), (0, None, None), (None, 0, None), (None, 0, 0), (1, 0, None), (0, None, 0)]


def tensors(batches, shapes=((2, 4, 5, 5), (6, 2, 3, 3), (6,)), size=3):
    made = [random(shape if dim is None else (size, *shape), D) for shape, dim in zip(shapes, batches)]
    return [tensor if dim is None else tensor.movedim(0, dim) for tensor, dim in zip(made, batches)]


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def ours(x, w, b):
    return tc.conv2d(x, w, b, groups=2, padding=1, activation="silu")


def theirs(x, w, b):
    return F.silu(F.conv2d(x, w, b, groups=2, padding=1))


def loss(function):
    return lambda *arguments: function(*arguments).square().sum()


@pytest.mark.parametrize("batches", BATCHES, ids=str)
def test_vmap(batches):
    arguments = tensors(batches)
    close(vmap(ours, batches)(*arguments), vmap(theirs, batches)(*arguments))
    assert sum(launches.values()) == 1


@pytest.mark.parametrize(
    "batches", BATCHES[:2] + [pytest.param(b, marks=pytest.mark.slow) for b in BATCHES[2:]], ids=str
)
def test_gradients_for_each_of_a_batch(batches):
    arguments = tensors(batches)
    results = [vmap(grad(loss(f), (0, 1, 2)), batches)(*arguments) for f in (ours, theirs)]
    close(*results)
    # Forward, once more before the slope of silu, and two gradients.
    assert sum(launches.values()) == 4


def test_gradients_of_a_vmapped_function():
    arguments = tensors((0, None, None))
    results = [grad(loss(vmap(f, (0, None, None))), (0, 1, 2))(*arguments) for f in (ours, theirs)]
    close(*results)


@pytest.mark.parametrize("batches", [(0, 0), (None, 0)], ids=str)
def test_vmap_of_other_kinds(batches):
    x, w = tensors(batches, ((2, 4, 4, 4), (4, 3, 3, 3)))
    for function in ("conv_transpose2d", "conv2d"):
        weight = w if function == "conv_transpose2d" else w[..., :3, :3].repeat_interleave(2, 2)[..., :4, :, :]
        mine, torchs = (lambda x, w, f=getattr(m, function): f(x, w, stride=2) for m in (tc, F))
        close(vmap(mine, batches)(x, weight), vmap(torchs, batches)(x, weight))


def test_per_sample_gradients_of_a_layer():
    layer = tc.nn.Conv1d(3, 4, 3, backend="triton", dtype=D).to(random((1,)).device)
    plain = torch.nn.Conv1d(3, 4, 3, dtype=D).to(random((1,)).device)
    plain.load_state_dict(layer.state_dict())
    x = random((5, 3, 8), D)
    found = []
    for module in (layer, plain):
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        sample = loss(lambda p, x, module=module: functional_call(module, p, (x[None],)))
        found.append(vmap(grad(sample), (None, 0))(parameters, x))
    close(*found)
    assert found[0]["weight"].shape == (5, 4, 3, 3)
    assert sum(launches.values()) == 2


def deformable_batches():
    yield pytest.param((0, 0, 0, 0, 0), marks=pytest.mark.slow)
    yield (0, None, 0, None, None)


@pytest.mark.parametrize("batches", list(deformable_batches()), ids=str)
def test_vmap_of_deformable_gradients(batches):
    shapes = ((1, 2, 4, 4), (1, 18, 4, 4), (1, 9, 4, 4), (2, 1, 3, 3), (2,))
    arguments = tensors(batches, shapes, size=2)

    def mine(x, o, m, w, b):
        return tc.deform_conv2d(x, o, w, b, padding=1, mask=m)

    def defined(x, o, m, w, b):
        return deform_conv2d(x, o, w, b, padding=1, mask=m)

    found = vmap(grad(loss(mine), (0, 1, 2, 3, 4)), batches)(*arguments)
    for i in range(2):
        one = [t if dim is None else t[i] for t, dim in zip(arguments, batches)]
        close(tuple(g[i] for g in found), grad(loss(defined), (0, 1, 2, 3, 4))(*one))


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_forward_mode(activation):
    def mine(x, w, b):
        return tc.conv2d(x, w, b, stride=2, padding=1, activation=activation)

    def torchs(x, w, b):
        y = F.conv2d(x, w, b, stride=2, padding=1)
        return y if activation is None else getattr(F, activation)(y)

    shapes = ((2, 2, 5, 4), (3, 2, 3, 3), (3,))
    arguments, directions = tensors((None,) * 3, shapes), tensors((None,) * 3, tuple((*s, 2) for s in shapes))
    directions = [d[..., 1] for d in directions]
    close(jvp(mine, tuple(arguments), tuple(directions)), jvp(torchs, tuple(arguments), tuple(directions)))
    products = [jvp(grad(loss(f), (0, 1, 2)), tuple(arguments), tuple(directions))[1] for f in (mine, torchs)]
    close(*products)


def test_dual_numbers():
    x, w, direction = random((1, 2, 4, 4), D).requires_grad_(), random((3, 2, 2, 2), D), random((1, 2, 4, 4), D, "d")
    tangents = []
    for function in (tc.conv2d, F.conv2d):
        with forward_ad.dual_level():
            dual = function(forward_ad.make_dual(x, direction), w, stride=2)
            tangents.append(forward_ad.unpack_dual(dual).tangent)
    close(*tangents)


def test_jacobians():
    x, w = random((1, 2, 3, 3), D), random((2, 2, 2, 2), D)
    results = [jac(lambda w: tc.conv2d(x, w))(w) for jac in (jacrev, jacfwd)]
    close(*results)
    close(results[0], jacrev(lambda w: F.conv2d(x, w))(w))


LAYER = tc.nn.Conv2d(2, 3, 2, stride=2, activation="silu", backend="triton", dtype=D, device=DEVICE)


def through_a_layer(x, w):
    return functional_call(LAYER, {"weight": w}, (x,))


def through_a_function(x, w):
    return tc.conv2d(x, w, LAYER.bias.detach(), stride=2, activation="silu")


TRANSFORMED = {
    "vmap": lambda f: lambda x, w: vmap(f, (0, None))(x[:, None], w),
    "vmap of grad": lambda f: lambda x, w: vmap(grad(lambda w, x: f(x[None], w).sum()), (None, 0))(w, x),
    "jvp": lambda f: lambda x, w: jvp(f, (x, w), (x, w))[1],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("vmap of grad", through_a_layer),
        ("jvp", through_a_function),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("jvp", through_a_layer),
                ("vmap of grad", through_a_function),
                ("vmap", through_a_layer),
                ("vmap", through_a_function),
            )
        ),
    ],
)
def test_compiled(name, function):
    x, w = random((2, 2, 4, 4), D), random((3, 2, 2, 2), D)
    transformed = TRANSFORMED[name](function)
    torch._dynamo.reset()
    launches.clear()
    found = torch.compile(transformed, backend="aot_eager", fullgraph=True)(x, w)
    assert sum(launches.values()) > 0
    close(found, transformed(x, w))
    close(found, TRANSFORMED[name](lambda x, w: F.silu(F.conv2d(x, w, LAYER.bias.detach(), stride=2)))(x, w))


@pytest.mark.filterwarnings("ignore::FutureWarning:copyreg", "ignore:.*LeafSpec.*:FutureWarning")
def test_an_exported_program_is_transformed():
    x = random((1, 2, 4, 4), D)
    program = torch.export.export(LAYER, (x,)).module()
    close(grad(loss(program))(x), grad(loss(LAYER))(x))
    close(jvp(program, (x,), (x,)), jvp(LAYER, (x,), (x,)))


def test_an_unsupported_transform_is_torchs_error():
    offset = random((1, 18, 2, 2), D)
    x, w = random((1, 2, 4, 4), D), random((3, 2, 3, 3), D)
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(lambda x: tc.deform_conv2d(x, offset, w), (x,), (x,))
