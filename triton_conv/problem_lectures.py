"""The problems of shuffled, locally connected and separable convolution: what their plans depend on besides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .geometry import ConvGeometry, Triple
from .layout import channels_last_like, dense_strides, of_rank, span
from .problem import INT32_LIMIT, Problem, vector_of


@dataclass(frozen=True)
class ShuffleProblem(Problem):
    """A grouped convolution whose output channels leave shuffled: channel j of group s is written to j * groups + s."""

    def describe(self) -> str:
        return f"{super().describe()} shuffled"


# ------------------------------------------------------------------------------------------------ locally connected


def local_weight_strides(shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """Strides of a dense weight `(*out_size, c_out, c_in/groups, *kernel)`, the input channels innermost if asked."""
    rank = (len(shape) - 2) // 2
    places = dense_strides((*shape[:rank], math.prod(shape[rank:])), channels_last=False)
    return (*places[:rank], *dense_strides(shape[rank:], channels_last))


@dataclass(frozen=True)
class LocalProblem(Problem):
    """A locally connected layer: every output pixel has a filter of its own.

    `geometry` is that of the convolution with one of these filters, `w_strides` are (o, i, d, h, w) inside a filter,
    `place_strides` (d, h, w) from a pixel's filter to the next one's. The bias has strides (c, d, h, w). Input and
    output are as the kernel reads and writes them.
    """

    place_strides: Triple = (0, 0, 0)
    bias_strides: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`(*out_size, c_out, c_in/groups, *kernel)`."""
        g = self.geometry
        return (*g.spatial(g.out_size), *g.weight_shape)

    @property
    def weight_strides(self) -> tuple[int, ...]:
        """Strides of the weight, in that order."""
        g = self.geometry
        return (*g.spatial(self.place_strides), *of_rank(g.rank, self.w_strides))

    @property
    def least_bytes(self) -> int:
        g = self.geometry
        pixels = g.batch * (g.c_in * g.in_pixels + g.c_out * g.out_pixels)
        return self.itemsize * (pixels + math.prod(self.weight_shape) + self.has_bias * g.c_out * g.out_pixels)

    @property
    def images_last(self) -> bool:
        """Whether neighbours in memory of the input are images, so that tiles of many images read whole lines."""
        return self.x_strides[0] == 1 and self.geometry.batch > 1

    @property
    def flat(self) -> bool:
        """Whether a filter's rows are runs of (channel, tap) pairs, as they are unless channels lie innermost."""
        return self.geometry.taps > 1 and self.weight_flat

    def image_vector(self, strides: Sequence[int], *steps: int) -> int:
        """Images that lie side by side at an aligned place in a tensor with these strides."""
        return vector_of(*strides[1:], *steps) if strides[0] == 1 else 1

    def weight_vector(self) -> int:
        """Elements of a filter's row, (channel, tap) pairs or channels, that lie side by side at an aligned place."""
        g = self.geometry
        rows = (*self.place_strides, self.w_strides[0])
        if self.flat:
            return vector_of(*rows, g.K)
        taps = self.w_strides[2:] if g.taps > 1 else ()
        return vector_of(*rows, *taps, g.c_in_group) if self.w_strides[1] == 1 else 1

    def wide_index(self, block_m: int) -> bool:
        """Whether offsets inside a tile of `block_m` images may pass 2^31; a filter's own start is 64-bit anyway."""
        g = self.geometry
        images = min(block_m, max(g.batch, 1))
        spans = [
            span(self.x_strides, (images, g.c_in, *(i + sum(p) for i, p in zip(g.in_size, g.padding, strict=True)))),
            span(self.y_strides, (images, g.c_out, *g.out_size)),
            span(self.w_strides, (g.c_out, g.c_in_group, *g.kernel)),
        ]
        return max(spans) > INT32_LIMIT

    def describe(self) -> str:
        order = "flat" if self.flat else "channels"
        return f"{super().describe()} local {order}{' images' if self.images_last else ''}"


@dataclass(frozen=True)
class LocalInputGradientProblem(LocalProblem):
    """The input gradient of a locally connected layer: `x_strides` are those of the result, `y_strides` of dy."""

    @property
    def result_shape(self) -> tuple[int, ...]:
        return self.geometry.in_shape

    @property
    def result_strides(self) -> tuple[int, ...]:
        return of_rank(self.geometry.rank, self.x_strides)

    def describe(self) -> str:
        return f"{super().describe()} dx"


@dataclass(frozen=True)
class LocalWeightGradientProblem(LocalProblem):
    """The weight gradient of a locally connected layer: strides of the weight are those of the result."""

    @property
    def result_shape(self) -> tuple[int, ...]:
        return self.weight_shape

    @property
    def result_strides(self) -> tuple[int, ...]:
        return self.weight_strides

    def describe(self) -> str:
        return f"{super().describe()} dw"


# -------------------------------------------------------------------------------------------------------- separable


@dataclass(frozen=True)
class SeparableProblem(Problem):
    """A depthwise convolution and the 1x1 one after it, in one kernel.

    `geometry` and `w_strides` are those of the depthwise one; bias and activation those of the second.
    """

    c_final: int = 1
    pointwise_strides: tuple[int, int] = (0, 0)
    has_mid_bias: bool = False
    stride_mb: int = 1
    mid_activation: str = "none"

    @property
    def result_shape(self) -> tuple[int, ...]:
        g = self.geometry
        return (g.batch, self.c_final, *g.spatial(g.out_size))

    @property
    def whole(self) -> ConvGeometry:
        return replace(self.geometry, c_out=self.c_final, groups=1)

    @property
    def flops(self) -> int:
        return self.geometry.flops + 2 * self.geometry.M * self.geometry.c_out * self.c_final

    @property
    def least_bytes(self) -> int:
        g = self.geometry
        weights = g.c_out * (g.taps + self.c_final)
        return self.itemsize * (g.batch * g.c_in * g.in_pixels + weights + g.M * self.c_final)

    def operand(self, pointer: str) -> torch.dtype | None:
        return None if pointer == "mid_b_ptr" and not self.has_mid_bias else super().operand(pointer)

    def pointwise_vector(self, *steps: int) -> int:
        """Input channels of the 1x1 weight that lie side by side at an aligned place."""
        outer, inner = self.pointwise_strides
        return vector_of(outer, *steps) if inner == 1 else 1

    def wide_index(self, block_m: int) -> bool:
        g = self.geometry
        images = min((block_m - 1) // max(g.out_pixels, 1) + 2, max(g.batch, 1))
        return (
            super().wide_index(block_m)
            or span(self.y_strides, (images, self.c_final, *g.out_size)) > INT32_LIMIT
            or span(self.pointwise_strides, (self.c_final, g.c_out)) > INT32_LIMIT
            or span((self.stride_b, self.stride_mb), (self.c_final, g.c_out)) > INT32_LIMIT
        )

    @property
    def moved_unfused(self) -> float:
        """Numbers that two kernels move, those between them twice: at 0.65 of what a copy moves in the same time.

        bfloat16, NHWC, on an H100: 57 us for 256 channels of 64 x 28 x 28 (53 by this count), 97 us for 128 of 56 x 56
        (105), both with 3 x 3 filters.
        """
        g = self.geometry
        numbers = g.batch * g.c_in * g.in_pixels + g.M * (2 * g.c_out + self.c_final)
        return numbers / 0.65

    @property
    def moved_fused(self) -> float:
        """Numbers that a copy moves in the time of one kernel, which filters in between its products: 9 taps of a
        number take 9.4 ps of an H100 with 256 output channels, 6.1 ps with 128 (121 us and 156 us, the layers above).
        """
        g = self.geometry
        tiles = -(-self.c_final // 256)
        each = 1.05 if self.c_final <= 128 else 1.55
        ends = g.batch * g.c_in * g.in_pixels + g.M * self.c_final
        return max(g.M * g.c_out * g.taps * each * tiles, ends)

    @property
    def unfused(self) -> str | None:
        """Why two kernels are the better plan, or None: by counting, with what was measured of both."""
        g = self.geometry
        if self.c_final > 256:
            return f"{self.c_final} output channels are several tiles, each of which would filter the input again"
        if self.moved_fused > self.moved_unfused:
            one, two = (moved / max(g.M, 1) for moved in (self.moved_fused, self.moved_unfused))
            return (
                f"{g.taps} taps in one kernel take as long as moving {one:.0f} numbers a pixel, two kernels {two:.0f}"
            )
        return None

    def describe(self) -> str:
        middle = ("+bias" if self.has_mid_bias else "") + (
            "" if self.mid_activation == "none" else f"+{self.mid_activation}"
        )
        return f"{super().describe()} separable{middle} {self.c_final}"


def dense_local_input(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a copy of an input with its images innermost."""
    inner = dense_strides((*shape[1:], max(shape[0], 1)), channels_last=False)
    return (1, *inner[:-1])


def is_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether channels lie innermost, for any rank; torch has no such format of one dimension."""
    if len(shape) == 3:
        return strides[1] == 1 and shape[1] > 1 and strides[2] >= shape[1]
    return channels_last_like(shape, strides)
