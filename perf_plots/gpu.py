"""`python -m perf_plots.gpu`: everything that needs a GPU, in one command and within a budget of seconds.

Measured ceilings, tests, tuning, portfolios, the flagships with their gradients, the lectures' kinds, whole steps and
models, the scaling sweeps, first calls, torch.compile, layers of networks, figures. Needs Python, torch, triton, numpy,
pytest and matplotlib, no installation and no network; run from the repository's root. Results are written to --work as
they come; a second call goes on there where the first stopped. After every stage --out holds all of it in three files:
results.tar.gz, summary.txt and overview.png.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .budget import Budget, BudgetError

if TYPE_CHECKING:
    from .run import Run

STAGE_NAMES = (
    "environment", "ceilings", "tests", "tuning", "portfolio", "benchmark", "gradients", "lectures", "steps", "models",
    "sweeps", "cold_start", "compiled", "sanitizer", "networks", "network_gradients", "variants", "figures",
)  # fmt: skip
# Those of triton_conv.workloads, which may not be imported yet when they are needed.
KIND_NAMES = ("grouped", "depthwise", "dilated", "transposed", "deformable", "separable", "shuffle", "local")
_NO_GPU, _STOPPED = 2, 3
_REHEARSAL_BUDGET, _LEAST_RESTART, _MOST_RESTARTS = 600.0, 30.0, 5


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf_plots.gpu", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--budget", type=float, help="seconds within which everything ends")
    parser.add_argument("--out", type=Path, help="folder for results.tar.gz, summary.txt and overview.png")
    parser.add_argument("--work", type=Path, help="folder of the run, which a second call goes on with (.perf_run)")
    parser.add_argument(
        "--only", default=",".join(STAGE_NAMES), help="stages and kinds, comma-separated (default: all)"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run in --out has done")
    parser.add_argument(
        "--committed", action="store_true",
        help="begin with what is committed of this device: measured is what is missing, or has other code or tiles now",
    )  # fmt: skip
    parser.add_argument(
        "--rehearse", action="store_true",
        help="walk every stage without a GPU: tiny cases, Triton's interpreter, made-up times, a temporary folder",
    )  # fmt: skip
    parser.add_argument("--base", metavar="REV", help="measure this revision too, and say what became faster or slower")
    parser.add_argument("--restarts", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 if all went well, 1 if something failed (see the summary), 2 if nothing was run, 3 if stopped."""
    parser = _parser()
    options = parser.parse_args(arguments)
    only = options.only.split(",")
    if unknown := [name for name in only if name not in STAGE_NAMES + KIND_NAMES]:
        parser.error(
            f"argument --only: {', '.join(unknown)} is not known; choose of {', '.join(STAGE_NAMES + KIND_NAMES)}"
        )
    stages = [stage for stage in STAGE_NAMES if stage in only] or list(STAGE_NAMES)
    if options.rehearse:
        # Must be known before triton_conv is imported.
        os.environ["TRITON_INTERPRET"] = "1"
        options.budget = _REHEARSAL_BUDGET if options.budget is None else options.budget
        options.work = options.work or Path(tempfile.mkdtemp(prefix="perf_plots-"))
        options.out = options.out or options.work
    elif options.budget is None or options.out is None:
        parser.error("--budget SECONDS and --out DIR are required, except with --rehearse")
    try:
        budget = Budget(options.budget, reserve=min(20.0, 0.25 * options.budget))
    except BudgetError as error:
        parser.error(f"argument --budget: {error}")
    # The seconds that importing torch takes count too.
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print(
            f"torch {torch.__version__} sees no GPU here, and nothing was run. Run this command on a machine with an "
            "NVIDIA GPU and a torch built for CUDA, or add --rehearse to walk through every stage on the CPU.",
            file=sys.stderr,
        )
        return _NO_GPU
    work = (options.work or Path(".perf_run")).resolve()
    if options.fresh and work.is_dir():
        _forget(work)
    for name, folder in (("--work", work), ("--out", options.out)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"argument {name}: {folder} cannot be made a folder: {error.strerror}")
    # Plans see the tiles that this run tunes.
    os.environ["TRITON_CONV_HOME"] = str(work)
    from triton_conv.amounts import counted

    from .record import COMMITTED
    from .run import Run
    from .state import TRIALS, adopt

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A log that is followed, or cut off, holds whole lines.
        sys.stdout.reconfigure(line_buffering=True)
    kinds = tuple(name for name in KIND_NAMES if name in only)
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", 0)
    run = Run(work, device, options.rehearse, kinds=kinds)
    if options.committed:
        count = adopt(COMMITTED / run.results.name, run.results, work / TRIALS)
        print(f"to begin with {counted(count, 'committed file')} of {run.results.name}")
    if not options.base:
        return _run(run, budget, stages, options)
    code = _run(run, Budget(0.5 * budget.end.left), stages, options)
    return max(code, _against_base(run, budget, stages, options))


def _against_base(run: Run, budget: Budget, stages: list[str], options: argparse.Namespace) -> int:
    """Measures the other revision with the time that is left, and compares; 1 for a loss or red tests."""
    from .base import BaseError, measure, report
    from .record import write_bytes

    only = [*stages, *run.kinds]
    try:
        before = measure(options.base, run.out, only, max(budget.end.left - 5.0, 1.0), options.rehearse)
    except BaseError as error:
        print(error, file=sys.stderr)
        return 1
    lines, well = report(before, run.out)
    print(f"== compared with {options.base}", *lines, sep="\n")
    write_bytes(options.out / "compared.txt", ("\n".join(lines) + "\n").encode())
    return 0 if well else 1


def _forget(work: Path) -> None:
    """Removes what a run writes, and nothing else that may lie in the folder."""
    from .state import (
        ARCHIVE,
        FAILURES,
        PASSED,
        STATE,
        SUMMARY,
        TESTS,
        TESTS_HOME,
        TRACEBACKS,
        TRIALS,
        TUNING,
    )  # fmt: skip

    for name in ("results", "autotune_configs", "figures", "base", TESTS_HOME):
        shutil.rmtree(work / name, ignore_errors=True)
    for name in (STATE, TUNING, TRIALS, TESTS, FAILURES, TRACEBACKS, PASSED, ARCHIVE, SUMMARY, "nvidia-smi.txt"):
        (work / name).unlink(missing_ok=True)


def _run(run: Run, budget: Budget, names: list[str], options: argparse.Namespace) -> int:
    folder = options.out.resolve()
    # A call that does not return cannot be interrupted, but what is on disk can be handed over in time.
    watchdog = threading.Timer(max(budget.end.left - 5.0, 0.9 * budget.end.left), _stop, (run, folder))
    watchdog.daemon = True
    watchdog.start()
    try:
        return _run_stages(run, budget, names, options, folder)
    finally:
        watchdog.cancel()


def _run_stages(run: Run, budget: Budget, names: list[str], options: argparse.Namespace, folder: Path) -> int:
    from triton_conv.autotune.measure import DeviceLostError

    from .stages import STAGES
    from .state import save_stage
    from .summary import failed, summarise

    for name, deadline in budget.deadlines({name: STAGES[name][0] for name in names}).items():
        start = time.monotonic()
        print(f"== {name} ({deadline.left:.0f} s)")
        try:
            report = STAGES[name][1](run, deadline)
        except DeviceLostError as error:
            print(error)
            if (code := _restart(budget, run, options)) is not None:
                return code
            report = {"error": str(error)}
        except KeyboardInterrupt:
            _hand_over(run, folder)
            raise
        except Exception as error:  # the stages after it must run; the summary says what happened
            report = {"error": f"{type(error).__name__}: {error}"}
            print(report["error"])
        save_stage(run.out, name, report | {"seconds": round(time.monotonic() - start, 2)})
        _hand_over(run, folder)
    print(f"== summary ({folder / 'summary.txt'}; everything in {folder / 'results.tar.gz'})")
    print("\n".join(summarise(run.out)))
    return 1 if failed(run.out) else 0


def _hand_over(run: Run, folder: Path) -> None:
    from .state import bundle
    from .summary import summarise

    bundle(run.out, folder, summarise(run.out))


def _stop(run: Run, folder: Path) -> None:
    """At the end of the budget, whatever is running."""
    from .children import end_all
    from .summary import summarise

    print("== stopped at the end of the budget")
    # They would run on, and hold the device.
    end_all()
    try:
        _hand_over(run, folder)
        print("\n".join(summarise(run.out)), flush=True)
    finally:
        os._exit(_STOPPED)


def _restart(budget: Budget, run: Run, options: argparse.Namespace) -> int | None:
    """Goes on in a new process, with what is left of the budget; does not return unless too little is."""
    left = budget.end.left
    if left < _LEAST_RESTART or options.restarts >= _MOST_RESTARTS:
        return None
    command = [
        sys.executable,
        "-m",
        "perf_plots.gpu",
        f"--budget={left:.1f}",
        f"--work={run.out}",
        f"--out={options.out}",
        f"--only={options.only}",
    ]
    command += [f"--restarts={options.restarts + 1}"]
    command += ["--rehearse"] if options.rehearse else []
    command += [f"--base={options.base}"] if options.base else []
    sys.stdout.flush()
    os.execv(sys.executable, command)


if __name__ == "__main__":
    sys.exit(main())
