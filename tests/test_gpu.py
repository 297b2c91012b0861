"""What only a GPU shows: full sizes, compiled tiles, streams, devices. The other files run on a GPU too."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import BANDED, CASES, DEPTHWISE, GEMM, PACKED, PATCH, PHASE, case
from helpers import DTYPES, channels_last, check, compare, limit, name_of, random
from test_tiles import FORMATS, LAYERS, formatted, run

import triton_conv as tc
from triton_conv import dispatch
from triton_conv.autotune.space import candidates
from triton_conv.defaults import default_tile
from triton_conv.errors import DeviceError
from triton_conv.reference import reference
from triton_conv.target import of_device
from triton_conv.workloads import FLAGSHIPS

pytestmark = pytest.mark.gpu

HALF = ("float16", "bfloat16")


# The float64 reference of so many elements, and the comparison with it, take less than 2 GB: other test processes share
# the card. Of the flagships only the causal layer has more in two images.
MOST_ELEMENTS = 2**25


def small_batches(dtypes):
    """The flagship layers, two images of each, in both memory formats; in full width, but for a depthwise layer of more
    than MOST_ELEMENTS, whose channels do not depend on each other.
    """
    for workload in FLAGSHIPS:
        for variant in workload.variants(dtypes, both_formats=True):
            batch, channels, *size = variant.input
            variant = replace(variant, input=(min(batch, 2), channels, *size))
            if variant.kind == "depthwise" and math.prod(variant.input) > MOST_ELEMENTS:
                few = MOST_ELEMENTS // (math.prod(variant.input) // channels)
                variant = replace(
                    variant,
                    input=(variant.input[0], few, *size),
                    weight=(few, *variant.weight[1:]),
                    arguments=variant.arguments | {"groups": few},
                )
            yield pytest.param(variant, id=variant.title)


@pytest.mark.parametrize("workload", list(small_batches(HALF)))
def test_flagships(workload):
    check(workload.function, workload.tensors("cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("workload", list(small_batches(("float32", "float64"))))
def test_flagships_in_single_and_double_precision(workload):
    check(workload.function, workload.tensors("cuda"))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    ("layer", "kernel"),
    [pytest.param(layer, kernel, id=f"{kernel}-{layer.id}") for kernel, layers in LAYERS.items() for layer in layers],
)
def test_default_tiles(layer, kernel, dtype, layout):
    arguments = formatted(layer, kernel, layout).tensors(dtype)
    made = tc.plan(getattr(tc, layer.function), **arguments)
    run(layer.function, arguments, kernel, default_tile(kernel, made.problem, made.target))


# Sizes that no tile divides, wide enough for several tiles of every candidate.
WIDE = {
    GEMM: case("dense", GEMM, "conv2d", (3, 200, 33, 31), (136, 200, 3, 3), padding=1),
    PACKED: case("grouped", PACKED, "conv2d", (3, 168, 33, 31), (168, 8, 3, 3), groups=21, padding=1),
    DEPTHWISE: case("depthwise", DEPTHWISE, "conv2d", (3, 104, 33, 31), (104, 1, 5, 5), groups=104, padding=2),
    BANDED: case("banded", BANDED, "conv2d", (3, 104, 33, 31), (104, 1, 5, 5), groups=104, padding=2),
    PATCH: case("patch", PATCH, "conv2d", (3, 104, 33, 31), (104, 1, 5, 5), groups=104, padding=2, x=channels_last),
    PHASE: case("transposed", PHASE, "conv_transpose2d", (3, 200, 17, 15), (200, 136, 4, 4), stride=2, padding=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("kernel", WIDE)
def test_every_tile_that_tuning_may_try(kernel, dtype, layout):
    # A wrong tile can compile and be fast: some compilers have made such code of some tiles.
    layer = formatted(WIDE[kernel], kernel, layout)
    arguments = layer.tensors(dtype)
    made = tc.plan(getattr(tc, layer.function), **arguments)
    expected = reference(layer.function, arguments)
    wrong = []
    for tile in candidates(kernel, made.problem, made.target):
        forced = dispatch.plan(made.problem, made.target, kernel, tile)
        output = torch.empty_strided(made.out_shape, made.out_strides, dtype=dtype, device="cuda").fill_(float("nan"))
        weight = forced.arranged(arguments["weight"])
        forced.launch(arguments["input"], weight, arguments.get("bias"), output)
        try:
            compare(output, expected, limit(forced, output))
        except AssertionError as error:
            wrong.append(f"{tile}: {error}")
    assert wrong == []


@pytest.mark.parametrize("workload", list(small_batches(("bfloat16",))))
def test_the_same_bits_twice(workload):
    arguments = workload.tensors("cuda")
    function = getattr(tc, workload.function)
    assert torch.equal(function(**arguments), function(**arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=name_of)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_memory_formats_are_cudnns(layout, dtype):
    x, w = random((2, 16, 9, 9), dtype).contiguous(memory_format=layout), random((8, 16, 3, 3), dtype)
    assert tc.conv2d(x, w).stride() == F.conv2d(x, w).stride()
    w = random((16, 8, 3, 3), dtype)
    assert tc.conv_transpose2d(x, w).stride() == F.conv_transpose2d(x, w).stride()


@pytest.mark.xdist_group("large-0")
def test_more_than_2_31_elements():
    images = 2**31 // (64 * 512 * 512) + 1
    if torch.cuda.mem_get_info()[0] < 4 * images * 64 * 512 * 512 * 2:
        pytest.skip("not enough memory on the device")
    x = torch.empty((images, 64, 512, 512), dtype=torch.bfloat16, device="cuda").normal_()
    w = random((64, 1, 3, 3), torch.bfloat16)
    result = tc.conv2d(x, w, padding=1, groups=64)
    made = tc.plan(tc.conv2d, x, w, padding=1, groups=64)
    for image in (0, images - 1):
        arguments = {"input": x[image : image + 1], "weight": w, "padding": 1, "groups": 64}
        compare(result[image : image + 1], reference("conv2d", arguments), limit(made, result))


def test_a_stream_of_its_own():
    arguments = CASES["networks"][0].tensors(torch.float32)
    expected = tc.conv2d(**arguments)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        result = tc.conv2d(**arguments)
    stream.synchronize()
    assert torch.equal(result, expected)


def test_a_captured_graph():
    x, w = random((2, 16, 9, 9)), random((16, 4, 3, 3))
    tc.conv2d(x, w, groups=4)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = tc.conv2d(x, w, groups=4)
    x.copy_(random((2, 16, 9, 9), seed="other"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, tc.conv2d(x, w, groups=4))


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    arguments = CASES["smoke"][1].tensors(torch.float32)
    expected = tc.conv2d(**arguments)
    moved = {k: v.to("cuda:1") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    assert torch.cuda.current_device() == 0
    result = tc.conv2d(**moved)
    assert (result.device.index, torch.cuda.current_device()) == (1, 0)
    torch.testing.assert_close(result.to("cuda:0"), expected)
    with pytest.raises(DeviceError, match=r"^weight: .*one device"):
        tc.conv2d(arguments["input"], moved["weight"])


def test_a_weight_left_on_the_cpu():
    x, w = random((1, 3, 5, 5)), random((4, 3, 3, 3))
    with pytest.raises(DeviceError, match=r"^weight: .*input is on cuda:0 and weight on cpu"):
        tc.conv2d(x, w.cpu())


def test_the_target_is_the_device():
    target = of_device(torch.device("cuda"))
    properties = torch.cuda.get_device_properties(0)
    assert target.sms == properties.multi_processor_count
    assert target.vendor == ("amd" if torch.version.hip else "nvidia")
    assert 2**15 < target.shared_bytes < 2**20
    assert not target.interpreted
