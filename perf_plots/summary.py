"""What a run came to, in at most sixty lines, failures first, from its files alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from triton_conv.amounts import counted

from . import ceilings, model_figures
from .cases import OF_STAGE, flagships, gradients
from .clocks import throttled
from .model_record import COMPILED as COMPILED_MODEL
from .model_record import CONVERTED, FORCED, WRONG
from .record import COMPILED, REHEARSED, Record, ResultError
from .state import TUNING, load_json, load_state
from .store import DeviceResults, load, read_ceilings
from .style import ratio
from .table import measured_table

LINES, _WIDTH, _FEW, _MODELS = 60, 160, 8, 16
# pytest's exit statuses: all passed, none collected.
_WELL = (0, 5)


def summarise(out: Path) -> list[str]:
    """The lines; a run that was stopped has fewer. What does not fit is the end of the table of flagships."""
    state = load_state(out)
    devices, complaints = load(out / "results")
    lines = [_environment(state.get("environment", {}))]
    if any(not device.measured for device in devices):
        lines.append(REHEARSED)
    lines += _few(_failures(state, devices) + complaints)
    lines.append(_tests(state.get("tests")))
    for device in devices:
        lines += _device(device, out / "results" / device.name)
    if not devices:
        lines.append("benchmark: no case was run")
    if watched := state.get("sanitizer"):
        counts = f"{watched.get('watched', 0)} units of forms, {watched.get('complaints', 0)} complained of"
        lines.append(f"compute-sanitizer: {counts}")
    lines += _tuning(load_json(out / TUNING).get("outcomes", {}))
    left = {stage: report["left"] for stage, report in state.items() if report.get("left")}
    if left:
        lines.append("left for want of time: " + ", ".join(f"{stage} {count}" for stage, count in left.items()))
    for device in devices:
        lines += _flagships(device)
    lines = [line if len(line) <= _WIDTH else line[: _WIDTH - 3] + "..." for line in lines]
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], f"... and {len(lines) - LINES + 1} lines more"]


def failed(out: Path) -> bool:
    """Whether a stage, a test or a case failed."""
    devices, complaints = load(out / "results")
    return bool(_failures(load_state(out), devices) + complaints)


def _environment(found: dict[str, Any]) -> str:
    if "device" not in found:
        return "environment: unknown"
    versions = ", ".join(
        f"{name} {found[name]}" for name in ("driver", "cuda", "cudnn", "torch", "triton", "python") if found[name]
    )
    commit = f"{str(found['commit'])[:12]}{' with changes' if found['dirty'] else ''}"
    device = f"{found['device']} ({found['arch']}, {found['sms']} SMs)"
    return f"{device}, {versions}, commit {commit}, source {found['source']}"


def _failures(state: dict[str, Any], devices: Sequence[DeviceResults]) -> list[str]:
    lines = [f"FAILED stage {name}: {report['error']}" for name, report in state.items() if report.get("error")]
    tests = state.get("tests", {})
    if tests.get("status", 0) not in _WELL and not tests["timed_out"]:
        lines.append(f"FAILED tests: pytest ended with status {tests['status']}, see tests.txt")
    lines += tests.get("failed", [])
    for device in devices:
        lines += [f"FAILED {record.workload.title}: {record.error}" for record in device.records if record.error]
        for model in device.models:
            lines += [f"FAILED model {model.unit.title}: {model.error}"] if model.error else []
            wrong = {name: each.absent for name, each in model.contestants.items() if each.absent.startswith(WRONG)}
            lines += [f"FAILED model {model.unit.title}, {name}: {why}" for name, why in wrong.items()]
    return lines


def _few(lines: list[str], most: int = _FEW) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"... and {len(lines) - most} more"]


def _tests(report: dict[str, Any] | None) -> str:
    if not report or "counts" not in report:
        return "tests: not run"
    counts = ", ".join(f"{count} {name}" for name, count in report["counts"].items())
    return f"tests: {counts or 'no result'}{', stopped at the time limit' if report['timed_out'] else ''} (tests.txt)"


def _device(device: DeviceResults, folder: Path) -> list[str]:
    try:
        found = read_ceilings(folder)
    except ResultError as error:
        found, lines = None, [str(error)]
    else:
        lines = [
            "ceilings: not measured, limits are the datasheet's"
            if found is None
            else f"ceilings: {ceilings.describe(found)}"
        ]
    found = device.by_title()
    for stage, workloads in OF_STAGE.items():
        records = [found[workload.title] for workload in workloads() if workload.title in found]
        lines += [_stage(stage, records, COMPILED)] if stage == "compiled" else [_stage(stage, records)]
    known = {workload.title for workloads in OF_STAGE.values() for workload in workloads()}
    lines.append(_stage("other cases", [record for record in device.records if record.workload.title not in known]))
    lines += _models(device)
    slow = [record.workload.title for record in device.records if throttled(record.clocks)]
    lines += [f"the device was throttled in {counted(len(slow), 'case')}: {', '.join(_few(slow))}"] if slow else []
    return [line for line in lines if line]


def _stage(name: str, records: Sequence[Record], other: str = "") -> str:
    """One line of many cases: the mean over the fastest library, or over one of the others, and the worst."""
    timed = [record for record in records if record.ours_us is not None]
    factors = []
    for record in timed:
        contestant = record.contestants.get(other)
        its = contestant.median_us if contestant and contestant.samples_us else None
        factor = record.speedup(False) if not other else its / (record.ours_us or its) if its else None
        factors += [(factor, record.workload.title)] if factor else []
    if not timed or (other and not factors):
        return ""
    if not factors:
        return f"{name}: {len(timed)} timed, none with another library to compare with"
    mean = math.exp(sum(math.log(factor) for factor, _ in factors) / len(factors))
    wins, (worst, title) = sum(factor >= 0.995 for factor, _ in factors), min(factors)
    against = other or "the fastest library"
    return (
        f"{name}: {len(timed)} timed, {len(factors)} against {against}: geometric mean {mean:.2f}x, {wins} not slower, "
        f"worst {worst:.2f}x ({title})"
    )


def _models(device: DeviceResults) -> list[str]:
    """A line a model in its usual format: what converting it brings."""
    lines = []
    for entry in sorted(model_figures.entries(device), key=lambda each: not each.usual):
        gains = {
            name: f"{ratio(gain)} {model_figures.MARKS[name].label}"
            for name in (CONVERTED, FORCED, CONVERTED + COMPILED_MODEL, FORCED + COMPILED_MODEL)
            if (gain := entry.gain(name))
        }
        what = f"model {entry.model} {'training' if entry.training else 'forward'} {entry.detail}"
        lines.append(f"{what}: {', '.join(gains.values()) or 'no time'}")
    return _few(lines, _MODELS) if lines else []


def _flagships(device: DeviceResults) -> list[str]:
    titles = {workload.title for workload in flagships() + gradients()}
    timed = [r for r in device.records if r.ours_us is not None and r.workload.title in titles]
    return measured_table(_worst_first(timed))


def _worst_first(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda record: (record.speedup(False) is None, record.speedup(False) or 0.0))


def _tuning(outcomes: dict[str, Any]) -> list[str]:
    if not outcomes:
        return ["tuning: not run"]
    gains = {
        title: outcome["default_time_us"] / outcome["time_us"]
        for title, outcome in outcomes.items()
        if outcome["time_us"] and outcome["default_time_us"]
    }
    better = sorted(((gain, title) for title, gain in gains.items() if gain > 1), reverse=True)
    errors = [f"FAILED tuning {title}: {outcome['error']}" for title, outcome in outcomes.items() if outcome["error"]]
    most = f", most {better[0][0]:.2f}x ({better[0][1]})" if better else ""
    trials = sum(outcome["trials"] for outcome in outcomes.values())
    return [
        f"tuning: {counted(len(outcomes), 'workload')}, {counted(trials, 'tile')} tried, {len(better)} better than the "
        f"default{most}",
        *_few(errors),
    ]
