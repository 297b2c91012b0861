"""Separable, shuffled and locally connected convolution: wrong arguments, each with an error that names it."""

import pytest
import torch
from helpers import (
    launches,
)

import triton_conv as tc
from triton_conv.errors import ArgumentError, ArgumentTypeError, ArgumentValueError, DtypeError

X = torch.zeros(1, 6, 5, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: tc.channel_shuffle(X, 4),
            ArgumentError,
            r"4 groups do not divide the channels of input \[1, 6, 5, 5\]",
        ),
        (lambda: tc.channel_shuffle(X, 0), ArgumentError, "0 groups"),
        (lambda: tc.channel_shuffle(X[0, 0], 1), ArgumentError, r"needs \(N, C, \*size\), got size \[5, 5\]"),
        (lambda: tc.channel_shuffle([1], 1), ArgumentTypeError, "expects a Tensor, got list"),
        (
            lambda: tc.shuffle_conv2d(X, torch.zeros(4, 3, 1, 1), groups=3),
            ArgumentError,
            r"weight of size \[4, 3, 1, 1\]",
        ),
        (lambda: tc.shuffle_conv2d(X, torch.zeros(4, 3, 1, 1), groups=2, activation="x"), ArgumentValueError, "'x'"),
        (
            lambda: tc.separable_conv2d(X, torch.zeros(6, 2, 3, 3), torch.zeros(4, 6, 1, 1)),
            ArgumentError,
            r"depthwise_weight: .*input \[1, 6, 5, 5\], got depthwise_weight \[6, 2, 3, 3\]",
        ),
        (
            lambda: tc.separable_conv2d(X, torch.zeros(6, 1, 3, 3), torch.zeros(4, 5, 1, 1)),
            ArgumentError,
            r"pointwise_weight: expected \[c_out, 6, 1, 1\].*got pointwise_weight \[4, 5, 1, 1\]",
        ),
        (
            lambda: tc.separable_conv2d(X, torch.zeros(6, 1, 3, 3), torch.zeros(4, 6, 3, 3)),
            ArgumentError,
            r"got pointwise_weight \[4, 6, 3, 3\]",
        ),
        (
            lambda: tc.separable_conv2d(X, torch.zeros(6, 1, 3, 3), torch.zeros(4, 6)),
            ArgumentError,
            r"pointwise_weight \[4, 6\] beside depthwise_weight \[6, 1, 3, 3\]",
        ),
        (
            lambda: tc.separable_conv2d(X, torch.zeros(6, 3, 3), torch.zeros(4, 6, 1, 1)),
            ArgumentError,
            r"^depthwise_weight: .*got depthwise_weight \[6, 3, 3\] and input \[1, 6, 5, 5\]",
        ),
        (
            lambda: tc.separable_conv2d(X, torch.zeros(6, 1, 3, 3), torch.zeros(4, 6, 1, 1), mid_activation="x"),
            ArgumentValueError,
            "^mid_activation: 'x' is not known; choose None or one of relu, relu6, gelu, silu",
        ),
        (
            lambda: tc.separable_conv2d(X, torch.zeros(6, 1, 3, 3), None),
            ArgumentTypeError,
            "pointwise_weight: .*got NoneType",
        ),
        (
            lambda: tc.separable_conv2d(X, torch.zeros(6, 1, 3, 3), torch.zeros(4, 6, 1, 1), mid_bias=torch.zeros(5)),
            ArgumentError,
            r"mid_bias: expected \[6\] for depthwise_weight \[6, 1, 3, 3\], got mid_bias \[5\]",
        ),
        (
            lambda: tc.separable_conv2d(X, torch.zeros(6, 1, 3, 3), torch.zeros(4, 6, 1, 1).half()),
            DtypeError,
            "pointwise_weight",
        ),
        (
            lambda: tc.locally_connected2d(X, torch.zeros(3, 4, 2, 6, 3, 3)),
            ArgumentError,
            r"for each of \[3, 3\] outputs of input \[1, 6, 5, 5\], got weight \[3, 4, 2, 6, 3, 3\]",
        ),
        (
            lambda: tc.locally_connected2d(X, torch.zeros(3, 3, 2, 5, 3, 3)),
            ArgumentError,
            r"expected input\[1, 6, 5, 5\] to have 5 channels",
        ),
        (lambda: tc.locally_connected2d(X, torch.zeros(2, 6, 3, 3)), ArgumentError, r"of 6 dimensions.*\[2, 6, 3, 3\]"),
        (lambda: tc.locally_connected2d(X, torch.zeros(3, 0, 2, 6, 3, 3)), ArgumentError, "none of its output sizes"),
        (lambda: tc.locally_connected2d(X, None), ArgumentTypeError, "weight: .*got NoneType"),
        (
            lambda: tc.locally_connected2d(X, torch.zeros(3, 3, 2, 6, 3, 3), torch.zeros(2)),
            ArgumentError,
            r"bias: expected \[2, 3, 3\] for weight .*got bias \[2\]",
        ),
        # Layers say so when they are made.
        (lambda: tc.nn.ChannelShuffle(0), ArgumentError, "^groups: expected a positive int, got 0"),
        (lambda: tc.nn.ChannelShuffle("2"), ArgumentTypeError, "^groups: expected an int, got '2'"),
        (lambda: tc.nn.ShuffleConv2d(6, 4, 1, activation="tanh"), ArgumentValueError, "^activation: 'tanh' is not"),
        (lambda: tc.nn.SeparableConv1d(6, 4, 3, activation="tanh"), ArgumentValueError, "^activation: 'tanh' is not"),
        (lambda: tc.nn.SeparableConv1d(6, 4, 3, mid_activation="x"), ArgumentValueError, "^mid_activation: 'x' is not"),
        (lambda: tc.nn.SeparableConv1d(6, 4, 3, padding="full"), ArgumentError, "^padding: .*expected 'same' or"),
        (lambda: tc.nn.SeparableConv1d(6, 4, 3, depth_multiplier=0), ArgumentError, "^depth_multiplier: .*got 0"),
        (lambda: tc.nn.LocallyConnected1d(6, 4, 5, 3, groups="2"), ArgumentTypeError, "^groups: expected an int"),
        (lambda: tc.nn.DeformConv2d(6, 4, 3, groups="2"), ArgumentTypeError, "^groups: expected an int, got '2'"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert not launches
