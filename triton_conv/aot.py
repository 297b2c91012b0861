"""Ahead-of-time compilation: what the compiler makes of a kernel, for any target, with no device.

`compile_here` compiles one (kernel, problem, tile, target) in this process and reads the result; `compile_all` runs
many in separate processes that it may kill, because LLVM can abort or hang. A process that interprets kernels cannot
compile them, hence the clean environment of the workers.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import pickle
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .kernels import KERNELS, Kernel, Tile, compiler_options
from .problem import Problem
from .target import Target

SECONDS_PER_COMPILE = 60.0

_POINTER = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}
_VECTOR_LOAD = {
    "ptx": re.compile(r"ld\.global\S*\.v4\.[bu]32|ld\.global\S*\.v2\.[bu]64|cp\.async\.c\S+ [^;]*?, 0x10\b"),
    "amdgcn": re.compile(r"(?:global|buffer)_load_(?:dwordx4|b128)"),
}
# What each resident block takes of NVIDIA's shared memory besides its own; a multiprocessor has as much besides.
_SHARED_RESERVED = 1024


@dataclass(frozen=True)
class Job:
    """One compilation: plain data, so that it can travel to another process."""

    kernel: str
    problem: Problem
    tile: Tile
    target: Target
    label: str = ""
    measured: bool = False

    def run(self) -> Compiled:
        """Does the job in this process, which must not interpret kernels."""
        return compile_here(self)

    def blank(self) -> Compiled:
        """What is known of the result beforehand."""
        dtype = str(self.problem.dtype).removeprefix("torch.")
        return Compiled(self.kernel, self.target.arch, dtype, str(self.tile), self.label)


class WarmJob(Job):
    """Compiles for the device at hand as a launch would, into Triton's cache, where the launch then finds it."""

    def run(self) -> Compiled:
        kernel = KERNELS[self.kernel]
        try:
            kernel.function.warmup(
                *kernel.operands(self.problem, self.tile), grid=(1,),
                **kernel.values(self.problem, self.tile, self.target),
                **compiler_options(self.tile.num_warps, self.tile.num_stages),
            )  # fmt: skip
        except Exception as error:  # the compiler raises its own, and LLVM's, kinds of exception
            return _replace(self.blank(), error=_reason(error))
        return self.blank()


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a job. Counts are of instructions in the code; `error` is empty on success.

    `registers` are per thread; `spill_bytes` stores and loads together; `occupancy` the share of the multiprocessor's
    threads that can be resident; `wgmma` counts Hopper's and Blackwell's asynchronous matrix instructions, `mma` the
    older kind (and AMD's); `vector_loads` loads of 16 bytes; `tma` bulk tensor copies.
    """

    kernel: str
    target: str
    dtype: str
    tile: str
    label: str = ""
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    occupancy: float = 0.0
    uses_dot: bool = False
    wgmma: int = 0
    mma: int = 0
    vector_loads: int = 0
    tma: int = 0
    warnings: tuple[str, ...] = ()
    error: str = ""

    def asdict(self) -> dict[str, object]:
        return asdict(self) | {"warnings": list(self.warnings)}


def signature(job: Job) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """(signature, constants, attributes) that a launch of this problem with 16-byte aligned tensors would compile."""
    kernel, problem, tile = KERNELS[job.kernel], job.problem, job.tile
    values = kernel.values(problem, tile, job.target)
    dtypes = dict(zip(kernel.parameters, kernel.operands(problem, tile), strict=False))
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, parameter in enumerate(kernel.function.params):
        name = parameter.name
        if name in dtypes:
            dtype = dtypes[name]
            if dtype is None:
                types[name], constants[name] = "constexpr", None
            else:
                types[name] = _POINTER[dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            continue
        value = values[name]
        if parameter.is_constexpr or value == 1:
            types[name], constants[name] = "constexpr", value
            continue
        assert isinstance(value, int)
        types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compile_here(job: Job) -> Compiled:
    """Compiles in this process (which must not interpret kernels); compiler errors come back in `error`."""
    return compile_binary(job)[0]


def compile_binary(job: Job) -> tuple[Compiled, Any]:
    """The same, and the compiled kernel itself; None after an error."""
    blank, kernel, log = job.blank(), KERNELS[job.kernel], io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            binary = _compile(kernel, job)
    except Exception as error:  # the compiler raises its own, and LLVM's, kinds of exception
        return _replace(blank, error=_reason(error)), None
    return _read(blank, binary, log.getvalue(), job), binary


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"


def _replace(row: Compiled, **changes: Any) -> Compiled:
    return Compiled(**{**row.__dict__, **changes})


def _device(vendor: str, arch: str, warp_size: int) -> Any:
    """A device, as Triton's compiler has it."""
    from triton.backends.compiler import GPUTarget

    if vendor == "nvidia":
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), warp_size)
    return GPUTarget("hip", arch, warp_size)


def _compile(kernel: Kernel, job: Job) -> Any:
    import triton
    from triton.compiler import ASTSource

    triton.knobs.compilation.always_compile = True  # a cached binary has no assembler log
    triton.knobs.nvidia.dump_ptxas_log = True
    return triton.compile(
        ASTSource(kernel.function, *signature(job)),
        target=_device(job.target.vendor, job.target.arch, job.target.warp_size),
        options=compiler_options(job.tile.num_warps, job.tile.num_stages),
    )


def _read(blank: Compiled, binary: Any, log: str, job: Job) -> Compiled:
    if job.target.vendor == "nvidia":
        code = binary.asm["ptx"]
        registers = int(_first(r"Used (\d+) registers", log))
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
        vector = _VECTOR_LOAD["ptx"]
    else:
        code = binary.asm["amdgcn"]
        registers = int(_first(r"\.vgpr_count:\s+(\d+)", code))
        spills = 4 * int(_first(r"\.vgpr_spill_count:\s+(\d+)", code))
        vector = _VECTOR_LOAD["amdgcn"]
    shared = binary.metadata.shared
    return _replace(
        blank,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=shared,
        occupancy=occupancy(job.target, job.tile.num_warps, registers, shared),
        uses_dot=" tt.dot " in binary.asm["ttir"],
        wgmma=len(re.findall(r"wgmma\.mma_async|tcgen05\.mma", code)),
        mma=len(re.findall(r"\bmma\.sync|v_mfma|v_wmma", code)),
        vector_loads=len(vector.findall(code)),
        tma=len(re.findall(r"cp\.async\.bulk\.tensor", code)),
        warnings=tuple(sorted(set(re.findall(r"\(?(C7\d{3})\)?", log)))),
    )


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match.group(1) if match else "0"


def occupancy(target: Target, warps: int, registers: int, shared: int) -> float:
    """Share of the multiprocessor's threads that blocks of this size can fill, by registers and shared memory."""
    threads = warps * target.warp_size
    per_warp = math.ceil(max(registers, 16) * target.warp_size / 256) * 256
    blocks = min(target.threads_per_sm // threads, target.registers // (per_warp * warps), 32)
    reserved = _SHARED_RESERVED if target.capability else 0
    if shared:
        blocks = min(blocks, (target.shared_bytes + reserved) // (shared + reserved))
    return round(blocks * threads / target.threads_per_sm, 3)


class Driver:
    """Stands for Triton's driver: all that a compilation asks of it. The real one would take memory of the device."""

    def __init__(self, vendor: str, arch: str, warp_size: int) -> None:
        self._target = _device(vendor, arch, warp_size)

    def get_current_target(self) -> object:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Worker:
    """A process that does jobs one after the other; killed when a job takes too long, and started anew."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, job: Job, seconds: float) -> Compiled:
        process = self._process = self._process or self._start()
        assert process.stdin and process.stdout
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            pickle.dump(job, process.stdin)
            process.stdin.flush()
            result: Compiled = pickle.load(process.stdout)
            return result
        except (EOFError, BrokenPipeError, ValueError, pickle.UnpicklingError):
            code = self.close()
            reason = f"no result within {seconds:g} s" if not timer.is_alive() else f"the compiler died ({code})"
            return _replace(job.blank(), error=reason)
        finally:
            timer.cancel()

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        environment = os.environ | {"TRITON_INTERPRET": "0"}
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        # A session of its own: Ctrl-C is for whoever gave it the job.
        return subprocess.Popen(
            [sys.executable, "-c", "from triton_conv.aot import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def close(self) -> int | None:
        """Ends the process, if there is one, and returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError, ValueError):
            process.stdin.close()
        process.stdout.close()
        return process.wait()


class Pool:
    """Processes that work off jobs, the lowest priority number first; results come in the order they are ready.

    Processes, not threads: a compiler can abort or hang, and takes only its own process along.
    """

    def __init__(self, processes: int | None = None, seconds: float = SECONDS_PER_COMPILE) -> None:
        self._jobs: queue.PriorityQueue[tuple[tuple[int, ...], int, Any, Job | None]] = queue.PriorityQueue()
        self._results: queue.Queue[tuple[Any, Compiled]] = queue.Queue()
        self._seconds, self._serial, self._stopped = seconds, itertools.count(), False
        self.waiting = 0
        """Jobs whose results have not been taken yet."""
        count = max(1, processes or len(os.sched_getaffinity(0)))
        self._workers = [_Worker() for _ in range(count)]
        self._threads = [threading.Thread(target=self._work, args=(w,), daemon=True) for w in self._workers]
        for thread in self._threads:
            thread.start()

    def submit(self, key: Any, job: Job, priority: tuple[int, ...] = ()) -> None:
        """Queues a job; its result will carry `key`."""
        self.waiting += 1
        self._jobs.put((priority, next(self._serial), key, job))

    def take(self, seconds: float | None = None) -> tuple[Any, Compiled]:
        """The next result; raises `queue.Empty` if none comes within `seconds`."""
        result = self._results.get(timeout=seconds)
        self.waiting -= 1
        return result

    def _work(self, worker: _Worker) -> None:
        while True:
            *_, key, job = self._jobs.get()
            if job is None or self._stopped:
                return
            self._results.put((key, worker.run(job, self._seconds)))

    def close(self) -> None:
        """Ends all processes; jobs under way are killed, queued ones forgotten."""
        self._stopped = True
        for worker in self._workers:
            worker.kill()
        for _ in self._threads:
            self._jobs.put(((-1,), next(self._serial), None, None))
        for thread, worker in zip(self._threads, self._workers, strict=True):
            thread.join()
            worker.close()


def compile_all(
    jobs: Iterable[Job], processes: int | None = None, seconds: float = SECONDS_PER_COMPILE
) -> Iterator[tuple[int, Compiled]]:
    """Compiles every job, in parallel processes, and yields (index, result) as they come."""
    pool = Pool(processes, seconds)
    try:
        for index, job in enumerate(jobs):
            pool.submit(index, job)
        while pool.waiting:
            yield pool.take()
    finally:
        pool.close()


def serve() -> None:
    """The worker's loop: jobs in, results out, until nobody gives or takes any. What compilers print goes to stderr."""
    import triton

    with contextlib.suppress(EOFError, BrokenPipeError), os.fdopen(os.dup(1), "wb") as channel:
        os.dup2(2, 1)
        while True:
            job: Job = pickle.load(sys.stdin.buffer)
            triton.runtime.driver.set_active(Driver(job.target.vendor, job.target.arch, job.target.warp_size))
            pickle.dump(job.run(), channel)
            channel.flush()
