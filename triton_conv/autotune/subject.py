"""What the tuner works on: one convolution of a workload's training step, with real operands and what must come out."""

from __future__ import annotations

import math
from collections.abc import Callable
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
        self._inputs, self._output = operands[:-1], operands[-1]
        self._bound = self._output
        # A sum over pixels is written in parts; one over images alone is not.
        self._split = workload.part == WEIGHT_GRADIENT and "SPLITS" in made.values
        self._expected = expect(workload, self.problem, tensors)

    def bind(self, made: Plan) -> Callable[[], None]:
        """A call that runs the plan into a buffer of its own; nothing is allocated while it runs."""
        output = self._output
        if self._split:
            splits = made.values["SPLITS"]
            strides = (math.prod(made.out_shape), *made.out_strides)
            output = output.new_empty_strided((splits, *made.out_shape), strides)
            if splits > 1:
                # Adding up is part of the price of splitting.
                total = torch.empty_strided(made.out_shape, made.out_strides, dtype=output.dtype, device=output.device)

                def run() -> None:
                    made.launch(*self._inputs, output)
                    torch.sum(output, 0, out=total)

                self._bound = output
                return run
        self._bound = output
        return lambda: made.launch(*self._inputs, output)

    @property
    def tolerance(self) -> float:
        """The bound of `error` that a correct kernel keeps."""
        return self._expected.tolerance

    def error(self, call: Callable[[], None]) -> float:
        """Deviation of one run of the call bound last; infinite where an element was not written."""
        self._bound.fill_(math.nan)
        call()
        return self._expected.error(self._bound.sum(0) if self._split else self._bound)


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
