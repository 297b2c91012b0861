"""`python -m perf_plots.cold_start --out DIR`: what the first call of a process costs, and the figure of it.

Each case runs in processes of its own: with an empty cache of compiled kernels, again with what the first one left
there, and as torch's own function. Measured by the host's clock around a call and the wait for its result; importing is
not counted, making the GPU ready is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from triton_conv.workloads import FLAGSHIPS, KINDS, Workload

from .budget import Deadline
from .measured import badge
from .provenance import provenance
from .record import COLD_START, ResultError, refuse_rehearsal, write_json
from .rows import Chart, Point, Row, draw
from .store import DeviceResults, device_folder, read_cold_start
from .style import BLACK, BLUE, ORANGE, SKY, Mark, duration

# Of one process: an empty cache takes an H100's host some ten.
_SECONDS = 90.0
_NO_END = Deadline(math.inf)
_MARKS = {
    "empty cache": Mark("first call, empty cache", BLUE, "o"),
    "filled cache": Mark("first call, filled cache", SKY, "o", filled=False),
    "torch": Mark("torch's function, first call", ORANGE, "s"),
    "warm": Mark("later call, launch and wait", BLACK, "|", size=14),
}


def cases() -> list[Workload]:
    """The first flagship of each kind."""
    return [next(workload for workload in FLAGSHIPS if workload.kind == kind) for kind in KINDS]


def measure(folder: Path, about: Mapping[str, Any], rehearse: bool = False, deadline: Deadline = _NO_END) -> int:
    """Runs every case and writes `cold_start.json` into a device's folder after each, until the deadline.

    Returns how many cases are left. What the same code has measured there is kept; a rehearsal runs one small case. A
    case that fails is recorded with its error and has no times. `about` is the provenance.
    """
    refuse_rehearsal(not rehearse, folder)
    found = _kept(folder, about)
    todo = [w for w in (cases()[:1] if rehearse else cases()) if w.title not in found]
    for index, workload in enumerate(todo):
        made = None if deadline.passed else _case(workload, rehearse, deadline)
        # One that was cut short says nothing of its case.
        if made is None or deadline.passed:
            return len(todo) - index
        found[workload.title] = made
        content = {"measured": not rehearse, "cases": list(found.values()), "provenance": dict(about)}
        write_json(folder / COLD_START, content)
    return 0


def _kept(folder: Path, about: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By title, what an earlier run of the same code has found on the same device."""
    try:
        before = read_cold_start(folder) or {}
    except ResultError:
        return {}
    same = all(before.get("provenance", {}).get(name) == about.get(name) for name in ("device", "source"))
    return {case["title"]: case for case in before["cases"]} if before and same else {}


def _case(workload: Workload, rehearse: bool, deadline: Deadline) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    error = ""
    with tempfile.TemporaryDirectory(prefix="perf_plots-cache-") as cache:
        for name in ("empty cache", "filled cache", "torch"):
            done = _process(workload.name, name, cache, rehearse, min(_SECONDS, deadline.left))
            if "error" in done:
                error = done["error"]
                continue
            seconds[name] = done["first"]
            if name == "filled cache":
                seconds["warm"] = done["later"]
    return {"title": workload.title, "kind": workload.kind, "seconds": seconds, "error": error}


def _process(name: str, what: str, cache: str, rehearse: bool, seconds: float) -> dict[str, Any]:
    """One first call in a new process; its answer is one line of JSON."""
    environment = os.environ | {"TRITON_CACHE_DIR": cache} | ({"TRITON_INTERPRET": "1"} if rehearse else {})
    command = [sys.executable, "-m", "perf_plots.cold_start", "--call", name, "--as", what]
    try:
        done = subprocess.run(
            [*command, *(["--rehearse"] if rehearse else [])], env=environment, cwd=Path(__file__).parent.parent,
            capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {seconds:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _call(name: str, what: str, rehearse: bool) -> dict[str, Any]:
    """The first call and the median of later ones, in this process, in seconds."""
    import torch

    from .baselines import build

    workload = next(w for w in FLAGSHIPS if w.name == name)
    workload = workload.shrunk() if rehearse else workload
    device = torch.device("cpu" if rehearse else "cuda")
    with torch.no_grad():
        tensors = workload.tensors(device)
        call: Any = lambda: workload.call(tensors)  # noqa: E731
        if what == "torch":
            baseline = build(workload, tensors)["torchvision" if workload.offset_groups else "cudnn"]
            if baseline.call is None:
                raise RuntimeError(baseline.absent)
            call = baseline.call
        times = []
        for _ in range(3 if rehearse else 11):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return {"first": times[0], "later": statistics.median(times[1:])}


def figure(device: DeviceResults, stem: Path) -> list[Path]:
    """A row a case: what its first call took."""
    assert device.cold_start is not None
    about = device.cold_start["provenance"]
    chart = Chart(
        "Cold start",
        f"First call of a process on {device.title}, by the host's clock",
        badge(device),
        f"{about.get('device')}; torch {about.get('torch')}; triton {about.get('triton')}; commit "
        f"{str(about.get('commit'))[:12]}; {str(about.get('date'))[:10]}. Importing is not counted, making the GPU "
        "ready is. Run by python -m perf_plots.cold_start.",
    )
    rows = []
    for case in device.cold_start["cases"]:
        times = {name: 1e6 * seconds for name, seconds in case["seconds"].items()}
        verdict = ", ".join(f"{name} {duration(us)}" for name, us in times.items())
        points = [Point(_MARKS[name], us, lane=int(name == "torch")) for name, us in times.items() if name in _MARKS]
        notes = (f"absent: {case['error']}",) if case["error"] else ()
        rows.append(Row(case["title"], case["kind"], verdict or "no time", points=tuple(points), notes=notes))
    return draw(chart, rows, stem)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 if a file was written."""
    parser = argparse.ArgumentParser(prog="python -m perf_plots.cold_start", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder of results")
    parser.add_argument("--rehearse", action="store_true", help="tiny cases in Triton's interpreter, no measurement")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    parser.add_argument("--as", dest="what", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.call:
        print(json.dumps(_call(options.call, options.what, options.rehearse)))
        return 0
    if options.out is None:
        parser.error("--out DIR is required")
    import torch

    from triton_conv.target import of_device

    device = torch.device("cpu" if options.rehearse else "cuda")
    folder = options.out / device_folder(of_device(device))
    measure(folder, provenance(device), options.rehearse)
    print(folder / COLD_START)
    return 0


if __name__ == "__main__":
    sys.exit(main())
