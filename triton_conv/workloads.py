"""The flagship workloads: the layers this library is tuned for, judged by, and compiled for, as data.

Each one is a layer of a published network or of a public thread about a slow convolution (`origin`). The tuner, the
compile check and the benchmark read this one list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import ops
from .errors import WorkloadError
from .functional import PLANNERS
from .problem import Problem, dense_strides

KINDS = ("grouped", "depthwise", "dilated", "transposed", "deformable")


@dataclass(frozen=True)
class Workload:
    """One call of a public function, by shapes; `arguments` are its keyword arguments besides tensors."""

    name: str
    kind: str
    function: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    channels_last: bool = False
    offset_groups: int = 0
    mask: bool = False
    origin: str = ""

    def __hash__(self) -> int:
        return hash((self.name, self.dtype, self.channels_last))

    @property
    def title(self) -> str:
        """Name, dtype and memory format: unique among the variants of a workload."""
        return f"{self.name} {self.dtype} {'NHWC' if self.channels_last else 'NCHW'}"

    def tensors(self, device: str | torch.device, seed: int = 0) -> dict[str, Any]:
        """All arguments of the call, tensors drawn anew from `seed`; on "meta", without data."""
        generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, self.dtype)

        def draw(shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
            strides = dense_strides(shape, self.channels_last)
            if len(shape) == 3 and self.channels_last:
                strides = (shape[1] * shape[2], 1, shape[1])
            tensor = torch.empty_strided(shape, strides, dtype=dtype, device=device)
            return tensor if generator is None else tensor.normal_(0, scale, generator=generator)

        fan_in = self.weight[1]
        for k in self.weight[2:]:
            fan_in *= k
        result = {"input": draw(self.input), "weight": draw(self.weight, fan_in**-0.5), **self.arguments}
        if self.function.startswith("deform"):
            taps = self.weight[2] * self.weight[3]
            n, _, h, w = self.input
            spatial = self._deform_out(h, w)
            result["offset"] = draw((n, 2 * self.offset_groups * taps, *spatial), 2.0)
            if self.mask:
                result["mask"] = draw((n, self.offset_groups * taps, *spatial))
                if generator is not None:
                    result["mask"].sigmoid_()
        return result

    def _deform_out(self, h: int, w: int) -> tuple[int, int]:
        padding, stride = self.arguments.get("padding", 0), self.arguments.get("stride", 1)
        kh, kw = self.weight[2:]
        return (h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1

    def problem(self) -> Problem:
        """What planning sees of the call, without allocating it."""
        planner, arguments = PLANNERS[self.function[:-2]]
        from .functional import bind

        return planner(*arguments(int(self.function[-2]), **bind(self.function, self.tensors("meta")))).problem

    def shrunk(self) -> Workload:
        """The same kind of call, small enough for the interpreter: few groups, few channels, a kernel of at most 3."""
        groups = self.arguments.get("groups", 1)
        few = min(groups, 4)
        transposed = "transpose" in self.function
        kernel = tuple(min(k, 3) for k in self.weight[2:])
        inner = min(self.weight[1], 4)
        outer = min(self.weight[0] // groups, 4) * few
        if self.kind == "deformable":
            inner = outer = 4 * self.offset_groups if self.offset_groups <= 4 else self.offset_groups
        c_in = outer if transposed else inner * few
        arguments = dict(self.arguments) | ({"groups": few} if groups > 1 else {})
        if "padding" in arguments and arguments["padding"] != "same":
            limit = kernel[-1] - 1
            old = arguments["padding"]
            arguments["padding"] = (
                min(old, limit)
                if isinstance(old, int)
                else tuple(tuple(min(p, limit) for p in pair) if isinstance(pair, tuple) else min(pair, limit) for pair in old)
            )
        dilation = arguments.get("dilation", 1)
        arguments |= {"dilation": min(dilation, 2)} if "dilation" in arguments else {}
        size = tuple(min(s, 7) for s in self.input[2:])
        return replace(
            self, input=(min(self.input[0], 2), c_in, *size), weight=(outer, inner, *kernel), arguments=arguments
        )
