"""What a device gives, and how long a launch takes on it by count.

Every term of a time is a demand over a rate. They overlap: the time is their power mean, near the largest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..errors import WorkloadError
from ..target import KNOWN, Target
from .demand import Demand

TERMS = {
    "issue": "instruction issue",
    "integer": "integer and float units",
    "special": "special functions",
    "memory": "memory instructions",
    "l1": "L1 and shared memory",
    "tensor": "tensor cores",
    "l2": "L2",
    "device": "device memory",
    "latency": "latency",
}


@dataclass(frozen=True)
class Machine:
    """Rates of one device. Of clocks each is the share that kernels reach of what the hardware does at most.

    `clock` in Hz, `l2` and `device` in bytes a second, `wait`, `fetch` and `barrier` in clocks, `launch` in seconds.
    `overlap` is the exponent of the power mean: infinite if all terms overlapped, 1 if none did. `ceilings` are the
    measured limits that floors are taken from.
    """

    clock: float
    issue: float
    integer: float
    special: float
    memory: float
    l1: float
    tensor: float
    l2: float
    device: float
    wait: float
    fetch: float
    barrier: float
    launch: float
    overlap: float
    ceilings: tuple[float, tuple[tuple[str, float], ...]]

    def seconds(self, demand: Demand) -> dict[str, float]:
        """Seconds that each term would take alone, by the names of `TERMS`."""
        clock = self.clock
        return {
            "issue": demand.issued / clock / self.issue,
            "integer": demand.integer / clock / self.integer,
            "special": demand.special / clock / self.special,
            "memory": demand.memory / clock / self.memory,
            "l1": demand.wavefronts / clock / self.l1,
            "tensor": demand.tensor / clock / self.tensor,
            "l2": demand.l2_bytes / self.l2,
            "device": demand.device_bytes / self.device,
            "latency": (demand.waits * self.wait + demand.fetches * self.fetch + demand.barriers * self.barrier)
            / clock,
        }

    def predict(self, demand: Demand) -> tuple[float, str]:
        """Seconds of a launch, with those of one ahead of it, which writes memory; and the term that binds it."""
        terms = self.seconds(demand)
        whole = math.fsum(term**self.overlap for term in terms.values()) ** (1 / self.overlap)
        if demand.ahead_bytes:
            whole += self.launch + demand.ahead_bytes / self.device
        return self.launch + whole, max(terms, key=lambda name: terms[name])

    def limits(self, target: Target) -> Target:
        """The target with the measured ceilings in place of the datasheet's."""
        bandwidth, rates = self.ceilings
        return replace(target, bandwidth=bandwidth, rates=tuple((dict(target.rates) | dict(rates)).items()))


MACHINES: dict[str, Machine] = {
    # Ceilings: measured, perf_plots/results/h100-80gb-hbm3-132sm; `device` and `tensor` are those of the copy and of
    # bfloat16's product. Clock: the most that an H100 SXM runs at. The others fit its 1809 trials best,
    # `python -m perf_plots.predictions --fit`: instructions for memory come at a quarter of one a clock, a load takes
    # 1350 clocks from asking to use, and a launch from a cold cache 12 us.
    "sm_90": Machine(
        clock=1.98e9, issue=1.0, integer=1.0, special=1.0, memory=0.276, l1=1.0, tensor=0.758, l2=7.87e12,
        device=3.022e12, wait=1358, fetch=1337, barrier=79, launch=11.7e-6, overlap=3.0,
        ceilings=(3.022e12, (("bfloat16", 811e12), ("float16", 784e12), ("tf32", 421e12), ("float32", 51.3e12))),
    ),
}  # fmt: skip
"""The devices that constants were measured for, by architecture."""


def of_target(name: str) -> tuple[Target, Machine]:
    """The target and its machine; raises `WorkloadError` for one that nothing was measured on."""
    if name not in MACHINES:
        known = ", ".join(MACHINES)
        raise WorkloadError(
            f"target: there is no static model of {name!r}, on which nothing was measured; choose {known}"
        )
    return KNOWN[name], MACHINES[name]
