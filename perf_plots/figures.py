"""Every figure from result files alone: the computed ones always, and a folder of measured ones for each device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from triton_conv.workloads import KINDS, NOT_SERVED

from . import computed, measured
from .cases import flagships, gradients
from .floors import DATASHEET
from .record import COMPUTED, MEASURED, REHEARSED
from .store import DeviceResults, load
from .table import computed_table, measured_table

Say = Callable[[str], None]


def draw_all(results: Path, out: Path, say: Say = print) -> tuple[list[Path], list[str]]:
    """Draws and prints; returns the files written and the complaints about result files left out."""
    devices, complaints = load(results)
    for complaint in complaints:
        say(complaint)
    paths = draw_computed(out / "computed", say)
    if not devices:
        say(f"No results in {results}: every figure is {COMPUTED}. Measure with: python -m perf_plots.gpu --help")
    for device in devices:
        paths += draw_device(device, out / device.name, say)
    return paths, complaints


def draw_computed(out: Path, say: Say) -> list[Path]:
    """Floors of every kind, and the overview."""
    say(f"\nFloors on NVIDIA {DATASHEET.target.name} by its datasheet: {COMPUTED}")
    for line in computed_table(flagships(), DATASHEET):
        say(line)
    for name, why in NOT_SERVED.items():
        say(f"{name}: absent, {why}")
    paths = computed.overview(flagships(), out / "overview")
    for kind in KINDS:
        paths += computed.kind_figure(kind, [w for w in flagships() if w.kind == kind], out / kind)
    return paths


def draw_device(device: DeviceResults, out: Path, say: Say) -> list[Path]:
    """Measured figures; a kind without any result on the device gets the computed one, which says so."""
    say(f"\n{device.title}: {MEASURED if device.measured else REHEARSED}")
    for line in measured_table(device.records):
        say(line)
    titles = {record.workload.title for record in device.records}
    shown = {workload.title for workload in flagships() + gradients()}
    paths = measured.overview("forward", flagships(), device, out / "overview")
    if any(workload.title in titles for workload in gradients()):
        paths += measured.overview("gradients", gradients(), device, out / "overview_gradients")
    for kind in KINDS:
        workloads = [workload for workload in flagships() if workload.kind == kind]
        records = [record for record in device.records if record.workload.kind == kind]
        if any(workload.title in titles for workload in workloads):
            paths += measured.kind_figure(kind, "Forward pass", workloads, device, out / kind)
        else:
            paths += computed.kind_figure(kind, workloads, out / kind, missing=f"No result on {device.title} yet")
        backward = [workload for workload in gradients() if workload.kind == kind]
        if any(workload.title in titles for workload in backward):
            paths += measured.kind_figure(kind, "Gradients", backward, device, out / f"{kind}_gradients")
        others = [record for record in records if record.workload.title not in shown]
        if others:
            paths += measured.variants_figure(kind, others, device, out / f"{kind}_variants")
    return paths
