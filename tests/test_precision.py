"""The last digit: products in tf32 or not, rounding to the dtype of storage, and what is not a number."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, channels_last, name_of, random, sliced

import triton_conv as tc

# NumPy warns of what IEEE arithmetic defines: overflow to infinity, and invalid operations that make NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

KERNELS = {
    "implicit_gemm": ("conv2d", (2, 20, 4, 5), (9, 20, 2, 2), {"padding": 1}),
    "implicit_gemm-flat": ("conv2d", (2, 3, 4, 5), (9, 3, 3, 3), {"padding": 1}),
    "grouped_packed": ("conv2d", (2, 12, 4, 5), (12, 3, 3, 3), {"groups": 4, "padding": 1}),
    "depthwise_banded": ("conv2d", (2, 6, 4, 5), (6, 1, 3, 3), {"groups": 6, "padding": 1}),
    "depthwise_patch": ("conv2d", (2, 6, 4, 5), (6, 1, 3, 3), {"groups": 6, "padding": 1}),
    "depthwise": ("conv2d", (2, 6, 4, 5), (12, 1, 3, 3), {"groups": 6, "padding": 1}),
    "transposed_phase": ("conv_transpose2d", (2, 6, 4, 5), (6, 7, 3, 3), {"stride": 2}),
    "transposed_phase-packed": ("conv_transpose2d", (2, 6, 4, 5), (6, 2, 3, 3), {"stride": 2, "groups": 3}),
    "deformable": ("deform_conv2d", (2, 6, 4, 5), (7, 6, 2, 2), {}),
}
CHANNELS_LAST = ("depthwise_patch", "depthwise")


def arguments_of(name, tensors):
    """Arguments of a kernel's call, tensors made by `tensors(shape, seed)`; deformable ones sample at whole pixels."""
    function, x, w, options = KERNELS[name]
    arguments = {"input": tensors(x, "x"), "weight": tensors(w, "w"), **options}
    if name in CHANNELS_LAST:
        arguments["input"] = channels_last(arguments["input"])
    if function == "deform_conv2d":
        arguments["offset"] = torch.zeros(2, 8, 3, 4, dtype=arguments["input"].dtype, device=DEVICE)
    assert tc.plan(getattr(tc, function), **arguments).kernel.name == name.split("-")[0]
    return function, arguments


def plain(function, arguments):
    """torch's own function for the arguments; a deformable call without offsets is a convolution."""
    arguments = {key: value for key, value in arguments.items() if key != "offset"}
    return getattr(F, "conv2d" if function == "deform_conv2d" else function)(**arguments)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_float32_follows_torchs_setting(precision, conv_precision):
    conv_precision.fp32_precision = precision
    x, w = random((1, 4, 5, 5)), random((4, 4, 3, 3))
    made = tc.plan(tc.conv2d, x, w)
    assert made.problem.precision == precision
    assert made.values["PRECISION"] == precision
    assert f"float32/{precision}" in str(made)
    assert tc.plan(tc.conv_transpose2d, x, w).problem.precision == precision
    offset = torch.zeros(1, 18, 3, 3, device=DEVICE)
    assert tc.plan(tc.deform_conv2d, x, offset, w).problem.precision == precision


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=name_of)
def test_other_dtypes_do_not(dtype, conv_precision):
    conv_precision.fp32_precision = "tf32"
    made = tc.plan(tc.conv2d, random((1, 4, 5, 5), dtype), random((4, 4, 3, 3), dtype))
    assert made.problem.precision == "ieee"


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", KERNELS)
def test_whole_numbers_are_exact(name, dtype):
    # Sums of small whole numbers are exact in every accumulator, so only the one rounding of the result is left.
    function, arguments = arguments_of(name, lambda shape, seed: (3 * random(shape, seed=seed)).round().to(dtype))
    exact = plain(function, {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
    assert torch.equal(getattr(tc, function)(**arguments), exact.to(dtype))


def every_number(dtype):
    """All normal numbers of a 16-bit dtype, and zero, as a (1, 1, many) tensor."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    normal = numbers.isfinite() & (numbers.abs() >= torch.finfo(dtype).tiny) | (numbers == 0)
    return numbers[normal].view(1, 1, -1).to(DEVICE)


@pytest.mark.parametrize("outputs", [1, 8], ids=["depthwise", "implicit_gemm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_multiplication_by_one_changes_nothing(dtype, outputs):
    x = every_number(dtype)
    y = tc.conv1d(x, torch.ones(outputs, 1, 1, dtype=dtype, device=DEVICE))
    assert torch.equal(y, x.expand(1, outputs, -1))


@pytest.mark.parametrize("added", [0.5, -0.25, 1.0, 3.0])
@pytest.mark.parametrize("outputs", [1, 8], ids=["depthwise", "implicit_gemm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_results_are_rounded_to_nearest_even(dtype, outputs, added):
    # One product and one bias: exact, or rounded once, in float32; halfway cases are among them.
    x = every_number(dtype)
    bias = torch.full((outputs,), added, dtype=dtype, device=DEVICE)
    y = tc.conv1d(x, torch.ones(outputs, 1, 1, dtype=dtype, device=DEVICE), bias)
    assert torch.equal(y, (x.float() + added).to(dtype).expand(1, outputs, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_sums_are_not_kept_in_half_precision(dtype):
    # In half precision a sum of ones stops growing where one is half a unit in its last place.
    x, w = (torch.ones(shape, dtype=dtype, device=DEVICE) for shape in ((1, 4096, 1), (16, 4096, 1)))
    assert (tc.conv1d(x, w) == 4096).all()


def test_float64_is_not_computed_in_float32():
    x, w = (torch.ones(shape, dtype=torch.float64, device=DEVICE) for shape in ((1, 2, 1), (16, 2, 1)))
    x[0, 1] = 2.0**-40
    assert (tc.conv1d(x, w) == 1 + 2.0**-40).all()


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize(("outputs", "kernel"), [(1, "depthwise"), (8, "implicit_gemm")])
@pytest.mark.parametrize("activation", ["relu", "relu6", "gelu", "silu"])
def test_activations_of_special_numbers(activation, outputs, kernel, precision, conv_precision):
    # Of 11 significant bits, as tf32 has, so that a product by one is exact whatever the precision of products.
    special = [0.0, -0.0, 1.0, -1.0, 6 - 2.0**-8, 6.0, 6 + 2.0**-8, -6.0, 100.0, -100.0, 2.0**100, -(2.0**100)]
    special += [float("inf"), -float("inf"), float("nan")]
    conv_precision.fp32_precision = precision
    # Pixels that are not contiguous are not for the banded form, which multiplies neighbours by zero.
    x, w = sliced(torch.tensor(special, device=DEVICE).view(1, 1, -1)), torch.ones(outputs, 1, 1, device=DEVICE)
    assert tc.plan(tc.conv1d, x, w).kernel.name == kernel
    y = tc.conv1d(x, w, activation=activation)
    expected = getattr(F, activation)(x.double()).float().expand(1, outputs, -1)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("outputs", [1, 8], ids=["depthwise", "implicit_gemm"])
def test_ieee_products_keep_every_bit(outputs, conv_precision):
    conv_precision.fp32_precision = "ieee"
    x = random((1, 1, 64))
    assert torch.equal(tc.conv1d(x, torch.ones(outputs, 1, 1, device=DEVICE)), x.expand(1, outputs, -1))


def test_too_large_for_half_is_infinite():
    x, w = random((1, 16, 5)).sign().half() * 60000, torch.ones(8, 16, 1).half().to(DEVICE)
    assert torch.equal(tc.conv1d(x.abs(), w), torch.full((1, 8, 5), float("inf"), dtype=torch.half, device=DEVICE))


# Not a defect but what a product with zeros is, in return for its speed: the kernels' page says so.
_SHARED = "groups that share a tile are multiplied by each other's zeros, and zero times NaN is NaN"
SPREADS = {
    "grouped_packed": _SHARED,
    "transposed_phase-packed": _SHARED,
    "depthwise_banded": "a block of a row is multiplied by the zeros of its band, and zero times NaN is NaN",
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.xfail(strict=True, reason=SPREADS[n]) if n in SPREADS else ())
        for n in KERNELS
        if n != "deformable"
    ],
)
def test_not_a_number_goes_where_it_goes_in_torch(name, value):
    function, arguments = arguments_of(name, lambda shape, seed: random(shape, seed=seed))
    arguments["input"][0, 1, 1, 2] = value
    result, expected = getattr(tc, function)(**arguments), plain(function, arguments)
    assert expected.isfinite().any()
    assert not expected.isfinite().all()
    assert torch.equal(result.isfinite(), expected.isfinite())


@pytest.mark.parametrize("name", KERNELS)
def test_not_a_number_is_never_lost(name):
    function, arguments = arguments_of(name, lambda shape, seed: random(shape, seed=seed))
    arguments["input"][0, 1, 1, 2] = float("nan")
    result, expected = getattr(tc, function)(**arguments), plain(function, arguments)
    assert result.isnan()[expected.isnan()].all()
    # Other images are not concerned.
    assert result[1].isfinite().all()
