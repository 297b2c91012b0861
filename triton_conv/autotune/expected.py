"""Float64 references of the parts of a result that are compared: enough to tell, and no more than fits in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem
from ..reference import reference, relative_error, rounding, tolerance
from ..workloads import FORWARD, WEIGHT_GRADIENT, Workload, output_gradient

# Channels at either end that are compared where the reference of a whole depthwise image does not fit in memory, and
# rows of the weight whose gradient is compared where there is one group.
_FEW_CHANNELS, _ROWS = 64, 4

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Expected:
    """What a result must be in some places."""

    parts: tuple[tuple[Index, Tensor], ...]
    description: str
    tolerance: float

    def error(self, result: Tensor) -> float:
        """The largest relative error over the parts; infinite where one holds a NaN."""
        return max(relative_error(result[index], part) for index, part in self.parts)


def expect(workload: Workload, problem: Problem, tensors: Mapping[str, Any]) -> Expected:
    """References of a workload's result on these tensors."""
    g, bound = problem.geometry, rounding(problem)
    grad = None
    if workload.part != FORWARD:
        x = tensors["input"]
        grad = output_gradient(workload.layer.problem().geometry.out_shape, x.dtype, x.device)
    if workload.part == WEIGHT_GRADIENT:
        assert grad is not None
        return Expected((_weight_rows(workload, tensors, grad),), "first rows of the weight", bound)
    images = [slice(0, 1)] if g.batch == 1 else [slice(0, 1), slice(g.batch - 1, g.batch)]
    try:
        parts: tuple[tuple[Index, Tensor], ...] = tuple(
            ((image,), _image(workload, tensors, grad, image)) for image in images
        )
        return Expected(parts, "the only image" if g.batch == 1 else "first and last image", bound)
    except torch.OutOfMemoryError:
        if workload.kind != "depthwise" or g.c_in != g.c_out:
            raise
    torch.cuda.empty_cache()
    few = min(_FEW_CHANNELS, g.c_in)
    ends = (slice(0, few), slice(g.c_in - few, g.c_in))
    parts = tuple(((image, end), _image(workload, tensors, grad, image, end)) for image in images for end in ends)
    return Expected(parts, f"outermost {few} channels of the first and last image", bound)


def expect_sampled(workload: Workload, problem: Problem, tensors: Mapping[str, Any]) -> list[Expected]:
    """References of the gradients of a deformable call's input, offset and mask, as far as it has them, in this order.

    An element of the input's gradient adds up samples of many pixels: all of an image at the worst.
    """
    g, x = problem.geometry, tensors["input"]
    grad = output_gradient(workload.layer.problem().geometry.out_shape, x.dtype, x.device)
    images = [slice(0, 1)] if g.batch == 1 else [slice(0, 1), slice(g.batch - 1, g.batch)]
    found = []
    for name in ("input", "offset", "mask"):
        if name not in tensors:
            continue
        terms = g.c_out_group * (g.taps * g.out_pixels if name == "input" else g.c_in_group)
        parts = tuple(((image,), _image(workload, tensors, grad, image, name=name)) for image in images)
        found.append(Expected(parts, name, tolerance(problem.dtype, terms, problem.precision, max(g.in_size))))
    return found


def _image(
    workload: Workload,
    tensors: Mapping[str, Any],
    grad: Tensor | None,
    image: slice,
    channels: slice | None = None,
    name: str = "input",
) -> Tensor:
    """Entries of a batch do not depend on each other, nor do the channels of a depthwise convolution."""
    arguments = dict(tensors)
    for batched in ("input", "offset", "mask"):
        if batched in arguments:
            arguments[batched] = arguments[batched][image]
    if channels is not None:
        arguments["input"] = arguments["input"][:, channels]
        arguments["weight"] = arguments["weight"][channels]
        arguments["groups"] = len(arguments["weight"])
    if workload.part == FORWARD:
        return reference(workload.function, arguments)
    assert grad is not None
    grad = grad[image] if channels is None else grad[image, channels]
    return _gradient(workload.function, arguments, name, grad)


def _weight_rows(workload: Workload, tensors: Mapping[str, Any], grad: Tensor) -> tuple[Index, Tensor]:
    """The weight's gradient in the first group, or in the first rows of the only one: rows do not depend on others."""
    if workload.kind == "local":
        # Filters are not shared: there are no rows to choose from that depend on less of the input.
        return (slice(None),), _gradient(workload.function, dict(tensors), "weight", grad)
    weight, groups = tensors["weight"], tensors.get("groups", 1)
    x, dy, arguments = tensors["input"], grad, dict(tensors)
    if groups > 1:
        # A group is a convolution of its own; its channels are a run of the input's and of the output's.
        rows = slice(0, weight.shape[0] // groups)
        x, dy = x[:, : x.shape[1] // groups], dy[:, : dy.shape[1] // groups]
        arguments["groups"] = 1
    else:
        rows = slice(0, min(_ROWS, weight.shape[0]))
        x, dy = (x[:, rows], dy) if "transpose" in workload.function else (x, dy[:, rows])
    arguments |= {"input": x, "weight": weight[rows]}
    return (rows,), _gradient(workload.function, arguments, "weight", dy)


def _gradient(function: str, arguments: dict[str, Any], name: str, grad: Tensor) -> Tensor:
    leaf = arguments[name].detach().double().requires_grad_()
    with torch.enable_grad():
        result = reference(function, arguments | {name: leaf})
    gradient: Tensor
    (gradient,) = torch.autograd.grad(result, leaf, grad.double())
    return gradient
