"""A device that is not there: the same motions, answers and accidents as a GPU's, from a seed.

`simulated:h100` and the like. Times come from a model of the roofline, waves, occupancy and latency, times a factor for
each tile and problem that no rule predicts; noise and drift are added to every run. Nothing is computed, and what is
stored is stored under the vendor "simulated", where no real device looks.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from ..defaults import default_tile
from ..dispatch import forms
from ..errors import DeviceError
from ..kernels import KERNELS
from ..problem import Problem
from ..target import KNOWN, Target
from ..workloads import Workload
from .lab import Trial, screen
from .measure import Timing
from .search import Candidate
from .space import candidates

BOARDS = {"a100": "sm_80", "h100": "sm_90", "b200": "sm_100", "mi300x": "gfx942"}
FAULTS = ("illegal", "hang", "nan", "oob", "abort", "crash")
"""An illegal access that loses the device, a kernel that never ends, a NaN, a write outside the output, a compiler that
aborts, and a kernel that takes its process along."""

# Seconds that a candidate costs besides its runs, about as on an H100: compiling, and comparing with the reference.
_COMPILE, _CHECK, _SET_UP = 0.05, 0.02, 0.2
_FOREVER = 3600.0
# What a model cannot know: the spread of the logarithm of the time by tile, and by tile and problem.
_LUCK_OF_TILE, _LUCK_OF_PROBLEM = 0.08, 0.04


@dataclass(frozen=True)
class Simulation:
    """What `--device simulated:BOARD,name=value,...` says.

    `noise` is the relative spread of a run, `drift` the relative slowing down over an hour of the device's time,
    `pace` the seconds really waited for each simulated one, `faults` the share of candidates that each fault befalls.
    `count` is how many such devices `--gpus all` finds; this is number `index` of them, whose noise is its own.
    """

    board: str = "h100"
    seed: int = 0
    noise: float = 0.01
    drift: float = 0.0
    pace: float = 0.0
    count: int = 1
    index: int = 0
    faults: dict[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Simulation:
        """Reads `simulated:h100,seed=3,noise=0.02,hang=0.1`; raises `DeviceError` naming what is not known."""
        board, *settings = text.removeprefix("simulated:").split(",")
        if board not in BOARDS:
            raise DeviceError(f"device: {board!r} cannot be simulated; choose one of {', '.join(BOARDS)}")
        values: dict[str, float] = {}
        faults: dict[str, float] = {}
        known = [item.name for item in fields(cls) if item.name not in ("board", "faults")]
        for setting in settings:
            name, _, value = setting.partition("=")
            if name not in (*known, *FAULTS):
                raise DeviceError(f"device: {name!r} is no setting of a simulated device; choose of {known}, {FAULTS}")
            try:
                (faults if name in FAULTS else values)[name] = (
                    int(value) if name in ("seed", "count", "index") else float(value)
                )
            except ValueError:
                raise DeviceError(f"device: {name}: expected a number, got {value!r}") from None
        return cls(board, faults=faults, **values)  # type: ignore[arg-type]

    @property
    def target(self) -> Target:
        return replace(KNOWN[BOARDS[self.board]], vendor="simulated")

    def fault(self, candidate: Candidate) -> str:
        """The fault that befalls a candidate, always the same one; empty for most."""
        lot = _uniform(self.seed, "fault", candidate)
        for name, share in self.faults.items():
            if lot < share:
                return name
            lot -= share
        return ""

    def true_time(self, problem: Problem, candidate: Candidate) -> float:
        """Microseconds that the candidate takes on a quiet device: what a tuner should find the least of."""
        luck = _LUCK_OF_TILE * _normal(self.seed, candidate)
        luck += _LUCK_OF_PROBLEM * _normal(self.seed, candidate, problem.describe())
        return _model(problem, candidate, self.target, self.seed) * math.exp(luck)


class SimulatedLab:
    """A simulated device, with a clock of its own unless `pace` ties it to the real one."""

    compiles = False
    restart_seconds = lost_seconds = 0.0

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.spent = 0.0
        """Seconds of the device's time since it was made."""
        self._runs = 0
        self._own = (simulation.index,) if simulation.index else ()

    @property
    def target(self) -> Target:
        return self.simulation.target

    def now(self) -> float:
        return time.monotonic() if self.simulation.pace else self.spent

    def wait(self, seconds: float) -> None:
        self.spent += seconds
        if self.simulation.pace:
            time.sleep(self.simulation.pace * seconds)

    def sample(self, time_us: float) -> float:
        """One run of so many microseconds, with noise and drift; the next run has other noise."""
        self._runs += 1
        noise = abs(self.simulation.noise * _normal(self.simulation.seed, "run", self._runs, *self._own))
        drift = self.simulation.drift * self.spent / 3600
        self.wait(1e-6 * time_us)
        return time_us * (1 + noise + drift)

    def open(self, workload: Workload, seconds: float = math.inf) -> SimulatedBench:
        self.wait(_SET_UP)
        return SimulatedBench(self, workload.problem())

    def compilation_failure(self, workload: Workload, candidate: Candidate) -> str:
        self.wait(_COMPILE)
        return "CompilerAborted: LLVM ERROR" if self.simulation.fault(candidate) == "abort" else ""

    def close(self) -> None:
        pass


class SimulatedBench:
    """One problem on a simulated device."""

    def __init__(self, lab: SimulatedLab, problem: Problem) -> None:
        self._lab, self._problem = lab, problem

    @property
    def problem(self) -> Problem:
        return self._problem

    def spaces(self) -> None:
        return None

    def judge(self, candidate: Candidate, best_us: float, seconds: float = math.inf) -> Trial:
        lab = self._lab
        lab.wait(_CHECK)
        fault = lab.simulation.fault(candidate)
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "hang":
            time.sleep(_FOREVER)
        if fault == "illegal":
            return Trial(failure="failed: CUDA error: an illegal memory access was encountered", lost=True)
        if fault == "nan":
            return Trial(relative_error=math.inf, failure="wrong result")
        if fault == "oob":
            return Trial(failure="out-of-bounds write")
        time_us = lab.simulation.true_time(self._problem, candidate)
        found = screen(lambda: lab.sample(time_us), lambda count: self._timing(time_us, count), best_us)
        return Trial(found, 1e-3)

    def rounds(self, candidates: Sequence[Candidate], count: int, seconds: float = math.inf) -> dict[Candidate, Timing]:
        times = {c: self._lab.simulation.true_time(self._problem, c) for c in candidates}
        samples: dict[Candidate, list[float]] = {candidate: [] for candidate in candidates}
        for _ in range(count):
            for candidate, time_us in times.items():
                samples[candidate].append(self._lab.sample(time_us))
        return {candidate: Timing(tuple(found), measured=False) for candidate, found in samples.items()}

    def _timing(self, time_us: float, count: int) -> Timing:
        return Timing(tuple(self._lab.sample(time_us) for _ in range(count)), measured=False)


def table(problem: Problem, simulation: Simulation) -> dict[Candidate, float]:
    """Every candidate's true time: the exhaustive table of a problem, the optimum included."""
    return {
        candidate: simulation.true_time(problem, candidate)
        for kernel in forms(problem, simulation.target)[0]
        for tile in candidates(kernel.name, problem, simulation.target)
        if not simulation.fault(candidate := Candidate(kernel.name, tile))
    }


def _model(problem: Problem, candidate: Candidate, target: Target, seed: int) -> float:
    """Microseconds by count, without luck. Not the tuner's own estimate: that one must not be right by construction."""
    kernel, tile, g = KERNELS[candidate.kernel], candidate.tile, problem.geometry
    dtype = str(problem.dtype).removeprefix("torch.")
    floor = 1e6 * target.floor_seconds(g.flops, problem.least_bytes, dtype, problem.precision)
    threads = tile.num_warps * target.warp_size
    programs = max(kernel.grid(problem, tile), 1)
    by_memory = target.shared_bytes // max(tile.shared_bytes(problem, target), 1)
    values = tile.accumulator_values() * problem.accumulator_bytes // 4
    # 32 registers a thread for addresses.
    by_registers = target.registers // (values + 32 * threads)
    resident = max(1, min(by_memory, by_registers, target.threads_per_sm // threads))
    waves = programs / (target.sms * resident)
    idle = math.ceil(waves) / waves
    # Eight warps or two blocks hide what one block waits for; stages do the rest.
    hidden = min(1.0, 0.55 + 0.05 * min(resident * tile.num_warps, 8) + 0.04 * min(tile.num_stages, 3))
    pressure = values / (threads * 128)
    spilled = 1 + 0.5 * max(0.0, pressure - 1)
    reuse = 1.0
    sizes = {name: int(value) for name, value in tile.asdict().items() if name.isupper()}
    if {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= set(sizes):
        m, n, k = (sizes[f"BLOCK_{axis}"] for axis in "MNK")
        loads = 1e6 * g.flops / (m * n) * (m + n) * problem.itemsize / (40e9 * target.sms)
        depth = 1 + 0.02 * (math.log2(k) - 5.5) ** 2
        reuse = max(1.0, loads / floor) * depth
    else:
        # Each size has a best value: about where the rules have it, a step or two beside.
        default = default_tile(candidate.kernel, problem, target).asdict()
        for name, value in sizes.items():
            best = math.log2(max(default[name], 1)) + 1.2 * _normal(seed, candidate.kernel, name)
            reuse *= 1 + 0.05 * min((math.log2(max(value, 1)) - best) ** 2, 16)
    form = 1.0 + 0.8 * _uniform(seed, "form", candidate.kernel)
    return 5.0 + floor * form * idle * spilled * reuse / hidden


def _uniform(*what: object) -> float:
    digest = hashlib.blake2b("|".join(map(str, what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _normal(*what: object) -> float:
    return random.Random(_uniform(*what)).gauss(0, 1)
