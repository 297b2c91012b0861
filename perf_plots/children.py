"""Work in child processes that may be killed: what compiles for minutes or crashes takes only its own unit along."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from .budget import Deadline
from .provenance import ROOT

_POLL = 0.2
_live: set[int] = set()


def options(module: str, about: str, units: str, arguments: list[str] | None) -> argparse.Namespace:
    """What a child's command line says: the folder of the run, its units, whether it is a rehearsal."""
    parser = argparse.ArgumentParser(prog=f"python -m perf_plots.{module}", description=about.partition("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the run")
    parser.add_argument("--units", required=True, help=f"titles of {units}, comma-separated")
    parser.add_argument("--rehearse", action="store_true", help="small cases in Triton's interpreter, no measurement")
    return parser.parse_args(arguments)


def start(
    command: Sequence[str], log: IO[str], environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A process in a group of its own, with all that it starts; to be ended by `end`."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    _live.add(process.pid)
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of it and of all that it started: the device's memory is then free again."""
    _kill(process.pid)
    process.wait()
    _live.discard(process.pid)


def end_all() -> None:
    """The same for whatever runs now, before this process itself ends."""
    for group in list(_live):
        _kill(group)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def work_off(
    units: Sequence[str],
    command: Callable[[Sequence[str]], list[str]],
    done: Callable[[str], bool],
    failed: Callable[[str, str], None],
    seconds: float,
    deadline: Deadline,
) -> int:
    """Has child processes do the units, in order, and returns how many were begun and came to an end.

    `command` starts a child for the units that are left; `done` says whether one's result is written. A unit may take
    `seconds`: then, or if its child dies, `failed` is told which and why, and the next child goes on behind it. At the
    deadline the child is killed; what was under way is left for the next time.
    """
    left = list(units)
    while left and not deadline.passed:
        with tempfile.TemporaryFile("w+") as log:
            child = start(command(left), log)
            try:
                why = _watch(child, left, done, seconds, deadline)
            finally:
                end(child)
            if why and left:
                log.seek(0)
                last = (log.read().strip().splitlines() or ["no message"])[-1][:200]
                failed(left.pop(0), why if "more than" in why else f"{why}: {last}")
    return len(units) - len(left)


def _watch(
    child: subprocess.Popen[bytes], left: list[str], done: Callable[[str], bool], seconds: float, deadline: Deadline
) -> str:
    """Takes from `left` what is done, until the child ends; why its first unit has failed, or nothing."""
    start = time.monotonic()
    while left:
        ended = child.poll() is not None
        if done(left[0]):
            left.pop(0)
            start = time.monotonic()
        elif ended:
            return f"the process ended with status {child.returncode}"
        elif deadline.passed:
            return ""
        elif time.monotonic() - start > seconds:
            return f"it took more than {seconds:.0f} s"
        else:
            time.sleep(_POLL)
    return ""
