"""Processes that compile kernels into Triton's cache: one imports torch and Triton, and forks the others.

A process takes longer to import them than to compile ten kernels, and one on each of sixteen cores longer still. None
of these asks the driver for anything, so that they neither wait for it nor hold memory of the device.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from triton_conv.aot import Driver, WarmJob
from triton_conv.target import Target

from .provenance import ROOT

# What ends with the process that started it.
_PR_SET_PDEATHSIG = 1
# Seconds between two looks for processes that have ended; those that it may take to kill what is late.
_POLL, _LATE = 0.02, 5.0
# Bytes of a job's number in the pipe that the processes take them from, which holds 64 KiB before anyone reads.
_NUMBER, _MOST_JOBS = 4, 16_000
_END = b"end"


@dataclass
class Made:
    """What became of jobs: how many were done, and the errors of those that failed."""

    done: int = 0
    errors: list[str] = field(default_factory=list)


class Compilers:
    """The process that forks; it is started once, and serves until this one ends."""

    def __init__(self, target: Target) -> None:
        command = "import sys; from perf_plots.compilers import serve; serve(sys.argv[1])"
        self._process = subprocess.Popen(
            [sys.executable, "-c", command, repr((target.vendor, target.arch, target.warp_size))],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"TRITON_INTERPRET": "0"},
            start_new_session=True,
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def compile(self, jobs: Sequence[WarmJob], stop: float, processes: int | None = None) -> Made:
        """Has jobs done, the first ones first, until `stop` on the monotonic clock."""
        made = Made()
        assert self._process.stdin
        try:
            pickle.dump((jobs[:_MOST_JOBS], stop, processes), self._process.stdin)
            self._process.stdin.flush()
        except OSError:
            self.close()
            return made
        rest = b""
        while True:
            # An empty answer: it is late, or it died.
            if not (read := self._read(stop + _LATE)):
                self.close()
                return made
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                if line == _END:
                    return made
                made.done += 1
                if error := line.decode(errors="replace").partition(" ")[2]:
                    made.errors.append(error)

    def _read(self, stop: float) -> bytes:
        assert self._process.stdout
        number = self._process.stdout.fileno()
        if not select.select([number], [], [], max(stop - time.monotonic(), 0.0))[0]:
            return b""
        return os.read(number, 65536)

    def close(self) -> None:
        """Ends it, and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()
        self._process.wait()


def serve(target: str) -> None:
    """The loop of the process that forks: jobs in; a line for each that is done and one at the end out."""
    import ast

    import triton

    _end_with_parent()
    triton.runtime.driver.set_active(Driver(*ast.literal_eval(target)))
    channel = os.dup(1)
    # Whatever a compiler prints must not reach the pipe.
    os.dup2(2, 1)
    while True:
        try:
            jobs, stop, processes = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        _work_off(jobs, stop, min(processes or len(os.sched_getaffinity(0)), len(jobs)), channel)
        os.write(channel, _END + b"\n")


def _work_off(jobs: Sequence[WarmJob], stop: float, processes: int, channel: int) -> None:
    """A process each takes the next number until none is left; one that dies takes only its own job along."""
    take, put = os.pipe()
    os.write(put, b"".join(index.to_bytes(_NUMBER, "little") for index in range(len(jobs))))
    os.close(put)
    live = set()
    for _ in range(processes):
        if (child := os.fork()) == 0:
            try:
                _end_with_parent()
                _work(jobs, take, channel)
            finally:
                os._exit(0)
        live.add(child)
    os.close(take)
    while live and time.monotonic() < stop:
        live -= {child for child in live if os.waitpid(child, os.WNOHANG)[0]}
        time.sleep(_POLL)
    for child in live:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _work(jobs: Sequence[WarmJob], take: int, channel: int) -> None:
    while number := os.read(take, _NUMBER):
        index = int.from_bytes(number, "little")
        error = " ".join(jobs[index].run().error.split())[:200]
        # Less than a pipe takes at once: lines of several processes do not mix.
        os.write(channel, f"{index} {error}\n".encode())


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
