"""The stage that runs the tests on the device: what never completed there first, and nothing again that has passed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import children
from .provenance import ROOT, source_hash
from .state import FAILURES, PASSED, TESTS, TESTS_HOME, TRACEBACKS, load_state

# Files of tests that say nothing new on a device.
NO_DEVICE = (
    "cli", "cli_lectures", "commands", "commands_refusals", "compare", "configs", "cost", "cost_formulas", "errors",
    "forced_forms", "geometry", "inspect", "lab", "likely", "page", "perf_gpu", "perf_models", "perf_plots",
    "perf_stages", "portfolio", "predictions", "readme", "static_model", "structure", "tune", "tune_journal",
    "tuner_figures",
)  # fmt: skip
# Those in which something has not passed on an H100 yet.
_FIRST = (
    "toeplitz", "toeplitz_weight_gradient",
    "rolling", "rolling_patch", "rolling_patch_weight_gradient", "transposed_overlap", "strided_boxed",
    "implicit_gemm_persistent", "implicit_gemm_rolling", "implicit_gemm_windows", "weight_gradient_clipped",
    "weight_gradient_taps", "weight_gradient_windows", "weight_gradient_columns", "banded_transposed",
    "fused_weight_gradient", "grouped_slab", "banded", "implicit_gemm_rows", "weight_gradient_rows", "lecture_forms",
    "separable_whole", "local_shifted", "launch", "memory", "first_use", "banded_weight_gradient", "compile", "capture",
    "policy", "conversion", "lecture_tiles", "lectures", "examples", "nn", "models", "conversion_kinds", "opinfo",
    "cases", "gpu", "depthwise_patch", "large",
)  # fmt: skip
# What a process of tests may come to hold of the device: its context, and stack for every thread of one kernel.
_WORKER_BYTES = 6e9
_TEST_SECONDS = 180
# pytest's exit statuses: all passed, none collected.
_WELL = (0, 5)


def files() -> list[str]:
    """Files of tests for a device, in the order in which they say most."""
    names = [path.stem.removeprefix("test_") for path in sorted((ROOT / "tests").glob("test_*.py"))]
    known = [name for name in names if name not in NO_DEVICE]
    ordered = [name for name in _FIRST if name in known] + [name for name in known if name not in _FIRST]
    return [f"tests/test_{name}.py" for name in ordered]


def run(
    out: Path, device: torch.device, seconds: float, say: Callable[[str], None], rehearse: bool = False
) -> dict[str, Any]:
    """Runs the tests in processes of their own; of the same code only what has not passed yet, and of any code first
    what failed in the last run here.
    """
    code = source_hash("triton_conv", "tests")
    before: dict[str, Any] = load_state(out).get("tests", {})
    red = [*before.get("failed", []), *_lines(out / FAILURES)]
    if before.get("source") != code:
        before = {}
        (out / PASSED).write_text("")
    elif not before.get("timed_out") and not before.get("failed"):
        say("already run for this code")
        return before
    # Every process of pytest reads what to leave out when it starts, also one that starts late: it must not change.
    skip = out / f"{PASSED}.before"
    skip.write_bytes((out / PASSED).read_bytes())
    first = out / f"{FAILURES}.before"
    first.write_text("".join(f"{_name(line)}\n" for line in red))
    for name in (FAILURES, TRACEBACKS):
        (out / name).write_text("")
    # Tiles under trial are no business of the tests; what they find out about forms comes back with the results.
    environment = os.environ | {
        "TRITON_CONV_HOME": str((out / TESTS_HOME).resolve()),
        "TRITON_CONV_FAILURES": str(out / FAILURES),
        "TRITON_CONV_TRACEBACKS": str(out / TRACEBACKS),
        "TRITON_CONV_FIRST": str(first),
        "TRITON_CONV_PASSED": str(out / PASSED),
        "TRITON_CONV_SKIP": str(skip),
    }
    with (out / TESTS).open("w") as log:
        status, timed_out = _pytest(_command(device, rehearse), environment, log, max(seconds, 1.0))
    skip.unlink()
    first.unlink()
    lines = (out / TESTS).read_text(errors="replace").splitlines()
    counts = {name: int(n) for n, name in re.findall(r"(\d+) ([a-z]+)", lines[-1])} if lines else {}
    passed = set((out / PASSED).read_text().splitlines())
    failed = _lines(out / FAILURES)
    failed += [line for line in lines if line.startswith("ERROR ")]
    say(f"{'stopped at its time limit; ' if timed_out else ''}{lines[-1] if lines else 'no output'}")
    # One that this call did not come to fails still.
    again = {_name(line) for line in failed}
    failed += [line for line in before.get("failed", []) if _name(line) not in again | passed]
    return {
        "source": code,
        "status": 1 if failed and status in _WELL else status,
        "timed_out": timed_out,
        "counts": counts | {"passed": len(passed)},
        "failed": failed,
    }


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _name(line: str) -> str:
    """Of "FAILED tests/test_x.py::test_y - why"."""
    return line.partition(" ")[2].partition(" - ")[0]


def workers(memory: int, cores: int) -> int:
    """Processes of tests: nearly all of the time goes to compiling, on the host; but they share the device's memory."""
    return max(1, min(cores - 2, int(memory // _WORKER_BYTES)))


def _command(device: torch.device, rehearse: bool) -> list[str]:
    # A rehearsal shows that the command works: one file is enough for that.
    what, marks = (["tests/test_rearranged.py"], "not slow") if rehearse else (files(), "not slow")
    command = [sys.executable, "-m", "pytest", *what, "-m", marks, "-q", "--tb=short", "--maxfail=100"]
    if find_spec("xdist") and not rehearse:
        # The groups keep tests that fill the card from meeting.
        memory = torch.cuda.get_device_properties(device).total_memory
        command += ["-n", str(workers(memory, os.cpu_count() or 1)), "--dist", "loadgroup"]
    if find_spec("pytest_timeout"):
        command += [f"--timeout={_TEST_SECONDS}"]
    # Other versions of torch warn of other things: here, of all places, that is no failure.
    return [*command, "-p", "no:cacheprovider", "--continue-on-collection-errors", "-W", "default"]


def _pytest(command: Sequence[str], environment: dict[str, str], log: Any, seconds: float) -> tuple[int, bool]:
    """Exit status, and whether it was stopped: with all of its processes."""
    process = children.start(command, log, environment)
    timed_out = False
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        children.end(process)
    return process.returncode, timed_out
