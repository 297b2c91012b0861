"""Tensors that reach beyond 2^31 elements, on storage that is mapped but hardly ever touched.

On Linux a large private mapping takes no memory until a page of it is written, so a few pages in a range of many
gigabytes hold a whole test. The views start 2^31 elements into the mapping: an offset that wrapped around in 32 bits
reads zeros before the view, and the comparison fails.
"""

import functools
import math
import mmap
import resource
from dataclasses import replace

import pytest
import torch
from helpers import DEVICE, channels_last, check, launches, random, sliced
from test_deformable import tensors as deformable_tensors
from test_tiles import run

import triton_conv as tc
from triton_conv import dispatch, ops_conv
from triton_conv.geometry import ConvGeometry
from triton_conv.kernels import KERNELS, launch
from triton_conv.kernels.depthwise_patch import DepthwisePatchTile
from triton_conv.layout import dense_strides, five
from triton_conv.ops_fused import set_separable_fusion
from triton_conv.problem import Problem
from triton_conv.problem_deform import DeformProblem
from triton_conv.target import KNOWN

LIMIT = 2**31
MAP_NORESERVE = 0x4000  # mmap.MAP_NORESERVE, which Python names from 3.13 on


@functools.cache
def storage():
    """Float16 zeros, 2^31 elements below the views' first and three times as many above: 16 GiB."""
    elements = 4 * LIMIT + 2**20
    if DEVICE == "cuda":
        if torch.cuda.mem_get_info()[0] < 2.2 * elements:
            pytest.skip("not enough memory on the device")
        return torch.zeros(elements, dtype=torch.float16, device=DEVICE)
    try:
        memory = mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except (OSError, AttributeError, ValueError) as error:
        pytest.skip(f"no lazily mapped memory: {error}")
    return torch.frombuffer(memory, dtype=torch.float16)


@pytest.fixture
def spread():
    """A function that gives a tensor another stride in one dimension; what it wrote is zero again after the test."""
    views = []

    def change(tensor, dim, stride):
        strides = list(tensor.stride())
        strides[dim] = stride
        view = storage().as_strided(tensor.shape, strides, LIMIT)
        views.append(view)
        return view.copy_(tensor)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield change
    for view in views:
        view.zero_()
    if DEVICE == "cpu":  # ru_maxrss is in KiB
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19, "touched more than 512 MiB"


LAYERS = {
    "implicit_gemm": ("conv2d", (3, 3, 3, 4), (4, 3, 3, 3), {"padding": 1}),
    "implicit_gemm-1x1": ("conv2d", (3, 3, 3, 4), (4, 3, 1, 1), {}),
    "implicit_gemm-1d": ("conv1d", (3, 3, 3), (4, 3, 2), {"padding": 1}),
    "implicit_gemm-3d": ("conv3d", (3, 3, 3, 2, 3), (4, 3, 2, 2, 2), {"padding": 1}),
    "implicit_gemm-reflect": ("conv2d", (3, 3, 3, 4), (4, 3, 3, 3), {"padding": 1, "padding_mode": "reflect"}),
    "grouped_packed": ("conv2d", (3, 4, 3, 4), (4, 2, 3, 3), {"padding": 1, "groups": 2}),
    "depthwise": ("conv2d", (3, 3, 3, 4), (6, 1, 3, 3), {"padding": 1, "groups": 3}),
    "transposed_phase": ("conv_transpose2d", (3, 3, 3, 4), (3, 4, 3, 3), {"stride": 2}),
    "transposed_phase-groups": ("conv_transpose2d", (3, 4, 3, 4), (4, 2, 3, 3), {"stride": 2, "groups": 2}),
}
# One stride is beyond 32 bits itself, or only the sum of several is.
STRIDES = {"one-stride": LIMIT + 24, "sum-of-strides": 2**30 + 16}


def arguments_of(layer):
    function, x, w, options = LAYERS[layer]
    c_out = w[1] * options.get("groups", 1) if "transpose" in function else w[0]
    tensors = {"input": random(x, torch.float16), "weight": random(w, torch.float16), "bias": random((c_out,)).half()}
    if layer == "depthwise":
        # Pixels that are not contiguous are for this form alone; the others have tests of their own.
        tensors["input"] = sliced(tensors["input"])
    return function, tensors | options


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "channel", "row"])
@pytest.mark.parametrize("layer", LAYERS)
def test_input(layer, dim, stride, spread):
    function, arguments = arguments_of(layer)
    arguments["input"] = spread(arguments["input"], dim, STRIDES[stride])
    check(function, arguments, layer.split("-")[0])


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["first", "second", "row"])
@pytest.mark.parametrize("layer", LAYERS)
def test_weight(layer, dim, spread):
    function, arguments = arguments_of(layer)
    stride = min(2**30 + 16, (3 * LIMIT - 1) // max(arguments["weight"].shape[dim] - 1, 1))
    arguments["weight"] = spread(arguments["weight"], dim, stride)
    check(function, arguments, layer.split("-")[0])


@pytest.mark.parametrize("layer", LAYERS)
def test_bias(layer, spread):
    function, arguments = arguments_of(layer)
    arguments["bias"] = spread(arguments["bias"], 0, 2**30 + 16)
    check(function, arguments, layer.split("-")[0])


@pytest.mark.parametrize("dim", [0, 2, 3], ids=["batch", "row", "column"])
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("name", ["input", "weight"])
def test_depthwise_patch(name, stride, dim, spread):
    arguments = {"input": channels_last(random((3, 4, 3, 4), torch.float16)), "weight": random((4, 1, 3, 3)).half()}
    # Three steps of the weight's would leave the storage.
    arguments[name] = spread(arguments[name], dim, STRIDES[stride] if name == "input" else 2**30 + 16)
    for unroll in (False, True):
        launches.clear()
        tile = DepthwisePatchTile(UNROLL=unroll, ROWS=2, COLS=4, BLOCK_P=4, BLOCK_C=4)
        run("conv2d", arguments | {"groups": 4, "padding": 1}, "depthwise_patch", tile)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "channel", "row"])
@pytest.mark.parametrize("name", ["input", "offset", "mask"])
def test_deformable(name, dim, spread):
    arguments = deformable_tensors(3, torch.float16)
    stride = min(2**30 + 16, 3 * LIMIT // arguments[name].shape[dim])
    arguments[name] = spread(arguments[name], dim, stride)
    check("deform_conv2d", arguments, "deformable")


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "channel", "row"])
@pytest.mark.parametrize("layer", LAYERS)
def test_weight_gradient(layer, dim, spread):
    function, arguments = arguments_of(layer)
    weight = arguments["weight"].requires_grad_()
    (expected,) = torch.autograd.grad(getattr(tc, function)(**arguments).sum(), weight)
    arguments["input"] = spread(arguments["input"], dim, 2**30 + 16)
    (found,) = torch.autograd.grad(getattr(tc, function)(**arguments).sum(), weight)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "dim", [0, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (1, 2))], ids=["batch", "channel", "row"]
)
@pytest.mark.parametrize("name", ["input", "offset", "mask"])
def test_deformable_gradients(name, dim, spread):
    arguments = deformable_tensors(3, torch.float16)
    leaves = [arguments[key].requires_grad_() for key in ("input", "offset", "mask", "weight")]
    expected = torch.autograd.grad(tc.deform_conv2d(**arguments).sum(), leaves)
    stride = min(2**30 + 16, 3 * LIMIT // arguments[name].shape[dim])
    arguments[name] = spread(arguments[name].detach(), dim, stride).detach().requires_grad_()
    leaves = [arguments[key] for key in ("input", "offset", "mask", "weight")]
    found = torch.autograd.grad(tc.deform_conv2d(**arguments).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        # Atomics add up in any order: a last digit may differ.
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-3)


def test_many_images_in_a_tile_of_a_phase(spread):
    # A phase has an eighth of the output's pixels, so that a tile of it reaches eight times as many images.
    arguments = {"input": random((9, 2, 2), torch.float16), "weight": random((2, 3, 8), torch.float16), "stride": 8}
    arguments["input"] = spread(arguments["input"], 0, 2**28)
    check("conv_transpose1d", arguments, "transposed_phase")


def problem(x_shape, w_shape, x_strides=None, transposed=False, **changes):
    rank = len(x_shape) - 2
    stride = changes.pop("stride", 1)
    geometry = ConvGeometry.of(
        x_shape, w_shape, (stride,) * rank, ((0, 0),) * rank, (1,) * rank, 1, transposed=transposed,
        output_padding=(0,) * rank,
    )  # fmt: skip
    strides = [dense_strides(shape, False) for shape in (x_shape, w_shape, geometry.out_shape)]
    strides[0] = x_strides or strides[0]
    return Problem(geometry, torch.float16, *(five(s) for s in strides), **changes)


def test_small_problems_index_in_32_bits():
    assert not problem((64, 64, 56, 56), (64, 64, 3, 3)).wide_index(128)
    assert not problem((2, 64, 2048, 4096), (8, 64, 1, 1)).wide_index(128)


@pytest.mark.parametrize(
    "large",
    [
        pytest.param(problem((2, 64, 8192, 4097), (1, 64, 1, 1)), id="image"),
        pytest.param(problem((1, 1, 8192, 4097), (64, 1, 1, 1)), id="output-image"),
        pytest.param(problem((2**16, 1, 256, 129), (1, 1, 1, 1)), id="pixels"),
        pytest.param(problem((4, 1, 2, 2), (1, 1, 1, 1), (2**30, 4, 2, 1)), id="batch-stride"),
        pytest.param(problem((1, 4, 2, 2), (1, 4, 1, 1), (0, 2**30, 2, 1)), id="channel-stride"),
        pytest.param(problem((1, 1, 4, 2), (1, 1, 1, 1), (0, 0, 2**30, 1)), id="row-stride"),
        pytest.param(problem((9, 2, 2), (2, 3, 64), (2**28, 2, 1), True, stride=64), id="images-of-a-phase"),
        pytest.param(problem((1, 1, 2), (4, 1, 1), has_bias=True, stride_b=2**30), id="bias-stride"),
    ],
)
def test_large_problems_index_in_64_bits(large):
    assert large.wide_index(128)


def test_many_small_images_need_no_64_bits():
    # Every tile starts from a 64-bit base: only the images that one tile touches count.
    assert not problem((2**15, 64, 32, 32), (64, 64, 1, 1)).wide_index(128)


BOXED = {
    "implicit_gemm_boxed": "conv2d",
    "implicit_gemm_persistent": "conv2d",
    "implicit_gemm_rolling": "conv2d",
    "strided_boxed": "conv_transpose2d",
}


@pytest.mark.parametrize("name", BOXED)
def test_a_weight_or_bias_beyond_the_pointers_beside_boxes_is_for_other_forms(name):
    x, w = (channels_last(random(shape, torch.float16)) for shape in ((1, 32, 5, 6), (32, 32, 3, 3)))
    near = tc.plan(getattr(tc, BOXED[name]), x, w, stride=2 if name == "strided_boxed" else 1).problem
    assert KERNELS[name].unsuited(near) is None
    first, second, depth, _, width = near.w_strides
    rows_apart = replace(near, w_strides=(first, second, depth, 2**30 + 16, width))
    for far in (rows_apart, replace(near, has_bias=True, stride_b=2**28)):
        assert "beyond 2^31" in KERNELS[name].unsuited(far)
        assert dispatch.plan(far, KNOWN["sm_90"]).kernel.name not in BOXED


@pytest.mark.parametrize("name", ["weight_gradient_boxed", "weight_gradient_clipped"])
def test_phases_further_apart_than_a_box_steps_are_for_other_forms(name):
    x, dy = (channels_last(random(shape, torch.float16)) for shape in ((1, 16, 5, 6), (1, 16, 3, 3)))
    near = ops_conv.plan_conv_weight_gradient(x, dy, (3, 3), (2, 2), (3, 3, 3, 3), (3, 3), 1, "zeros").problem
    assert KERNELS[name].unsuited(near) is None
    # Every second column is a step of 2^31 + 32 elements, which is a negative one in 32 bits.
    far = replace(near, x_strides=(*near.x_strides[:4], 2**30 + 16))
    assert "2^31 elements apart" in KERNELS[name].unsuited(far)
    assert dispatch.plan(far, KNOWN["sm_90"]).kernel.name not in ("weight_gradient_boxed", "weight_gradient_clipped")


def test_a_bias_beyond_the_pointers_of_overlapping_taps():
    x, w = random((2, 16, 4, 4), torch.float16), random((16, 16, 4, 4), torch.float16)
    kernel, near = KERNELS["transposed_overlap"], tc.plan(tc.conv_transpose2d, x, w, stride=2).problem
    assert kernel.safe_tile.mismatch(near) is None
    assert "pass 2^31" in kernel.safe_tile.mismatch(replace(near, has_bias=True, stride_b=2**28))


def test_either_bias_of_a_separable_convolution_counts():
    x, depthwise, pointwise = (random(shape) for shape in ((1, 8, 4, 4), (8, 1, 3, 3), (16, 8, 1, 1)))
    with set_separable_fusion(True):
        near = tc.plan(tc.separable_conv2d, x, depthwise, pointwise).problem
    assert not near.wide_index(64)
    assert replace(near, has_mid_bias=True, stride_mb=2**29).wide_index(64)
    # Of the channels that come out, more than are filtered.
    assert replace(near, has_bias=True, stride_b=2**27).wide_index(64)


@pytest.mark.parametrize("name", ["offset_strides", "mask_strides"])
def test_offsets_count_too(name):
    plain = tc.plan(tc.deform_conv2d, **deformable_tensors(3, torch.float16)).problem
    assert isinstance(plain, DeformProblem)
    assert not plain.wide_index(64)
    assert replace(plain, **{name: (2**30, 36, 6, 1)}).wide_index(64)


def test_the_kernel_is_told(spread):
    function, arguments = arguments_of("implicit_gemm")
    assert tc.plan(getattr(tc, function), **arguments).values["INDEX_INT64"] is False
    arguments["input"] = spread(arguments["input"], 0, 2**30)
    assert tc.plan(getattr(tc, function), **arguments).values["INDEX_INT64"] is True
    assert math.prod(arguments["input"].shape) < 2**10


@pytest.mark.parametrize(
    ("function", "kernel", "options"),
    [
        ("conv2d", "depthwise", {}),
        ("conv2d", "implicit_gemm", {}),
        ("conv2d", "implicit_gemm", {"padding_mode": "circular"}),
        ("conv_transpose2d", "transposed_phase", {}),
    ],
    ids=["depthwise", "implicit_gemm", "implicit_gemm-circular", "transposed_phase"],
)
def test_an_image_of_2_32_pixels(function, kernel, options):
    # Two programs of the millions: which pixels are theirs depends on the image's size, which is 0 in 32 bits.
    x = random((1, 1, 1, 1), torch.float16).expand(1, 1, 2**16, 2**16)
    # With one output channel a transposed convolution of stride 1 is planned as a forward one.
    w = torch.ones(1, 2 if kernel == "transposed_phase" else 1, 1, 1, dtype=torch.float16, device=DEVICE)
    made = tc.plan(getattr(tc, function), x, w, **options)
    made = dispatch.plan(made.problem, made.target, kernel)
    output = storage().as_strided(made.out_shape, made.out_strides)
    row = output[0, 0, 0, : 2 * made.tile.BLOCK_M]
    row.fill_(float("nan"))
    launch(made.kernel, 2, made.tile, made.values, x, w, None, output)
    assert torch.equal(row, x[0, 0, 0, : row.numel()])
    row.zero_()
