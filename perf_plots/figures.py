"""Every figure from result files alone: the computed ones always, and a folder of measured ones for each device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from triton_conv.workloads import (
    FORWARD,
    INPUT_GRADIENT,
    KINDS,
    LECTURE_KINDS,
    NOT_SERVED,
    STEP,
    WEIGHT_GRADIENT,
    Workload,
)

from . import cases, cold_start, computed, layers, measured, model_figures, parts, predictions, roofline, sweeps
from .cases import KIND_TITLES, flagships, gradients, lectures, steps
from .evidence import EVIDENCE, EvidenceError, read_evidence
from .floors import DATASHEET
from .page import Drawing, write_page
from .record import COMPUTED, MEASURED, REHEARSED, Record
from .store import DeviceResults, load
from .table import computed_table, measured_table
from .trial_demands import H100

Say = Callable[[str], None]
GRADIENTS = "gradients"
# What each figure is, and how it is read.
_SPEED = (
    "A line a layer, the worst first. Right of 1× triton_conv is faster; in the shaded part it is slower. Blue: than "
    "the fastest other library on the same operation; green: than a dense convolution of the same input and output."
)
_SAVING = (
    "Dots: how many times less time than the standard convolution, measured. Bars: what counts of FLOPs and bytes "
    "allow, computed. A dot beyond its bar: the standard convolution stays further below its own limit than we do."
)
_ROOFLINE = (
    "The higher a mark, the more arithmetic a second. The line is the most that the device can do for a layer with so "
    "many FLOPs a byte; its distance above a mark is what is left to gain."
)
_SHARES = "100% is the least time that the device's memory and arithmetic allow, computed from its measured rates."
_TUNING = (
    "What searching for a tile brought over the one that is taken without a search. The rules of the latter were made "
    "with these trials at hand."
)
_KIND = (
    "Times; further left is faster. Upper line of a case: triton_conv and the limits; lower line: everybody else. In "
    "brackets, computed: what counts of FLOPs and bytes allow."
)
_SWEEP = (
    "One number of one layer grows, the rest stays. Where blue lies below green, the kind is faster than the standard "
    "convolution of the same input and output."
)
_NETWORKS = "As above; names are the network, channels x size, k filter, s stride, d dilation."
_MODELS = "Times of whole models; further left is faster. Converted: ours in the layers where a measurement says so."
_COLD = "What the first call of a process costs: compiling once a machine, loading once a process."
_PREDICTIONS = (
    "Every tile that was tried: the time computed from its compiled code against the measured one. On the line both "
    "agree; dashed is a factor of two."
)


def draw_all(results: Path, out: Path, say: Say = print, evidence: Path = EVIDENCE) -> tuple[list[Path], list[str]]:
    """Draws, writes the page, and prints; returns the files written and complaints about what was left out."""
    devices, complaints = load(results)
    try:
        found = read_evidence(evidence)
    except EvidenceError as error:
        found = None
        complaints.append(f"left out: {error}")
    for complaint in complaints:
        say(complaint)
    drawn = draw_computed(out / "computed", say)
    if not devices:
        say(f"No results in {results}: every figure is {COMPUTED}. Measure with: python -m perf_plots.gpu --help")
    for device in devices:
        drawn += draw_device(device, out / device.name, say)
    page = write_page(out, devices, drawn, flagships(), found, complaints)
    return [path for drawing in drawn for path in drawing.paths] + [page], complaints


def draw_computed(out: Path, say: Say) -> list[Drawing]:
    """Floors of every kind, and the overview."""
    say(f"\nFloors on NVIDIA {DATASHEET.target.name} by its datasheet: {COMPUTED}")
    for line in computed_table(flagships(), DATASHEET):
        say(line)
    for name, why in NOT_SERVED.items():
        say(f"{name}: absent, {why}")
    paths = computed.overview(flagships(), out / "overview")
    drawn = [Drawing(tuple(paths), "What the five kinds can save, by the count", computed=True)]
    for kind in KINDS:
        paths = computed.kind_figure(kind, [w for w in flagships() if w.kind == kind], out / kind)
        drawn.append(Drawing(tuple(paths), f"{KIND_TITLES[kind]}, by the count", kind, computed=True))
    return drawn


def draw_device(device: DeviceResults, out: Path, say: Say) -> list[Drawing]:
    """Measured figures; a kind without any result on the device gets the computed one, which says so."""
    say(f"\n{device.title}: {MEASURED if device.measured else REHEARSED}")
    for line in measured_table(device.records):
        say(line)
    return _Device(device, out).draw()


class _Device:
    """The figures of one device, one after the other."""

    def __init__(self, device: DeviceResults, out: Path) -> None:
        self._device, self._out = device, out
        self._drawn: list[Drawing] = []

    def draw(self) -> list[Drawing]:
        found = self._device.by_title()
        forward, backward = flagships(), gradients()
        first = [found[w.title] for w in (*forward, *backward) if w.title in found]
        self._overviews(forward, backward, first)
        for kind in KINDS:
            self._kind(kind, [w for w in forward if w.kind == kind], [w for w in backward if w.kind == kind])
        taught = [workload for workload in lectures() if workload.title in found]
        for kind in dict.fromkeys(workload.kind for workload in taught):
            of_kind = [workload for workload in lectures() if workload.kind == kind]
            self._kind(kind, [w for w in of_kind if w.part == FORWARD], [w for w in of_kind if w.part != FORWARD])
        self._others({w.title for w in (*forward, *backward, *lectures(), *steps())})
        for training, part in ((False, FORWARD), (True, STEP)):
            name = "training" if training else "forward"
            paths = model_figures.figure(self._device, training, self._out / f"models_{name}")
            self._add(paths, f"Whole models, {name}", _MODELS, parts=(part,))
        if self._device.cold_start:
            self._add(cold_start.figure(self._device, self._out / "cold_start"), "Cold start", _COLD)
        if self._device.name == H100.name:
            paths = predictions.figure(self._out / "predictions")
            self._add(paths, "Static model against measurement", _PREDICTIONS)
        return self._drawn

    def _add(self, paths: list[Path], title: str, note: str, kind: str = "", parts: tuple[str, ...] = ()) -> None:
        if paths:
            self._drawn.append(Drawing(tuple(paths), title, kind, parts, self._device.name, note=note))

    def _overviews(self, forward: list[Workload], backward: list[Workload], first: list[Record]) -> None:
        device, out = self._device, self._out
        found = device.by_title()
        titles = {record.workload.title for record in first}
        one, both = (FORWARD,), (INPUT_GRADIENT, WEIGHT_GRADIENT)
        self._add(
            measured.overview("forward", forward, device, out / "overview"), "Speed-up, forward", _SPEED, parts=one
        )
        if any(workload.title in titles for workload in backward):
            paths = measured.overview(GRADIENTS, backward, device, out / "overview_gradients")
            self._add(paths, "Speed-up, gradients", _SPEED, parts=both)
        if any(workload.title in found for workload in steps()):
            paths = measured.overview("forward and backward", steps(), device, out / "overview_steps")
            self._add(paths, "Speed-up, forward and backward in one", _SPEED, parts=(STEP,))
        for what, suffix, wanted in (("forward", "", one), (GRADIENTS, "_gradients", both)):
            records = [record for record in first if record.workload.part in wanted]
            if any(record.speedup(True) and record.saving for record in records):
                paths = parts.saving(records, device, what, out / f"saving{suffix}")
                self._add(paths, f"Saving over the standard convolution, {what}", _SAVING, parts=wanted)
        for part, suffix in ((FORWARD, ""), (INPUT_GRADIENT, "_dx"), (WEIGHT_GRADIENT, "_dw")):
            every = [*first, *(found[w.title] for w in lectures() if w.title in found)]
            records = [record for record in every if record.workload.part == part]
            paths = roofline.roofline(part, records, device, out / f"roofline{suffix}")
            self._add(paths, f"Roofline, {part}", _ROOFLINE, parts=(part,))
        if any(record.share for record in first):
            self._add(parts.shares(first, device, out / "shares"), "Share of the limit", _SHARES)
        if first:
            paths = parts.tuning(first, device, device.trials, out / "tuning")
            self._add(paths, "Tuned against default tiles", _TUNING)

    def _kind(self, kind: str, forward: list[Workload], backward: list[Workload]) -> None:
        device, out, title = self._device, self._out, KIND_TITLES[kind]
        titles = {record.workload.title for record in device.records}
        if any(workload.title in titles for workload in forward):
            paths = measured.kind_figure(kind, "Forward pass", forward, device, out / kind)
        else:
            paths = computed.kind_figure(kind, forward, out / kind, missing=f"No result on {device.title} yet")
        self._add(paths, f"{title}, forward", _KIND, kind, (FORWARD,))
        if any(workload.title in titles for workload in backward):
            paths = measured.kind_figure(kind, "Gradients", backward, device, out / f"{kind}_gradients")
            self._add(paths, f"{title}, gradients", _KIND, kind, (INPUT_GRADIENT, WEIGHT_GRADIENT))

    def _others(self, shown: set[str]) -> None:
        """What is not `shown` yet: sweeps, and by kind the layers of networks and the other dtypes and formats."""
        device, out = self._device, self._out
        for sweep, points in sweeps.found(device):
            paths = sweeps.figure(sweep, points, device, out / f"sweep_{sweep.name}")
            self._add(paths, f"Scaling: {sweep.title}", _SWEEP, sweep.kind, (FORWARD,))
        shown = shown | {workload.title for sweep in layers.sweeps() for workload in sweep.workloads.values()}
        found = device.by_title()
        networks = [part for workload in layers.networks() for part in workload.parts() if part.title in found]
        for kind in KINDS:
            for what, suffix, wanted in (
                ("layers", "", (FORWARD,)), ("gradients", "_gradients", (INPUT_GRADIENT, WEIGHT_GRADIENT))
            ):  # fmt: skip
                of_kind = [w for w in networks if w.kind == kind and w.part in wanted]
                if of_kind:
                    paths = measured.overview(f"{kind} {what}", of_kind, device, out / f"{kind}_networks{suffix}")
                    self._add(paths, f"Speed-up, {kind} {what} of networks", _NETWORKS, kind, wanted)
        shown |= {workload.title for workload in networks}
        variants = {workload.title for workload in cases.variants()}
        for kind in (*KINDS, *LECTURE_KINDS):
            others = [r for r in device.records if r.workload.kind == kind and r.workload.title not in shown]
            for what, suffix, records in (
                ("Other dtypes and formats", "variants", [r for r in others if r.workload.title in variants]),
                ("Cases of an earlier program", "former", [r for r in others if r.workload.title not in variants]),
            ):
                if records:
                    paths = measured.others_figure(kind, what, records, device, out / f"{kind}_{suffix}")
                    self._add(paths, f"{KIND_TITLES[kind]}: {what[0].lower()}{what[1:]}", _KIND, kind)
