"""Receptive fields: which part of the network's input a neuron sees, layer by layer.

The recurrences of Araujo, Norris and Sim, "Computing receptive fields of convolutional neural networks" (Distill 2019),
extended to transposed convolution, where neurons lie closer than the inputs do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..geometry import ConvGeometry


@dataclass(frozen=True)
class Axis:
    """Along one dimension, in input pixels: what a neuron sees, the way to its neighbour's, the first one's centre.

    `centre` is 0 for a field centred on the first pixel; padding moves it, and may move it outside.
    """

    size: int = 1
    jump: Fraction = Fraction(1)
    centre: Fraction = Fraction(0)

    def through(self, extent: int, stride: int, before: int) -> Axis:
        """Behind a window of `extent` with this stride and padding before."""
        return Axis(
            size=self.size + int((extent - 1) * self.jump),
            jump=self.jump * stride,
            centre=self.centre + (Fraction(extent - 1, 2) - before) * self.jump,
        )

    def transposed(self, kernel: int, stride: int, before: int, dilation: int) -> Axis:
        """Behind a transposed convolution; the size is that of the output phase that sees most."""
        # Output o reads input i where o + before = i stride + tap dilation.
        spans = []
        for phase in range(stride):
            read = [
                (phase - tap * dilation) // stride for tap in range(kernel) if (phase - tap * dilation) % stride == 0
            ]
            spans.append(max(read) - min(read) + 1 if read else 0)
        extent = (kernel - 1) * dilation
        return Axis(
            size=self.size + int((max(spans) - 1) * self.jump),
            jump=self.jump / stride,
            centre=self.centre + (before - Fraction(extent, 2)) / stride * self.jump,
        )

    def over(self, count: int) -> Axis:
        """Of something that sees `count` neurons in a row: a global pooling, a fully connected layer."""
        return self.through(count, 1, 0)

    def union(self, other: Axis) -> Axis:
        """Of a neuron that sees both: a sum, or neighbours in a concatenation."""
        low = min(self.centre - Fraction(self.size - 1, 2), other.centre - Fraction(other.size - 1, 2))
        high = max(self.centre + Fraction(self.size - 1, 2), other.centre + Fraction(other.size - 1, 2))
        return Axis(int(high - low) + 1, max(self.jump, other.jump), (low + high) / 2)


@dataclass(frozen=True)
class Field:
    """The receptive field of the neurons of a map, an `Axis` for each spatial dimension."""

    axes: tuple[Axis, ...]

    @classmethod
    def of_input(cls, rank: int) -> Field:
        return cls((Axis(),) * rank)

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def jump(self) -> tuple[float, ...]:
        return tuple(float(axis.jump) for axis in self.axes)

    @property
    def centre(self) -> tuple[float, ...]:
        return tuple(float(axis.centre) for axis in self.axes)

    def convolved(self, g: ConvGeometry) -> Field:
        """Behind a convolution of this geometry."""
        found = []
        for axis, i in zip(self.axes, range(3 - g.rank, 3), strict=True):
            if g.transposed:
                found.append(axis.transposed(g.kernel[i], g.stride[i], g.pad_before[i], g.dilation[i]))
            else:
                found.append(axis.through(g.extent[i], g.stride[i], g.pad_before[i]))
        return Field(tuple(found))

    def pooled(self, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Field:
        """Behind a pooling."""
        axes = zip(self.axes, kernel, stride, padding, strict=True)
        return Field(tuple(axis.through(k, s, p) for axis, k, s, p in axes))

    def gathered(self, sizes: Sequence[int]) -> Field:
        """Of what sees the whole map."""
        return Field(tuple(axis.over(size) for axis, size in zip(self.axes, sizes, strict=True)))


def union(fields: Iterable[Field]) -> Field | None:
    """The field of what is computed from all of these, element by element; None if they are of different rank."""
    result: Field | None = None
    for field in fields:
        if result is None:
            result = field
        elif len(result.axes) != len(field.axes):
            return None
        else:
            result = Field(tuple(a.union(b) for a, b in zip(result.axes, field.axes, strict=True)))
    return result
