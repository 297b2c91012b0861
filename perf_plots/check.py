"""No time counts before the result is right: our kernel against the float64 reference, on a poisoned output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triton_conv.problem import Problem
from triton_conv.reference import reference, relative_error, tolerance
from triton_conv.workloads import Workload

# Channels at either end that are checked where the reference of a whole image does not fit in memory.
_FEW_CHANNELS = 64


class CheckError(AssertionError):
    """Our result is wrong: too far from the reference, not a number, not written, or another one the second time."""


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Every tensor that torch allocates here holds NaN, so that an element that nothing writes shows."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


@dataclass(frozen=True)
class Expected:
    """Float64 references of the parts of a batch that are compared."""

    parts: tuple[tuple[tuple[slice, ...], Tensor], ...]
    description: str
    tolerance: float

    def error(self, result: Tensor) -> float:
        """The largest relative error over the parts; infinite where one holds a NaN."""
        return max(relative_error(result[index], part) for index, part in self.parts)


def expect(workload: Workload, problem: Problem, tensors: Mapping[str, Any]) -> Expected:
    """References of the first and the last image; of the outermost channels where a depthwise image is too large."""
    sampled = max(problem.geometry.in_size) if workload.offset_groups else 0
    bound = tolerance(problem.dtype, problem.geometry.K, problem.precision, sampled)
    batch = problem.geometry.batch
    images = [slice(0, 1)] if batch == 1 else [slice(0, 1), slice(batch - 1, batch)]
    parts: tuple[tuple[tuple[slice, ...], Tensor], ...]
    try:
        parts = tuple(((image,), _reference(workload, tensors, image)) for image in images)
        return Expected(parts, "the only image" if batch == 1 else "first and last image", bound)
    except torch.OutOfMemoryError:
        if workload.kind != "depthwise" or problem.geometry.c_in != problem.geometry.c_out:
            raise
    torch.cuda.empty_cache()
    few, channels = min(_FEW_CHANNELS, problem.geometry.c_in), problem.geometry.c_in
    ends = (slice(0, few), slice(channels - few, channels))
    parts = tuple(((image, end), _reference(workload, tensors, image, end)) for image in images for end in ends)
    return Expected(parts, f"outermost {few} channels of the first and last image", bound)


def _reference(workload: Workload, tensors: Mapping[str, Any], image: slice, channels: slice | None = None) -> Tensor:
    """Entries of a batch do not depend on each other, nor do the channels of a depthwise convolution."""
    arguments = dict(tensors)
    for name in ("input", "offset", "mask"):
        if name in arguments:
            arguments[name] = arguments[name][image]
    if channels is not None:
        arguments["input"] = arguments["input"][:, channels]
        arguments["weight"] = arguments["weight"][channels]
        arguments["groups"] = len(arguments["weight"])
    return reference(workload.function, arguments)


def check(call: Callable[[], Tensor], expected: Expected) -> float:
    """Runs our kernel twice, the first time on a poisoned output; returns the relative error or raises `CheckError`."""
    with poisoned_outputs():
        first = call()
    if not torch.isfinite(first).all():
        bad = int((~torch.isfinite(first)).sum())
        raise CheckError(f"{bad} of {first.numel()} outputs are not finite or were never written")
    error = expected.error(first)
    if not error <= expected.tolerance:
        raise CheckError(f"relative error {error:.3g} exceeds {expected.tolerance:.3g}")
    if not torch.equal(first, call()):
        raise CheckError("a second run on the same input gave another result: a race")
    return error
