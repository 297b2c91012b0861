"""What the stages of a run share: its folder, the device, and the cases that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from triton_conv.autotune.measure import CudaTimer, RehearsalTimer, Timer
from triton_conv.target import of_device
from triton_conv.workloads import Workload

from . import cases
from .floors import Limits
from .runner import Bench
from .store import device_folder, read_ceilings


@dataclass(frozen=True)
class Run:
    """What the stages share."""

    out: Path
    device: torch.device
    rehearse: bool = False
    say: Callable[[str], None] = print
    kinds: tuple[str, ...] = ()

    @property
    def results(self) -> Path:
        """The device's folder of results."""
        return self.out / "results" / device_folder(of_device(self.device))

    def cases(self, stage: str) -> list[Workload]:
        """The workloads of a stage, of the kinds that were asked for: of all, if of none."""
        every = cases.of_stage(stage, self.rehearse)
        return [workload for workload in every if not self.kinds or workload.kind in self.kinds]

    def bench(self, compiled: bool = False) -> Bench:
        limits = Limits.of(of_device(self.device), read_ceilings(self.results))
        return Bench(self.device, self.timer(), self.results, limits, compiled=compiled)

    def timer(self) -> Timer:
        return RehearsalTimer() if self.rehearse else CudaTimer(self.device)
