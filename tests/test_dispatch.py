"""Which kernel a call gets and why, and the weight as that kernel reads it: a copy, a flipped view, or itself."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEPTHWISE_FORMS, channels_last, check, compare, launches, name_of, random, sliced

import triton_conv as tc
from triton_conv import dispatch, workloads
from triton_conv.target import KNOWN

BANDED, PATCH, DEPTHWISE = DEPTHWISE_FORMS
ROLLING_PATCH = "depthwise_rolling_patch"


def plan_of(function, x, w, layout=None, **options):
    x = random(x)
    return tc.plan(getattr(tc, function), layout(x) if layout else x, random(w), **options)


# --------------------------------------------------------------------------------------------------------------- forms

NOT_BANDED = "not depthwise_banded: neighbouring pixels are not contiguous"
NOT_TOEPLITZ = "not depthwise_toeplitz: neighbouring pixels are not contiguous"
NOT_HALF = "not depthwise_toeplitz: only 16-bit numbers are multiplied"
NOT_PATCH = "not depthwise_patch: the channels of its input are not contiguous"
NOT_ROLLING = "not depthwise_rolling: the channels of its input are not contiguous"
NOT_ROLLING_PATCH = "not depthwise_rolling_patch: neighbouring pixels are not contiguous"
NOT_ONE_OUTPUT = tuple(
    f"not depthwise_{form}: a group has 1 input channels and 2 output" for form in ("patch", "rolling")
)


@pytest.mark.parametrize(
    ("layout", "multiplier", "options", "names", "notes"),
    [
        (None, 1, {}, (BANDED, ROLLING_PATCH, DEPTHWISE), (NOT_HALF, NOT_PATCH, NOT_ROLLING)),
        (None, 2, {}, (BANDED, ROLLING_PATCH, DEPTHWISE), (NOT_HALF, *NOT_ONE_OUTPUT)),
        (channels_last, 1, {}, (PATCH, "depthwise_rolling", DEPTHWISE), (NOT_BANDED, NOT_TOEPLITZ, NOT_ROLLING_PATCH)),
        (channels_last, 2, {}, (DEPTHWISE,), (NOT_BANDED, NOT_TOEPLITZ, *NOT_ONE_OUTPUT, NOT_ROLLING_PATCH)),
        (sliced, 1, {}, (DEPTHWISE,), (NOT_BANDED, NOT_TOEPLITZ, NOT_PATCH, NOT_ROLLING, NOT_ROLLING_PATCH)),
        (
            channels_last,
            1,
            {"padding": 1, "padding_mode": "reflect"},
            (DEPTHWISE,),
            tuple(
                f"not depthwise_{form}: its border is reflect"
                for form in ("banded", "toeplitz", "patch", "rolling", "rolling_patch")
            ),
        ),
    ],
)
def test_forms_of_depthwise(layout, multiplier, options, names, notes):
    made = plan_of("conv2d", (2, 4, 6, 8), (4 * multiplier, 1, 3, 3), layout, groups=4, **options)
    suited, said = dispatch.forms(made.problem, made.target)
    assert tuple(kernel.name for kernel in suited) == names
    assert made.kernel is suited[0]
    assert made.reason == dispatch.family(made.problem)[1]
    assert len(said) == len(notes)
    for line, expected in zip(said, notes, strict=True):
        assert line.startswith(expected)
        assert f"note     {line}" in str(made)
    waiting = [kernel.name for kernel in suited if kernel.name in dispatch.WAITING]
    assert [note.split(":")[0] for note in made.notes if "where a measurement says so" in note] == [
        f"not {name}" for name in waiting
    ]


@pytest.mark.parametrize("workload", workloads.FLAGSHIPS, ids=lambda w: w.name)
def test_the_last_form_takes_what_the_others_take(workload):
    for variant in workload.variants(("float16",), both_formats=True):
        problem = variant.problem()
        names, _ = dispatch.family(problem)
        suited, notes = dispatch.forms(problem, KNOWN["sm_90"])
        assert suited[-1].name == names[-1]
        assert len(suited) + len(notes) == len(names)


@pytest.mark.parametrize(
    ("function", "x", "w", "options", "kernel", "reason"),
    [
        ("conv2d", (1, 6, 5, 5), (4, 6, 3, 3), {}, "implicit_gemm", "a product over channels and taps"),
        ("conv2d", (1, 6, 5, 5), (6, 3, 3, 3), {"groups": 2}, "grouped_packed", "at most 3 channels"),
        ("conv2d", (1, 66, 5, 5), (66, 33, 3, 3), {"groups": 2}, "implicit_gemm", "a product over channels"),
        ("conv2d", (1, 1, 5, 5), (8, 1, 3, 3), {}, "implicit_gemm", "a product over channels"),
        ("conv2d", (1, 1, 5, 5), (7, 1, 3, 3), {}, BANDED, "one input channel a group, multiplier 7"),
        ("conv_transpose2d", (1, 6, 5, 5), (6, 3, 3, 3), {"stride": 2}, "transposed_phase", "4 output phases"),
    ],
)
def test_family(function, x, w, options, kernel, reason):
    made = plan_of(function, x, w, **options)
    assert made.kernel.name == kernel
    assert kernel in dispatch.family(made.problem)[0]
    assert reason in made.reason


# ------------------------------------------------------------------------------------------------- packed: a copy

PACKED = {
    "conv1d": ("conv1d", (2, 17, 130), (19, 17, 3), {"padding": 1}),
    "conv2d": ("conv2d", (1, 20, 16, 16), (18, 20, 3, 3), {"padding": 1}),
    "conv3d": ("conv3d", (1, 16, 4, 8, 8), (17, 16, 2, 2, 2), {"padding": ((1, 0), (1, 0), (0, 1))}),
    "wide-groups": ("conv2d", (1, 66, 16, 16), (68, 33, 1, 3), {"padding": (0, 1), "groups": 2}),
    "transposed": ("conv_transpose2d", (1, 16, 16, 16), (16, 17, 2, 2), {"stride": 2}),
    "transposed-groups": ("conv_transpose1d", (1, 34, 256), (34, 18, 3), {"padding": 1, "groups": 2}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("name", PACKED)
def test_a_packed_weight(name, dtype):
    function, x, w, options = PACKED[name]
    x, weight = random(x, dtype), random(w, dtype, scale=torch.Size(w[1:]).numel() ** -0.5)
    made = tc.plan(getattr(tc, function), x, weight, **options)
    assert made.problem.weight_view == "packed"
    arranged = made.arranged(weight)
    assert torch.equal(arranged, weight)
    assert arranged.stride() == channels_last(weight).stride()
    planned = made.problem.w_strides
    assert arranged.stride() == (*planned[:2], *planned[5 - (weight.dim() - 2) :])
    check(function, {"input": x, "weight": weight, **options}, made.kernel.name)


@pytest.mark.parametrize(
    ("x", "w", "layout", "options"),
    [
        ((1, 16, 15, 16), (16, 16, 3, 3), None, {"padding": 1}),
        ((1, 16, 16, 16), (16, 16, 1, 1), None, {}),
        ((1, 16, 16, 16), (16, 16, 3, 3), channels_last, {"padding": 1}),
        ((1, 15, 16, 16), (16, 15, 3, 3), None, {"padding": 1}),
        ((1, 16, 16, 16), (15, 16, 3, 3), None, {"padding": 1}),
        ((1, 16, 16, 16), (16, 1, 3, 3), None, {"padding": 1, "groups": 16}),
    ],
    ids=["few-pixels", "1x1", "innermost-already", "few-inputs", "few-outputs", "depthwise"],
)
def test_a_weight_that_stays_as_it_is(x, w, layout, options):
    weight = layout(random(w)) if layout else random(w)
    made = tc.plan(tc.conv2d, random(x), weight, **options)
    assert made.problem.weight_view == "stored"
    assert made.problem.rearranged() == made.problem
    assert made.arranged(weight) is weight


def test_the_pixels_of_a_phase_count():
    # A phase of 16 x 15 pixels reads its taps as often as a forward convolution of so many.
    options = {"stride": 2, "output_padding": (0, 0)}
    assert plan_of("conv_transpose2d", (1, 16, 16, 15), (16, 16, 2, 2), **options).problem.weight_view == "stored"
    assert plan_of("conv_transpose2d", (1, 16, 16, 16), (16, 16, 2, 2), **options).problem.weight_view == "packed"


# ----------------------------------------------------------------------------------------- flipped: a view from its end

FLIPPED = {
    "plain": ("conv_transpose2d", (2, 4, 5, 8), (4, 1, 3, 3), {}),
    "padding": ("conv_transpose2d", (2, 4, 5, 8), (4, 1, 3, 5), {"padding": (2, 1)}),
    "dilation": ("conv_transpose2d", (2, 4, 5, 8), (4, 1, 3, 2), {"dilation": (1, 3), "padding": (0, 3)}),
    "output-padding": (
        "conv_transpose2d", (2, 4, 5, 8), (4, 1, 3, 3),
        {"dilation": (3, 2), "padding": (1, 4), "output_padding": (2, 1)},
    ),
    "even": ("conv_transpose2d", (2, 4, 5, 8), (4, 1, 4, 2), {"padding": 1}),
    "rank-1": ("conv_transpose1d", (2, 4, 18), (4, 1, 4), {"padding": 2}),
    "rank-3": ("conv_transpose3d", (2, 4, 3, 4, 5), (4, 1, 3, 2, 3), {"padding": (2, 0, 1), "dilation": (1, 2, 1)}),
    "activation": ("conv_transpose2d", (2, 4, 5, 8), (4, 1, 3, 3), {"padding": 1, "activation": "gelu"}),
}  # fmt: skip


@pytest.mark.parametrize("weight_layout", [None, sliced], ids=["stored", "sliced"])
@pytest.mark.parametrize("layout", [None, channels_last, sliced], ids=lambda f: f.__name__ if f else "contiguous")
@pytest.mark.parametrize("name", FLIPPED)
def test_a_flipped_weight(name, layout, weight_layout):
    function, x, w, options = FLIPPED[name]
    x, weight = random(x), random(w)
    arguments = {"input": layout(x) if layout else x, "weight": weight_layout(weight) if weight_layout else weight}
    arguments |= {"bias": random((w[0],)), "groups": w[0], **options}
    made = tc.plan(getattr(tc, function), **arguments)
    assert made.problem.weight_view == "flipped"
    assert not made.problem.geometry.transposed
    # A view from the last tap on; the kernel walks back from there.
    arranged = made.arranged(arguments["weight"])
    assert torch.equal(arranged.flatten(), weight.flatten(1)[:, -1])
    assert arranged.untyped_storage().data_ptr() == arguments["weight"].untyped_storage().data_ptr()
    check(function, arguments, {None: BANDED, channels_last: PATCH, sliced: DEPTHWISE}[layout])


@pytest.mark.parametrize(
    ("w", "options"),
    [
        ((4, 1, 3, 3), {"groups": 4, "stride": 2}),
        ((4, 2, 3, 3), {"groups": 4}),
        ((4, 2, 3, 3), {"groups": 2}),
        # More padding than the kernel reaches is no padding of a forward convolution.
        ((4, 1, 3, 3), {"groups": 4, "padding": (3, 0)}),
    ],
    ids=["stride", "multiplier", "groups-of-2", "padding-over-reach"],
)
def test_what_is_not_flipped(w, options):
    arguments = {"input": random((2, 4, 8, 7)), "weight": random(w), **options}
    assert tc.plan(tc.conv_transpose2d, **arguments).problem.weight_view == "stored"
    check("conv_transpose2d", arguments, "transposed_phase")


@pytest.mark.parametrize("layout", [None, channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        ((11,), (4,), {"padding": 3}),
        ((5, 8), (3, 3), {"padding": 1}),
        ((9, 8), (3, 5), {"padding": (2, 3), "dilation": (2, 1)}),
        ((5, 8), (3, 3), {"padding": 1, "padding_mode": "circular"}),
        ((3, 4, 5), (3, 2, 3), {"padding": (1, 0, 1)}),
    ],
    ids=["rank-1", "rank-2", "dilated", "circular", "rank-3"],
)
def test_the_input_gradient_of_a_depthwise_layer_is_depthwise(size, kernel, options, layout):
    rank = len(size)
    x, w = random((2, 3, *size), torch.float64), random((3, 1, *kernel), torch.float64)
    x = (layout(x) if layout else x).requires_grad_()
    y = getattr(tc, f"conv{rank}d")(x, w, groups=3, **options)
    grad = random(y.shape, torch.float64, "grad")
    launches.clear()
    (found,) = torch.autograd.grad(y, x, layout(grad) if layout else grad)
    assert dict(launches) == {PATCH if layout else BANDED: 1}
    around = options.get("padding", 0)
    if options.get("padding_mode") == "circular":
        other = F.conv2d(F.pad(x, (around,) * 4, mode="circular"), w, groups=3)
    else:
        other = getattr(F, f"conv{rank}d")(x, w, groups=3, **options)
    (expected,) = torch.autograd.grad(other, x, grad)
    compare(found, expected, 1e-12)
