"""torch.compile, torch.export and autocast: no graph break, no graph for each batch or size, torch's own dtypes."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, channels_last, launches, random
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import triton_conv as tc

pytestmark = [
    pytest.mark.usefixtures("nothing_measured"),
    pytest.mark.filterwarnings(
        # torch's own tracing and its own serialiser, of their own parts.
        "ignore::DeprecationWarning:torch",
        "ignore::FutureWarning:copyreg",
        "ignore:.*LeafSpec.*:FutureWarning",
    ),
]


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, dynamic, backend="aot_eager"):
    """The function compiled into one graph without a break, and the counter of its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic), counter


def compare(function, graph, tensors):
    """Results and gradients of a compiled function are those of the plain one, in values and in strides."""
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    found, expected = graph(*tensors), function(*tensors)
    torch.testing.assert_close(found, expected, check_stride=True)
    pairs = [torch.autograd.grad(result.square().sum(), tensors) for result in (found, expected)]
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, check_stride=True)


def conv(x, w, b):
    return tc.conv2d(x, w, b, padding=1, activation="relu") + 1


def strided(x, w, b):
    return tc.conv2d(x, w, b, stride=2, padding=((1, 0), (2, 1)), activation="silu")


def folded(x, w, b):
    return tc.conv2d(x, w, b, padding="same", padding_mode="reflect")


def transposed(x, w, b):
    return tc.conv_transpose2d(x, w.transpose(0, 1), b, stride=2, padding=1, output_padding=1)


def depthwise(x, w, b):
    return tc.conv1d(x.flatten(2), w[:3, :1, 0], b[:3], padding=((2, 0),), groups=3)


def deformable(x, w, b):
    offset = F.pad(x[:, :1], (0, 0, 0, 0, 0, 17))
    return tc.deform_conv2d(x, offset, w, b, padding=1)


FUNCTIONS = [
    conv,
    strided,
    pytest.param(folded, marks=pytest.mark.slow),
    pytest.param(transposed, marks=pytest.mark.slow),
    pytest.param(depthwise, marks=pytest.mark.slow),
    pytest.param(deformable, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_graph_for_every_batch_and_size(function):
    graph, counter = compiled(function, dynamic=True)
    # Odd and even sizes: what is left over of a stride is no reason for another graph either.
    for n, size in ((2, (5, 6)), (3, (6, 4)), (4, (7, 8))):
        compare(function, graph, (random((n, 3, *size)), random((4, 3, 3, 3)), random((4,))))
    assert counter.frame_count == 1
    assert sum(launches.values()) > 0


@pytest.mark.parametrize("function", [conv, pytest.param(transposed, marks=pytest.mark.slow)])
def test_static_sizes_are_one_graph_each(function):
    graph, counter = compiled(function, dynamic=False)
    for n in (2, 3):
        compare(function, graph, (random((n, 3, 5, 6)), random((4, 3, 3, 3)), random((4,))))
    assert counter.frame_count == 2


def test_channels_last_passes_through():
    graph, counter = compiled(lambda x, w: tc.conv2d(tc.conv2d(x, w, padding=1), w, padding=1), dynamic=True)
    for n in (2, 3):
        x = channels_last(random((n, 4, 5, 6)))
        result = graph(x, random((4, 4, 3, 3)))
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert not result.is_contiguous()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor():
    graph, counter = compiled(conv, dynamic=True, backend="inductor")
    for n in (2, 3):
        compare(conv, graph, (random((n, 3, 5, 6)), random((4, 3, 3, 3)), random((4,))))
    assert counter.frame_count == 1


# torch.export of torch 2.11 does not run where this is set.
exact = pytest.mark.usefixtures("exact_products")


@exact
@pytest.mark.parametrize("backend", ["triton", "auto", "torch"])
def test_modules_compile_into_one_graph(backend):
    layer = tc.nn.Conv2d(3, 4, 3, padding=1, activation="gelu", backend=backend).to(DEVICE)
    graph, counter = compiled(layer, dynamic=True)
    for n, size in ((2, (5, 6)), (3, (7, 4))):
        launches.clear()
        x = random((n, 3, *size)).requires_grad_()
        graph(x).sum().backward()
        # Ours, recomputed for gelu, and its gradients; nothing is measured on this device, so "auto" is torch's.
        assert sum(launches.values()) == (4 if backend == "triton" else 0)
        torch.testing.assert_close(graph(x), layer(x))
    assert counter.frame_count == 1


def test_where_a_slice_begins_may_be_a_symbol():
    layer = tc.nn.Conv2d(3, 3, 3, padding=1, backend="triton", device=DEVICE)
    filters = random((3, 1, 3, 3)), random((4, 3, 1, 1))

    def function(x):
        return tc.separable_conv2d(layer(x[:, :, 1:]), *filters)

    graph, counter = compiled(function, dynamic=True)
    for size in ((6, 5), (7, 8)):
        compare(function, graph, (random((2, 3, *size)),))
    assert counter.frame_count == 1


def test_a_change_of_backend_is_seen_by_a_graph():
    layer = tc.nn.Conv2d(3, 4, 3).to(DEVICE)
    graph, counter = compiled(layer, dynamic=True)
    x = random((2, 3, 5, 6))
    for backend, ran in (("triton", 1), ("torch", 0), ("triton", 1)):
        launches.clear()
        with tc.set_backend(backend):
            graph(x)
        assert sum(launches.values()) == ran
    assert counter.frame_count == 2


@exact
def test_accelerate_around_and_inside_a_compiled_function():
    def layer(x, w):
        return F.conv2d(x, w, padding=1).relu()

    def accelerated(x, w):
        with tc.accelerate(force=True):
            return layer(x, w)

    x, w = random((2, 3, 5, 6)), random((4, 3, 3, 3))
    expected = layer(x, w)
    graph, counter = compiled(layer, dynamic=True)
    with tc.accelerate(force=True):
        torch.testing.assert_close(graph(x, w), expected)
    assert sum(launches.values()) == counter.frame_count == 1
    graph, _ = compiled(accelerated, dynamic=True)
    torch.testing.assert_close(graph(x, w), expected)
    assert sum(launches.values()) == 2


# ------------------------------------------------------------------------------------------------------------- export


def export(layer, strict):
    sizes = {0: Dim("n", min=1, max=64), 2: Dim("h", min=4, max=64), 3: Dim("w", min=4, max=64)}
    return torch.export.export(layer, (random((2, 3, 5, 6)),), dynamic_shapes=(sizes,), strict=strict)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export(strict):
    layer = tc.nn.Conv2d(3, 4, 3, padding=1, stride=2, activation="relu", backend="triton").to(DEVICE)
    program = export(layer, strict)
    decomposed = program.run_decompositions()
    for n, size in ((1, (4, 6)), (4, (9, 5))):
        x = random((n, 3, *size))
        for made in (program, decomposed):
            launches.clear()
            torch.testing.assert_close(made.module()(x), layer(x))
            assert sum(launches.values()) == 2
    assert torch.ops.triton_conv.conv.default in [node.target for node in decomposed.graph.nodes]


def test_an_exported_program_can_be_stored():
    layer = tc.nn.Conv2d(3, 4, 3, backend="triton").to(DEVICE)
    file = io.BytesIO()
    torch.export.save(export(layer, strict=False), file)
    file.seek(0)
    x = random((3, 3, 7, 6))
    torch.testing.assert_close(torch.export.load(file).module()(x), layer(x))
    assert sum(launches.values()) == 2


def test_an_exported_function_of_torchs_names_no_op_of_ours_unless_asked():
    program = export(tc.nn.Conv2d(3, 4, 3, backend="auto").to(DEVICE), strict=False).run_decompositions()
    targets = [node.target for node in program.graph.nodes]
    assert torch.ops.aten.convolution.default in targets
    assert torch.ops.triton_conv.conv.default not in targets


# ----------------------------------------------------------------------------------------------------------- autocast


AUTOCAST = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("lower", AUTOCAST, ids=str)
@pytest.mark.parametrize("tracing", [False, True], ids=["eager", "compiled"])
def test_autocast(lower, tracing):
    def both(x, w, b):
        return tc.conv2d(x, w, b), tc.conv_transpose2d(x, w.transpose(0, 1), b)

    x, w, b = (random(shape).requires_grad_() for shape in ((2, 3, 5, 6), (4, 3, 3, 3), (4,)))
    function = compiled(both, dynamic=True)[0] if tracing else both
    with torch.autocast(DEVICE, dtype=lower):
        results = function(x, w, b)
    expected = both(*(tensor.detach().to(lower) for tensor in (x, w, b)))
    for result, exact in zip(results, expected, strict=True):
        assert result.dtype == lower
        assert torch.equal(result, exact)
    results[0].float().sum().backward()
    assert [tensor.grad.dtype for tensor in (x, w, b)] == [torch.float32] * 3
    # Outside, nothing is cast, and a graph made inside is not taken for it.
    assert function(x, w, b)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_what_torchs_does(dtype):
    x, w = random((1, 3, 4, 4), dtype), random((2, 3, 3, 3), dtype)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert tc.conv2d(x, w).dtype == F.conv2d(x, w).dtype == tc.plan(tc.conv2d, x, w).problem.dtype
    with torch.autocast(DEVICE, enabled=False):
        assert tc.conv2d(x, w).dtype == dtype


def test_autocast_keeps_the_digits_of_offsets():
    x, w = random((1, 2, 4, 4)), random((3, 2, 3, 3))
    # bfloat16 would make a whole pixel of it.
    offset = torch.full((1, 18, 2, 2), 1.0037, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        result = tc.deform_conv2d(x, offset, w)
        assert tc.plan(tc.deform_conv2d, x, offset, w).problem.dtype == result.dtype == torch.bfloat16
    assert torch.equal(result, tc.deform_conv2d(x.bfloat16(), offset, w.bfloat16()))
    assert not torch.equal(result, tc.deform_conv2d(x.bfloat16(), offset.bfloat16(), w.bfloat16()))


def test_backward_is_computed_in_the_precision_of_forward_also_inside_autocast():
    x, w = random((1, 3, 5, 5), torch.float32).requires_grad_(), random((4, 3, 3, 3)).requires_grad_()
    found, expected = copy.copy((x, w)), [tensor.detach().clone().requires_grad_() for tensor in (x, w)]
    output = tc.conv2d(*found)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output.sum().backward()
    tc.conv2d(*expected).sum().backward()
    for ours, plain in zip(found, expected, strict=True):
        assert torch.equal(ours.grad, plain.grad)
