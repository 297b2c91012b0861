"""The same layer in other forms: what grouping, separating and shuffling save of a standard convolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..geometry import ConvGeometry
from .layers import Cost, Layer, aligned

FORMS = ("standard", "grouped", "separable", "shuffle")


@dataclass(frozen=True)
class Form:
    """Weights and products of a layer in one form, without biases."""

    weights: int
    macs: int


def forms(g: ConvGeometry, groups: int = 4) -> dict[str, Form]:
    """A layer of this input, output and filter size as each of `FORMS`.

    "grouped" has `groups` groups, or the most that divide both numbers of channels; "separable" is a depthwise
    convolution and a 1x1 one, "shuffle" the same with its 1x1 in that many groups, whose channels are then shuffled. Of
    a transposed layer the products are counted over its inputs, where they are made.
    """
    divisors = (d for d in range(max(groups, 1), 0, -1) if g.c_in % d == g.c_out % d == 0)
    most = next(divisors, 1)
    made = g.batch * (g.in_pixels if g.transposed else g.out_pixels)
    pixels = g.batch * g.out_pixels
    depthwise, pointwise = g.c_in * g.taps, g.c_in * g.c_out
    spatial = g.taps > 1
    separable = Form(pointwise + spatial * depthwise, pixels * pointwise + spatial * made * depthwise)
    return {
        "standard": Form(pointwise * g.taps, made * pointwise * g.taps),
        "grouped": Form(pointwise * g.taps // most, made * pointwise * g.taps // most),
        "separable": separable,
        "shuffle": Form(
            pointwise // most + spatial * depthwise, pixels * pointwise // most + spatial * made * depthwise
        ),
    }


def compare(cost: Cost, groups: int = 4) -> list[tuple[Layer, Mapping[str, Form]]]:
    """Every convolution of a network beside its forms."""
    return [(layer, forms(layer.geometry, groups)) for layer in cost.layers if layer.geometry is not None]


@dataclass(frozen=True)
class Sharing:
    """Weights of the same layer with parameters shared in full, in part and not at all."""

    full: int
    partial: int
    none: int


def sharing(g: ConvGeometry) -> Sharing:
    """A convolution, a locally connected layer and a fully connected one of this input and output, without biases."""
    filters = g.c_in_group * g.taps * g.c_out
    return Sharing(filters, filters * g.out_pixels, g.c_in * g.in_pixels * g.c_out * g.out_pixels)


def sharing_table(g: ConvGeometry) -> str:
    """The lecture's comparison: weights, and how many times those of the line above."""
    s = sharing(g)
    rows = [
        ("sharing", "layer", "weights", "times"),
        ("full", "convolution", f"{s.full:,}", ""),
        ("partial", "locally connected", f"{s.partial:,}", f"{s.partial / s.full:g}"),
        ("none", "fully connected", f"{s.none:,}", f"{s.none / s.partial:g}"),
    ]
    return aligned(rows, left=2)
