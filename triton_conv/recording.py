"""Which problems a piece of code would run: on meta tensors nothing is computed, but everything is planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from . import ops_conv, ops_deform, ops_fused, ops_local
from .dispatch import Plan
from .problem import Problem

_PLANNERS: dict[Any, Callable[..., Plan]] = {
    ops_conv.conv: ops_conv.plan_conv,
    ops_conv.conv_weight_gradient: ops_conv.plan_conv_weight_gradient,
    ops_deform.deform_conv: ops_deform.plan_deform_conv,
    ops_deform.deform_conv_input_gradient: ops_deform.plan_deform_conv_input_gradient,
    ops_deform.deform_conv_weight_gradient: ops_deform.plan_deform_conv_weight_gradient,
    **ops_fused.PLANNERS,
    **ops_local.PLANNERS,
}


def problem_of(func: Any, arguments: Sequence[Any]) -> Problem | None:
    """The problem that a call of one of our ops is, or None if the op is not ours."""
    return _PLANNERS[func](*arguments).problem if func in _PLANNERS else None


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.problems: list[Problem] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (problem := problem_of(func, args)) is not None:
            self.problems.append(problem)
        return func(*args, **(kwargs or {}))


def record(call: Callable[[], Any]) -> list[Problem]:
    """The problem of every convolution that `call` runs, forward or backward, in order."""
    with _Recorder() as recorder:
        call()
    problems: list[Problem] = recorder.problems
    return problems
