"""First and second derivatives against torch's own in float64, on every path that a gradient takes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from helpers import DEPTHWISE_FORMS, DEVICE, launches, name_of
from torch_samples import OPS

import triton_conv as tc
from triton_conv import ops_conv
from triton_conv.errors import ArgumentError, DtypeError
from triton_conv.reference import tolerance

SAMPLES = [(name, i) for name, op in OPS.items() for i, _ in enumerate(op.sample_inputs("cpu", torch.float64))]
FUNCTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def leaf(tensor, dtype=torch.float64):
    return tensor.detach().to(dtype).requires_grad_()


def derivatives(function, tensors, options, second):
    """Gradients of every tensor for a random gradient of the output and, if asked, gradients of a sum over those."""
    given_ = [leaf(t, t.dtype) if isinstance(t, torch.Tensor) else t for t in tensors]
    leaves = [t for t in given_ if isinstance(t, torch.Tensor)]
    output = function(*given_, **options)
    generator = torch.Generator(output.device).manual_seed(7)

    def draw(like):
        return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)

    grad_output = draw(output).requires_grad_()
    first = torch.autograd.grad(output, leaves, grad_output, create_graph=second)
    if not second:
        return first
    inner = sum((gradient * draw(gradient)).sum() for gradient in first)
    return first + torch.autograd.grad(inner, [*leaves, grad_output], allow_unused=True)


def compare(ours, theirs, bound):
    assert len(ours) == len(theirs)
    for index, (mine, expected) in enumerate(zip(ours, theirs, strict=True)):
        if mine is None or expected is None:
            # One formula may know that a derivative is zero where the other computes zeros.
            there = expected if mine is None else mine
            assert there is None or not there.any()
            continue
        assert mine.shape == expected.shape
        assert mine.dtype != torch.float16 or mine.isfinite().all()
        scale = expected.abs().max().item() or 1.0
        error = (mine.double() - expected.double()).abs().max().item() / scale if mine.numel() else 0.0
        assert error <= bound, f"derivative {index}: error {error}"


def torch_padded(function, pairs, mode="zeros"):
    """torch's function on an input that is padded beforehand, for what its own padding cannot express."""

    def padded(input, weight, bias=None, **options):
        flat = [p for pair in reversed(pairs) for p in pair]
        return function(F.pad(input, flat, mode="constant" if mode == "zeros" else mode), weight, bias, **options)

    return padded


# The unbatched twin of every sample, and two samples that take as long as all the others together.
LARGE = [*(sample for sample in SAMPLES if sample[1] % 2), ("conv_transpose3d", 2)]


@pytest.mark.parametrize(
    ("name", "index"),
    [
        pytest.param(*sample, id="{}-{}".format(*sample), marks=pytest.mark.slow if sample in LARGE else ())
        for sample in SAMPLES
    ],
)
def test_opinfo_samples_twice_differentiated(name, index):
    sample = next(itertools.islice(OPS[name].sample_inputs(DEVICE, torch.float64), index, None))
    tensors = (sample.input, *sample.args)
    ours = derivatives(getattr(tc, name), tensors, sample.kwargs, second=True)
    theirs = derivatives(OPS[name].op, tensors, sample.kwargs, second=True)
    compare(ours, theirs, 1e-12)


def test_there_are_92_samples():
    assert len(SAMPLES) == 92


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name != "conv1d" else ()) for name in FUNCTIONS]
)
def test_gradcheck_and_gradgradcheck(name):
    rank = int(name[-2])
    size = (4, 3, 2)[:rank]
    options = {"stride": 2, "padding": 1, "groups": 2}
    shape = (4, 1) if "transpose" in name else (4, 2)
    tensors = [
        torch.randn(s, dtype=torch.float64, device=DEVICE).requires_grad_()
        for s in ((1, 4, *size), (*shape, *(2,) * rank), (2 if "transpose" in name else 4,))
    ]

    def function(*tensors):
        return getattr(tc, name)(*tensors, **options)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.smoke
@pytest.mark.parametrize("case", CASES["smoke"], ids=name_of)
def test_smoke(case):
    tensors = case.tensors(torch.float64)
    operands = [tensors.get(name) for name in ("input", "weight", "bias")]
    ours = derivatives(getattr(tc, case.function), operands, case.arguments, second=False)
    # The input gradient of a depthwise layer of stride 1 is depthwise too.
    assert sum(launches[kernel] for kernel in case.kernels) >= (2 if case.kernels == DEPTHWISE_FORMS else 1)
    assert sum(count for name, count in launches.items() if name.endswith("weight_gradient")) == 1
    compare(ours, derivatives(getattr(F, case.function), operands, case.arguments, second=False), 1e-12)


MATRIX = list(itertools.product((1, 2), (1, 3, 5), (1, 2, 4), (1, 2)))


@pytest.mark.parametrize(("stride", "k", "groups", "dilation"), MATRIX)
@pytest.mark.parametrize("channels_last", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["nchw", "nhwc"])
def test_the_matrix_of_torchs_own_tests(stride, k, groups, dilation, channels_last):
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, device=DEVICE).to(memory_format=memory)
    w = torch.randn(8, 4 // groups, k, k, dtype=torch.float64, device=DEVICE).to(memory_format=memory)
    options = {"stride": stride, "padding": dilation * (k - 1) // 2, "groups": groups, "dilation": dilation}
    ours = derivatives(tc.conv2d, (x, w, None), options, second=False)
    compare(ours, derivatives(F.conv2d, (x, w, None), options, second=False), 1e-12)


@pytest.mark.parametrize("multiplier", [1, 2, 3])
@pytest.mark.parametrize("rank", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_depthwise(rank, multiplier):
    x = torch.randn(2, 5, *(6, 5, 4)[:rank], dtype=torch.float64, device=DEVICE)
    w = torch.randn(5 * multiplier, 1, *(3, 2, 3)[:rank], dtype=torch.float64, device=DEVICE)
    b = torch.randn(5 * multiplier, dtype=torch.float64, device=DEVICE)
    options = {"padding": 1, "groups": 5, "stride": 2}
    ours = derivatives(getattr(tc, f"conv{rank}d"), (x, w, b), options, second=False)
    assert launches["depthwise_weight_gradient"] == 1
    compare(ours, derivatives(getattr(F, f"conv{rank}d"), (x, w, b), options, second=False), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_every_dtype(name, groups, dtype):
    x = torch.randn(2, 8, 6, 5, device=DEVICE).to(dtype)
    w = torch.randn(8, 8 // groups, 3, 3, device=DEVICE).to(dtype)
    options = {"padding": 1, "groups": groups}
    ours = derivatives(getattr(tc, name), (x, w, None), options, second=False)
    assert all(gradient.dtype == dtype for gradient in ours)
    # torch's own derivatives of the same numbers, with the same gradient of the output.
    given_ = [leaf(t) for t in (x, w)]
    output = getattr(F, name)(*given_, None, **options)
    generator = torch.Generator(DEVICE).manual_seed(7)
    grad_output = torch.randn(output.shape, dtype=dtype, device=DEVICE, generator=generator)
    expected = torch.autograd.grad(output, given_, grad_output.double())
    compare(ours, expected, 2 * tolerance(dtype, 72, "tf32" if DEVICE == "cuda" else "ieee"))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_padding_modes(rank, mode):
    x = torch.randn(2, 4, *(5, 4, 6)[:rank], dtype=torch.float64, device=DEVICE)
    w = torch.randn(6, 2, *(3, 2, 3)[:rank], dtype=torch.float64, device=DEVICE)
    pairs = ((2, 1), (1, 3), (0, 2))[:rank]
    options = {"groups": 2, "stride": 2}
    ours = derivatives(
        getattr(tc, f"conv{rank}d"), (x, w), options | {"padding": pairs, "padding_mode": mode}, second=True
    )
    theirs = derivatives(torch_padded(getattr(F, f"conv{rank}d"), pairs, mode), (x, w), options, second=True)
    compare(ours, theirs, 1e-12)


@pytest.mark.parametrize("activation", ["relu", "relu6", "gelu", "silu"])
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_activations(name, activation):
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, device=DEVICE)
    w = torch.randn(4, 4, 3, 2, dtype=torch.float64, device=DEVICE)
    b = torch.randn(4, dtype=torch.float64, device=DEVICE)
    ours = derivatives(getattr(tc, name), (x, w, b), {"padding": 1, "activation": activation}, second=True)

    def plain(*tensors):
        return getattr(F, activation)(getattr(F, name)(*tensors, padding=1))

    compare(ours, derivatives(plain, (x, w, b), {}, second=True), 1e-12)


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_what_is_not_finite_stops_where_an_activation_is_flat(activation, value):
    """As with torch's activations: what comes back is selected, not multiplied by zero."""
    x = torch.tensor([-1.0, 1.0, 7.0, 2.0], dtype=torch.float64, device=DEVICE).view(1, 1, 4)
    above = value if activation == "relu6" else 1.0
    grad_output, grads = x.new_tensor([value, 1.0, above, 1.0]).view_as(x), []
    for function in (lambda *t: tc.conv1d(*t, activation=activation), lambda *t: getattr(F, activation)(F.conv1d(*t))):
        leaves = [leaf(x), leaf(torch.ones_like(x[..., :1]))]
        grads.append(torch.autograd.grad(function(*leaves), leaves, grad_output))
    for mine, torchs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, torchs)


def test_asymmetric_padding():
    x = torch.randn(2, 4, 9, dtype=torch.float64, device=DEVICE)
    w = torch.randn(4, 1, 4, dtype=torch.float64, device=DEVICE)
    ours = derivatives(tc.conv1d, (x, w), {"padding": ((3, 0),), "groups": 4}, second=True)
    compare(ours, derivatives(torch_padded(F.conv1d, ((3, 0),)), (x, w), {"groups": 4}, second=True), 1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 3, "output_padding": 2},
        {"stride": 3, "output_padding": 2, "padding": 2},
        {"stride": 2, "dilation": 5, "output_padding": 4},
        {"stride": 2, "dilation": 5, "output_padding": 4, "padding": 1},
        {"stride": 4, "padding": 1},
    ],
    ids=str,
)
def test_transposed_with_output_padding(options):
    """The forward convolution that undoes it must see exactly the input's size, whatever was added at the end."""
    x = torch.randn(2, 4, 5, dtype=torch.float64, device=DEVICE)
    w = torch.randn(4, 3, 3, dtype=torch.float64, device=DEVICE)
    ours = derivatives(tc.conv_transpose1d, (x, w), options, second=True)
    compare(ours, derivatives(F.conv_transpose1d, (x, w), options, second=True), 1e-12)


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_gradients_that_are_no_dense_tensors(name):
    x, w = (torch.randn(4, 4, 5, 5, dtype=torch.float64, device=DEVICE).requires_grad_() for _ in range(2))
    for reduce in (
        torch.sum,  # an expanded scalar: every stride is zero
        lambda y: (y.transpose(2, 3) * torch.arange(y.shape[2], device=DEVICE)).sum(),
        lambda y: y[:, ::2, 1:, ::3].square().sum(),
    ):
        ours = torch.autograd.grad(reduce(getattr(tc, name)(x, w, padding=1)), (x, w))
        compare(ours, torch.autograd.grad(reduce(getattr(F, name)(x, w, padding=1)), (x, w)), 1e-12)


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_an_empty_batch(name):
    x = torch.randn(0, 4, 5, 5, dtype=torch.float64, device=DEVICE)
    w, b = (
        torch.randn(4, 4, 3, 3, dtype=torch.float64, device=DEVICE),
        torch.randn(4, dtype=torch.float64, device=DEVICE),
    )
    grad_x, grad_w, grad_b = derivatives(getattr(tc, name), (x, w, b), {}, second=False)
    assert grad_x.shape == x.shape
    assert not grad_w.any()
    assert not grad_b.any()


def test_empty_channels():
    x, w = torch.randn(2, 0, 5, 5, device=DEVICE), torch.randn(4, 0, 3, 3, device=DEVICE)
    b = torch.randn(4, device=DEVICE)
    grad_x, grad_w, grad_b = derivatives(tc.conv2d, (x, w, b), {}, second=False)
    assert (grad_x.shape, grad_w.shape) == (x.shape, w.shape)
    assert grad_b.isfinite().all()


@pytest.mark.parametrize(
    ("asked", "kernels"),
    [
        ((0,), {"implicit_gemm": 1, "transposed_phase": 1}),
        ((1,), {"implicit_gemm": 1, "weight_gradient": 1}),
        ((2,), {"implicit_gemm": 1}),
    ],
)
def test_only_what_is_asked_for_is_computed(asked, kernels):
    tensors = [torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4)]
    tensors = [t.to(DEVICE).requires_grad_(i in asked) for i, t in enumerate(tensors)]
    launches.clear()
    tc.conv2d(*tensors).sum().backward()
    assert dict(launches) == kernels
    assert [t.grad is not None for t in tensors] == [i in asked for i in range(3)]


@pytest.mark.parametrize("groups", [1, 8])
def test_the_same_backward_twice_is_the_same_bits(groups):
    x, w = torch.randn(2, 8, 9, 9, device=DEVICE), torch.randn(8, 8 // groups, 3, 3, device=DEVICE)
    first, second = (derivatives(tc.conv2d, (x, w), {"groups": groups}, second=False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_op_passes_torchs_own_check():
    x, y = torch.randn(2, 4, 6, 6, device=DEVICE), torch.randn(2, 6, 5, 5, device=DEVICE)
    arguments = ([2, 2], [1, 1], [0, 0, 0, 0], [1, 1], 2, "zeros")
    torch.library.opcheck(
        ops_conv.conv_weight_gradient, (x, y, *arguments), test_utils=("test_schema", "test_faketensor")
    )
    torch.library.opcheck(
        ops_conv.conv_weight_gradient, (x.requires_grad_(), y.requires_grad_(), *arguments),
        test_utils="test_autograd_registration",
    )  # fmt: skip


def test_errors_name_the_op_and_the_argument():
    x, y = torch.randn(2, 4, 6, 6, device=DEVICE), torch.randn(2, 6, 4, 5, device=DEVICE)
    arguments = ([2, 2], [1, 1], [0, 0, 0, 0], [1, 1], 2, "zeros")
    with pytest.raises(
        ArgumentError, match=r"grad_output: expected shape \[2, 6, 5, 5\].*got grad_output \[2, 6, 4, 5\]"
    ):
        ops_conv.conv_weight_gradient(x, y, *arguments)
    with pytest.raises(DtypeError, match="grad_output"):
        ops_conv.conv_weight_gradient(x, y.double(), *arguments)
