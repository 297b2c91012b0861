"""Deformable convolution of signals: linear interpolation at learned places, against its definition in float64."""

import pytest
import torch
from helpers import DTYPES, compare, launches, name_of, random
from torch.func import grad, vmap

import triton_conv as tc
from triton_conv.errors import ArgumentError
from triton_conv.reference import tolerance


def defined(input, offset, weight, bias=None, stride=1, padding=0, dilation=1, mask=None):
    """Sums over taps of the signal between its samples, one group of channels and one of offsets after another."""
    n, c, length = input.shape
    _, c_group, k = weight.shape
    parts, out = offset.shape[1] // k, offset.shape[2]
    groups, columns = c // c_group, []
    for channel in range(c):
        part = channel // (c // parts)
        taps = torch.zeros(n, k, out, dtype=input.dtype, device=input.device)
        for tap in range(k):
            at = torch.arange(out, device=input.device) * stride - padding + tap * dilation
            place = at + offset[:, part * k + tap]
            left, value = place.floor(), 0
            for corner, blend in ((left, 1 - (place - left)), (left + 1, place - left)):
                inside = (corner >= 0) & (corner < length)
                value = value + input[:, channel].gather(1, corner.clamp(0, length - 1).long()) * blend * inside
            one = torch.zeros(k, 1, dtype=input.dtype, device=input.device)
            one[tap] = 1
            taps = taps + one * (value if mask is None else value * mask[:, part * k + tap])[:, None]
        columns.append(taps)
    columns = torch.stack(columns, 1).unflatten(1, (groups, c_group))
    result = torch.einsum("ngckl,gock->ngol", columns, weight.unflatten(0, (groups, -1))).flatten(1, 2)
    return result if bias is None else result + bias[:, None]


def tensors(dtype=torch.float64, masked=True, parts=2, batch=2):
    made = {
        "input": random((batch, 4, 9), dtype, "x"),
        # As far as beyond both ends.
        "offset": random((batch, parts * 3, 4), dtype, "o", 4.0),
        "weight": random((6, 2, 3), dtype, "w", 0.4),
        "bias": random((6,), dtype, "b"),
    }
    if masked:
        made["mask"] = random((batch, parts * 3, 4), dtype, "m").sigmoid()
    return made


WINDOW = dict(stride=2, padding=1, dilation=2)


@pytest.mark.parametrize("masked", [True, False], ids=["v2", "v1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_values(dtype, masked):
    given = tensors(dtype, masked, parts=1 if masked else 2)
    result = tc.deform_conv1d(**given, **WINDOW)
    assert dict(launches) == {"deformable": 1}
    assert result.dtype == dtype
    expected = defined(**{name: tensor.double() for name, tensor in given.items()}, **WINDOW)
    compare(result, expected, tolerance(dtype, 6, "tf32" if dtype == torch.float32 else "ieee", 9))
    assert tc.plan(tc.deform_conv1d, **given, **WINDOW).out_shape == (2, 6, 1, 4)


def test_no_offset_is_a_convolution():
    given = tensors(masked=False)
    given["offset"] = torch.zeros_like(given["offset"])
    x, w, b = (given[name] for name in ("input", "weight", "bias"))
    plain = torch.nn.functional.conv1d(x, w, b, groups=2, **WINDOW)
    torch.testing.assert_close(tc.deform_conv1d(**given, **WINDOW), plain)


def test_gradients():
    given = {name: tensor.requires_grad_() for name, tensor in tensors(batch=1).items()}
    found, expected = (
        torch.autograd.grad(f(**given, **WINDOW).square().sum(), list(given.values()))
        for f in (tc.deform_conv1d, defined)
    )
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-10, rtol=1e-10)


def test_one_graph_of_it():
    given = list(tensors().values())

    def call(x, o, w, b, m):
        return tc.deform_conv1d(x, o, w, b, mask=m, **WINDOW)

    graph = torch.compile(call, backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(graph(*given), call(*given))
    torch._dynamo.reset()


def test_per_sample_gradients():
    x, o, w, b = (t for name, t in tensors().items() if name != "mask")

    def loss(w, x, o):
        return tc.deform_conv1d(x[None], o[None], w, b, **WINDOW).square().sum()

    found = vmap(grad(loss), (None, 0, 0))(w, x, o)
    for i in range(2):
        torch.testing.assert_close(found[i], grad(loss)(w, x[i], o[i]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(offset=(2, 5, 4)),
            r"offset: .*the kernel size = 3, and the whole shape \[2, 3, 4\].*got offset \[2, 5, 4\]",
        ),
        (dict(offset=(2, 3, 1, 4)), r"offset: .*got offset \[2, 3, 1, 4\]"),
        (dict(offset=(2, 9, 4)), r"offset: 3 offset groups .* do not divide the channels of input \[2, 4, 9\]"),
        (dict(mask=(2, 6, 5)), r"mask: mask.shape \[2, 6, 5\] is not valid: expected \[2, 6, 4\]"),
        (dict(weight=(6, 3, 3)), r"weight: dimension 1 of weight \[6, 3, 3\] must divide .* input \[2, 4, 9\]"),
        (dict(weight=(6, 2, 1, 3)), r"weight: .*deform_conv1d takes a weight of 3 dimensions"),
        (dict(input=(4, 9)), r"input: deform_conv1d needs a batched input"),
        (dict(bias=(5,)), r"bias: .*6 elements, but got bias of size \[5\]"),
    ],
)
def test_wrong_shapes(change, message):
    given = tensors() | {name: torch.zeros(shape, dtype=torch.float64) for name, shape in change.items()}
    with pytest.raises(ArgumentError, match=message):
        tc.deform_conv1d(**{name: tensor.cpu() for name, tensor in given.items()}, **WINDOW)
    assert not launches
