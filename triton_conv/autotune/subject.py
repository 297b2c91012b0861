"""What the tuner works on: one convolution of a workload's training step, with real operands and what must come out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .. import target as targets
from ..dispatch import Plan
from ..errors import WorkloadError
from ..problem import DeformInputGradientProblem
from ..workloads import WEIGHT_GRADIENT, Workload, differentiated
from .expected import expect

# Elements before and after an output that no kernel may write: a row or two of a tile, and a multiple of any alignment.
_GUARD = 4096


class OutOfBoundsError(RuntimeError):
    """A kernel wrote outside its output."""


class Subject:
    """One launch: its operands, whatever tile runs it, and what must come out."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.workload = workload
        tensors = workload.tensors(device)
        made, operands = _default_launch(differentiated(workload.call, tensors, workload.part))
        if isinstance(made.problem, DeformInputGradientProblem):
            raise WorkloadError("workload: the input gradient of a deformable convolution cannot be tuned yet")
        assert operands[-1] is not None
        self.problem, self.target = made.problem, targets.of_device(device)
        # A sum over pixels is written in parts; one over images alone is not.
        self._split = workload.part == WEIGHT_GRADIENT and "SPLITS" in made.values
        self._inputs = operands[:-1]
        self._buffer, self._output = _guarded(operands[-1], operands[-1].shape, operands[-1].stride())
        self._bound = self._buffer, self._output
        self._expected = expect(workload, self.problem, tensors)

    def bind(self, made: Plan) -> Callable[[], None]:
        """A call that runs the plan into a buffer of its own; nothing is allocated while it runs."""
        self._bound = self._buffer, self._output
        if self._split:
            splits = made.values["SPLITS"]
            strides = (math.prod(made.out_shape), *made.out_strides)
            self._bound = _guarded(self._output, (splits, *made.out_shape), strides)
            if splits > 1:
                # Adding up is part of the price of splitting.
                parts, total = self._bound[1], self._output.new_empty_strided(made.out_shape, made.out_strides)

                def run() -> None:
                    made.launch(*self._inputs, parts)
                    torch.sum(parts, 0, out=total)

                return run
        _, output = self._bound
        return lambda: made.launch(*self._inputs, output)

    @property
    def tolerance(self) -> float:
        """The bound of `error` that a correct kernel keeps."""
        return self._expected.tolerance

    def error(self, call: Callable[[], None]) -> float:
        """Deviation of one run of the call bound last; infinite where an element was not written.

        Raises `OutOfBoundsError` if something else was.
        """
        buffer, output = self._bound
        buffer.fill_(math.nan)
        call()
        if not torch.cat((buffer[:_GUARD], buffer[-_GUARD:])).isnan().all():
            raise OutOfBoundsError(f"within {_GUARD} elements of the output")
        return self._expected.error(output.sum(0) if self._split else output)


def _guarded(like: Tensor, shape: Sequence[int], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A flat buffer, and a tensor of that shape inside it with guard bands on both sides."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    buffer = like.new_empty(elements + 2 * _GUARD)
    return buffer, buffer.as_strided(tuple(shape), tuple(strides), _GUARD)


def _default_launch(call: Callable[[], Any]) -> tuple[Plan, tuple[Tensor | None, ...]]:
    """Plan and operands of a launch, caught in the act."""
    caught: list[tuple[Plan, tuple[Tensor | None, ...]]] = []
    dispatch.watchers.append(lambda made, tensors: caught.append((made, tensors)))
    try:
        call()
    finally:
        dispatch.watchers.pop()
    if not caught:
        raise WorkloadError("workload: nothing is launched for it; its output or its gradient is empty")
    # Before a gradient, a smooth activation has the forward pass computed anew.
    return caught[-1]
