"""`ConvGeometry`: the one place where a convolution's arguments are validated and its sizes derived.

Ranks 1, 2 and 3 are one geometry: every spatial triple is (depth, height, width), and a dimension that a rank lacks has
size 1, kernel 1, stride 1, dilation 1 and no padding. In the terms of implicit GEMM, M counts output pixels, N the
output channels of a group, K the products summed for one output.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from .errors import ArgumentError, ArgumentValueError

Triple = tuple[int, int, int]
T = TypeVar("T")

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
ACTIVATIONS = ("none", "relu", "relu6", "gelu", "silu")
# Kernels multiply these numbers in 32 bits, and torch counts elements in 63.
_MOST, _MOST_ELEMENTS = 2**31 - 1, 2**63 - 1


def triple(values: Sequence[int], fill: int) -> Triple:
    """(d, h, w) of the last one to three dimensions; missing ones are `fill`."""
    d, h, w = (fill,) * (3 - len(values)) + tuple(values)
    return d, h, w


@dataclass(frozen=True)
class ConvGeometry:
    """A validated convolution of rank 1, 2 or 3, forward or transposed, and every number derived from it.

    `padding` holds (before, after) for depth, height, width. For a transposed convolution `padding`, `output_padding`,
    `stride` and `dilation` mean what they mean in torch's `conv_transpose`. Build with `ConvGeometry.of`.
    """

    rank: int
    batch: int
    c_in: int
    c_out: int
    in_size: Triple
    kernel: Triple
    stride: Triple
    padding: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    dilation: Triple
    groups: int
    transposed: bool = False
    output_padding: Triple = (0, 0, 0)
    padding_mode: str = "zeros"

    @classmethod
    def of(
        cls,
        input_shape: Sequence[int],
        weight_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[tuple[int, int]],
        dilation: Sequence[int],
        groups: int,
        *,
        transposed: bool = False,
        output_padding: Sequence[int] = (0,),
        padding_mode: str = "zeros",
    ) -> ConvGeometry:
        """Validates and builds. Shapes are `(N, C, *size)` and `(c_out, c_in/groups, *kernel)`, transposed
        `(c_in, c_out/groups, *kernel)`; the sequences have one entry a spatial dimension.

        Raises `ArgumentError` wherever torch raises `RuntimeError`, with torch's phrase and both shapes.
        """
        x, w = list(input_shape), list(weight_shape)
        rank = len(x) - 2
        _check_window(x, w, stride, padding, dilation, groups, padding_mode)
        _check_channels(x, w, groups, transposed)
        pads = ((0, 0),) * (3 - rank) + tuple((before, after) for before, after in padding)
        geometry = cls(
            rank=rank,
            batch=x[0],
            c_in=x[1],
            c_out=w[1] * groups if transposed else w[0],
            in_size=triple(x[2:], 1),
            kernel=triple(w[2:], 1),
            stride=triple(stride, 1),
            padding=(pads[0], pads[1], pads[2]),
            dilation=triple(dilation, 1),
            groups=groups,
            transposed=transposed,
            output_padding=triple(output_padding, 0),
            padding_mode=padding_mode,
        )
        geometry._check_sizes(x)
        return geometry

    def _check_sizes(self, x: list[int]) -> None:
        self._check_each_size(x)
        if math.prod(n for n in (self.batch, self.c_out, *self.out_size) if isinstance(n, int)) > _MOST_ELEMENTS:
            raise ArgumentError(
                f"input: its output of size {list(self.out_shape)} has more elements than can be counted; got input "
                f"{x} with padding={self._listed(self.padding)}, stride={self._listed(self.stride)}"
            )

    def _check_each_size(self, x: list[int]) -> None:
        if self.batch and self.c_in and 0 in self.in_size:
            raise ArgumentError(
                f"input: Only zero batch or zero channel inputs are supported, but got input shape: {x}"
            )
        if self.transposed:
            self._check_output_padding()
            if any(size < 0 for size in self.out_size):
                raise ArgumentError(
                    f"input: Given input size per channel: {self._size(self.in_size)}. Calculated output size per "
                    f"channel: {self._size(self.out_size)}. Output size is too small"
                )
            return
        if any(size <= 0 for size in self.out_size):
            padded = tuple(i + b + a for i, (b, a) in zip(self.in_size, self.padding, strict=True))
            raise ArgumentError(
                f"weight: Calculated padded input size per channel: {self._size(padded)}. Kernel size: "
                f"{self._size(self.extent)}. Kernel size can't be greater than actual input size"
            )
        self._check_border()

    def _check_output_padding(self) -> None:
        for extra, s, d in zip(self.output_padding, self.stride, self.dilation, strict=True):
            if extra < 0:
                raise ArgumentError(
                    "output_padding: negative output_padding is not supported, got output_padding="
                    f"{self._listed(self.output_padding)}"
                )
            # In this order, so that a symbolic size is asked for a bound, not for its remainder by the stride.
            if extra >= max(s, d) and extra > 0:
                raise ArgumentError(
                    "output_padding: output padding must be smaller than either stride or dilation, but got "
                    f"output_padding={self._listed(self.output_padding)}, stride={self._listed(self.stride)}, "
                    f"dilation={self._listed(self.dilation)}"
                )

    def _check_border(self) -> None:
        # A mirrored border needs as many real elements beside the edge; a wrapped one may use them all.
        spare = {"reflect": 1, "circular": 0}.get(self.padding_mode)
        if spare is not None and any(
            max(pair) > size - spare and max(pair) > 0 for pair, size in zip(self.padding, self.in_size, strict=True)
        ):
            raise ArgumentError(
                f"padding: padding_mode={self.padding_mode!r} needs padding of at most the input size"
                f"{' less one' if spare else ''}, got padding={self._listed(self.padding)} for input size "
                f"{self._size(self.in_size)}"
            )

    def _size(self, size: Sequence[int]) -> str:
        return f"({' x '.join(map(str, self.spatial(size)))})"

    def _listed(self, values: Sequence[object]) -> list[object]:
        return list(self.spatial(values))

    # ------------------------------------------------------------------ sizes

    def spatial(self, values: Sequence[T]) -> tuple[T, ...]:
        """Of what stands for (depth, height, width) that of the dimensions of this rank, as torch has it."""
        return tuple(values[3 - self.rank :])

    @property
    def extent(self) -> Triple:
        """The span of the dilated kernel."""
        d, h, w = (dil * (k - 1) + 1 for k, dil in zip(self.kernel, self.dilation, strict=True))
        return d, h, w

    @functools.cached_property
    def out_size(self) -> Triple:
        """Output (depth, height, width)."""
        sizes = []
        for i in range(3):
            size, extent, stride = self.in_size[i], self.extent[i], self.stride[i]
            before, after = self.padding[i]
            if self.transposed:
                sizes.append((size - 1) * stride - before - after + extent + self.output_padding[i])
            else:
                sizes.append((size + before + after - extent) // stride + 1)
        return sizes[0], sizes[1], sizes[2]

    @property
    def pad_before(self) -> Triple:
        """Elements of padding before the first of each dimension."""
        (d, _), (h, _), (w, _) = self.padding
        return d, h, w

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of the batched input at its own rank."""
        return (self.batch, self.c_in, *self.spatial(self.in_size))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight as torch has it: of a transposed convolution its input channels come first."""
        channels = (self.c_in, self.c_out_group) if self.transposed else (self.c_out, self.c_in_group)
        return (*channels, *self.spatial(self.kernel))

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the batched output at its own rank."""
        return (self.batch, self.c_out, *self.spatial(self.out_size))

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def c_in_group(self) -> int:
        return self.c_in // self.groups

    @property
    def c_out_group(self) -> int:
        return self.c_out // self.groups

    @property
    def in_pixels(self) -> int:
        return math.prod(self.in_size)

    @property
    def out_pixels(self) -> int:
        return math.prod(self.out_size)

    @property
    def phases(self) -> int:
        """Output phases of a transposed convolution: outputs of one phase read the same taps."""
        return math.prod(self.stride) if self.transposed else 1

    # ------------------------------------------------------------------ implicit GEMM

    @property
    def M(self) -> int:
        """Output pixels over the whole batch."""
        return self.batch * self.out_pixels

    @property
    def N(self) -> int:
        """Output channels of one group."""
        return self.c_out_group

    @property
    def K(self) -> int:
        """Products summed for one output (transposed: an upper bound, since a phase reads only its own taps)."""
        return self.c_in_group * self.taps

    @property
    def flops(self) -> int:
        """Useful floating-point operations, a multiply and an add each; padding counted as if it were data."""
        pixels = self.in_pixels if self.transposed else self.out_pixels
        per_pixel = self.c_in * self.c_out_group if self.transposed else self.c_out * self.c_in_group
        return 2 * self.batch * pixels * per_pixel * self.taps

    def least_bytes(self, itemsize: int) -> int:
        """Bytes that must cross device memory: input and weight read once, output written once."""
        x = self.batch * self.c_in * self.in_pixels
        w = self.groups * self.c_in_group * self.c_out_group * self.taps
        return itemsize * (x + w + self.M * self.c_out)

    def dense(self) -> ConvGeometry:
        """The standard convolution that this one is compared with: one group, no dilation, the same kernel and output.

        Its input is the same too; for a transposed convolution it is the input with stride - 1 zeros inserted between
        the elements, over which a standard convolution of stride 1 computes the same output.
        """
        stride = (1, 1, 1) if self.transposed else self.stride
        sizes, padding = [], []
        for size, out, k, s, inserted in zip(
            self.in_size, self.out_size, self.kernel, stride, self.stride, strict=True
        ):
            size = (size - 1) * inserted + 1 if self.transposed else size
            total = max((out - 1) * s + k - size, 0)
            sizes.append(size)
            padding.append((total // 2, total - total // 2))
        return replace(
            self,
            groups=1,
            in_size=(sizes[0], sizes[1], sizes[2]),
            stride=stride,
            dilation=(1, 1, 1),
            padding=(padding[0], padding[1], padding[2]),
            padding_mode="zeros",
            transposed=False,
            output_padding=(0, 0, 0),
        )

    def flipped(self) -> ConvGeometry | None:
        """The forward convolution with flipped filters that a transposed one of stride 1 is, or None if there is none:
        more padding than the kernel reaches would become negative.
        """
        if self.stride != (1, 1, 1):
            return None
        reach = [extent - 1 for extent in self.extent]
        pads = [
            (r - before, r - after + extra)
            for r, (before, after), extra in zip(reach, self.padding, self.output_padding, strict=True)
        ]
        if any(p < 0 for pair in pads for p in pair):
            return None
        return replace(self, padding=(pads[0], pads[1], pads[2]), transposed=False, output_padding=(0, 0, 0))

    def describe(self) -> str:
        """One readable line, also the key of stored configurations: every number the result depends on."""

        def each(values: Sequence[object]) -> str:
            return "x".join(map(str, self.spatial(values)))

        parts = [
            f"n{self.batch}",
            f"c{self.c_in}-{self.c_out}",
            f"{''.join(self.spatial('dhw'))}{each(self.in_size)}",
            f"k{each(self.kernel)}",
            f"s{each(self.stride)}",
            f"p{each([b if a == b else f'{b}:{a}' for b, a in self.padding])}",
            f"d{each(self.dilation)}",
            f"g{self.groups}",
        ]
        if self.transposed:
            parts.append(f"t{each(self.output_padding)}")
        if self.padding_mode != "zeros":
            parts.append(self.padding_mode)
        return " ".join(parts)


def _check_window(
    x: list[int], w: list[int], stride: Sequence[int], padding: Sequence[tuple[int, int]], dilation: Sequence[int],
    groups: int, padding_mode: str,
) -> None:  # fmt: skip
    rank = len(x) - 2
    if len(w) != rank + 2:
        raise ArgumentError(
            f"weight: expected a {rank + 2}-dimensional weight for {rank + 2}-dimensional input {x}, "
            f"but got weight of size {w}"
        )
    if groups <= 0:
        raise ArgumentError(f"groups: non-positive groups is not supported, got groups={groups}")
    for name, values in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        if len(values) != rank:
            raise ArgumentError(
                f"{name}: expected {name} to be a single integer value or a list of {rank} values "
                f"to match the convolution dimensions, but got {name}={list(values)}"
            )
    if any(s <= 0 for s in stride):
        raise ArgumentError(f"stride: non-positive stride is not supported, got stride={list(stride)}")
    if any(p < 0 for pair in padding for p in pair):
        raise ArgumentError(f"padding: negative padding is not supported, got padding={list(padding)}")
    if any(d <= 0 for d in dilation):
        raise ArgumentError(f"dilation: dilation should be greater than zero, got dilation={list(dilation)}")
    for name, values in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        if any(_far(value) for value in values):
            raise ArgumentError(f"{name}: more than {_MOST} is not supported, got {name}={list(values)}")
    if any(k <= 0 for k in w[2:]):
        raise ArgumentError(f"weight: the kernel's size must be positive, got a weight of size {w}")
    if padding_mode not in PADDING_MODES:
        raise ArgumentValueError(
            f"padding_mode: {padding_mode!r} is not known; choose one of {', '.join(PADDING_MODES)}"
        )


def _far(value: int | tuple[int, int]) -> bool:
    """Of a number or two; a symbol is not compared, which would limit what a graph is good for."""
    return any(isinstance(v, int) and v > _MOST for v in (value if isinstance(value, tuple) else (value,)))


def _check_channels(x: list[int], w: list[int], groups: int, transposed: bool) -> None:
    if w[0] < groups:
        raise ArgumentError(
            f"weight: Given groups={groups}, expected weight to be at least {groups} at dimension 0, "
            f"but got weight of size {w} instead"
        )
    if w[0] % groups:
        raise ArgumentError(
            f"weight: Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
            f"but got weight of size {w} instead"
        )
    expected = w[0] if transposed else w[1] * groups
    if x[1] != expected:
        raise ArgumentError(
            f"input: Given groups={groups}, {'transposed=1, ' if transposed else ''}weight of size {w}, "
            f"expected input{x} to have {expected} channels, but got {x[1]} channels instead"
            f"{'; a transposed weight is (c_in, c_out/groups, *kernel)' if transposed else ''}"
        )
