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
from ..kernels.sum_partials import sum_partials
from ..ops_fused import set_separable_fusion
from ..problem import WeightGradientProblem
from ..workloads import INPUT_GRADIENT, Workload, differentiated
from .expected import expect, expect_sampled

# Elements before and after an output that no kernel may write: a row or two of a tile, and a multiple of any alignment.
_GUARD = 4096

_Buffer = tuple[Tensor, Tensor]


class OutOfBoundsError(RuntimeError):
    """A kernel wrote outside its output."""


class Subject:
    """One launch: its operands, whatever tile runs it, and what must come out."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.workload = workload
        tensors = workload.tensors(device)
        sampled = workload.part == INPUT_GRADIENT and workload.offset_groups > 0
        if sampled:
            # A slope jumps where a coordinate is whole. Multiples of 1/64 are exact in float32 after the addition too,
            # so that kernel and reference stand on the same side.
            tensors["offset"].mul_(64).round_().div_(64)
        # Two kernels may be faster until a tile of the one is found.
        with set_separable_fusion(True):
            made, operands = _default_launch(differentiated(workload.call, tensors, workload.part))
        self.problem, self.target = made.problem, targets.of_device(device)
        # The gradients of input, offset and mask are written together, the first one added up in memory.
        self._adds = sampled
        first = made.kernel.pointers.index("dx_ptr") if sampled else len(operands) - 1
        self._inputs = operands[:first]
        self._weight, self._as_made = tensors.get("weight"), made.kernel.contiguous_weight
        self._outputs = [t if t is None else _guarded(t, t.shape, t.stride()) for t in operands[first:]]
        if isinstance(made.problem, WeightGradientProblem):
            # What was launched may have written partial sums.
            self._outputs = [_guarded(tensors["input"], made.out_shape, made.problem.result_strides)]
        self._bound = self._outputs
        self._expected = (
            expect_sampled(workload, self.problem, tensors) if sampled else [expect(workload, self.problem, tensors)]
        )

    def bind(self, made: Plan, whole: bool = False) -> Callable[[], None]:
        """A call that runs the plan into buffers of its own; nothing is allocated while it runs.

        A `whole` one arranges the weight first, where a user's call does so each time: in memory of its own.
        """
        self._bound = self._outputs
        inputs = self._read_by(made)
        if made.partial is not None:
            return self._bind_split(made, *made.partial)
        outputs = [buffer and buffer[1] for buffer in self._outputs]
        if self._adds and (sums := outputs[0]) is not None:
            # Zeros to add to are part of the price.
            def run() -> None:
                sums.zero_()
                made.launch(*inputs, *outputs)

            return run
        if whole and self.problem.weight_view == "packed":
            return lambda: made.launch(*self._arranged(made), *outputs)
        return lambda: made.launch(*inputs, *outputs)

    def _read_by(self, made: Plan) -> Sequence[Tensor | None]:
        """The inputs as the plan's kernel reads them: some read the weight as it was made, where others have a copy."""
        alike = made.kernel.contiguous_weight == self._as_made or self._weight is None
        return self._inputs if alike else self._arranged(made)

    def _arranged(self, made: Plan) -> Sequence[Tensor | None]:
        """The inputs with the weight arranged anew."""
        assert self._weight is not None
        place = made.kernel.pointers.index("w_ptr")
        return (*self._inputs[:place], made.arranged(self._weight), *self._inputs[place + 1 :])

    def _bind_split(self, made: Plan, shape: Sequence[int], strides: Sequence[int]) -> Callable[[], None]:
        assert self._outputs[0] is not None
        result = self._outputs[0][1]
        partial = _guarded(result.new_empty(0, dtype=made.problem.accumulator), shape, strides)
        self._bound = [*self._outputs, partial]

        # Adding up is part of the price of splitting.
        def run() -> None:
            made.launch(*self._inputs, partial[1])
            sum_partials(partial[1], result)

        return run

    @property
    def tolerance(self) -> float:
        """The bound of `error` that a correct kernel keeps."""
        return max(expected.tolerance for expected in self._expected)

    def error(self, call: Callable[[], None]) -> float:
        """Deviation of one run of the call bound last; infinite where an element was not written, or a second run
        gives other bits and should not.

        Raises `OutOfBoundsError` if something else was written.
        """
        bound = [buffer for buffer in self._bound if buffer is not None]
        for buffer, _ in bound:
            buffer.fill_(math.nan)
        call()
        for buffer, _ in bound:
            if not torch.cat((buffer[:_GUARD], buffer[-_GUARD:])).isnan().all():
                raise OutOfBoundsError(f"within {_GUARD} elements of the output")
        found = max(expected.error(output) for expected, (_, output) in zip(self._expected, bound, strict=False))
        return found if self._repeats(call, bound) else math.inf

    def _repeats(self, call: Callable[[], None], bound: Sequence[_Buffer]) -> bool:
        """Whether a second run has the same bits, where it should have them; a NaN is no number."""
        if not self.problem.repeatable:
            return True
        before = [output.clone() for _, output in bound]
        call()
        return all(torch.equal(first, output) for first, (_, output) in zip(before, bound, strict=True))


def _guarded(like: Tensor, shape: Sequence[int], strides: Sequence[int]) -> _Buffer:
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
