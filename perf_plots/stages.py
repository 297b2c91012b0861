"""The stages of a run on a GPU. Each one looks at what is on disk, goes on from there, and writes as it goes."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from triton_conv import ops
from triton_conv.autotune.measure import CudaTimer, DeviceLostError, RehearsalTimer, Timer, usable
from triton_conv.target import of_device
from triton_conv.workloads import Workload

from . import cases, ceilings
from .budget import Deadline
from .floors import Limits
from .provenance import ROOT, output, provenance, source_hash
from .record import CEILINGS, refuse_rehearsal, write_json
from .runner import Bench, finished, run_case
from .state import FAILURES, TESTS, TRIALS, TUNING, load_state
from .store import device_folder, load, read_ceilings

Report = dict[str, Any]

# Seconds: a busy machine takes half of them to set up seven workloads.
_REHEARSAL_TUNING = 12.0
# Files of tests that say nothing new on a device.
_NO_DEVICE = (
    "cli", "cli_lectures", "commands", "commands_refusals", "compare", "configs", "cost", "cost_formulas", "errors",
    "forced_forms", "geometry", "inspect", "lab", "page", "perf_gpu", "perf_plots", "portfolio", "predictions",
    "static_model", "structure", "tune", "tuner_figures",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What the stages share."""

    out: Path
    device: torch.device
    rehearse: bool = False
    say: Callable[[str], None] = print
    compiled: bool = False
    kinds: tuple[str, ...] = ()

    @property
    def results(self) -> Path:
        """The device's folder of results."""
        return self.out / "results" / device_folder(of_device(self.device))

    @property
    def flagships(self) -> list[Workload]:
        return self._of_kinds(cases.rehearsal() if self.rehearse else cases.flagships())

    @property
    def gradients(self) -> list[Workload]:
        return self._of_kinds(cases.rehearsal()[0].parts()[1:] if self.rehearse else cases.gradients())

    @property
    def variants(self) -> list[Workload]:
        return self._of_kinds(cases.rehearsal()[0].variants(("float16",)) if self.rehearse else cases.second_tier())

    def _of_kinds(self, workloads: list[Workload]) -> list[Workload]:
        """Those of the kinds that were asked for: of all, if of none."""
        return [workload for workload in workloads if not self.kinds or workload.kind in self.kinds]

    def timer(self) -> Timer:
        return RehearsalTimer() if self.rehearse else CudaTimer(self.device)


def environment(run: Run, deadline: Deadline) -> Report:
    """Device and versions; the whole of nvidia-smi beside them."""
    found = provenance(run.device)
    if not run.rehearse:
        (run.out / "nvidia-smi.txt").write_text(output("nvidia-smi") or "nvidia-smi could not be run\n")
    run.say(", ".join(f"{name} {value}" for name, value in found.items() if value is not None))
    return found


def tests(run: Run, deadline: Deadline) -> Report:
    """The tests, on the device, in processes of their own; not again for the same code."""
    code = source_hash("triton_conv", "tests")
    before: Report = load_state(run.out).get("tests", {})
    if before.get("source") == code and not before.get("timed_out"):
        run.say("already run for this code")
        return before
    # A rehearsal shows that the command works: one file is enough for that.
    what, marks = ("tests/test_perf_gpu.py", "gpu") if run.rehearse else ("tests", "not slow")
    command = [sys.executable, "-m", "pytest", what, "-m", marks, "-q", "--tb=short", "--maxfail=100"]
    command += ["-p", "no:cacheprovider", *(f"--ignore=tests/test_{name}.py" for name in _NO_DEVICE)]
    if find_spec("xdist") and not run.rehearse:
        # Nearly all of the time goes to compiling, on the host. The groups keep tests that fill the card from meeting.
        command += ["-n", str(max(1, (os.cpu_count() or 1) - 2)), "--dist", "loadgroup"]
    # Other versions of torch warn of other things: here, of all places, that is no failure.
    command += ["--continue-on-collection-errors", "-W", "default"]
    # Tiles under trial are no business of the tests.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_CONV_HOME"}
    failures = run.out / FAILURES
    failures.write_text("")
    environment["TRITON_CONV_FAILURES"] = str(failures)
    log, timed_out = run.out / TESTS, False
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout=max(deadline.left, 1.0))
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            process.kill()
            process.wait()
    lines = log.read_text(errors="replace").splitlines()
    counts = {name: int(n) for n, name in re.findall(r"(\d+) ([a-z]+)", lines[-1])} if lines else {}
    failed = failures.read_text(errors="replace").splitlines()
    failed += [line for line in lines if line.startswith("ERROR ")]
    report = {"source": code, "status": process.returncode, "timed_out": timed_out, "counts": counts, "failed": failed}
    run.say(f"{'stopped at its time limit; ' if timed_out else ''}{lines[-1] if lines else 'no output'}")
    return report


def measure_ceilings(run: Run, deadline: Deadline) -> Report:
    """The rates that shares of the limit refer to; not again where they are there."""
    found = read_ceilings(run.results)
    if found is None:
        found = ceilings.measure(run.device, run.timer())
        refuse_rehearsal(found["measured"], run.results)
        write_json(run.results / CEILINGS, found)
    run.say(ceilings.describe(found))
    return {}


def benchmark(run: Run, deadline: Deadline) -> Report:
    """The flagships; a case that has been run with the tile that would run now is not run again."""
    return _benchmark(run, deadline, run.flagships)


def gradients(run: Run, deadline: Deadline) -> Report:
    """Both gradients of the flagships."""
    return _benchmark(run, deadline, run.gradients)


def variants(run: Run, deadline: Deadline) -> Report:
    """The second tier, with what time is left."""
    return _benchmark(run, deadline, run.variants)


def _benchmark(run: Run, deadline: Deadline, workloads: Sequence[Workload]) -> Report:
    ops.forget_plans()
    limits = Limits.of(of_device(run.device), read_ceilings(run.results))
    bench = Bench(run.device, run.timer(), run.results, limits, compiled=run.compiled)
    ran = kept = 0
    for workload in workloads:
        if finished(workload, bench) is not None:
            kept += 1
            continue
        if deadline.passed:
            continue
        record = run_case(workload, bench)
        ran += 1
        run.say(f"{workload.title}: " + (record.error or f"{record.ours_us:.1f} us, {_factors(record.speedup)}"))
        if record.error and not usable(run.device):
            raise DeviceLostError(f"the device does not answer after {workload.title}")
    left = len(workloads) - ran - kept
    run.say(f"{ran} cases run, {kept} kept, {left} left for want of time")
    return {"ran": ran, "kept": kept, "left": left}


def _factors(speedup: Callable[[bool], float | None]) -> str:
    library, standard = (f"{value:.2f}x vs" if value else "no time of" for value in (speedup(False), speedup(True)))
    return f"{library} the fastest other library, {standard} the standard convolution"


def tuning(run: Run, deadline: Deadline) -> Report:
    """Tunes the flagships, both gradients included, those that stand worst first; trials of the same code are kept."""
    from triton_conv.autotune.lab import DeviceLab
    from triton_conv.autotune.tune import tune

    workloads = sorted(run.flagships + run.gradients, key=_standing(run))
    seconds = min(deadline.left, _REHEARSAL_TUNING) if run.rehearse else deadline.left
    outcomes = tune(
        workloads, seconds=seconds, lab=DeviceLab(run.device, run.timer()), folder=run.out / "autotune_configs",
        journal=run.out / TRIALS, report=run.say,
    )  # fmt: skip
    found = {outcome.workload: _plain(asdict(outcome)) for outcome in outcomes}
    write_json(run.out / TUNING, {"provenance": provenance(run.device), "outcomes": found})
    return {"tuned": len(found), "trials": sum(outcome.trials for outcome in outcomes)}


def _standing(run: Run) -> Callable[[Workload], float]:
    """How a workload compares with the fastest other, as far as is known: what is not known comes first."""
    devices, _ = load(run.out / "results")
    found = {title: record for device in devices for title, record in device.by_title().items()}

    def standing(workload: Workload) -> float:
        record = found.get(workload.title)
        return (record.speedup(False) or record.speedup(True) or 0.0) if record else 0.0

    return standing


def _plain(value: Any) -> Any:
    """JSON has no NaN: where there is no number there is none."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figures(run: Run, deadline: Deadline) -> Report:
    """Every figure of what is there."""
    from .figures import draw_all

    paths, complaints = draw_all(run.out / "results", run.out / "figures", say=lambda line: None)
    run.say(f"{len(paths)} files written below {run.out / 'figures'}")
    return {"files": len(paths), "complaints": complaints}


STAGES: dict[str, tuple[float, Callable[[Run, Deadline], Report]]] = {
    "environment": (0.01, environment),
    "tests": (0.16, tests),
    "ceilings": (0.03, measure_ceilings),
    "tuning": (0.34, tuning),
    "benchmark": (0.16, benchmark),
    "gradients": (0.27, gradients),
    "variants": (0.02, variants),
    "figures": (0.01, figures),
}
"""Share of the budget and function, in order."""
