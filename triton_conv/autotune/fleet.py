"""Several devices of one kind tuning one store: a process and a journal each, the work divided, the journals merged."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import DeviceError, TritonConvError
from ..workloads import Workload
from . import journal
from .lab import Lab
from .race import Outcome
from .simulated import Simulation
from .tune import tune


def devices(device: str, gpus: str | None) -> list[str]:
    """The devices that `--gpus` names: all, or some by number; `device` itself where it names none.

    Raises `DeviceError` for a number that no device has.
    """
    if gpus is None:
        return [device]
    simulated = device.startswith("simulated:")
    if not simulated and device != "cuda":
        raise DeviceError(f"gpus: --gpus {gpus} and --device {device} both name devices; leave one of them out")
    count = Simulation.parse(device).count if simulated else torch.cuda.device_count()
    numbers = [str(i) for i in range(count)]
    chosen = numbers if gpus == "all" else list(dict.fromkeys(gpus.split(",")))
    if unknown := [number for number in chosen if number not in numbers]:
        raise DeviceError(f"gpus: no device {', '.join(unknown)}; all, or of {', '.join(numbers)}")
    return [f"{device},index={number}" if simulated else f"cuda:{number}" for number in chosen]


def same_target(labs: Sequence[Lab], names: Sequence[str]) -> None:
    """Raises `DeviceError` unless all devices are of one kind: else a time of one says nothing of another's."""
    first = labs[0].target
    for lab, name in zip(labs[1:], names[1:], strict=True):
        if lab.target != first:
            raise DeviceError(
                f"gpus: {names[0]} is {first.name} ({first.sms} multiprocessors) and {name} is {lab.target.name} "
                f"({lab.target.sms}); tune them one after the other with --device"
            )


def share(workloads: Sequence[Workload], count: int) -> list[list[Workload]]:
    """The workloads dealt out like cards: neighbours, which cost about the same, go to different devices."""
    return [list(workloads[i::count]) for i in range(count)]


def gather(folder: Path) -> int:
    """Moves the trials of single devices into the journal of all, those of a run that was killed too; how many."""
    whole, moved = folder / journal.NAME, 0
    for part in sorted(folder.glob(journal.PARTS)):
        moved += journal.append(part, whole)
        part.unlink()
    return moved


def tune_all(
    workloads: Sequence[Workload], labs: Sequence[Lab], *, folder: Path, device: Path, **settings: Any
) -> list[Outcome]:
    """`tune` on every device at once, each with its share of the workloads; the trials end up in one journal.

    An error of one device is raised when the others are done: what they found is kept. `device` is the folder of the
    devices' part of the store.
    """
    gather(device)
    if len(labs) == 1:
        return tune(workloads, lab=labs[0], folder=folder, journal=device / journal.NAME, **settings)
    outcomes: list[Outcome] = []
    errors: list[Exception] = []
    cores = len(os.sched_getaffinity(0))

    def work(number: int, lab: Lab, mine: list[Workload]) -> None:
        part = device / journal.PARTS.replace("*", str(number))
        try:
            outcomes.extend(
                tune(
                    mine, lab=lab, folder=folder, journal=part, known=(device / journal.NAME,),
                    compilers=max(1, cores // len(labs) - 1), **settings,
                )
            )  # fmt: skip
        except Exception as error:  # raised below, when the others are done
            errors.append(error)

    shares = [mine for mine in share(workloads, len(labs)) if mine]
    threads = [
        threading.Thread(target=work, args=(number, lab, mine), daemon=True)
        for number, (lab, mine) in enumerate(zip(labs, shares))
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            # A wait without an end would not be interrupted by Ctrl-C.
            while thread.is_alive():
                thread.join(_SECONDS_BETWEEN_LOOKS)
    finally:
        gather(device)
    if errors:
        _raise(errors, settings.get("report", print))
    place = {workload.title: i for i, workload in enumerate(workloads)}
    return sorted(outcomes, key=lambda outcome: place[outcome.workload])


_SECONDS_BETWEEN_LOOKS = 0.2


def _raise(errors: Sequence[Exception], report: Callable[[str], None]) -> None:
    for error in errors[1:]:
        report(f"{type(error).__name__}: {error}")
    if isinstance(errors[0], (TritonConvError, RuntimeError, OSError)):
        raise errors[0]
    raise RuntimeError(f"{type(errors[0]).__name__}: {errors[0]}") from errors[0]
