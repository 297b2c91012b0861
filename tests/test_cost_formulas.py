"""The lectures' numbers, and every formula against a convolution that was counted or run."""

import itertools
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from triton_conv import cost
from triton_conv.errors import ArgumentError, WorkloadError


def test_the_lectures_separable_example():
    # 5x5, 3 -> 256 channels, 8x8 outputs; one slide prints 52,952.
    assert cost.standard_macs(5, 5, 3, 256, 8, 8) == 1_228_800
    assert cost.depthwise_macs(3, 5, 5, 8, 8) == 4_800
    assert cost.standard_macs(1, 1, 3, 256, 8, 8) == 49_152
    assert cost.separable_macs(5, 5, 3, 256, 8, 8) == 53_952
    assert Fraction(53_952, 1_228_800) == cost.separable_ratio(5, 5, 256)


def test_two_3x3_see_5x5():
    assert cost.receptive_field([3, 3]) == 5
    assert cost.receptive_field([3, 3, 3]) == cost.receptive_field([7])
    assert cost.receptive_field([3, 3], strides=[2, 1]) == 7
    assert cost.receptive_field([3, 3, 3], dilations=[1, 2, 4]) == 15


@pytest.mark.parametrize("m", [1, 3, 64])
@pytest.mark.parametrize(("p", "q", "k"), [(1, 1, 5), (3, 3, 64), (5, 2, 6)])
def test_parameters_are_those_of_a_layer(m, p, q, k):
    def held(layer):
        return sum(parameter.numel() for parameter in layer.parameters())

    with torch.device("meta"):
        assert cost.parameters(m, p, q, k) == held(torch.nn.Conv2d(m, k, (p, q)))
        assert cost.grouped_parameters(2 * m, p, q, 2 * k, 2) == held(torch.nn.Conv2d(2 * m, 2 * k, (p, q), groups=2))
        assert cost.depthwise_parameters(m, p, q) == held(torch.nn.Conv2d(m, m, (p, q), groups=m))
        pair = torch.nn.Conv2d(m, m, (p, q), groups=m, bias=False), torch.nn.Conv2d(m, k, 1, bias=False)
        assert cost.separable_weights(p, q, m, k) == sum(held(layer) for layer in pair)


def test_a_group_reads_its_own_channels():
    m, g = 12, 3
    read = {s: [cost.group_channel(s, m, g, j) for j in range(1, m // g + 1)] for s in range(1, g + 1)}
    assert read == {1: [1, 2, 3, 4], 2: [5, 6, 7, 8], 3: [9, 10, 11, 12]}
    for s in read:
        # A filter of ones in group s alone answers to exactly these channels.
        x = torch.zeros(1, m, 1)
        x[0, [channel - 1 for channel in read[s]]] = 1
        w = torch.zeros(g, m // g, 1)
        w[s - 1] = 1
        assert F.conv1d(x, w, groups=g).sum() == m // g
    with pytest.raises(ArgumentError, match=r"expected 1..3 and 1..4, got 4 and 1"):
        cost.group_channel(4, m, g, 1)


def test_grouped_and_depthwise_products():
    assert cost.grouped_macs(8, 3, 3, 16, 4, 5, 6) * 4 == cost.standard_macs(3, 3, 8, 16, 5, 6)
    assert cost.depthwise_macs(8, 3, 3, 5, 6) * 8 == cost.standard_macs(3, 3, 8, 8, 5, 6)
    with pytest.raises(ArgumentError, match="3 groups do not divide m=8"):
        cost.grouped_macs(8, 3, 3, 9, 3, 5, 6)


def test_sharing_ratios():
    d1, (w1, h1), (w, h), d2, (w2, h2) = 3, (8, 6), (5, 3), 7, (4, 4)
    full, partial = cost.full_sharing(d1, w, h, d2), cost.partial_sharing(d1, w, h, d2, w2, h2)
    none = cost.no_sharing(d1, w1, h1, d2, w2, h2)
    assert (full, partial, none) == (3 * 5 * 3 * 7, 3 * 5 * 3 * 7 * 16, 3 * 48 * 7 * 16)
    ratios = cost.sharing_ratios(w1, h1, w, h, w2, h2)
    assert ratios == (Fraction(partial, full), Fraction(none, partial), Fraction(none, full))
    assert ratios == (w2 * h2, Fraction(w1 * h1, w * h), Fraction(w1 * h1 * w2 * h2, w * h))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel", [1, 2, 5])
@pytest.mark.parametrize("padding", [0, 2, (3, 0), "valid"])
def test_output_sizes_are_torchs(kernel, stride, dilation, padding):
    before, after = {0: (0, 0), 2: (2, 2), "valid": (0, 0)}.get(padding, padding)
    x = F.pad(torch.empty(1, 1, 13, device="meta"), (before, after))
    own = F.conv1d(x, torch.empty(1, 1, kernel, device="meta"), stride=stride, dilation=dilation).shape[2]
    assert cost.output_size(13, kernel, stride, padding, dilation) == own


def test_valid_and_same():
    assert [cost.output_size(h, k, padding="valid") for h, k in ((7, 3), (7, 7), (5, 4))] == [5, 1, 2]
    for h, k, s in itertools.product((5, 8), (1, 2, 3, 4), (1, 2, 3)):
        assert cost.output_size(h, k, s, "same") == -(-h // s)
    with pytest.raises(ArgumentError, match=r"a kernel of 5 does not fit in 4 \+ 0 \+ 0"):
        cost.output_size(4, 5)
    with pytest.raises(ArgumentError, match="stride: expected a positive int, got 0"):
        cost.output_size(4, 3, stride=0)
    with pytest.raises(ArgumentError, match="got 'full'"):
        cost.output_size(4, 3, padding="full")


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "extra", "dilation"),
    [
        (4, 3, 1, 0, 0, 1),
        (4, 3, 2, 1, 0, 1),
        (3, 4, 3, 1, 2, 1),
        (5, 2, 2, 0, 1, 2),
        (4, 3, 2, 4, 0, 1),
        (2, 1, 5, 0, 4, 1),
    ],
)
def test_a_transposed_convolution_is_a_direct_one_on_inserted_zeros(size, kernel, stride, padding, extra, dilation):
    torch.manual_seed(0)
    x, w = torch.randn(1, 1, size, dtype=torch.float64), torch.randn(1, 1, kernel, dtype=torch.float64)
    expected = F.conv_transpose1d(x, w, stride=stride, padding=padding, output_padding=extra, dilation=dilation)
    same = cost.transposed(size, kernel, stride, padding, extra, dilation)
    assert (same.zeros, same.stride, same.size) == (stride - 1, 1, expected.shape[2])
    if extra == 0 and dilation == 1:
        assert same.border == kernel - padding - 1
        assert same.size == (size - 1) * stride + kernel - 2 * padding
    spread = torch.zeros(1, 1, (size - 1) * (same.zeros + 1) + 1, dtype=torch.float64)
    spread[..., :: same.zeros + 1] = x
    spread = F.pad(spread, (same.border, same.border_after))
    torch.testing.assert_close(F.conv1d(spread, w.flip(2), dilation=dilation), expected)


def test_dilated_extent_counts_the_inserted_zeros():
    for k, d in itertools.product((1, 3, 5), (1, 2, 7)):
        assert cost.dilated_extent(k, d) == k + (k - 1) * (d - 1)


def test_deformable_offsets_and_bilinear_weights():
    assert cost.deformable_offsets(3, 3) == 18
    weights = [cost.bilinear_weight(a, b, 1.25, 2.5) for a, b in itertools.product((0, 1, 2), (1, 2, 3))]
    assert weights == [0, 0, 0, 0, 0.375, 0.375, 0, 0.125, 0.125]
    assert sum(weights) == 1


def test_shuffled_channels_are_torchs():
    x = torch.arange(12.0).view(1, 12, 1, 1)
    shuffled = torch.nn.ChannelShuffle(3)(x).flatten().long().tolist()
    assert [shuffled[cost.shuffled_channel(channel, 12, 3)] for channel in range(12)] == list(range(12))
    with pytest.raises(ArgumentError, match="5 groups do not divide channels=12"):
        cost.shuffled_channel(0, 12, 5)


def test_units_that_shufflenet_is_compared_with():
    # ShuffleNet, section 3.2: for the same c and m, fewer products than ResNet's and ResNeXt's units.
    h, w, c, m, g = 28, 28, 240, 60, 3
    shuffle, next_, plain = (
        cost.shuffle_unit_macs(h, w, c, m, g), cost.bottleneck_macs(h, w, c, m, g), cost.bottleneck_macs(h, w, c, m),
    )  # fmt: skip
    assert shuffle == h * w * (2 * c * m // g + 9 * m)
    assert shuffle < next_ < plain


def test_mobile_blocks():
    standard, separable = cost.mobile_block_parameters(3, 3, 512, 512)
    assert standard == 9 * 512 * 512 + 2 * 512
    assert separable == 9 * 512 + 512 * 512 + 4 * 512


def test_formulas_by_name():
    assert cost.evaluate("parameters", m=3, p=3, q=3, k=64) == 1792
    assert {formula.row for formula in cost.FORMULAS.values()} == {f"L{i}" for i in range(1, 14)}
    assert all(formula.text and formula.function.__doc__ for formula in cost.FORMULAS.values())
    with pytest.raises(WorkloadError, match="formula: 'params' is not known; choose one of standard_macs"):
        cost.evaluate("params")
    with pytest.raises(WorkloadError, match="parameters takes m, p, q, k, got m"):
        cost.evaluate("parameters", m=3)
