"""The lectures' functions and layers in torch's machinery: torch.func, torch.compile, torch.export, autocast, autograd.

Each against its definition in torch's own operations, in float64 where derivatives are compared.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, channels_last, launches, random
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import triton_conv as tc
from triton_conv.reference import reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]
D = torch.float64


def defined(function, names, **options):
    """The function's definition, by tensors in order."""
    return lambda *tensors: reference(function, dict(zip(names, tensors, strict=True)) | options)


def shuffled(x, w, b):
    return tc.shuffle_conv2d(x, w, b, padding=(1, 0), groups=2, activation="silu")


def separable(x, d, p, m, b):
    return tc.separable_conv2d(x, d, p, b, stride=2, padding=1, mid_bias=m, mid_activation="relu", activation="gelu")


def separable1d(x, d, p):
    return tc.separable_conv1d(x, d, p, padding=((1, 0),))


def local(x, w, b):
    return tc.locally_connected2d(x, w, b, stride=2, groups=2)


def local3d(x, w):
    return tc.locally_connected3d(x, w)


# Function, definition, shapes of the tensors.
CASES = {
    "shuffle": (
        shuffled,
        defined("shuffle_conv2d", ("input", "weight", "bias"), padding=(1, 0), groups=2, activation="silu"),
        ((2, 4, 3, 4), (6, 2, 3, 2), (6,)),
    ),
    "separable": (
        separable,
        defined(
            "separable_conv2d", ("input", "depthwise_weight", "pointwise_weight", "mid_bias", "bias"),
            stride=2, padding=1, mid_activation="relu", activation="gelu",
        ),
        ((2, 3, 3, 2), (3, 1, 2, 2), (4, 3, 1, 1), (3,), (4,)),
    ),
    "separable-1d": (
        separable1d,
        defined("separable_conv1d", ("input", "depthwise_weight", "pointwise_weight"), padding=((1, 0),)),
        ((2, 3, 5), (3, 1, 2), (4, 3, 1)),
    ),
    "local": (
        local,
        defined("locally_connected2d", ("input", "weight", "bias"), stride=2, groups=2),
        ((2, 4, 3, 4), (1, 2, 2, 2, 2, 2), (2, 1, 2)),
    ),
    "local-3d": (
        local3d,
        defined("locally_connected3d", ("input", "weight")),
        ((2, 2, 2, 3, 2), (1, 2, 1, 3, 2, 2, 2, 2)),
    ),
}  # fmt: skip


def tensors(name, size=None, batched=()):
    """The tensors of a case, those at the places `batched` for `size` calls at once."""
    shapes = CASES[name][2]
    return [random((size, *s) if i in batched else s, D, f"{name}{i}") for i, s in enumerate(shapes)]


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def loss(function):
    return lambda *arguments: function(*arguments).square().sum()


# Which tensors are in a batch: images alone, each call's own filters, filters alone.
BATCHES = {
    "images": lambda n: (0,),
    "all": lambda n: tuple(range(n)),
    "filters": lambda n: (1,),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", CASES)
def test_vmap_is_one_call(name, batch):
    function, definition, shapes = CASES[name]
    batched = BATCHES[batch](len(shapes))
    dims = tuple(0 if i in batched else None for i in range(len(shapes)))
    arguments = tensors(name, 2, batched)
    found = vmap(function, dims)(*arguments)
    # Separable convolution with filters of each call is two kernels.
    assert sum(launches.values()) == (2 if name.startswith("separable") and batch != "images" else 1)
    for i in range(2):
        close(found[i], definition(*[t if dim is None else t[i] for t, dim in zip(arguments, dims, strict=True)]))


@pytest.mark.parametrize("name", [n if n == "shuffle" else pytest.param(n, marks=pytest.mark.slow)
                                  for n in CASES])  # fmt: skip
@pytest.mark.parametrize("batch", ["all", pytest.param("images", marks=pytest.mark.slow)])
def test_gradients_for_each_of_a_batch(name, batch):
    function, definition, shapes = CASES[name]
    batched = BATCHES[batch](len(shapes))
    dims = tuple(0 if i in batched else None for i in range(len(shapes)))
    arguments, places = tensors(name, 2, batched), tuple(range(len(shapes)))
    found = vmap(grad(loss(function), places), dims)(*arguments)
    for i in range(2):
        one = [t if dim is None else t[i] for t, dim in zip(arguments, dims, strict=True)]
        close(tuple(g[i] for g in found), grad(loss(definition), places)(*one))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("separable-1d", "local-3d") else n for n in CASES]
)
def test_forward_mode(name):
    function, definition, shapes = CASES[name]
    arguments = tuple(tensors(name))
    directions = tuple(random(shape, D, f"direction{i}") for i, shape in enumerate(shapes))
    found, expected = (jvp(f, arguments, directions) for f in (function, definition))
    close(found, expected)
    # A direction of one tensor alone.
    for i in (0, len(shapes) - 1):
        one, direction = arguments[i], directions[i]
        partial = [jvp(lambda t, f=f, i=i: f(*arguments[:i], t, *arguments[i + 1 :]), (one,), (direction,))[1]
                   for f in (function, definition)]  # fmt: skip
        close(*partial)


@pytest.mark.parametrize(
    "name", ["shuffle", *(pytest.param(n, marks=pytest.mark.slow) for n in ("separable", "local"))]
)
def test_forward_mode_of_a_gradient(name):
    function, definition, shapes = CASES[name]
    arguments = tuple(tensors(name))
    directions = tuple(random(shape, D, f"direction{i}") for i, shape in enumerate(shapes))
    places = tuple(range(len(shapes)))
    products = [jvp(grad(loss(f), places), arguments, directions)[1] for f in (function, definition)]
    close(*products)


def test_jacobians():
    x, w, _ = tensors("local")
    results = [jac(lambda w: local(x[:1, :, :2, :2], w[:, :1], None))(w[:, :1]) for jac in (jacrev, jacfwd)]
    close(*results)
    assert results[0].any()


# ----------------------------------------------------------------------------------------------------- one graph of it


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", ["separable", *(pytest.param(n, marks=pytest.mark.slow) for n in ("shuffle", "local"))]
)
def test_one_graph_for_every_batch(name):
    function, _, _ = CASES[name]
    x, *others = tensors(name)
    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    # Sizes that no other dimension has: torch takes equal ones for the same symbol.
    for batch in (x[[0, 1, 0, 1, 0]], channels_last(x[[1, 0, 0, 1, 1, 0, 1]])):
        leaves = [t.clone().requires_grad_() for t in (batch, *others)]
        found, expected = graph(*leaves), function(*leaves)
        torch.testing.assert_close(found, expected, check_stride=True)
        for ours, theirs in zip(
            *(torch.autograd.grad(y.square().sum(), leaves) for y in (found, expected)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, check_stride=True)
    # One for either memory format.
    assert counter.frame_count == 2


def test_a_graph_of_two_kernels_is_one_too():
    """Where fusing does not pay the choice is the graph's, made by the sizes that it is traced with."""
    wide = [random(shape, D, str(shape)) for shape in ((1, 3, 4, 4), (3, 1, 3, 3), (300, 3, 1, 1))]
    counter = CompileCounterWithBackend("eager")
    graph = torch.compile(tc.separable_conv2d, backend=counter, fullgraph=True, dynamic=True)
    close(graph(*wide), tc.separable_conv2d(*wide))
    assert "separable" not in launches
    assert counter.frame_count == 1


LAYERS = {
    "shuffle": lambda: tc.nn.ShuffleConv2d(4, 6, 1, groups=2, activation="relu"),
    "separable": lambda: tc.nn.SeparableConv2d(4, 6, 3, padding=1, mid_activation="relu6"),
    "local": lambda: tc.nn.LocallyConnected2d(4, 3, (5, 4), 2),
    "channels": lambda: tc.nn.ChannelShuffle(2),
}


@pytest.mark.parametrize(
    ("name", "strict"),
    [
        pytest.param(
            name, strict, id=f"{name}-{'strict' if strict else 'non-strict'}",
            marks=pytest.mark.slow if strict != (name == "separable") else (),
        )
        for name in LAYERS
        for strict in (True, False)
    ],
)  # fmt: skip
def test_export(name, strict):
    layer, x = LAYERS[name]().to(DEVICE), random((2, 4, 5, 4))
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: Dim("n", min=1, max=64)},), strict=strict)
    more = torch.cat((x, x[:1]))
    for made in (program, program.run_decompositions()):
        torch.testing.assert_close(made.module()(more), layer(more))


@pytest.mark.parametrize("lower", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", ["shuffle", "separable", "local"])
def test_autocast(name, lower):
    function, _, _ = CASES[name]
    whole = [t.float().requires_grad_() for t in tensors(name)]
    with torch.autocast(DEVICE, dtype=lower):
        result = function(*whole)
    assert result.dtype == lower
    assert torch.equal(result, function(*[t.detach().to(lower) for t in whole]))
    result.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in whole)
    with torch.autocast(DEVICE, dtype=lower):
        assert function(*[t.double() for t in whole]).dtype == torch.float64, "as torch's convolutions"


def test_two_kernels_lower_their_operands_too():
    x, d, p = random((1, 3, 4, 4)), random((3, 1, 3, 3)), random((300, 3, 1, 1))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert tc.separable_conv2d(x, d, p).dtype == F.conv2d(x, d, groups=3).dtype == torch.bfloat16


def saved_by(call):
    """Shapes and bytes of what autograd keeps for the backward pass of a call, each tensor once."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return {tuple(t.shape) for t in kept.values()}, sum(t.numel() * t.element_size() for t in kept.values())


@pytest.mark.usefixtures("one_kernel")
def test_a_separable_gradient_keeps_no_intermediate():
    """Of one kernel it is computed anew: what is kept are the tensors that were given; two layers keep it, once or
    twice."""
    x, d, p = random((2, 4, 8, 8)), random((8, 1, 3, 3), seed="d"), random((3, 8, 1, 1), seed="p")
    for tensor in (x, d, p):
        tensor.requires_grad_()
    given = sum(4 * t.numel() for t in (x, d, p))
    shapes, size = saved_by(lambda: tc.separable_conv2d(x, d, p, padding=1, mid_activation="silu"))
    assert shapes == {tuple(t.shape) for t in (x, d, p)}
    assert size == given
    shapes, size = saved_by(lambda: F.conv2d(F.silu(F.conv2d(x, d, padding=1, groups=4)), p))
    assert (2, 8, 8, 8) in shapes
    assert size >= given + 4 * 2 * 8 * 8 * 8
