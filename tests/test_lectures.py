"""Separable, shuffled and locally connected convolution against float64: values, formats, gradients, plans."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    channels_last,
    compare,
    compare_activated,
    launches,
    name_of,
    random,
    sliced,
    strides_of_format,
)
from test_gradients import compare as compare_derivatives
from test_gradients import derivatives

import triton_conv as tc
from triton_conv import dispatch, ops_fused, ops_local
from triton_conv.errors import PlanError
from triton_conv.ops_fused import Chain
from triton_conv.problem_lectures import local_weight_strides
from triton_conv.reference import reference, tolerance
from triton_conv.target import KNOWN

pytestmark = pytest.mark.usefixtures("one_kernel")


def shuffled(x, w, bias=True, **options):
    c = {"input": random(x, torch.float64, "x"), "weight": random(w, torch.float64, "w", (w[1] * w[2] * w[3]) ** -0.5)}
    if bias:
        c["bias"] = random(w[:1], torch.float64, "b")
    return "shuffle_conv2d", c | options


def separable(x, w, c_out, bias=True, mid_bias=False, **options):
    rank = len(x) - 2
    c = {
        "input": random(x, torch.float64, "x"),
        "depthwise_weight": random(w, torch.float64, "w", torch.Size(w[1:]).numel() ** -0.5),
        "pointwise_weight": random((c_out, w[0], *(1,) * rank), torch.float64, "p", w[0] ** -0.5),
    }
    if bias:
        c["bias"] = random((c_out,), torch.float64, "b")
    if mid_bias:
        c["mid_bias"] = random(w[:1], torch.float64, "m")
    return f"separable_conv{rank}d", c | options


def local(x, out, w, bias=True, innermost=False, **options):
    rank = len(x) - 2
    shape = (*out, *w)
    weight = random(shape, torch.float64, "w", torch.Size(w[1:]).numel() ** -0.5)
    if innermost:
        weight = torch.empty_strided(
            shape, local_weight_strides(shape, True), dtype=weight.dtype, device=DEVICE
        ).copy_(weight)  # fmt: skip
    c = {"input": random(x, torch.float64, "x"), "weight": weight}
    if bias:
        c["bias"] = random((w[0], *out), torch.float64, "b")
    return f"locally_connected{rank}d", c | options


CASES = {
    "shuffle": shuffled((2, 12, 5, 4), (9, 4, 1, 1), groups=3),
    "shuffle-3x3": shuffled((2, 8, 7, 6), (12, 4, 3, 2), groups=2, padding=1, stride=(2, 1), dilation=(1, 2)),
    "shuffle-many-groups": shuffled((1, 20, 3, 3), (20, 2, 1, 1), groups=10, bias=False),
    "shuffle-wide": shuffled((1, 66, 4, 3), (70, 33, 1, 1), groups=2, activation="relu"),
    "shuffle-pairs": shuffled((1, 6, 4, 5), (4, 3, 2, 2), groups=2, padding=((1, 0), (0, 2)), activation="silu"),
    "separable": separable((2, 5, 6, 5), (5, 1, 3, 3), 7, padding=1),
    "separable-multiplier": separable((2, 3, 7, 6), (6, 1, 3, 2), 4, stride=2, padding=(1, 0), mid_bias=True),
    "separable-activations": separable(
        (1, 6, 5, 5), (6, 1, 3, 3), 5, padding="same", mid_bias=True, mid_activation="relu6", activation="gelu"
    ),
    "separable-dilated": separable((1, 4, 9, 8), (4, 1, 3, 3), 3, dilation=(2, 3), padding=2, bias=False),
    "separable-causal": separable((2, 5, 11), (5, 1, 4), 6, padding=((3, 0),), mid_activation="silu"),
    "separable-3d": separable((1, 3, 4, 3, 5), (6, 1, 2, 2, 2), 5, padding=1, activation="relu"),
    "local": local((2, 5, 5, 4), (3, 2), (4, 5, 3, 3)),
    "local-batch": local((9, 4, 4, 4), (3, 2), (3, 4, 2, 3)),
    "local-groups": local((2, 6, 5, 4), (2, 2), (4, 3, 3, 2), groups=2, padding=(1, 0), stride=(2, 1), dilation=2),
    "local-innermost": local((9, 4, 3, 3), (3, 2), (5, 4, 2, 3), innermost=True, padding=((1, 0), (1, 0)), bias=False),
    "local-1d": local((3, 3, 9), (4,), (5, 3, 3), stride=2, padding=((0, 1),)),
    "local-3d": local((2, 2, 3, 3, 4), (2, 2, 2), (3, 2, 2, 2, 2), dilation=(1, 1, 2)),
    "local-same": local((1, 3, 3, 4), (3, 4), (2, 3, 2, 3), padding="same"),
    "local-1x1": local((2, 17, 2, 3), (2, 3), (19, 17, 1, 1)),
}  # fmt: skip
KERNEL_OF = {"shuffle": "shuffle_gemm", "separable": "separable", "local": "locally_connected"}


def kernel_of(name):
    return KERNEL_OF[name.split("-")[0]]


def cast(arguments, dtype, layout=None):
    """The arguments in a dtype, the input in a layout."""
    result = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    return result | {"input": layout(result["input"])} if layout else result


def bound(made, dtype):
    problem, precision = made.problem, "ieee" if INTERPRETED else made.problem.precision
    separable = made.kernel.name.startswith("separable")
    terms = problem.geometry.K + (problem.geometry.c_out if separable else 0)
    return tolerance(dtype, terms, precision, int(separable))


def check(name, dtype, layout=None):
    function, arguments = CASES[name]
    arguments = cast(arguments, dtype, layout)
    made = tc.plan(getattr(tc, function), **arguments)
    launches.clear()
    result = getattr(tc, function)(**arguments)
    assert dict(launches) == {kernel_of(name): 1}
    assert result.dtype == dtype
    if result.dim() > 3:
        assert result.stride() == strides_of_format(result.shape, arguments["input"])
    expected = reference(function, arguments)
    if arguments.get("activation"):
        before = reference(function, arguments | {"activation": None})
        compare_activated(result, expected, before, bound(made, dtype))
    else:
        compare(result, expected, bound(made, dtype))


PLAIN = ("shuffle", "separable", "local")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name, dtype, id=f"{name}-{name_of(dtype)}",
            marks=pytest.mark.slow if dtype != torch.float32 and name not in PLAIN else (),
        )
        for name in CASES
        for dtype in DTYPES
    ],
)  # fmt: skip
def test_values(name, dtype):
    check(name, dtype)


def both(x):
    return channels_last(sliced(x))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(
            name, layout, id=f"{name}-{layout.__name__}",
            marks=pytest.mark.slow if layout is not channels_last and name not in PLAIN else (),
        )
        for name in CASES
        for layout in (channels_last, sliced, both)
    ],
)  # fmt: skip
def test_layouts(name, layout):
    check(name, torch.float32 if layout is sliced else torch.bfloat16, layout)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["shuffle", "separable", "local"])
def test_smoke(name):
    check(name, torch.float32)


# The definitions of the references in torch's own words: the references are what everything else is compared with.
def test_the_reference_of_a_locally_connected_layer():
    x, w = random((2, 6, 5, 4), torch.float64), random((3, 2, 4, 3, 2, 3), torch.float64, "w")
    b = random((4, 3, 2), torch.float64, "b")
    columns = F.unfold(x, (2, 3), padding=1, stride=2).unflatten(1, (2, 18)).unflatten(3, (3, 2))
    expected = torch.einsum("ngkhw,hwgok->ngohw", columns, w.reshape(3, 2, 2, 2, 18)).flatten(1, 2) + b
    window = {"stride": 2, "padding": 1, "groups": 2}
    got = reference("locally_connected2d", {"input": x, "weight": w, "bias": b, **window})
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("exact_products")
def test_shared_filters_make_it_a_convolution():
    x, w = random((2, 4, 5, 5)), random((3, 4, 3, 3), seed="w")
    result = tc.locally_connected2d(x, w.expand(5, 5, 3, 4, 3, 3), padding=1)
    compare(result, F.conv2d(x.double(), w.double(), padding=1), tolerance(torch.float32, 36))


def test_shuffled_is_shuffled_after():
    _, arguments = CASES["shuffle"]
    # Whole numbers: two kernels may add up, and round to tf32, in different ways.
    arguments = {k: (4 * v).round().float() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    plain = tc.conv2d(**arguments)
    assert torch.equal(tc.shuffle_conv2d(**arguments), tc.channel_shuffle(plain, 3))


@pytest.mark.parametrize(("groups", "w"), [(1, (4, 6, 1, 1)), (6, (6, 1, 3, 3))])
def test_nothing_to_shuffle(groups, w):
    x, weight = random((1, 6, 4, 4)), random(w, seed="w")
    assert torch.equal(tc.shuffle_conv2d(x, weight, groups=groups), tc.conv2d(x, weight, groups=groups))
    assert "shuffle_gemm" not in launches
    assert tc.plan(tc.shuffle_conv2d, x, weight, groups=groups).kernel.name != "shuffle_gemm"


@pytest.mark.parametrize("layout", [None, channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", [(5,), (3, 4), (2, 3, 2)])
def test_channel_shuffle(size, layout):
    x = random((2, 12, *size))
    x = layout(x) if layout else x
    result = tc.channel_shuffle(x, 3)
    expected = torch.nn.functional.channel_shuffle(x.flatten(2)[..., None], 3).view(x.shape)
    assert torch.equal(result, expected)
    assert result.stride() == x.stride()
    assert torch.equal(tc.channel_shuffle(result, 4), x), "shuffled back"


@pytest.mark.usefixtures("exact_products")
def test_two_kernels_where_one_would_filter_again():
    x, dw = random((1, 4, 5, 5)), random((4, 1, 3, 3), seed="w")
    pw, bias = random((300, 4, 1, 1), seed="p"), random((300,), seed="b")
    arguments = dict(padding=1, mid_activation="relu", activation="silu")
    with tc.set_separable_fusion(None):
        made = tc.plan(tc.separable_conv2d, x, dw, pw, bias, **arguments)
        assert isinstance(made, Chain)
        assert "300 output channels are several tiles" in str(made)
        assert [plan.kernel.name for plan in made.plans] == ["depthwise_banded", "implicit_gemm"]
        result = tc.separable_conv2d(x, dw, pw, bias, **arguments)
        assert dict(launches) == {plan.kernel.name: 1 for plan in made.plans}
        large = random((4, 1, 5, 5), seed="w")
        assert "25 taps" in tc.plan(tc.separable_conv2d, x, large, random((3, 4, 1, 1)), padding=2).reason
    given = dict(input=x, depthwise_weight=dw, pointwise_weight=pw, bias=bias, **arguments)
    compare(result, reference("separable_conv2d", given), tolerance(torch.float32, 13))


@pytest.mark.parametrize("name", ["shuffle", "separable-causal", "separable", "local", "local-1d"])
def test_unbatched(name):
    function, arguments = CASES[name]
    arguments = cast(arguments, torch.float32)
    whole = getattr(tc, function)(**arguments)
    arguments["input"] = arguments["input"][0]
    torch.testing.assert_close(getattr(tc, function)(**arguments), whole[0])


@pytest.mark.parametrize("name", ["shuffle", "separable", "local", "local-innermost"])
def test_empty_batch(name):
    function, arguments = CASES[name]
    arguments = cast(arguments, torch.float32)
    leaf = arguments["input"][:0].requires_grad_()
    weight = "depthwise_weight" if function.startswith("sep") else "weight"
    arguments |= {"input": leaf, weight: arguments[weight].requires_grad_()}
    result = getattr(tc, function)(**arguments)
    assert result.shape == reference(function, arguments).shape
    assert not launches
    grads = torch.autograd.grad(result.sum(), (leaf, arguments[weight]))
    assert [grad.shape for grad in grads] == [leaf.shape, arguments[weight].shape]
    assert not grads[1].any()


# --------------------------------------------------------------------------------------------------------- gradients

FEW = [
    "shuffle-3x3",
    "shuffle-wide",
    "shuffle-pairs",
    "separable-multiplier",
    "separable-activations",
    "separable-causal",
]
LONG = ("local-batch", "local-groups", "local-innermost", "local-3d", "local-1x1", "separable-activations")
FEW += ["local", "local-batch", "local-groups", "local-innermost", "local-1d", "local-3d", "local-1x1"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in FEW])
def test_derivatives(name):
    function, arguments = CASES[name]
    names = [k for k, v in arguments.items() if isinstance(v, torch.Tensor)]
    options = {k: v for k, v in arguments.items() if k not in names}

    def ours(*tensors, **kwargs):
        return getattr(tc, function)(**dict(zip(names, tensors, strict=True)), **kwargs)

    def theirs(*tensors, **kwargs):
        return reference(function, dict(zip(names, tensors, strict=True)) | kwargs)

    tensors = [arguments[k] for k in names]
    mine = derivatives(ours, tensors, options, second=True)
    compare_derivatives(mine, derivatives(theirs, tensors, options, second=True), 1e-11)
    gradients = ("locally_connected_input_gradient", "locally_connected_input_gradient_rolling")
    used = {"shuffle": ("shuffle_gemm",), "separable": ("separable",), "local": gradients}
    assert sum(launches[kernel] for kernel in used[name.split("-")[0]])
    if name.startswith("local"):
        assert launches["locally_connected_weight_gradient"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=name_of)
@pytest.mark.parametrize(
    "name", ["shuffle", "separable", "local-innermost", pytest.param("local-batch", marks=pytest.mark.slow)]
)
def test_gradients_in(name, dtype):
    function, arguments = CASES[name]
    arguments = cast(arguments, dtype, channels_last)
    names = [k for k in arguments if k in ("input", "weight", "depthwise_weight", "pointwise_weight")]
    leaves = [arguments[k].detach().requires_grad_() for k in names]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    result = getattr(tc, function)(**arguments | dict(zip(names, leaves, strict=True)))
    grad = random(result.shape, dtype, "g")
    mine = torch.autograd.grad(result, leaves, grad)
    expected = reference(function, arguments | dict(zip(names, exact, strict=True)))
    theirs = torch.autograd.grad(expected, exact, grad.double())
    for leaf, got, want in zip(leaves, mine, theirs, strict=True):
        assert got.dtype == dtype
        assert got.stride() == leaf.stride() or not name.startswith("local"), "in the format of what it belongs to"
        compare_derivatives([got], [want], 8 * torch.finfo(dtype).eps)


# --------------------------------------------------------------------------------------------------------------- ops


def op_arguments():
    x, w = random((2, 4, 4, 3)), random((6, 2, 1, 1), seed="w")
    window = ([1, 1], [0, 0, 0, 0], [1, 1])
    filters = random((3, 2, 5, 4, 2, 2), seed="f")
    dy = random((2, 5, 3, 2), seed="y")
    depthwise, pointwise = random((8, 1, 3, 2), seed="d"), random((3, 8, 1, 1), seed="p")
    separable = (x, depthwise, pointwise, random((8,)), None, *window, "silu", "relu")
    return {
        "shuffle": (ops_fused.shuffle_conv, (x, w, random((6,)), *window, 2, "relu")),
        "separable": (ops_fused.separable_conv, separable),
        "separable-chosen": (torch.ops.triton_conv.chosen_separable_conv.default, separable),
        "local": (ops_local.local_conv, (x, filters, random((5, 3, 2)), *window, 1)),
        "local-dx": (ops_local.local_conv_input_gradient, (dy, filters, [4, 3], *window, 1, True)),
        "local-dw": (ops_local.local_conv_weight_gradient, (x, dy, [2, 2], *window, 1, True)),
    }


LONG_CHECKS = ("separable", "local-dx", "local-dw")


# Of torch 2.15's own tracing.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG_CHECKS else n for n in op_arguments()]
)
def test_opcheck(name):
    op, arguments = op_arguments()[name]
    arguments = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", CASES)
def test_meta_tensors(name):
    function, arguments = CASES[name]
    arguments = cast(arguments, torch.bfloat16)
    real = getattr(tc, function)(**arguments)
    on_meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    launches.clear()
    result = getattr(tc, function)(**on_meta)
    assert (result.shape, result.stride()) == (real.shape, real.stride())
    assert not launches


def test_plans_are_printed():
    for name in ("shuffle", "separable", "local"):
        function, arguments = CASES[name]
        text = str(tc.plan(getattr(tc, function), **arguments))
        assert f"{kernel_of(name)} on " in text
        assert KERNEL_OF[name].split("_")[0][:5] in text.splitlines()[1], "the problem says which kind it is"
        assert "GFLOP" in text


def test_results_are_the_same_bits_twice():
    for name in ("shuffle", "separable", "local"):
        function, arguments = CASES[name]
        arguments = cast(arguments, torch.float32)
        arguments["input"].requires_grad_()
        results = [getattr(tc, function)(**arguments) for _ in range(2)]
        grads = [torch.autograd.grad(result.sum(), arguments["input"])[0] for result in results]
        assert torch.equal(*results)
        assert torch.equal(*grads)


@pytest.mark.parametrize("kernel", ["implicit_gemm", "grouped_packed", "separable"])
def test_other_kernels_do_not_take_them(kernel):
    function, arguments = CASES["shuffle"]
    problem = tc.plan(getattr(tc, function), **arguments).problem
    with pytest.raises(PlanError, match=r"leave shuffled|no 1x1"):
        dispatch.plan(problem, KNOWN["sm_90"], kernel)
