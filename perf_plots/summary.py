"""What a run came to, in at most sixty lines, failures first, from its files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import ceilings
from .cases import flagships, gradients
from .record import REHEARSED, Record, ResultError
from .state import TUNING, load_json, load_state
from .store import DeviceResults, load, read_ceilings
from .table import measured_table

LINES, _WIDTH, _FEW = 60, 160, 8
# pytest's exit statuses: all passed, none collected.
_WELL = (0, 5)


def summarise(out: Path) -> list[str]:
    """The lines; a run that was stopped has fewer."""
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
    lines += _tuning(load_json(out / TUNING).get("outcomes", {}))
    left = {stage: state[stage]["left"] for stage in ("benchmark", "tuning", "retime", "variants")
            if state.get(stage, {}).get("left")}  # fmt: skip
    if left:
        lines.append("left for want of time: " + ", ".join(f"{stage} {count}" for stage, count in left.items()))
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
    return lines


def _few(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _FEW else [*lines[:_FEW], f"... and {len(lines) - _FEW} failures more"]


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
    titles = {workload.title for workload in flagships() + gradients()}
    timed = [record for record in device.records if record.ours_us is not None]
    lines += measured_table(_worst_first([record for record in timed if record.workload.title in titles]))
    others = _worst_first([record for record in timed if record.workload.title not in titles])
    if others:
        factors = [(record.speedup(False), record.workload.title) for record in others]
        against = [(factor, title) for factor, title in factors if factor]
        losses = sum(factor < 0.995 for factor, _ in against)
        worst = f", {losses} losses, worst {against[0][0]:.2f}x ({against[0][1]})" if against else ""
        lines.append(f"variants: {len(others)} timed, {len(against)} with another library to compare with{worst}")
    return lines


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
        f"tuning: {len(outcomes)} workloads, {trials} tiles tried, {len(better)} better than the default{most}",
        *_few(errors),
    ]
