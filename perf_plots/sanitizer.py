"""`python -m perf_plots.sanitizer`: every form under NVIDIA's compute-sanitizer, on small problems.

memcheck sees each access to memory that nobody allocated, racecheck threads of a program that disagree on who wrote
shared memory first. Each unit is one part of a training step with one of the flagships' layers, by one kernel: its
default tile and others of its space. The units run in many processes, since most of the time goes to compiling.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from triton_conv.configs import kernel_hash
from triton_conv.workloads import Workload

from . import children
from .budget import Deadline
from .cases import flagships, gradients, lectures
from .record import SANITIZER, refuse_rehearsal, write_json
from .state import load_json

TOOLS = ("memcheck", "racecheck")
_TOOL = "compute-sanitizer"
# Of a process's output: the unit that it begins and the launches that it made, and a line of the sanitizer's own.
_BEGIN, _END, _THEIRS = "@@ begin ", "@@ end ", "========= "
_NO_FINDING = ("COMPUTE-SANITIZER", "ERROR SUMMARY: 0", "RACECHECK SUMMARY: 0", "Saved", "Host Frame", "     ")
_TILES, _LONGEST = 3, 160
_PLANTED = "a write past the end"


@dataclass(frozen=True)
class Finding:
    """What a tool said of a unit: how many launches it watched, and its first lines if it complained.

    `kernel_hash` is that of the kernel's code: another one is watched anew.
    """

    unit: str
    tool: str
    launches: int
    complaint: str = ""
    kernel_hash: str = ""


def units() -> dict[str, tuple[Workload, str]]:
    """By title, the workloads with every kernel of their kind, whether or not it can run them; those that wait for a
    measurement first, since none of them may have run on a device.
    """
    from triton_conv.dispatch import family, serving
    from triton_conv.kernels import KERNELS

    served = {kernel.name for kernel in serving(list(KERNELS.values()))}
    workloads = _workloads()
    pairs = [(title, name) for title, workload in workloads.items() for name in family(workload.problem())[0]]
    pairs.sort(key=lambda pair: pair[1] in served)
    return {f"{title}/{name}": (workloads[title], name) for title, name in pairs}


def _workloads() -> dict[str, Workload]:
    return {workload.title: _small(workload) for workload in (*flagships(), *gradients(), *lectures())}


def _small(workload: Workload) -> Workload:
    """The same channels and filter on an image or two of odd size, a little larger than the filter reaches."""
    if workload.kind == "local":
        return workload.shrunk()
    dilation = workload.arguments.get("dilation", 1)
    size = tuple(min(s, dilation * (k - 1) + 14) for s, k in zip(workload.input[2:], workload.weight[2:], strict=True))
    return replace(workload, input=(min(workload.input[0], 2), workload.input[1], *size))


def run(folder: Path, about: Mapping[str, Any], deadline: Deadline, rehearse: bool = False) -> tuple[int, int, int]:
    """Watches what is not watched yet, until the deadline; returns how many runs there are, are left, and complain.

    `sanitizer.json` in the device's folder is written after each tool. Without the sanitizer nothing is run.
    """
    refuse_rehearsal(not rehearse, folder)
    if not rehearse and shutil.which(_TOOL) is None:
        raise FileNotFoundError(f"{_TOOL} is not installed: it is part of the CUDA toolkit")
    before = load_json(folder / SANITIZER)
    same = all(before.get("provenance", {}).get(name) == about.get(name) for name in ("device", "triton"))
    titles = list(units())[: 2 if rehearse else None]
    hashes = {title: kernel_hash(title.rpartition("/")[2]) for title in titles}
    rows = [Finding(**row) for row in before.get("findings", [])] if same else []
    found = [finding for finding in rows if finding.kernel_hash == hashes.get(finding.unit)]
    tools = TOOLS[:1] if rehearse else TOOLS
    planted = (same and before.get("planted")) or ("" if rehearse else _planted(deadline))
    for tool in tools:
        known = {finding.unit for finding in found if finding.tool == tool}
        todo = [title for title in titles if title not in known]
        count = max(min((os.cpu_count() or 1) - 2, len(todo)), 1)
        watch = functools.partial(_watch, tool, deadline, rehearse)
        with concurrent.futures.ThreadPoolExecutor(count) as threads:
            parts = threads.map(watch, [todo[i::count] for i in range(count)])
            found += [replace(each, kernel_hash=hashes[each.unit]) for part in parts for each in part]
        content = {"measured": not rehearse, "provenance": dict(about), "planted": planted}
        write_json(folder / SANITIZER, content | {"findings": [asdict(each) for each in found]})
    total = len(titles) * len(tools)
    return total, total - len(found), sum(bool(finding.complaint) for finding in found)


def _planted(deadline: Deadline) -> str:
    """What memcheck says of a write past the end; raises `RuntimeError` if nothing, for then it sees nothing."""
    complaint = "".join(finding.complaint for finding in _watch(TOOLS[0], deadline, False, [_PLANTED]))
    if not complaint:
        raise RuntimeError(f"{_TOOL} does not see a write past the end that was made on purpose")
    return complaint


def _watch(tool: str, deadline: Deadline, rehearse: bool, todo: Sequence[str]) -> list[Finding]:
    """One process after the other until all units have run: what is illegal ends the process that does it."""
    left, found = list(todo), []
    while left and not deadline.passed:
        command = [sys.executable, "-m", "perf_plots.sanitizer", "--units", ",".join(left)]
        if not rehearse:
            command = [_TOOL, "--tool", tool, "--print-limit", "3", *command]
        # Of torch's cache a kernel may read what another tensor was; each of these is an allocation of its own.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_CONV_FIRST_USE": "0"}
        environment |= {"TRITON_INTERPRET": "1"} if rehearse else {}
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            process = children.start([*command, *(["--rehearse"] if rehearse else [])], log, environment)
            try:
                process.wait(timeout=max(deadline.left, 0.1))
            except subprocess.TimeoutExpired:
                pass
            finally:
                children.end(process)
            log.seek(0)
            done = read(tool, log.read().splitlines(), ended=not deadline.passed)
        found += done
        left = left[len(done) :]
        if not done:
            break
    return found


def read(tool: str, lines: Sequence[str], ended: bool = True) -> list[Finding]:
    """What the output of a process says of its units; of one that it began and did not end, if it `ended` itself."""
    found: list[Finding] = []
    unit = ""
    theirs: list[str] = []
    for line in lines:
        if line.startswith(_BEGIN):
            unit, theirs = line.removeprefix(_BEGIN), []
        elif line.startswith(_END) and unit:
            found.append(Finding(unit, tool, int(line.removeprefix(_END)), _complaint(theirs)))
            unit = ""
        elif line.startswith(_THEIRS) and not line.removeprefix(_THEIRS).startswith(_NO_FINDING):
            theirs.append(line.removeprefix(_THEIRS).strip())
    if unit and ended:
        found.append(Finding(unit, tool, 0, _complaint(theirs) or f"the process ended: {lines[-1][:_LONGEST]}"))
    return found


def _complaint(lines: Sequence[str]) -> str:
    return "; ".join(line for line in lines[:3] if line)[: 2 * _LONGEST]


def _launch(workload: Workload, kernel: str, device: Any) -> int:
    """Runs the kernel's default tile and others of its space; how many."""
    import torch

    from triton_conv.autotune.space import candidates
    from triton_conv.autotune.subject import Subject
    from triton_conv.defaults import default_tile
    from triton_conv.dispatch import forms, plan
    from triton_conv.errors import PlanError

    subject = Subject(workload, device)
    problem, target = subject.problem, subject.target
    if kernel not in {form.name for form in forms(problem, target)[0]}:
        return 0
    space = candidates(kernel, problem, target)
    # Others for every unit, and the same in every run.
    picked = random.Random(zlib.crc32(f"{workload.title}/{kernel}".encode())).sample(space, min(_TILES - 1, len(space)))
    launches = 0
    for tile in dict.fromkeys((default_tile(kernel, problem, target), *picked)):
        try:
            call = subject.bind(plan(problem, target, kernel, tile))
            call()
        except PlanError:
            continue
        if device.type == "cuda":
            torch.cuda.synchronize()
        launches += 1
    return launches


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 if every unit ran; what the sanitizer says of them is beside it in the output."""
    parser = argparse.ArgumentParser(prog="python -m perf_plots.sanitizer", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--units", required=True, help="titles of units, comma-separated")
    parser.add_argument("--rehearse", action="store_true", help="in Triton's interpreter, by no sanitizer")
    options = parser.parse_args(arguments)
    import torch

    from triton_conv.kernels.pack_weight import pack_weight

    device = torch.device("cpu" if options.rehearse else "cuda")
    if options.units == _PLANTED:
        print(f"{_BEGIN}{_PLANTED}", flush=True)
        pack_weight(torch.zeros(64, 64, 3, 3, device=device), torch.empty(16, device=device))
        torch.cuda.synchronize()
        print(f"{_END}1", flush=True)
        return 0
    known = _workloads()
    for title in options.units.split(","):
        name, _, kernel = title.rpartition("/")
        workload = known[name]
        print(f"{_BEGIN}{title}", flush=True)
        launches = _launch(workload.shrunk() if options.rehearse else workload, kernel, device)
        print(f"{_END}{launches}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
