"""The command line, `triton-conv`: inspect kernels, tune tiles, show plans, count costs. Each command has `--help`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import __version__, cli_lectures, configs, dispatch, inspection, target, workloads
from .aot import Compiled, compile_all
from .errors import TritonConvError, WorkloadError
from .kernels import KERNELS

# A file or a pipe has no width to fit in.
_OUT = Console(width=None if sys.stdout.isatty() else 160)
_ERR = Console(stderr=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 good, 1 what was checked is not, 2 the command was not understood."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except TritonConvError as error:
        _ERR.print(f"triton-conv: {error}", markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        _ERR.print("triton-conv: interrupted")
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="triton-conv", description="Triton convolution kernels: inspect, tune and count."
    )
    parser.add_argument("--version", action="version", version=f"triton_conv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="compile kernels with no GPU and show what the compiler made of them")
    inspect.add_argument("--all", action="store_true", help="every workload, dtype and memory format")
    inspect.add_argument("--kernel", choices=KERNELS, action="append", help="only this kernel (repeatable)")
    inspect.add_argument("--target", choices=target.KNOWN, action="append", help="only this target (repeatable)")
    inspect.add_argument("--dtype", choices=inspection.DTYPES, action="append", help="with --all, only this dtype")
    inspect.add_argument("--processes", type=int, metavar="N", help="compiler processes (default: one a core)")
    inspect.add_argument("--json", type=Path, metavar="FILE", help="also write all rows to FILE")
    inspect.set_defaults(run=_inspect)

    tune = commands.add_parser("tune", help="measure candidate tiles on this machine's GPU and keep the winners")
    tune.add_argument("--workload", required=True, metavar="NAME", help="a workload, a kind, all, or a .json file")
    tune.add_argument("--budget", type=float, required=True, metavar="SECONDS", help="time for all of it")
    tune.add_argument("--store", type=Path, metavar="DIR", help="where to write (default: your own folder)")
    tune.add_argument("--target", choices=target.KNOWN, default="sm_90", help="without a GPU: compile for this target")
    tune.add_argument("--json", type=Path, metavar="FILE", help="also write the outcomes to FILE")
    tune.set_defaults(run=_tune)

    plan = commands.add_parser("plan", help="show which kernel and tile a workload would run, and why")
    plan.add_argument("--workload", default="all", metavar="NAME", help="a workload, a kind, all, or a .json file")
    plan.add_argument("--target", choices=target.KNOWN, help="for this target instead of this machine's GPU")
    plan.set_defaults(run=_plan)

    cli_lectures.add(commands, lambda line: _OUT.print(line, highlight=False, markup=False, soft_wrap=True))
    return parser


def _write_json(path: Path | None, content: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        _OUT.print(f"wrote {path}", highlight=False)


# ---------------------------------------------------------------------------------------------------------- inspect


def _inspect(arguments: argparse.Namespace) -> int:
    jobs = inspection.jobs(
        arguments.all,
        arguments.kernel or tuple(KERNELS),
        arguments.target or tuple(target.KNOWN),
        arguments.dtype or inspection.DTYPES,
    )
    rows: dict[int, Compiled] = {}
    with Progress(console=_ERR, transient=True) as progress:
        bar = progress.add_task("compiling", total=len(jobs))
        for index, row in compile_all(jobs, arguments.processes):
            rows[index] = row
            progress.advance(bar)
    table = Table(box=None, header_style="bold")
    for column in ("kernel", "workload", "target", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in (
        "registers",
        "spilled\nbytes",
        "shared\nbytes",
        "occu-\npancy",
        "matrix\nops",
        "16-byte\nloads",
        "TMA",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("warnings")
    wrong = []
    for index, job in enumerate(jobs):
        row = rows[index]
        bad = inspection.complaints(job, row)
        wrong += [f"{row.kernel} {row.label} {row.target} {row.dtype} ({row.tile}): {reason}" for reason in bad]
        matrix = f"{row.wgmma} wgmma" if row.wgmma else f"{row.mma} mma" if row.mma else "-"
        table.add_row(
            row.kernel, row.label, row.target, row.dtype, str(row.registers), str(row.spill_bytes),
            str(row.shared_bytes), f"{row.occupancy:.0%}", matrix, str(row.vector_loads), str(row.tma),
            ", ".join(row.warnings) or "-", style="red" if bad else "",
        )  # fmt: skip
    _OUT.print(table)
    _write_json(arguments.json, {"kernels": [rows[index].asdict() for index in range(len(jobs))]})
    _OUT.print(f"{len(jobs)} compiled, {len(wrong)} complaints", highlight=False)
    for line in wrong:
        _OUT.print(f"  {line}", highlight=False, markup=False)
    return 1 if wrong else 0


# ------------------------------------------------------------------------------------------------------------- tune


def _tune(arguments: argparse.Namespace) -> int:
    from .autotune import tune as tuning
    from .autotune.measure import CudaTimer

    selected = workloads.find(arguments.workload)
    if not arguments.budget > 0:
        raise WorkloadError(f"budget: expected a positive number of seconds, got {arguments.budget:g}")
    if not torch.cuda.is_available():
        return _survivors(selected, target.known(arguments.target), arguments.budget, arguments.json)
    folder = arguments.store or configs.user_folder()
    outcomes = tuning.tune(
        selected,
        seconds=arguments.budget,
        device=torch.device("cuda"),
        timer=CudaTimer(),
        folder=folder,
        report=lambda line: _OUT.print(line, highlight=False, markup=False),
    )
    _OUT.print(f"winners are in {folder}", highlight=False)
    _write_json(arguments.json, {"outcomes": [vars(outcome) for outcome in outcomes]})
    return 1 if any(outcome.error for outcome in outcomes) else 0


def _survivors(selected: list[workloads.Workload], goal: target.Target, seconds: float, file: Path | None) -> int:
    """Without a GPU nothing can be measured: what can be known is which candidates compile, and cleanly."""
    from .autotune.tune import survivors

    _OUT.print(
        "No GPU here: nothing is measured and nothing stored. "
        f"Candidates that compile for {goal.arch} without a spill, nearest to the analytic default first:",
        highlight=False,
    )
    report = []
    for workload in selected:
        alive, compiled = survivors(workload.problem(), goal, seconds / len(selected))
        _OUT.print(f"\n{workload.title}: {len(alive)} of {compiled} compiled", highlight=False)
        for tile, row in alive:
            _OUT.print(
                f"  {tile}  [{row.registers} registers, {row.shared_bytes} shared, {row.occupancy:.0%} occupancy]",
                highlight=False,
                markup=False,
            )
        report.append(
            {"workload": workload.title, "compiled": compiled, "survivors": [row.asdict() for _, row in alive]}
        )
    _write_json(file, {"target": goal.arch, "workloads": report})
    return 0


# ------------------------------------------------------------------------------------------------------------- plan


def _plan(arguments: argparse.Namespace) -> int:
    selected = workloads.find(arguments.workload)
    if arguments.target:
        goal = target.known(arguments.target)
    elif torch.cuda.is_available():
        goal = target.of_device(torch.device("cuda"))
    else:
        raise WorkloadError(f"target: no GPU here; name one of {', '.join(target.KNOWN)} with --target")
    for workload in selected:
        _OUT.print(
            f"{workload.title} ({workload.origin}): {dispatch.plan(workload.problem(), goal)}\n", highlight=False
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
