"""Derivatives of deformable convolution against torch's own of its definition in float64, first and second."""

import math

import pytest
import torch
from helpers import DEVICE, DTYPES, channels_last, expanded, launches, name_of, permuted, random, shifted, sliced
from test_deformable import GEOMETRIES, drawn, tensors

import triton_conv as tc
from triton_conv import ops, ops_deform
from triton_conv.dispatch import plan
from triton_conv.errors import ArgumentError, DtypeError, PlanError
from triton_conv.problem_deform import DeformInputGradientProblem, DeformWeightGradientProblem
from triton_conv.reference import deform_conv2d as defined
from triton_conv.reference import tolerance
from triton_conv.target import KNOWN

NAMES = ("input", "offset", "mask", "weight", "bias")
PRECISION = "tf32" if DEVICE == "cuda" else "ieee"
GRADIENTS = {"deformable_input_gradient": 1, "deformable_weight_gradient": 1}
GEOMETRY = ((2, 1), (1, 1, 0, 0), (2, 1))  # torchvision's, as the ops take it


@pytest.fixture(params=[False, True], ids=["atomic", "fixed-point"], name="deterministic")
def _deterministic(request):
    """torch's setting, which picks how the input's gradient is added up."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)


def present(arguments):
    return [name for name in NAMES if isinstance(arguments.get(name), torch.Tensor)]


def gradients(function, arguments, names, grad_output=None, dtype=None):
    """Gradients for the tensors of these names, and the output's gradient: given, or drawn."""
    leaves = {
        name: arguments[name].detach().to(dtype or arguments[name].dtype).requires_grad_(name in names)
        for name in present(arguments)
    }
    output = function(**arguments | leaves)
    if grad_output is None:
        grad_output = random(output.shape, output.dtype, "grad")
    return torch.autograd.grad(output, [leaves[name] for name in names], grad_output.to(output.dtype)), grad_output


def check(arguments, names=None, bound=None, grad_output=None):
    """Our gradients, compared with those of the definition in float64; the launch counter proves whose they are."""
    names = present(arguments) if names is None else names
    launches.clear()
    ours, grad_output = gradients(tc.deform_conv2d, arguments, names, grad_output)
    empty = arguments["input"].shape[0] == 0
    expected = {"deformable": 0 if empty else 1}
    if {"input", "offset", "mask"} & set(names) and not empty:
        expected["deformable_input_gradient"] = 1
    if "weight" in names and not empty:
        expected["deformable_weight_gradient"] = 1
    assert launches == {name: count for name, count in expected.items() if count}
    theirs, _ = gradients(defined, arguments, names, grad_output, torch.float64)
    dtype = arguments["input"].dtype
    if bound is None:
        # Of all sums the weight's is the longest; coordinates have the accumulator's precision.
        terms = arguments["weight"][0].numel() * max(grad_output[:, 0].numel(), 1)
        bound = 2 * tolerance(dtype, terms, PRECISION, max(arguments["input"].shape[2:]))
    for name, mine, expected in zip(names, ours, theirs, strict=True):
        assert (mine.shape, mine.dtype) == (arguments[name].shape, arguments[name].dtype)
        assert mine.isfinite().all()
        scale = expected.abs().max().item() if expected.numel() else 1.0
        error = (mine.double() - expected).abs().max().item() / (scale or 1.0) if mine.numel() else 0.0
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"
    return dict(zip(names, ours, strict=True))


@pytest.mark.parametrize("mask", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["v2", "v1"])
@pytest.mark.parametrize(
    ("batch", "dtype"),
    [
        pytest.param(
            batch,
            dtype,
            id=f"{batch}-{name_of(dtype)}",
            marks=pytest.mark.slow if batch and dtype in (torch.float16, torch.float32) else (),
        )
        for batch in (0, 33)
        for dtype in DTYPES
    ],
)
def test_torchvision_geometry(batch, dtype, mask, deterministic):
    found = check(tensors(batch, dtype, mask))
    assert len(found) == 4 + mask


@pytest.mark.parametrize(
    "layout", [channels_last, sliced, *(pytest.param(f, marks=pytest.mark.slow) for f in (permuted, expanded, shifted))]
)
@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=name_of)
def test_layouts(layout, dtype):
    arguments = tensors(3, dtype, layout=layout)
    found = check(arguments, grad_output=layout(random((3, 2, 2, 3), dtype, "grad")))
    for name in ("input", "offset", "mask"):
        last = layout is channels_last
        assert found[name].is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("layout", [None, pytest.param(channels_last, marks=pytest.mark.slow)], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=name_of)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name, dtype, layout):
    arguments = drawn(*GEOMETRIES[name], dtype)
    check(arguments if layout is None else arguments | {"input": layout(arguments["input"])})


@pytest.mark.parametrize("spread", [3.0, 1e30])
def test_offsets_outside_the_image(spread):
    check(tensors(3, torch.float32, spread=spread))


@pytest.mark.parametrize("far", [math.inf, -math.inf])
def test_infinite_offsets_have_no_gradient(far):
    arguments = tensors(2, torch.float32)
    arguments["offset"].fill_(far)
    found, _ = gradients(tc.deform_conv2d, arguments, ["input", "offset", "mask", "weight"])
    assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("edge", [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("border", ["first", "last", "row", "column"])
def test_slopes_at_the_border(edge, border):
    """At a whole pixel the slope is that to the right; nothing comes from where a pixel is outside."""
    x = random((1, 1, 4, 5), torch.float64, "border")
    rows = torch.arange(4, device=DEVICE).view(4, 1).expand(4, 5)
    columns = torch.arange(5, device=DEVICE).view(1, 5).expand(4, 5)
    # Both coordinates at a border, or one of them while the other is well inside.
    places = {"first": (edge, edge), "last": (3 + edge, 4 + edge), "row": (edge, 1.25), "column": (1.25, edge)}
    row, column = places[border]
    offset = torch.stack([row - rows, column - columns])[None].double()
    arguments = {"input": x, "offset": offset, "weight": torch.ones(1, 1, 1, 1, dtype=torch.float64, device=DEVICE)}
    found = check(arguments)
    # torchvision's rule, written out for one pixel.
    y0, x0 = math.floor(row), math.floor(column)

    def pixel(i, j):
        return x[0, 0, i, j].item() if 0 <= i < 4 and 0 <= j < 5 else 0.0

    up, right = row - y0, column - x0
    slope_y = right * (pixel(y0 + 1, x0 + 1) - pixel(y0, x0 + 1)) + (1 - right) * (pixel(y0 + 1, x0) - pixel(y0, x0))
    slope_x = up * (pixel(y0 + 1, x0 + 1) - pixel(y0 + 1, x0)) + (1 - up) * (pixel(y0, x0 + 1) - pixel(y0, x0))
    grad_output = random((1, 1, 4, 5), torch.float64, "grad")
    torch.testing.assert_close(found["offset"][:, :1], slope_y * grad_output)
    torch.testing.assert_close(found["offset"][:, 1:], slope_x * grad_output)


@pytest.mark.parametrize("name", ["dense", "one-weight-group-many-offset-groups", "1x1"])
def test_zero_offsets_have_a_convolutions_gradients(name):
    arguments = drawn(*GEOMETRIES[name], torch.float64)
    del arguments["mask"]
    arguments["offset"].zero_()
    names = ["input", "weight", "bias"]
    ours, grad_output = gradients(tc.deform_conv2d, arguments, names)
    del arguments["offset"]
    groups = arguments["input"].shape[1] // arguments["weight"].shape[1]
    theirs, _ = gradients(torch.nn.functional.conv2d, arguments | {"groups": groups}, names, grad_output)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_float32_offsets_beside_half_precision(dtype):
    check(tensors(3, dtype, offset_dtype=torch.float32))


@pytest.mark.parametrize("names", [[name] for name in NAMES] + [["input", "mask"], ["offset", "weight"]], ids=str)
def test_only_what_is_asked_for_is_computed(names):
    found = check(tensors(2, torch.float64), names)
    assert list(found) == names


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_what_is_not_needed_is_empty(needed):
    arguments = tensors(2, torch.float32)
    given = [arguments[name] for name in ("input", "offset", "mask", "weight")]
    results = ops_deform.deform_conv_input_gradient(*given, random((2, 2, 2, 3)), *GEOMETRY, needed, False)
    for result, tensor, need in zip(results, given, needed, strict=False):
        assert result.shape == (tensor.shape if need else (0,))


def test_the_same_backward_twice_is_the_same_bits():
    torch.use_deterministic_algorithms(True)
    try:
        arguments = tensors(3, torch.float32)
        first, _ = gradients(tc.deform_conv2d, arguments, NAMES)
        second, _ = gradients(tc.deform_conv2d, arguments, NAMES)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_fixed_point_has_no_order():
    """Pixels, and with them the atomics, in another order give the same bits; float32 atomics would not."""
    # One output channel: what is scattered is a single product, in whatever order a library multiplies.
    x, w = random((1, 2, 20, 30)), random((1, 2, 1, 1))
    offset, grad_output = random((1, 2, 20, 30), scale=0.5), random((1, 1, 20, 30), seed="grad")
    # Every output reads near the same four pixels, whatever its own place is.
    rows = torch.arange(20, device=DEVICE).view(20, 1).expand(20, 30)
    columns = torch.arange(30, device=DEVICE).expand(20, 30)
    place = torch.stack([rows, columns])[None]
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def shuffled(tensor):
        return tensor.flatten(2)[:, :, order].unflatten(2, (20, 30))

    results = []
    for position, grad in ((offset + 1, grad_output), (shuffled(offset + 1), shuffled(grad_output))):
        # Whole multiples of 1/64: the sum with the pixel's place is exact in float32.
        exact = (position * 64).round() / 64 - place
        arguments = (x, exact, None, w, grad, (1, 1), (0,) * 4, (1, 1), (True, False, False), True)
        made = ops_deform.plan_deform_conv_input_gradient(*arguments)
        assert made.problem.fixed_point
        results.append(ops_deform.deform_conv_input_gradient(*arguments)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("exponent", [-100, -40, 40, 100])
def test_fixed_point_has_the_range_of_float32(exponent):
    arguments = tensors(2, torch.float32)
    given = [arguments[name] for name in ("input", "offset", "mask", "weight")]
    grad_output = random((2, 2, 2, 3))
    options = (*GEOMETRY, (True, False, False))
    plain = ops_deform.deform_conv_input_gradient(*given, grad_output, *options, False)[0]
    scaled = ops_deform.deform_conv_input_gradient(*given, grad_output * 2.0**exponent, *options, True)[0]
    torch.testing.assert_close(scaled / 2.0**exponent, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
def test_what_is_not_finite_is_not_lost_in_fixed_point(value):
    arguments = tensors(2, torch.float32)
    grad_output = random((2, 2, 2, 3))
    grad_output[0, 1, 1, 1] = value
    given = [arguments[name] for name in ("input", "offset", "mask", "weight")]
    result = ops_deform.deform_conv_input_gradient(*given, grad_output, *GEOMETRY, (True, False, False), True)[0]
    assert result.isnan().all()


def test_gradients_that_are_no_dense_tensors():
    arguments = tensors(2, torch.float64)
    names = present(arguments)
    for reduce in (torch.sum, lambda y: y[:, ::2, 1:, ::2].square().sum()):
        both = []
        for function in (tc.deform_conv2d, defined):
            leaves = {name: arguments[name].detach().requires_grad_() for name in names}
            both.append(torch.autograd.grad(reduce(function(**arguments | leaves)), list(leaves.values())))
        for mine, expected in zip(*both, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def small(mask):
    """A call so small that every derivative can be had numerically; no sample is near a whole pixel."""
    generator = torch.Generator().manual_seed(3)

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    offset = torch.randint(-1, 2, (1, 8, 3, 1), generator=generator) + 0.3 + 0.4 * uniform(1, 8, 3, 1)
    found = [uniform(1, 2, 3, 2), offset, uniform(2, 1, 1, 2) - 0.5, uniform(2)]
    found += [uniform(1, 4, 3, 1)] if mask else []
    return [tensor.to(DEVICE).requires_grad_() for tensor in found]


@pytest.mark.slow
@pytest.mark.parametrize("mask", [True, False], ids=["v2", "v1"])
def test_gradcheck_and_gradgradcheck(mask):
    def function(input, offset, weight, bias, mask=None):
        return tc.deform_conv2d(input, offset, weight, bias, mask=mask)

    # Atomics may add up in another order the second time.
    options = {"fast_mode": True, "nondet_tol": 0.0 if DEVICE == "cpu" else 1e-12}
    assert torch.autograd.gradcheck(function, small(mask), **options)
    assert torch.autograd.gradgradcheck(function, small(mask), **options)


def test_second_derivatives_where_the_offset_comes_from_the_input():
    """As in every published network; what the tensors have in common is not counted twice."""
    results = []
    for function in (tc.deform_conv2d, defined):
        x, w, v = (random(s, torch.float64).requires_grad_() for s in ((1, 2, 4, 4), (2, 2, 2, 2), (8, 2, 2, 2)))
        y = function(x, torch.nn.functional.conv2d(x, v), w)
        first = torch.autograd.grad(y.square().sum(), (x, w, v), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, v), create_graph=True)
        third = torch.autograd.grad(sum(g.square().sum() for g in second), (x, w, v))
        results.append((*first, *second, *third))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name_of)
def test_second_derivatives_in_half_precision(dtype, exact_products):
    """Of float32 in a backward pass under autocast, which concerns forward passes alone."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in small(False)[:3]]
    y = tc.deform_conv2d(*leaves)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.float32):
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    assert [g.dtype for g in second] == [dtype] * 3
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    first = torch.autograd.grad(defined(*exact).square().sum(), exact, create_graph=True)
    for mine, expected in zip(second, torch.autograd.grad(sum(g.square().sum() for g in first), exact), strict=True):
        assert (mine.double() - expected).abs().max() <= 16 * torch.finfo(dtype).eps * expected.abs().max()


def planned(arguments, kernel):
    grad_output = random((len(arguments["input"]), 2, 2, 3), arguments["input"].dtype, "grad")
    sampled = [arguments[name] for name in ("input", "offset", "mask")]
    if kernel == "deformable_input_gradient":
        return ops_deform.plan_deform_conv_input_gradient(
            *sampled, arguments["weight"], grad_output, *GEOMETRY, (True, True, True), False
        )
    return ops_deform.plan_deform_conv_weight_gradient(*sampled, grad_output, (3, 2), *GEOMETRY, 2)


def test_a_gradient_has_kernels_of_its_own():
    arguments = tensors(2, torch.float32)
    forward = tc.plan(tc.deform_conv2d, **arguments).problem
    sampled, weight = (planned(arguments, kernel).problem for kernel in GRADIENTS)
    assert isinstance(sampled, DeformInputGradientProblem)
    assert isinstance(weight, DeformWeightGradientProblem)
    assert len({problem.describe() for problem in (forward, sampled, weight)}) == 3
    for problem, kernels in (
        (forward, GRADIENTS),
        (sampled, ("deformable", "deformable_weight_gradient", "weight_gradient")),
        (weight, ("deformable", "deformable_input_gradient", "weight_gradient")),
    ):
        for kernel in kernels:
            with pytest.raises(PlanError):
                plan(problem, KNOWN["sm_90"], kernel)


def test_plans_are_made_once_and_forgotten():
    made = planned(tensors(2, torch.float32), "deformable_weight_gradient")
    assert planned(tensors(2, torch.float32), "deformable_weight_gradient") is made
    ops.forget_plans()
    assert planned(tensors(2, torch.float32), "deformable_weight_gradient") is not made


@pytest.mark.parametrize(
    ("dtype", "mask"),
    [
        pytest.param(dtype, mask, marks=pytest.mark.slow)
        for dtype, mask in ((torch.float16, True), (torch.float32, True), (torch.float32, False))
    ],
    ids=name_of,
)
def test_the_ops_pass_torchs_own_check(dtype, mask):
    arguments = tensors(2, dtype, mask)
    sampled = [arguments.get(name) for name in ("input", "offset", "mask")]
    grad_output = random((2, 2, 2, 3), dtype)
    calls = [
        (ops_deform.deform_conv_weight_gradient, (*sampled, grad_output, [3, 2], *GEOMETRY, 2)),
        *(
            (
                ops_deform.deform_conv_input_gradient,
                (*sampled, arguments["weight"], grad_output, *GEOMETRY, [True, True, mask], fixed),
            )
            for fixed in (False, True)
        ),
    ]
    for op, given in calls:
        torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))
        differentiable = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in given]
        torch.library.opcheck(op, tuple(differentiable), test_utils="test_autograd_registration")


def test_errors_name_the_op_and_the_argument():
    arguments = tensors(2, torch.float32)
    sampled = [arguments[name] for name in ("input", "offset", "mask")]
    weight, grad_output = arguments["weight"], random((2, 2, 2, 3))
    options = (*GEOMETRY, (True, True, True), False)
    into_input, into_weight = ops_deform.deform_conv_input_gradient, ops_deform.deform_conv_weight_gradient
    for wrong, error, message in (
        (grad_output[:, :, :1], ArgumentError, r"^grad_output: expected shape \[2, 2, 2, 3\].*got.*\[2, 2, 1, 3\]"),
        (grad_output.double(), DtypeError, "^grad_output: .*float32.*float64"),
    ):
        with pytest.raises(error, match=message):
            into_input(*sampled, weight, wrong, *options)
        with pytest.raises(error, match=message):
            into_weight(*sampled, wrong, (3, 2), *GEOMETRY, 2)
    with pytest.raises(ArgumentError, match=r"^mask: mask.shape .* is not valid"):
        into_input(*sampled[:2], sampled[2][:1], weight, grad_output, *options)
    with pytest.raises(ArgumentError, match=r"^offset: the shape of the offset"):
        into_weight(sampled[0], sampled[1][:, :3], None, grad_output, (3, 2), *GEOMETRY, 2)
    with pytest.raises(ArgumentError, match=r"^needed: the gradient of a mask that is None"):
        into_input(*sampled[:2], None, weight, grad_output, *options)
    with pytest.raises(ArgumentError, match=r"^needed: expected three flags"):
        into_input(*sampled, weight, grad_output, *GEOMETRY, (True,), False)
    assert not launches
