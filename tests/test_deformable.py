"""Deformable convolution: torchvision's own test geometry, its definition written as loops, and its limits."""

import itertools
import math

import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    channels_last,
    check,
    compare,
    expanded,
    launches,
    limit,
    name_of,
    permuted,
    random,
    shifted,
    sliced,
)

import triton_conv as tc
from triton_conv.reference import deform_conv2d as reference_deform_conv2d
from triton_conv.reference import reference

TORCHVISION = {"stride": (2, 1), "padding": (1, 0), "dilation": (2, 1)}


def tensors(batch, dtype, mask=True, bias=True, layout=None, offset_dtype=None, spread=1.0):
    """torchvision's TestDeformConv: 6 to 2 channels, a kernel of 3 x 2, 2 weight groups, 3 offset groups."""
    taps, out = 6, (2, 3)
    result = {
        "input": random((batch, 6, 5, 4), dtype, "deform"),
        "offset": random((batch, 2 * 3 * taps, *out), offset_dtype or dtype, scale=spread),
        "weight": random((2, 3, 3, 2), dtype, "deform"),
    }
    if mask:
        result["mask"] = random((batch, 3 * taps, *out), dtype).sigmoid()
    if layout:
        result = {name: layout(tensor) for name, tensor in result.items()}
    if bias:
        result["bias"] = random((2,), dtype)
    return result | TORCHVISION


def loops(input, offset, weight, bias, stride, padding, dilation, mask):
    """The definition, element by element, with torchvision's bilinear rule: nothing from a pixel outside or further."""
    n, c_in, height, width = input.shape
    c_out, c_group, kh, kw = weight.shape
    h_out, w_out = offset.shape[2:]
    per_offset = c_in // (offset.shape[1] // (2 * kh * kw))
    per_group = c_out // (c_in // c_group)

    def pixel(image, channel, y, x):
        return input[image, channel, y, x].item() if 0 <= y < height and 0 <= x < width else 0.0

    def bilinear(image, channel, y, x):
        if y <= -1 or y >= height or x <= -1 or x >= width:
            return 0.0
        y0, x0 = math.floor(y), math.floor(x)
        dy, dx = y - y0, x - x0
        return (
            pixel(image, channel, y0, x0) * (1 - dy) * (1 - dx)
            + pixel(image, channel, y0, x0 + 1) * (1 - dy) * dx
            + pixel(image, channel, y0 + 1, x0) * dy * (1 - dx)
            + pixel(image, channel, y0 + 1, x0 + 1) * dy * dx
        )

    result = torch.zeros(n, c_out, h_out, w_out, dtype=torch.float64)
    for image, out, i, j in itertools.product(range(n), range(c_out), range(h_out), range(w_out)):
        total = bias[out].item()
        for inner, a, b in itertools.product(range(c_group), range(kh), range(kw)):
            channel = out // per_group * c_group + inner
            tap = channel // per_offset * kh * kw + a * kw + b
            y = i * stride[0] - padding[0] + a * dilation[0] + offset[image, 2 * tap, i, j].item()
            x = j * stride[1] - padding[1] + b * dilation[1] + offset[image, 2 * tap + 1, i, j].item()
            sample = bilinear(image, channel, y, x) * mask[image, tap, i, j].item()
            total += sample * weight[out, inner, a, b].item()
        result[image, out, i, j] = total
    return result


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_the_reference_is_the_definition(spread):
    arguments = {
        name: value.cpu() if isinstance(value, torch.Tensor) else value
        for name, value in tensors(2, torch.float64, spread=spread).items()
    }
    torch.testing.assert_close(reference_deform_conv2d(**arguments), loops(**arguments), rtol=1e-12, atol=1e-12)


def transposed(tensor):
    """torchvision's way to make a tensor non-contiguous."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("mask", [True, False], ids=["v2", "v1"])
@pytest.mark.parametrize("layout", [None, transposed], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("batch", [0, 33])
def test_torchvision_geometry(batch, dtype, layout, mask, bias, conv_precision):
    # torchvision multiplies by a matrix product, for which torch's default is ieee; its own test has these bounds.
    conv_precision.fp32_precision = "ieee"
    arguments = tensors(batch, dtype, mask, bias, layout)
    result = check("deform_conv2d", arguments, "deformable")
    assert result.is_contiguous()
    if dtype != torch.bfloat16:  # which torchvision has not
        bound = 2e-3 if dtype == torch.float16 else 1e-5
        torch.testing.assert_close(result.double(), reference("deform_conv2d", arguments), rtol=bound, atol=bound)


@pytest.mark.parametrize("layout", [sliced, permuted, expanded, shifted, channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_layouts(layout, dtype):
    result = check("deform_conv2d", tensors(3, dtype, layout=layout), "deformable")
    if layout is channels_last:
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_float32_offsets_beside_half_precision(dtype):
    arguments = tensors(3, dtype, offset_dtype=torch.float32)
    check("deform_conv2d", arguments)
    check("deform_conv2d", arguments | {"mask": arguments["mask"].float()})


@pytest.mark.parametrize("spread", [3.0, 50.0, 1e6, 1e30])
def test_offsets_outside_the_image(spread):
    check("deform_conv2d", tensors(3, torch.float32, spread=spread))


@pytest.mark.parametrize("far", [math.inf, -math.inf])
def test_infinite_offsets_sample_nothing(far):
    arguments = tensors(2, torch.float32)
    arguments["offset"].fill_(far)
    result = tc.deform_conv2d(**arguments)
    assert torch.equal(result, arguments["bias"].view(1, 2, 1, 1).expand(result.shape))


@pytest.mark.parametrize("edge", [-1.0, -0.5, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("border", ["first", "last"])
def test_samples_at_the_border(edge, border, conv_precision):
    # A 1 x 1 kernel that reads every row (or column) at one coordinate around the first or last pixel.
    x = random((1, 1, 4, 5), seed="border")
    w = torch.ones(1, 1, 1, 1, device=DEVICE)
    rows = torch.arange(4, device=DEVICE).view(4, 1).expand(4, 5)
    columns = torch.arange(5, device=DEVICE).view(1, 5).expand(4, 5)
    row, column = (edge, edge) if border == "first" else (3 + edge, 4 + edge)
    offset = torch.stack([row - rows, column - columns])[None].float()
    conv_precision.fp32_precision = "ieee"
    result = check("deform_conv2d", {"input": x, "offset": offset, "weight": w})
    if edge == 0:  # the pixel itself, to the last bit
        assert torch.equal(result, (x[0, 0, 0, 0] if border == "first" else x[0, 0, 3, 4]).expand(1, 1, 4, 5))


GEOMETRIES = {
    "dense": ((2, 20, 6, 5), (7, 20, 3, 3), 1, {"padding": 1}),
    "one-offset-group-many-weight-groups": ((1, 12, 5, 5), (8, 3, 3, 3), 1, {"padding": 1}),
    "one-weight-group-many-offset-groups": ((1, 12, 5, 5), (5, 12, 3, 3), 4, {"padding": 1}),
    "depthwise": ((1, 6, 5, 5), (6, 1, 3, 3), 6, {"padding": 1}),
    "multiplier-2": ((1, 4, 5, 5), (8, 1, 2, 2), 2, {}),
    "1x1": ((2, 5, 4, 4), (3, 5, 1, 1), 5, {}),
    "many-outputs": ((1, 4, 4, 4), (130, 4, 2, 2), 2, {}),
    "many-channels": ((1, 66, 3, 3), (3, 66, 3, 3), 2, {"padding": 1}),
    "dilated-strided": ((2, 4, 9, 11), (4, 4, 3, 2), 2, {"stride": (2, 3), "dilation": (3, 2), "padding": (2, 1)}),
}


def drawn(shape, weight, offset_groups, options, dtype):
    """Tensors for a geometry, with an offset and a mask of the right size."""
    x, w = random(shape, dtype), random(weight, dtype, scale=math.prod(weight[1:]) ** -0.5)
    out = torch.nn.functional.conv2d(x[:, : weight[1]].float(), w.float(), **options).shape[2:]
    taps = weight[2] * weight[3]
    offset = random((shape[0], 2 * offset_groups * taps, *out), dtype)
    mask = random((shape[0], offset_groups * taps, *out), dtype).sigmoid()
    return {"input": x, "offset": offset, "weight": w, "mask": mask, "bias": random(weight[:1], dtype), **options}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.smoke if name == "dense" else ()) for name in GEOMETRIES]
)
def test_geometries(name, dtype):
    arguments = drawn(*GEOMETRIES[name], dtype)
    check("deform_conv2d", arguments)
    check("deform_conv2d", arguments | {"input": channels_last(arguments["input"])})


@pytest.mark.parametrize("name", GEOMETRIES)
def test_zero_offsets_are_a_convolution(name):
    arguments = drawn(*GEOMETRIES[name], torch.float32)
    del arguments["mask"]
    offset = torch.zeros_like(arguments.pop("offset"))
    made = tc.plan(tc.deform_conv2d, offset=offset, **arguments)
    result = tc.deform_conv2d(offset=offset, **arguments)
    groups = arguments["input"].shape[1] // arguments["weight"].shape[1]
    compare(result, reference("conv2d", arguments | {"groups": groups}), limit(made, result))


@pytest.mark.parametrize("shift", [(0, 1), (-2, 0), (1, -1)], ids=str)
def test_whole_offsets_move_the_image(shift):
    x, w = random((2, 4, 6, 7)), random((3, 4, 3, 3), scale=1 / 6)
    down, right = shift
    moved = torch.nn.functional.pad(x, (3, 3, 3, 3))[:, :, 2 + down : 10 + down, 2 + right : 11 + right]
    offset = torch.tensor([down, right] * 9, dtype=torch.float32, device=DEVICE).view(1, 18, 1, 1).expand(2, 18, 6, 7)
    made = tc.plan(tc.deform_conv2d, x, offset, w, padding=1)
    result = tc.deform_conv2d(x, offset, w, padding=1)
    compare(result, reference("conv2d", {"input": moved, "weight": w}), limit(made, result))


def test_a_mask_of_zeros_leaves_the_bias():
    arguments = tensors(2, torch.float32)
    result = tc.deform_conv2d(**(arguments | {"mask": torch.zeros_like(arguments["mask"])}))
    assert torch.equal(result, arguments["bias"].view(1, 2, 1, 1).expand(result.shape))


def changed(**changes):
    """torchvision's arguments with some of them replaced, by functions of the old ones."""
    arguments = tensors(2, torch.float32)
    return arguments | {name: change(arguments[name]) for name, change in changes.items()}


ERRORS = {
    "offset-channels": (changed(offset=lambda o: o[:, :2]), RuntimeError, "the shape of the offset"),
    "offset-channels-odd": (changed(offset=lambda o: o[:, :-1]), RuntimeError, "the shape of the offset"),
    "offset-size": (changed(offset=lambda o: o[..., :-1]), RuntimeError, "^offset: .*2, 36, 2, 3.*2, 36, 2, 2"),
    "offset-batch": (changed(offset=lambda o: o[:1]), RuntimeError, "^offset: .*2, 36, 2, 3.*1, 36, 2, 3"),
    "offset-rank": (changed(offset=lambda o: o[0]), RuntimeError, "^offset: "),
    "offset-groups": (changed(offset=lambda o: torch.cat([o, o[:, :12]], 1)), RuntimeError, "^offset: 4 offset groups"),
    "offset-dtype": (changed(offset=lambda o: o.double()), RuntimeError, "^offset: .*float32.*float64"),
    "offset-half": (changed(offset=lambda o: o.half()), RuntimeError, "^offset: .*float32.*float16"),
    "offset-none": (changed(offset=lambda o: None), TypeError, "^offset: .*Tensor"),
    "mask-channels": (changed(mask=lambda m: m[:, :2]), RuntimeError, r"mask.shape.*2, 2, 2, 3.*2, 18, 2, 3"),
    "mask-size": (changed(mask=lambda m: m[:, :, :1]), RuntimeError, r"mask.shape"),
    "mask-type": (changed(mask=lambda m: 1.0), TypeError, "^mask: .*Tensor"),
    "unbatched": (changed(input=lambda x: x[0]), RuntimeError, "^input: .*batched"),
    "channels": (changed(input=lambda x: x[:, :5]), RuntimeError, "^weight: .*2, 3, 3, 2.*2, 5, 5, 4"),
    "weight-rank": (changed(weight=lambda w: w[0]), RuntimeError, "^weight: "),
    "weight-groups": (changed(weight=lambda w: w[:1]), RuntimeError, "^weight: Given groups=2"),
    "bias": (changed(bias=lambda b: b[:1]), RuntimeError, "^bias: .*1-dimensional with 2"),
    "kernel-too-large": (changed(input=lambda x: x[:, :, :2]), RuntimeError, "Kernel size can't be greater"),
    "padding-string": (changed(padding=lambda p: "same"), TypeError, "^padding: "),
    "stride": (changed(stride=lambda s: 0), RuntimeError, "^stride: non-positive"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    arguments, error, message = ERRORS[name]
    with pytest.raises(error, match=message) as raised:
        tc.deform_conv2d(**arguments)
    assert isinstance(raised.value, tc.errors.TritonConvError)
    assert not launches
