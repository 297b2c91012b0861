"""The command line, `triton-conv`: inspect compiled kernels, tune tiles, count costs. Each command has `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__, cli_lectures, cli_model, inspection, target
from .amounts import counted, number
from .aot import Compiled, compile_all
from .autotune.commands import add_to as commands_of_the_tuner
from .autotune.console import ERR, OUT, Progress, Table, complain, write_json
from .errors import TritonConvError, WorkloadError
from .kernels import KERNELS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 good, 1 what was checked is not, 2 the command was not understood."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except TritonConvError as error:
        complain(str(error))
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        complain(f"{where}{error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="triton-conv", description="Triton convolution kernels: inspect, tune and count."
    )
    parser.add_argument("--version", action="version", version=f"triton_conv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = "compile kernels with no GPU and show what the compiler made of them"
    inspect = commands.add_parser("inspect", help=text, description=text)
    inspect.add_argument("--all", action="store_true", help="every workload, dtype and memory format")
    inspect.add_argument(
        "--kernel", choices=KERNELS, action="append", metavar="NAME",
        help="only this kernel, such as implicit_gemm (repeatable)",
    )  # fmt: skip
    inspect.add_argument(
        "--target", choices=target.KNOWN, action="append",
        help=f"this target instead of {', '.join(inspection.TARGETS)} (repeatable)",
    )  # fmt: skip
    inspect.add_argument("--dtype", choices=inspection.DTYPES, action="append", help="with --all, only this dtype")
    inspect.add_argument("--processes", type=number, metavar="N", help="compiler processes (default: one a core)")
    inspect.add_argument("--json", type=Path, metavar="FILE", help="also write all rows to FILE")
    cli_model.add(inspect)
    inspect.set_defaults(run=_inspect)

    commands_of_the_tuner(commands)
    cli_lectures.add(commands, lambda line: OUT.print(line, highlight=False, markup=False, soft_wrap=True))
    return parser


# ---------------------------------------------------------------------------------------------------------- inspect


def _inspect(arguments: argparse.Namespace) -> int:
    if arguments.workload is not None:
        return cli_model.inspect(arguments)
    if arguments.part:
        raise WorkloadError("part: only a workload has parts; name one with --workload")
    if arguments.waiting:
        raise WorkloadError("waiting: forms wait for a measurement of a workload; name one with --workload")
    if arguments.dtype and not arguments.all:
        raise WorkloadError("dtype: without --all every kernel is compiled for bfloat16; add --all")
    jobs = inspection.jobs(
        arguments.all,
        arguments.kernel or tuple(KERNELS),
        arguments.target or inspection.TARGETS,
        arguments.dtype or inspection.DTYPES,
    )
    rows: dict[int, Compiled] = {}
    with Progress(console=ERR, transient=True) as progress:
        bar = progress.add_task("compiling", total=len(jobs))
        for index, row in compile_all(jobs, arguments.processes):
            rows[index] = row
            progress.advance(bar)
    made = [(rows[index], inspection.complaints(job, rows[index])) for index, job in enumerate(jobs)]
    OUT.print(_table(made))
    write_json(arguments.json, {"kernels": [row.asdict() for row, _ in made]})
    wrong = [(row, reason) for row, complaints in made for reason in complaints]
    OUT.print(f"{len(jobs)} compiled, {counted(len(wrong), 'complaint')}", highlight=False)
    for row, reason in wrong:
        line = f"  {row.kernel} {row.label} {row.target} {row.dtype} ({row.tile}): {reason}"
        OUT.print(line, highlight=False, markup=False)
    return 1 if wrong else 0


def _table(made: Sequence[tuple[Compiled, Sequence[str]]]) -> Table:
    """One row a kernel; those with complaints in red."""
    table = Table(box=None, header_style="bold")
    for column in ("kernel", "workload", "target", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in (
        "registers", "spilled\nbytes", "shared\nbytes", "occu-\npancy", "matrix\nops", "16-byte\nloads", "TMA"
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("warnings")
    for row, complaints in made:
        matrix = f"{row.wgmma} wgmma" if row.wgmma else f"{row.mma} mma" if row.mma else "-"
        table.add_row(
            row.kernel, row.label, row.target, row.dtype, str(row.registers), str(row.spill_bytes),
            str(row.shared_bytes), f"{row.occupancy:.0%}", matrix, str(row.vector_loads), str(row.tma),
            ", ".join(row.warnings) or "-", style="red" if complaints else "",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
