"""A lab in a process of its own, which may be killed: a candidate that hangs, crashes or loses the device takes only
that process along, and the next candidate finds a new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import DeviceError, TritonConvError
from ..kernels import Tile
from ..problem import Problem
from ..target import Target
from ..workloads import Workload
from .lab import Bench, DeviceLab, Lab, OutOfTimeError, Trial, first_line
from .measure import CudaTimer, DeviceLostError, RehearsalTimer, Timing
from .search import Candidate
from .simulated import SimulatedLab, Simulation

# Seconds for one trial, and for setting up operands and reference (and torch, in a new process).
SECONDS_PER_TRIAL, _SECONDS_TO_OPEN = 20.0, 120.0
# A driver that ends a kernel which hangs may refuse the next process for a while: seconds before each further attempt.
# One that does not give a dead process back is not waited for longer than this either.
_PATIENCE, _SECONDS_TO_DIE = (1.0, 3.0), 10.0
_PR_SET_PDEATHSIG = 1


def open_lab(device: str) -> Lab:
    """The lab of a device by name: `cuda`, `cuda:1`, `cpu` (the interpreter, made-up times), `simulated:h100,...`."""
    if device.startswith("simulated:"):
        return SimulatedLab(Simulation.parse(device))
    try:
        known = torch.device(device)
    except RuntimeError:
        raise DeviceError(f"device: {device!r} is not known; name cuda, cuda:N or simulated:BOARD") from None
    if known.type == "cuda" and known.index is not None:
        # Triton launches on the current device, and events and streams are that one's.
        torch.cuda.set_device(known)
    return DeviceLab(known, CudaTimer(known) if known.type == "cuda" else RehearsalTimer())


class WorkerLab:
    """The lab of a device, behind a process that is killed when a request takes too long, and started anew."""

    def __init__(self, device: str, seconds: float = SECONDS_PER_TRIAL) -> None:
        self._device, self._seconds = device, seconds
        self.compiles = device.split(":")[0] == "cuda"
        self.generation = 0
        """How many processes have ended: what an earlier one set up is gone."""
        self.restart_seconds = 0.0
        """What starting a process took, and setting a workload up in it: what a candidate that hangs costs besides."""
        self._process: subprocess.Popen[bytes] | None = None
        self._target: Target | None = None
        self._benches: list[WorkerBench] = []

    @property
    def target(self) -> Target:
        if self._target is None:
            start = time.monotonic()
            self._target = self.ask(("target",), _SECONDS_TO_OPEN)
            self.restart_seconds = time.monotonic() - start
        assert self._target is not None
        return self._target

    @property
    def lost_seconds(self) -> float:
        return sum(bench.set_up_seconds for bench in self._benches if not bench.ready)

    def now(self) -> float:
        return time.monotonic()

    def open(self, workload: Workload, seconds: float = math.inf) -> WorkerBench:
        self._benches.append(bench := WorkerBench(self, workload, self._seconds, seconds))
        return bench

    def compilation_failure(self, workload: Workload, candidate: Candidate) -> str:
        failure: str = self.ask(("compilation_failure", workload, candidate), self._seconds)
        return failure

    def ask(self, request: tuple[Any, ...], seconds: float) -> Any:
        """The answer to a request. Raises what the other side raised, or `DeviceLostError` if it died or hung."""
        process = self._process = self._process or self._start()
        assert process.stdin and process.stdout
        killed = threading.Event()

        def kill() -> None:
            killed.set()
            process.kill()

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            pickle.dump(request, process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, ValueError, pickle.UnpicklingError):
            code = self._end()
            raise DeviceLostError(f"no result within {seconds:.3g} s" if killed.is_set() else _death(code)) from None
        finally:
            timer.cancel()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        # A session of its own: Ctrl-C is for the tuner, which then lets the trial finish.
        return subprocess.Popen(
            [sys.executable, "-c", "import sys; from triton_conv.autotune.worker import serve; serve(sys.argv[1])",
             self._device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )  # fmt: skip

    def _end(self) -> int:
        process, self._process = self._process, None
        self.generation += 1
        assert process and process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        try:
            return process.wait(_SECONDS_TO_DIE)
        except subprocess.TimeoutExpired:  # killed, and held by the driver: it will go when that lets it
            return -signal.SIGKILL

    def close(self) -> None:
        """Ends the process at once; a trial under way is lost."""
        if self._process is not None:
            self._process.kill()
            self._end()


class WorkerBench:
    """One workload, set up in the lab's process when it is first needed, and again in each new process."""

    def __init__(self, lab: WorkerLab, workload: Workload, seconds: float, seconds_to_open: float) -> None:
        self._lab, self._workload, self._seconds = lab, workload, seconds
        self._generation = -1
        self.set_up_seconds = 0.0
        """What setting it up took."""
        self._problem: Problem
        self._spaces: Mapping[str, Sequence[Tile]] | None
        try:
            self._open(seconds_to_open)
        except DeviceLostError as error:
            # It may be the workload's own fault: others are tried.
            raise RuntimeError(str(error)) from error

    @property
    def problem(self) -> Problem:
        return self._problem

    @property
    def ready(self) -> bool:
        """Whether the lab's process has it set up."""
        return self._generation == self._lab.generation

    def spaces(self) -> Mapping[str, Sequence[Tile]] | None:
        return self._spaces

    def judge(self, candidate: Candidate, best_us: float, seconds: float = math.inf) -> Trial:
        start = self._lab.now()
        self._open(seconds)
        seconds = max(seconds - (self._lab.now() - start), 1e-3)
        try:
            request = "judge", self._workload, candidate, best_us
            trial: Trial = self._lab.ask(request, min(self._seconds, seconds))
        except DeviceLostError as error:
            if seconds < self._seconds and "no result" in str(error):
                raise OutOfTimeError from None
            return Trial(failure=f"killed: {error}")
        except (TritonConvError, RuntimeError, ValueError, TypeError, MemoryError) as error:
            return Trial(failure=f"failed: {first_line(error)[:60]}")
        if trial.lost:
            # An illegal access is no error of the next candidate: it gets a process that has a device.
            self._lab.close()
            return Trial(failure=trial.failure)
        return trial

    def rounds(self, candidates: Sequence[Candidate], count: int, seconds: float = math.inf) -> dict[Candidate, Timing]:
        self._open(seconds)
        request = "rounds", self._workload, candidates, count
        timings: dict[Candidate, Timing] = self._lab.ask(request, self._seconds)
        return timings

    def _open(self, seconds: float = math.inf) -> None:
        """Sets the workload up in a process that lacks it.

        Raises `OutOfTimeError` if `seconds` were not enough, `DeviceLostError` if no process can use the device: that
        is no candidate's fault.
        """
        lab, start = self._lab, self._lab.now()
        for patience in (*_PATIENCE, None):
            if self.ready:
                return
            left = seconds - (lab.now() - start)
            if left <= 0:
                # Not even a process is started for it: twenty workloads would each start and kill one.
                raise OutOfTimeError
            began = lab.now()
            try:
                self._problem, self._spaces = lab.ask(("open", self._workload), max(1e-3, min(_SECONDS_TO_OPEN, left)))
                self._generation, self.set_up_seconds = lab.generation, lab.now() - began
            except DeviceLostError as error:
                lab.close()
                if left < _SECONDS_TO_OPEN and "no result" in str(error):
                    raise OutOfTimeError from None
                if patience is None:
                    raise
                time.sleep(max(0.0, min(patience, left)))


def _death(code: int) -> str:
    return f"the process died of {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"


def serve(device: str) -> None:
    """The process's loop: requests in, answers or exceptions out. It ends with its parent, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    channel = os.fdopen(os.dup(1), "wb")
    # Whatever a compiler or a kernel prints must not reach the pipe.
    os.dup2(2, 1)
    lab: Lab | None = None
    benches: dict[str, Bench] = {}
    while True:
        try:
            name, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: Any
        try:
            lab = lab or open_lab(device)
            answer = _answer(lab, benches, name, arguments)
        except Exception as error:  # whatever it is, the parent judges it
            answer = error if _travels(error) else RuntimeError(f"{type(error).__name__}: {error}")
        pickle.dump(answer, channel)
        channel.flush()


def _answer(lab: Lab, benches: dict[str, Bench], name: str, arguments: list[Any]) -> Any:
    if name == "target":
        return lab.target
    if name == "compilation_failure":
        return lab.compilation_failure(*arguments)
    workload, *rest = arguments
    bench = _bench(lab, benches, workload)
    return (bench.problem, bench.spaces()) if name == "open" else getattr(bench, name)(*rest)


def _bench(lab: Lab, benches: dict[str, Bench], workload: Workload) -> Bench:
    """The bench of a workload; where memory does not hold all of them, those asked for longest ago make room."""
    if (bench := benches.pop(workload.title, None)) is None:
        while bench is None:
            try:
                bench = lab.open(workload)
            except torch.OutOfMemoryError:
                if not benches:
                    raise
                del benches[next(iter(benches))]
                torch.cuda.empty_cache()
    benches[workload.title] = bench
    return bench


def _travels(error: Exception) -> bool:
    """Whether an exception survives a pipe: some classes take other arguments than they keep."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False
