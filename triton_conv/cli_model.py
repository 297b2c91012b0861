"""`triton-conv inspect --workload`: the static model's prediction for a workload, beside the floor."""

from __future__ import annotations

import argparse

from . import workloads
from .autotune.console import ERR, OUT, Progress, Table, write_json
from .errors import WorkloadError
from .static_model.rows import PARTS, Prediction, planned, predictions, waiting


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options to those of `inspect`."""
    parser.add_argument(
        "--workload",
        metavar="NAME",
        help="predict the time of this workload, kind, all, lectures or .json file instead",
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="with --workload, only this part (repeatable)")
    parser.add_argument(
        "--waiting", action="store_true", help="with --workload, the forms that serve where measured, and are not"
    )


def inspect(arguments: argparse.Namespace) -> int:
    """Predicts and prints; exit code 1 if a kernel did not compile."""
    targets = arguments.target or ["sm_90"]
    if len(targets) > 1:
        raise WorkloadError(f"target: expected one with --workload, got {', '.join(targets)}")
    if arguments.all or arguments.kernel or arguments.dtype:
        raise WorkloadError("workload: a workload has a kernel and a dtype; --all, --kernel and --dtype go without one")
    selected = workloads.find(arguments.workload)
    with Progress(console=ERR, transient=True) as progress:
        bar = progress.add_task("compiling", total=None)
        found = predictions(
            selected, arguments.part or tuple(PARTS), targets[0], arguments.processes,
            lambda total: progress.update(bar, total=total, advance=1), waiting if arguments.waiting else planned,
        )  # fmt: skip
    if arguments.waiting and not found:
        OUT.print(f"no form of {arguments.workload} waits for a measurement on {targets[0]}", highlight=False)
        return 0
    OUT.print(table(found))
    for row in found:
        if len(found) <= 3 and not row.error:
            _explain(row)
        elif row.error:
            OUT.print(f"  {row.workload} {row.part}: {row.error}", highlight=False, markup=False)
    OUT.print(
        "computed, not measured, but for the last column: microseconds of this tile where it was tuned", highlight=False
    )
    write_json(arguments.json, {"target": targets[0], "predictions": [row.asdict() for row in found]})
    return 1 if any(row.error for row in found) else 0


def table(found: list[Prediction]) -> Table:
    """One row a prediction; those that miss their goal in red."""
    grid = Table(box=None, header_style="bold")
    for column in ("workload", "part", "kernel"):
        grid.add_column(column, no_wrap=True)
    for column in (
        "pro-\ngrams", "at\nonce", "waves", "slots an\noutput", "device\nMB", "L2\nMB", "floor\nus", "predicted\nus",
        "share", "goal", "measured\nus",
    ):  # fmt: skip
        grid.add_column(column, justify="right", no_wrap=True)
    grid.add_column("binds")
    for row in found:
        grid.add_row(
            row.workload, row.part, row.kernel, str(row.programs), str(row.resident), f"{row.waves:.2f}",
            f"{row.slots_per_output:.1f}", f"{row.device_mb:.1f}", f"{row.l2_mb:.1f}", f"{row.floor_us:.1f}",
            f"{row.predicted_us:.1f}", f"{row.share:.0%}", "-" if row.goal is None else f"{row.goal:.0%}",
            "-" if row.measured_us is None else f"{row.measured_us:.1f}", row.binds, style="red" if row.missed else "",
        )  # fmt: skip
    return grid


def _explain(row: Prediction) -> None:
    """The terms of one prediction, the largest first, and the innermost loop by pipe."""
    say = lambda line: OUT.print(line, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    say(f"{row.workload} {row.part}: {row.kernel} {row.tile} ({row.source}), {row.registers} registers a thread")
    device, l2 = (1e3 * value / max(row.programs, 1) for value in (row.device_mb, row.l2_mb))
    say(f"  a program: {device:.1f} KB from device memory, {l2:.1f} KB through L2")
    terms = sorted(row.terms.items(), key=lambda item: -item[1])
    say("  us alone: " + ", ".join(f"{name} {value:.1f}" for name, value in terms))
    say("  innermost loop, instructions an output: " + ", ".join(f"{n} {v:.2f}" for n, v in row.pipes.items()))
