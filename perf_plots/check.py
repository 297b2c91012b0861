"""No time counts before the result is right: our kernel against the float64 reference, on a poisoned output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from triton_conv.autotune.expected import Expected


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


def check(call: Callable[[], Tensor], expected: Expected, repeatable: bool = True) -> float:
    """Runs our kernel twice, the first time on a poisoned output; returns the relative error or raises `CheckError`."""
    with poisoned_outputs():
        first = call()
    if not torch.isfinite(first).all():
        bad = int((~torch.isfinite(first)).sum())
        raise CheckError(f"{bad} of {first.numel()} outputs are not finite or were never written")
    error = expected.error(first)
    if not error <= expected.tolerance:
        raise CheckError(f"relative error {error:.3g} exceeds {expected.tolerance:.3g}")
    second = call()
    if not repeatable:
        # Sums by atomics come in another order each time: within the bound, again.
        error = max(error, expected.error(second))
        if not error <= expected.tolerance:
            raise CheckError(f"relative error {error:.3g} of a second run exceeds {expected.tolerance:.3g}")
    elif not torch.equal(first, second):
        raise CheckError("a second run on the same input gave another result: a race")
    return error
