"""The problems of deformable convolution: beside those of the convolution, where offset and mask lie in memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .layout import dense_like, of_rank, span
from .problem import INT32_LIMIT, Problem, WeightGradientProblem, vector_of


@dataclass(frozen=True)
class DeformProblem(Problem):
    """A deformable call: besides, the layout of offset and mask, strides in the order (n, c, h, w)."""

    offset_groups: int = 1
    offset_strides: tuple[int, int, int, int] = (0, 0, 0, 0)
    mask_strides: tuple[int, int, int, int] | None = None

    @property
    def has_mask(self) -> bool:
        return self.mask_strides is not None

    @property
    def least_bytes(self) -> int:
        g = self.geometry
        per_tap = 3 if self.has_mask else 2
        return super().least_bytes + self.itemsize * g.M * g.taps * self.offset_groups * per_tap

    def operand(self, pointer: str) -> torch.dtype | None:
        return None if pointer == "mask_ptr" and not self.has_mask else super().operand(pointer)

    @functools.cached_property
    def offset_shape(self) -> tuple[int, int, int, int]:
        g = self.geometry
        return g.batch, 2 * self.offset_groups * g.taps, *g.out_size[1:]

    @functools.cached_property
    def mask_shape(self) -> tuple[int, int, int, int]:
        g = self.geometry
        return g.batch, self.offset_groups * g.taps, *g.out_size[1:]

    @property
    def segment(self) -> int:
        """Channels that share a weight group and an offset group, and so are sampled and multiplied together."""
        return math.gcd(self.geometry.c_in_group, self.geometry.c_in // self.offset_groups)

    def _wide(self, block_m: int, tensors: Iterable[tuple[Sequence[int] | None, Sequence[int]]]) -> bool:
        """Whether the images that a tile touches pass 2^31 in one of these tensors of (strides, shape)."""
        g = self.geometry
        images = min((block_m - 1) // max(g.out_pixels, 1) + 2, max(g.batch, 1))
        spans = [span(strides, (images, *shape[1:])) for strides, shape in tensors if strides is not None]
        return max(spans) > INT32_LIMIT

    def wide_index(self, block_m: int) -> bool:
        layouts = ((self.offset_strides, self.offset_shape), (self.mask_strides, self.mask_shape))
        return super().wide_index(block_m) or self._wide(block_m, layouts)

    def describe(self) -> str:
        return f"{super().describe()} og{self.offset_groups}{'+mask' if self.has_mask else ''}"


@dataclass(frozen=True)
class DeformWeightGradientProblem(DeformProblem, WeightGradientProblem):
    """The weight gradient of a deformable convolution: a weight gradient whose input is sampled at offsets."""


@dataclass(frozen=True)
class DeformInputGradientProblem(DeformProblem):
    """The gradients of a deformable convolution's input, offset and mask, as far as they are needed.

    `y_strides` are those of the output's gradient; there is no bias. Results are dense, each in the memory format of
    the tensor it belongs to. `fixed_point` sums the input's gradient in 64-bit integers, whose sum has no order.
    """

    need_input: bool = True
    need_offset: bool = True
    need_mask: bool = False
    fixed_point: bool = False

    @property
    def result_shape(self) -> tuple[int, ...]:
        """Shape of the input and its gradient; offset and mask come beside it."""
        return self.geometry.in_shape

    @property
    def result_strides(self) -> tuple[int, ...]:
        return dense_like(self.result_shape, of_rank(2, self.x_strides))

    @functools.cached_property
    def offset_gradient_strides(self) -> tuple[int, ...]:
        return dense_like(self.offset_shape, self.offset_strides)

    @functools.cached_property
    def mask_gradient_strides(self) -> tuple[int, ...]:
        return dense_like(self.mask_shape, self.mask_strides or (0, 0, 0, 0))

    @property
    def repeatable(self) -> bool:
        return self.fixed_point or not self.need_input

    def operand(self, pointer: str) -> torch.dtype | None:
        if pointer == "dx_ptr":
            sums = torch.int64 if self.fixed_point else self.accumulator
            return sums if self.need_input else None
        if pointer == "scale_ptr":
            return self.accumulator if self.need_input and self.fixed_point else None
        absent = (pointer == "doffset_ptr" and not self.need_offset) or (pointer == "dmask_ptr" and not self.need_mask)
        return None if absent else super().operand(pointer)

    @property
    def least_bytes(self) -> int:
        g = self.geometry
        written = self.need_input * g.batch * g.c_in * g.in_pixels
        for needed, shape in ((self.need_offset, self.offset_shape), (self.need_mask, self.mask_shape)):
            written += needed * math.prod(shape)
        return super().least_bytes + self.itemsize * written

    def wide_index(self, block_m: int) -> bool:
        layouts = (
            (self.result_strides, self.result_shape),
            (self.offset_gradient_strides, self.offset_shape),
            (self.mask_gradient_strides, self.mask_shape),
        )
        return super().wide_index(block_m) or self._wide(block_m, layouts)

    def dx_vector(self, *steps: int) -> int:
        """Channels that lie side by side at an aligned place in the input's gradient, as `x_vector` has it."""
        n, c, h, w = self.result_strides
        return vector_of(n, h, w, *steps) if c == 1 else 1

    def describe(self) -> str:
        needed = (self.need_input, "dx"), (self.need_offset, "do"), (self.need_mask, "dm")
        names = "".join(f" {name}" for need, name in needed if need)
        return f"{super().describe()}{names}{' fixed' if self.fixed_point and self.need_input else ''}"
