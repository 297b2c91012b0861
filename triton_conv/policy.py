"""Whether a layer's call runs on our kernels or on torch's own, and why.

This is the practical face: the modules of `triton_conv.nn`, `convert` and `accelerate` ask here; the functions of the
library do not, and always run our kernels. Three backends: "auto" takes ours where a measurement stored for this device
says that it is faster, "triton" wherever our kernels can run the call, "torch" nowhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops, ops_conv, ops_deform
from .comparisons import judge
from .dispatch import Plan
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    ArgumentValueError,
    BackendWarning,
    CaptureError,
    TritonConvError,
)
from .settings import Setting
from .tensors import TensorMeta

AUTO, OURS, TORCH = BACKENDS = ("auto", "triton", "torch")

_PLANNERS: dict[str, Callable[..., Plan]] = {
    "conv": ops_conv.plan_conv_of,
    "deform_conv": ops_deform.plan_deform_conv_of,
}
_backend = AUTO


@dataclass(frozen=True)
class Choice:
    """Where a call runs: "triton" or "torch", why, and the plan of ours if our kernels can run it.

    `gain` is how many times as fast as torch ours is expected to be; None if that was never measured.
    """

    backend: str
    reason: str
    gain: float | None = None
    plan: Plan | None = None

    @property
    def ours(self) -> bool:
        return self.backend == OURS


class set_backend(Setting):
    """Sets the backend of every layer that has none of its own: "auto" (the default), "triton" or "torch".

    Takes effect at once; as a context manager, until its end.

    >>> tc.set_backend("triton")
    >>> with tc.set_backend("torch"):
    ...     model(x)

    Raises:
        ArgumentValueError (a ValueError): for another name.
    """

    def __init__(self, backend: str) -> None:
        super().__init__(globals(), "_backend", check_backend(backend))


def check_backend(backend: str) -> str:
    """The backend, if it is one."""
    if backend not in BACKENDS:
        raise ArgumentValueError(f"backend: {backend!r} is not known; choose one of {', '.join(BACKENDS)}")
    return backend


def current_backend() -> str:
    """The backend of layers that have none of their own."""
    return _backend


def choose(kind: str, backend: str, tensors: tuple[Tensor | None, ...], arguments: tuple[Any, ...]) -> Choice:
    """The choice for a call of the op `kind`, by its tensors and its other arguments in the op's order.

    A call seen before costs a look-up. Never raises: what our kernels refuse is torch's to run or to complain of.
    """
    training = torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
    precision = ops.conv_precision(tensors[0].dtype)  # type: ignore[union-attr]
    try:
        metas = tuple([None if tensor is None else TensorMeta.of("tensor", tensor) for tensor in tensors])
        try:
            return _choose(kind, backend, training, metas, arguments, precision)
        except TypeError:
            # Symbols have no hash.
            return _choose(kind, backend, training, ops.traced(metas), ops.traced(arguments), precision)
    except CaptureError as error:
        warnings.warn(f"a layer runs on torch's kernel: {error}", BackendWarning, stacklevel=2)
        return Choice(TORCH, str(error))
    except ArgumentError as error:
        return Choice(TORCH, f"not ours: {error}")


@ops.cached
def _choose(
    kind: str,
    backend: str,
    training: bool,
    tensors: tuple[TensorMeta | None, ...],
    arguments: tuple[Any, ...],
    precision: str,
) -> Choice:
    try:
        plan = _PLANNERS[kind](*tensors, *arguments, precision)
    except TritonConvError as error:
        # A wrong argument is no matter of backends: torch will say so itself.
        if backend == OURS and not isinstance(error, (ArgumentError, ArgumentTypeError, ArgumentValueError)):
            warnings.warn(f"a layer runs on torch's kernel: {error}", BackendWarning, stacklevel=3)
        return Choice(TORCH, f"not ours: {error}")
    verdict = judge(plan.problem, plan.target, training)
    if backend != AUTO:
        return Choice(backend, "asked for", verdict.gain, plan)
    return Choice(OURS if verdict.faster else TORCH, verdict.reason, verdict.gain, plan)
