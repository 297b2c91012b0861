"""The numbers that everything else trusts: sizes against torch's, work against a counter, layouts against torch's."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from helpers import name_of, random
from torch._prims_common import suggest_memory_format
from torch.utils.flop_counter import FlopCounterMode

import triton_conv as tc
from triton_conv.geometry import ConvGeometry
from triton_conv.layout import channels_last_like, dense_strides, five, of_rank
from triton_conv.problem import VECTOR_LIMIT, Problem

ALL = [case for cases in CASES.values() for case in cases]


def of(x, w, stride=1, padding=0, dilation=1, groups=1, **options):
    """A geometry of one number a parameter."""
    rank = len(x) - 2
    if "output_padding" in options:
        options["output_padding"] = (options["output_padding"],) * rank
    pairs = padding if isinstance(padding, list) else [(padding, padding)] * rank
    return ConvGeometry.of(x, w, (stride,) * rank, pairs, (dilation,) * rank, groups, **options)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_output_sizes(rank):
    convolve = getattr(F, f"conv{rank}d")
    for size, k, s, p, d in itertools.product(range(3, 8), (1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2)):
        if size + 2 * p >= d * (k - 1) + 1:
            x, w = (1, 1, *[size] * rank), (1, 1, *[k] * rank)
            own = convolve(torch.empty(x, device="meta"), torch.empty(w, device="meta"), None, s, p, d)
            assert of(x, w, s, p, d).out_shape == own.shape


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_output_sizes(rank):
    convolve = getattr(F, f"conv_transpose{rank}d")
    for size, k, s, p, d, extra in itertools.product((1, 2, 5), (1, 2, 3), (1, 2, 3), (0, 1), (1, 2), (0, 1)):
        if extra < max(s, d) and (size - 1) * s - 2 * p + d * (k - 1) + 1 + extra > 0:
            x, w = (1, 1, *[size] * rank), (1, 1, *[k] * rank)
            own = convolve(torch.empty(x, device="meta"), torch.empty(w, device="meta"), None, s, p, extra, 1, d)
            assert of(x, w, s, p, d, transposed=True, output_padding=extra).out_shape == own.shape


def test_pairs_pad_each_side():
    assert of((1, 1, 5, 6), (1, 1, 3, 3), padding=[(2, 0), (1, 4)]).out_shape == (1, 1, 5, 9)
    assert of((1, 1, 5, 6), (1, 1, 3, 3), padding=[(2, 0), (1, 4)]).pad_before == (0, 2, 1)


def test_missing_dimensions_have_size_one():
    g = of((2, 4, 9), (6, 2, 3), stride=2, padding=1, groups=2)
    assert (g.in_size, g.kernel, g.stride, g.dilation) == ((1, 1, 9), (1, 1, 3), (1, 1, 2), (1, 1, 1))
    assert (g.out_size, g.out_shape, g.extent) == ((1, 1, 5), (2, 6, 5), (1, 1, 3))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [(9,), (8, 9), (7, 8, 9)])
def test_shapes_and_strides_are_again_those_of_the_tensors(size, transposed):
    x, w = (2, 4, *size), ((4, 3) if transposed else (6, 2)) + (1, 2, 3)[3 - len(size) :]
    g = of(x, w, groups=2, transposed=transposed)
    assert (g.in_shape, g.weight_shape) == (x, w)
    assert g.spatial(g.in_size) == size
    assert g.out_shape[:2] == (2, 6)
    strides = torch.empty(x).stride()
    assert of_rank(g.rank, five(strides)) == strides


def test_numbers_of_a_known_layer():
    # A 3 x 3 layer of ResNet's first stage, on one image.
    g = of((1, 64, 56, 56), (64, 64, 3, 3), padding=1)
    assert (g.M, g.N, g.K, g.taps, g.phases) == (3136, 64, 576, 9, 1)
    assert g.flops == 231_211_008
    assert g.least_bytes(2) == 876_544
    depthwise = of((8, 64, 56, 56), (64, 1, 3, 3), padding=1, groups=64)
    assert (depthwise.N, depthwise.K, depthwise.c_in_group, depthwise.c_out_group) == (1, 9, 1, 1)
    assert depthwise.flops == 2 * 8 * 64 * 56 * 56 * 9
    doubled = of((128, 512, 4, 4), (512, 256, 4, 4), 2, 1, transposed=True, output_padding=0)
    assert (doubled.out_shape, doubled.phases) == ((128, 256, 8, 8), 4)
    assert doubled.flops == 2 * 128 * 16 * 512 * 256 * 16


COUNTED = [case for case in ALL if 0 not in case.input and "padding_mode" not in case.arguments]


@pytest.mark.parametrize("case", COUNTED, ids=name_of)
def test_flops_are_torchs(case):
    g = tc.plan(getattr(tc, case.function), **case.tensors(torch.float32)).problem.geometry
    arguments = {k: v for k, v in case.arguments.items() if k != "activation"}
    padding = arguments.get("padding", 0)
    if isinstance(padding, tuple) and isinstance(padding[0], tuple):
        arguments["padding"] = 0
        flat = [p for pair in reversed(padding) for p in pair]
        x = F.pad(torch.empty(case.input, device="meta"), flat)
    else:
        x = torch.empty(case.input, device="meta")
    with FlopCounterMode(display=False) as counter:
        getattr(F, case.function)(x, torch.empty(case.weight, device="meta"), **arguments)
    assert g.flops == counter.get_total_flops()


VARIANTS = {
    "base": of((2, 8, 9, 9), (8, 8, 3, 3)),
    "batch": of((3, 8, 9, 9), (8, 8, 3, 3)),
    "c_in": of((2, 4, 9, 9), (8, 4, 3, 3)),
    "c_out": of((2, 8, 9, 9), (4, 8, 3, 3)),
    "height": of((2, 8, 7, 9), (8, 8, 3, 3)),
    "width": of((2, 8, 9, 7), (8, 8, 3, 3)),
    "kernel": of((2, 8, 9, 9), (8, 8, 3, 1)),
    "stride": of((2, 8, 9, 9), (8, 8, 3, 3), stride=2),
    "padding": of((2, 8, 9, 9), (8, 8, 3, 3), padding=1),
    "before": of((2, 8, 9, 9), (8, 8, 3, 3), padding=[(1, 0), (0, 0)]),
    "after": of((2, 8, 9, 9), (8, 8, 3, 3), padding=[(0, 1), (0, 0)]),
    "dilation": of((2, 8, 9, 9), (8, 8, 3, 3), dilation=2),
    "groups": of((2, 8, 9, 9), (8, 4, 3, 3), groups=2),
    "mode": of((2, 8, 9, 9), (8, 8, 3, 3), padding=1, padding_mode="reflect"),
    "transposed": of((2, 8, 9, 9), (8, 8, 3, 3), transposed=True, output_padding=0),
    "output_padding": of((2, 8, 9, 9), (8, 8, 3, 3), 2, transposed=True, output_padding=1),
    "rank": of((2, 8, 81), (8, 8, 9)),
}


def test_descriptions_are_unique():
    assert len({g.describe() for g in VARIANTS.values()}) == len(VARIANTS)


def test_descriptions_are_stable():
    # They are the keys of stored configurations: a change would make every file useless.
    assert VARIANTS["base"].describe() == "n2 c8-8 hw9x9 k3x3 s1x1 p0x0 d1x1 g1"
    assert VARIANTS["before"].describe() == "n2 c8-8 hw9x9 k3x3 s1x1 p1:0x0 d1x1 g1"
    assert VARIANTS["output_padding"].describe() == "n2 c8-8 hw9x9 k3x3 s2x2 p0x0 d1x1 g1 t1x1"
    assert VARIANTS["rank"].describe() == "n2 c8-8 w81 k9 s1 p0 d1 g1"
    options = {"groups": 4, "padding_mode": "circular", "activation": "gelu"}
    made = tc.plan(tc.conv1d, random((1, 4, 8)), random((4, 1, 3)), **options)
    assert made.problem.describe().startswith("n1 c4-4 w8 k3 s1 p0 d1 g4 circular float32/")
    assert made.problem.describe().endswith(" NCHW+gelu")


@pytest.mark.parametrize("case", [c for c in ALL if 0 not in c.input], ids=name_of)
def test_the_dense_counterpart_has_the_same_output(case):
    g = tc.plan(getattr(tc, case.function), **case.tensors(torch.float32)).problem.geometry
    dense = g.dense()
    assert (dense.groups, dense.c_in, dense.c_out, dense.kernel) == (1, g.c_in, g.c_out, g.kernel)
    # Where the dilated kernel throws elements away that no undilated one would, no padding makes up for it.
    wanted = [(out - 1) * s + k for out, s, k in zip(g.out_size, g.stride, g.kernel, strict=True)]
    if g.transposed or all(size <= needed for size, needed in zip(g.in_size, wanted, strict=True)):
        assert dense.out_size == g.out_size


def strided_tensors(rank):
    """Dense tensors in every order of the dimensions, with sizes of 0 and 1 among them, and slices and expansions."""
    orders = list(itertools.permutations(range(rank + 2)))
    for sizes in itertools.product((0, 1, 2, 3), repeat=rank + 2):
        for order in orders if rank == 2 else [*orders[::11], (0, 2, 3, 4, 1)]:
            inverse = [list(order).index(i) for i in range(rank + 2)]
            dense = torch.empty([sizes[i] for i in order], device="meta").permute(inverse)
            yield dense
            yield dense[:, ::2]
            yield dense[..., :1].expand(sizes) if sizes[-1] else dense
            yield dense[:, :1].expand(sizes) if sizes[1] else dense


@pytest.mark.parametrize("rank", [2, 3])
def test_channels_last_is_what_torch_calls_it(rank):
    count = 0
    for tensor in strided_tensors(rank):
        own = suggest_memory_format(tensor) != torch.contiguous_format
        assert channels_last_like(tensor.shape, tensor.stride()) == own, (tensor.shape, tensor.stride())
        count += own
    assert count > 100
    assert not channels_last_like((2, 3, 4), (12, 1, 3))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (0, 3, 4, 5), (2, 3, 4, 5, 6), (2, 1, 1, 5, 6)])
def test_dense_strides_are_torchs(shape):
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    assert dense_strides(shape, False) == torch.empty(shape, device="meta").stride()
    assert dense_strides(shape, True) == torch.empty(shape, device="meta", memory_format=last).stride()


@pytest.mark.parametrize("w", [(4, 3, 2, 2), (4, 3, 1, 1), (4, 1, 2, 2), (4, 1, 1, 1), (4, 3, 1, 2)])
def test_flat_weights_are_contiguous_ones(w):
    for order in itertools.permutations(range(4)):
        weight = torch.empty([w[i] for i in order], device="meta").permute([order.index(i) for i in range(4)])
        problem = Problem(of((1, w[1], 5, 5), w), torch.float32, (0,) * 5, five(weight.stride()), (0,) * 5)
        assert problem.weight_flat == weight[0].is_contiguous()


@pytest.mark.parametrize("channels", [1, 4, 6, 8, 24, 64])
@pytest.mark.parametrize("pixel", [1, 8, 12, 24, 64])
def test_vectors_never_straddle(channels, pixel):
    strides = (7 * 5 * pixel, 1, 0, 5 * pixel, pixel)
    problem = Problem(of((2, channels, 7, 5), (1, channels, 1, 1)), torch.float16, strides, (0,) * 5, (0,) * 5)
    vector = problem.x_vector(channels)
    if channels == 1:
        assert vector == 1
    else:
        starts = [n * strides[0] + h * strides[3] + w * strides[4] for n in (0, 1) for h in range(7) for w in range(5)]
        assert all(start % vector == 0 for start in (*starts, channels))
        assert vector == VECTOR_LIMIT or any(start % (2 * vector) for start in (*starts, channels))
