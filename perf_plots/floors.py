"""What a case must cost at least: its arithmetic and its traffic over the limits of a device.

Computed, never measured: counts from the geometry, rates from a datasheet or from the ceilings measured on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from triton_conv.target import KNOWN, Target
from triton_conv.workloads import PARTS, STEP, Workload


@dataclass(frozen=True)
class Limits:
    """A device's rates and where they come from."""

    target: Target
    basis: str = "datasheet"

    @property
    def known(self) -> bool:
        return bool(self.target.bandwidth and self.target.rates)

    @classmethod
    def of(cls, target: Target, ceilings: Mapping[str, Any] | None) -> Limits:
        """The measured ceilings where there are any, else the datasheet's figures."""
        if not ceilings:
            return cls(target)
        rates = dict(target.rates) | ceilings["flops_per_s"]
        return cls(replace(target, bandwidth=ceilings["bytes_per_s"], rates=tuple(rates.items())), "measured ceilings")


DATASHEET = Limits(KNOWN["sm_90"])
"""What the computed figures are drawn for where nothing has been measured."""


@dataclass(frozen=True)
class Work:
    """FLOPs and least bytes of an operation, and of the standard convolution of the same input and output."""

    flops: int
    least_bytes: int
    standard_flops: int
    standard_bytes: int
    dtype: str
    precision: str

    @classmethod
    def of(cls, workload: Workload) -> Work:
        # A gradient multiplies the same numbers, and reads and writes tensors of the same shapes: a step is three.
        problem, times = workload.layer.problem(), len(PARTS) if workload.part == STEP else 1
        dense = problem.whole.dense()
        return cls(
            flops=times * problem.flops,
            least_bytes=times * problem.least_bytes,
            standard_flops=times * dense.flops,
            standard_bytes=times * dense.least_bytes(problem.itemsize),
            dtype=workload.dtype,
            precision=problem.precision,
        )

    def floor_us(self, limits: Limits) -> float:
        """Least time of the operation."""
        return 1e6 * limits.target.floor_seconds(self.flops, self.least_bytes, self.dtype, self.precision)

    def standard_floor_us(self, limits: Limits) -> float:
        """Least time of the standard convolution."""
        return 1e6 * limits.target.floor_seconds(self.standard_flops, self.standard_bytes, self.dtype, self.precision)

    def bound(self, limits: Limits) -> str:
        """Which of the two limits decides: "memory" or "arithmetic"."""
        arithmetic = self.flops / limits.target.rate(self.dtype, self.precision)
        return "arithmetic" if arithmetic > self.least_bytes / limits.target.bandwidth else "memory"
