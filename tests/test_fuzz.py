"""Random calls of every function against torch: geometries, layouts and dtypes that nobody thought of.

The examples are derived from the test itself, so a failure here fails everywhere; hypothesis shrinks it.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, channels_last, check, expanded, permuted, random, shifted, sliced
from test_gradients import compare, derivatives

import triton_conv as tc

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Deterministic: the same examples on every machine, so that a red run is red again. After `torch_samples`: torch's
# own test code loads another profile.
settings.register_profile(
    "ci", derandomize=True, deadline=None, database=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")

LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "channels_last": channels_last,
    "permuted": permuted,
    "sliced": sliced,
    "shifted": shifted,
    "expanded": expanded,
}
# Where all outputs are near zero by chance, rounding errors are large beside them.
LEAST_OUTPUTS = 16


def each(draw, rank, least, most):
    return tuple(draw(st.integers(least, most)) for _ in range(rank))


@st.composite
def channels(draw):
    """(groups, channels in and out of a group); from depthwise to more channels than a step of a kernel takes."""
    groups = draw(st.sampled_from([1, 1, 2, 3, 7, 20]))
    widths = st.sampled_from([1, 1, 2, 3, 5, 8, 17] if groups > 3 else [1, 2, 3, 7, 16, 18, 33])
    return groups, draw(widths), draw(widths)


@st.composite
def tensors(draw, x_shape, w_shape, c_out):
    """Input, weight and, sometimes, a bias, in random dtype and layouts."""
    dtype = draw(st.sampled_from(DTYPES))
    layouts = st.sampled_from(sorted(LAYOUTS))
    # A 1-D tensor of one channel is contiguous and channels-last at once; which of them torch sees, it does not say.
    plain = len(x_shape) == 3 and 1 in (x_shape[1], w_shape[1])
    x = LAYOUTS["contiguous" if plain else draw(layouts)](random(x_shape, dtype))
    w = random(w_shape, dtype, "w", math.prod(w_shape[1:]) ** -0.5)
    w = LAYOUTS["contiguous" if plain else draw(layouts)](w)
    arguments = {"input": x, "weight": w}
    if draw(st.booleans()):
        layout = draw(st.sampled_from(["contiguous", "sliced", "expanded"]))
        arguments["bias"] = LAYOUTS[layout](random((c_out,), dtype))
    return arguments


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 3))
    groups, c_in, c_out = draw(channels())
    kernel = each(draw, rank, 1, 5 - rank)
    stride, dilation = each(draw, rank, 1, 3), each(draw, rank, 1, 3)
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    pairs = [each(draw, 2, 0, 3) for _ in range(rank)]
    if draw(st.booleans()):
        pairs = [(before, before) for before, _ in pairs]
    size = []
    for k, d, pair in zip(kernel, dilation, pairs, strict=True):
        spare = {"reflect": max(pair) + 1, "circular": max(pair)}.get(mode, 1)
        least = max(d * (k - 1) + 1 - sum(pair), spare, 1)
        size.append(draw(st.integers(least, least + 9 - 2 * rank)))
    out = math.prod(
        (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, pairs, dilation, strict=True)
    )
    c_out *= -(-LEAST_OUTPUTS // (out * groups * c_out))
    x_shape = (draw(st.integers(1, 3)), groups * c_in, *size)
    arguments = draw(tensors(x_shape, (groups * c_out, c_in, *kernel), groups * c_out))
    symmetric = all(before == after for before, after in pairs)
    padding = tuple(before for before, _ in pairs) if symmetric else tuple(pairs)
    arguments |= {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode}
    arguments["activation"] = draw(st.sampled_from([None, None, "relu", "relu6", "gelu", "silu"]))
    return f"conv{rank}d", arguments


@st.composite
def transposed_convolutions(draw):
    rank = draw(st.integers(1, 3))
    groups, c_in, c_out = draw(channels())
    kernel, size = each(draw, rank, 1, 6 - rank), each(draw, rank, 1, 6 - rank)
    stride, dilation = each(draw, rank, 1, 5 - rank), each(draw, rank, 1, 4)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    padding, out = [], 1
    for n, k, s, d, more in zip(size, kernel, stride, dilation, extra, strict=True):
        full = (n - 1) * s + d * (k - 1) + 1 + more
        padding.append(draw(st.integers(0, min((full - 1) // 2, 4))))
        out *= full - 2 * padding[-1]
    c_out *= -(-LEAST_OUTPUTS // (out * groups * c_out))
    x_shape = (draw(st.integers(1, 3)), groups * c_in, *size)
    arguments = draw(tensors(x_shape, (groups * c_in, c_out, *kernel), groups * c_out))
    arguments |= {"stride": stride, "padding": tuple(padding), "output_padding": extra}
    arguments |= {"groups": groups, "dilation": dilation}
    arguments["activation"] = draw(st.sampled_from([None, None, "relu", "gelu"]))
    return f"conv_transpose{rank}d", arguments


@st.composite
def deformable_convolutions(draw):
    groups, offset_groups, each_group = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    c_in, c_out = math.lcm(groups, offset_groups) * each_group, groups * draw(st.sampled_from([1, 2, 5, 17]))
    kernel, stride, dilation, padding = (each(draw, 2, least, 3) for least in (1, 1, 1, 0))
    size = [
        draw(st.integers(max(d * (k - 1) + 1 - 2 * p, 1), d * (k - 1) + 5))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    c_out *= -(-LEAST_OUTPUTS // (math.prod(out) * c_out))
    batch, taps = draw(st.integers(1, 3)), math.prod(kernel)
    arguments = draw(tensors((batch, c_in, *size), (c_out, c_in // groups, *kernel), c_out))
    dtype = arguments["input"].dtype
    spread = draw(st.sampled_from([0.0, 0.5, 2.0, 100.0]))
    wide = draw(st.booleans()) and dtype.itemsize == 2
    offset = random((batch, 2 * offset_groups * taps, *out), torch.float32 if wide else dtype, "o", spread)
    arguments["offset"] = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](offset)
    if draw(st.booleans()):
        mask = random((batch, offset_groups * taps, *out), dtype, "m").sigmoid()
        arguments["mask"] = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](mask)
    return "deform_conv2d", arguments | {"stride": stride, "padding": padding, "dilation": dilation}


KINDS = {
    "forward": convolutions(),
    "transposed": transposed_convolutions(),
    "deformable": deformable_convolutions(),
}


# Ten here: each takes as long as several curated cases. A thousand below.
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(data=st.data())
def test_random_calls(kind, data):
    check(*data.draw(KINDS[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=1000)
@given(data=st.data())
def test_many_random_calls(kind, data):
    check(*data.draw(KINDS[kind]))


@st.composite
def geometries(draw):
    rank, groups, transposed = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.booleans())
    sizes = [each(draw, rank, least, most) for least, most in ((3, 6), (1, 3), (1, 3), (0, 2), (1, 2))]
    return rank, groups, transposed, sizes, each(draw, 2, 1, 3)


@settings(max_examples=10)
@given(geometries())
def test_random_gradients(case):
    rank, groups, transposed, (size, kernel, stride, padding, dilation), (inner, outer) = case
    if transposed:
        # Enough padding would leave nothing of the output.
        padding = [min(p, d * (k - 1) // 2) for p, d, k in zip(padding, dilation, kernel, strict=True)]
    name = f"conv_transpose{rank}d" if transposed else f"conv{rank}d"
    if not transposed and any(
        s + 2 * p < d * (k - 1) + 1 for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)
    ):
        return
    shape = (inner * groups, outer) if transposed else (outer * groups, inner)
    x = torch.randn(2, inner * groups, *size, dtype=torch.float64, device=DEVICE)
    w = torch.randn(*shape, *kernel, dtype=torch.float64, device=DEVICE)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    ours = derivatives(getattr(tc, name), (x, w), options, second=False)
    compare(ours, derivatives(getattr(F, name), (x, w), options, second=False), 1e-12)
