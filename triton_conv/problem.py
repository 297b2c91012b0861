"""`Problem`: a geometry with the dtype, the memory layout and the epilogue of one call; all that a plan depends on.

Strides are in elements, five to a tensor: (n, c, d, h, w) for input and output, (o, i, d, h, w) for a weight in the
order of its first two dimensions as torch stores it. A dimension that the rank lacks has stride 0.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch

from .geometry import ConvGeometry
from .layout import Strides, dense_strides, five, of_rank, span

INT32_LIMIT = 2**31 - 1
# Triton knows an integer argument's divisibility by 16 at most; more would say nothing new.
VECTOR_LIMIT = 16
# Output pixels (of a phase) from which a copy of the weight pays: as many read each weight from L2 anew, in tiles.
_PIXELS_WORTH_PACKING = 256
# Below this, torch hands out pieces of blocks that it holds anyway.
_POOLED_BYTES = 1 << 20


@dataclass(frozen=True)
class Problem:
    """One convolution call, as far as choosing and launching a kernel is concerned."""

    geometry: ConvGeometry
    dtype: torch.dtype
    x_strides: Strides
    w_strides: Strides
    y_strides: Strides
    has_bias: bool = False
    stride_b: int = 1
    activation: str = "none"
    precision: str = "ieee"
    weight_view: str = "stored"
    """What `w_strides` are the strides of: the weight as it is "stored"; a copy "packed" with its second dimension
    innermost; or the weight "flipped", a view that starts at its last tap and has negative strides."""
    aligned: bool = True
    """Whether input and weight begin at a multiple of 16 bytes."""

    @property
    def repeatable(self) -> bool:
        """Whether the result has the same bits every time."""
        return True

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def accumulator_bytes(self) -> int:
        return self.accumulator.itemsize

    @property
    def whole(self) -> ConvGeometry:
        """The convolution whose input and output are the problem's: what a standard one is compared with."""
        return self.geometry

    @property
    def flops(self) -> int:
        """Useful floating-point operations, as `ConvGeometry.flops` counts them."""
        return self.geometry.flops

    @property
    def least_bytes(self) -> int:
        """Bytes that must cross device memory: each operand read once, the output written once."""
        return self.geometry.least_bytes(self.itemsize)

    @property
    def ends(self) -> tuple[int, int]:
        """Numbers of the input and of the output."""
        return self.geometry.batch * self.geometry.c_in * self.geometry.in_pixels, self.geometry.M * self.geometry.c_out

    @property
    def most_partial_bytes(self) -> int:
        """What sums of parts of the result may take: a tenth of input and output."""
        return max(self.itemsize * sum(self.ends) // 10, _POOLED_BYTES)

    @property
    def accumulator(self) -> torch.dtype:
        """Dtype of sums: float32, or float64 for float64."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def result_shape(self) -> tuple[int, ...]:
        """Shape of what the kernel writes."""
        return self.geometry.out_shape

    @property
    def result_strides(self) -> tuple[int, ...]:
        """Strides of what the kernel writes."""
        return of_rank(self.geometry.rank, self.y_strides)

    def operand(self, pointer: str) -> torch.dtype | None:
        """Dtype of the tensor behind a kernel's pointer of that name; None if this call has none there."""
        return None if pointer == "b_ptr" and not self.has_bias else self.dtype

    @property
    def pixels_last(self) -> bool:
        """Whether neighbours in memory are neighbouring pixels (NCHW) rather than channels (NHWC).

        Of one channel there are no neighbours; a stride of zero (an expanded tensor) is no neighbourhood either.
        """
        return not (self.x_strides[1] == 1 and self.geometry.c_in > 1)

    @property
    def dtype_name(self) -> str:
        """In words: "bfloat16"; of float32 with the precision of its products, "float32/tf32"."""
        name = str(self.dtype).removeprefix("torch.")
        return f"{name}/{self.precision}" if self.dtype == torch.float32 else name

    @property
    def layout(self) -> str:
        """The input's memory format in a word, which stands for all ranks."""
        return "NCHW" if self.pixels_last else "NHWC"

    def x_vector(self, *steps: int) -> int:
        """Channels that lie side by side at an aligned place in the input, where tiles start at multiples of `steps`:
        the widest load that never straddles a boundary.
        """
        if self.pixels_last:
            return 1
        return vector_of(*_but_channels(self.x_strides), *steps)

    def w_vector(self, *steps: int) -> int:
        """The same for the weight, along its second dimension."""
        if self.w_strides[1] != 1:
            return 1
        return vector_of(*_but_channels(self.w_strides), *steps)

    def y_vector(self, *steps: int) -> int:
        """The same for the output, along its channels."""
        if self.y_strides[1] != 1:
            return 1
        return vector_of(*_but_channels(self.y_strides), *steps)

    def rearranged(self) -> Problem:
        """The same convolution with its weight arranged as kernels read it best; itself, if it is so already.

        A depthwise transposed convolution of stride 1 is a forward one with the filter flipped. A filter that lies
        innermost puts neighbouring channels `taps` elements apart: a tile of it touches a 32-byte sector of L2 for each
        of its 2-byte elements, again for every tile of pixels.
        """
        g = self.geometry
        if g.transposed and g.c_in_group == g.c_out_group == 1 and (flipped := g.flipped()) is not None:
            n, c, *spatial = self.w_strides
            d, h, w = (-stride for stride in spatial)
            return replace(self, geometry=flipped, w_strides=(n, c, d, h, w), weight_view="flipped")
        few = min(g.c_in_group, g.c_out_group) < 16
        if few or g.taps == 1 or self.w_strides[1] == 1 or g.phases * _PIXELS_WORTH_PACKING > g.M:
            return self
        return replace(self, w_strides=five(dense_strides(g.weight_shape, channels_last=True)), weight_view="packed")

    def x_run(self, *steps: int) -> int:
        """Pixels of a row that lie side by side at an aligned place in the input, for blocks of columns that start at
        multiples of `steps`; a row holds a whole number of such runs.
        """
        return _run(self.x_strides, self.geometry.in_size[2], *steps)

    def y_run(self, *steps: int) -> int:
        """The same for the output."""
        return _run(self.y_strides, self.geometry.out_size[2], *steps)

    @functools.cached_property
    def weight_flat(self) -> bool:
        """Whether (channel, depth, height, width) of the weight is one contiguous run, as nn.Conv makes it."""
        g = self.geometry
        step = 1
        for stride, size in zip(reversed(self.w_strides[1:]), (*reversed(g.kernel), g.c_in_group), strict=True):
            if size > 1 and stride != step:
                return False
            step *= size
        return True

    def wide_index(self, block_m: int) -> bool:
        """Whether offsets inside a tile of `block_m` pixels may pass 2^31: then, and only then, they are 64-bit.

        Every kernel starts from a 64-bit base at the first image that the tile touches.
        """
        g = self.geometry
        # The pixels of an image that one tile sees: of a transposed convolution those of one phase.
        steps = g.stride if g.transposed else (1, 1, 1)
        pixels = math.prod(max(size // step, 1) for size, step in zip(g.out_size, steps, strict=True))
        images = min((block_m - 1) // pixels + 2, max(g.batch, 1))
        spans = [
            span(self.x_strides, (images, g.c_in, *(i + sum(p) for i, p in zip(g.in_size, g.padding, strict=True)))),
            span(self.y_strides, (images, g.c_out, *g.out_size)),
            span(self.w_strides, (g.c_in if g.transposed else g.c_out, max(g.c_in_group, g.c_out_group), *g.kernel)),
            span((self.stride_b,), (g.c_out,)),
            g.M + block_m,
        ]
        return max(spans) > INT32_LIMIT

    def describe(self) -> str:
        """One readable line: dtype, memory format, epilogue and geometry."""
        epilogue = ("+bias" if self.has_bias else "") + ("" if self.activation == "none" else f"+{self.activation}")
        return f"{self.geometry.describe()} {self.dtype_name} {self.layout}{epilogue}"


@dataclass(frozen=True)
class WeightGradientProblem(Problem):
    """The weight gradient of a forward convolution: `y_strides` are those of the output's gradient.

    The result is dense, in the memory format of the weight; there is no weight, bias or activation, and `w_strides` are
    zero. Of a `transposed` convolution, input and output's gradient have changed places.
    """

    channels_last: bool = False
    transposed: bool = False

    @property
    def read_bytes(self) -> int:
        """Input and output's gradient, each read once."""
        return self.itemsize * sum(self.ends)

    @property
    def partial_bytes(self) -> int:
        """One partial sum of every result."""
        return self.accumulator_bytes * math.prod(self.result_shape)

    @property
    def most_partial_bytes(self) -> int:
        """What partial sums may take, so that forward and backward together never hold more than the tensors that come
        in and go out, and a tenth of what this gradient reads.

        Where `weight_first`, the input's gradient is not there yet: its memory is free.
        """
        x, y = self.ends
        spare = (y if self.transposed else x) if weight_first(math.prod(self.result_shape), x + y) else 0
        return max(self.read_bytes // 10 + self.itemsize * spare, _POOLED_BYTES)

    @property
    def result_shape(self) -> tuple[int, ...]:
        """That of the weight, and of each partial sum."""
        return self.geometry.weight_shape

    @property
    def result_strides(self) -> tuple[int, ...]:
        return dense_strides(self.result_shape, self.channels_last)

    def describe(self) -> str:
        return f"{super().describe()} dw"


def weight_first(weight: int, read: int) -> bool:
    """Whether the weight's gradient comes before the input's, so that its partial sums lie where that one will: given
    the elements of the weight and of what its gradient reads.

    A large weight comes last instead. The copy of it that the input's gradient may read then lies where its gradient
    will.
    """
    return 10 * weight <= read


def _but_channels(strides: Strides) -> Strides:
    """Every stride but the second. Those of dimensions of size 1 too: a masked-off lane may still step along them, and
    an asynchronous copy wants even the addresses that it does not read aligned.
    """
    n, _, d, h, w = strides
    return n, 0, d, h, w


def _run(strides: Strides, width: int, *steps: int) -> int:
    *others, w = strides
    return vector_of(*others, width, *steps) if w == 1 else 1


def vector_of(*numbers: int) -> int:
    """The widest vector, of a power of two elements, that divides all of these strides and steps."""
    return math.gcd(VECTOR_LIMIT, *(abs(n) for n in numbers))
