"""What every trial of a device asked of it, counted from its machine code: kept, because compiling them takes an hour.

    python -m perf_plots.trial_demands [--results DIR] [--processes N]

A run that was stopped goes on where it was. Counts are of the Triton that runs; the times are of the one that measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import triton

from triton_conv.amounts import number
from triton_conv.aot import compile_all
from triton_conv.kernels import KERNELS
from triton_conv.static_model.demand import CountedJob, Demand, of_row
from triton_conv.target import KNOWN
from triton_conv.workloads import FLAGSHIPS

from .record import COMMITTED, write_bytes
from .state import TRIALS

DEMANDS = Path(__file__).parent / "evidence" / "trial_demands.json"
H100 = COMMITTED / "h100-80gb-hbm3-132sm"
_FIELDS = [entry.name for entry in fields(Demand)]
# Results are written down every so many.
_BATCH = 64


@dataclass(frozen=True)
class Counted:
    """One trial: its line in the journal, what it asked for, bytes that it spills, and its time in microseconds."""

    line: int
    workload: str
    kernel: str
    tile: dict[str, Any]
    time_us: float
    spilled: int
    demand: Demand


def journal(folder: Path) -> list[dict[str, Any]]:
    """The trials of a device, failures too: a line of the file each."""
    return [json.loads(line) for line in (folder / TRIALS).read_text().splitlines()]


def read(path: Path = DEMANDS, folder: Path = H100) -> list[Counted]:
    """The counted trials, beside their times."""
    content, trials = json.loads(path.read_text()), journal(folder)
    if content["fields"] != _FIELDS:
        raise ValueError(f"{path}: counts {content['fields']}, expected {_FIELDS}; count again")
    found = []
    for line, spilled, *numbers in content["rows"]:
        trial = trials[int(line)]
        found.append(
            Counted(
                int(line), trial["workload"], trial["kernel"], trial["tile"], trial["time_us"], int(spilled),
                Demand(*map(float, numbers)),
            )
        )  # fmt: skip
    return found


def jobs(trials: list[dict[str, Any]], known: set[int]) -> Iterator[tuple[int, CountedJob]]:
    """The compilations of the trials that have a time and were not counted yet."""
    works = {part.title: part for workload in FLAGSHIPS for part in workload.parts()}
    problems = {title: works[title].problem() for title in {trial["workload"] for trial in trials} if title in works}
    for line, trial in enumerate(trials):
        problem = problems.get(trial["workload"])
        if line in known or "failure" in trial or problem is None or problem.describe() != trial["problem"]:
            continue
        tile = KERNELS[trial["kernel"]].tile_type(**trial["tile"])
        yield line, CountedJob(trial["kernel"], problem, tile, KNOWN["sm_90"])


def short(number: float) -> float:
    """Four digits are enough of a count that is off by tens of percent as a time."""
    return float(f"{number:.4g}")


def write(path: Path, rows: dict[int, list[float]], version: str) -> None:
    """Writes the file, one trial a line."""
    source = f"{len(rows)} trials compiled by Triton {version}"
    lines = ",\n".join(f"  {json.dumps(rows[line])}" for line in sorted(rows))
    head = f'{{"source": {json.dumps(source)},\n "fields": {json.dumps(_FIELDS)},\n "rows": [\n'
    write_bytes(path, f"{head}{lines}\n ]}}\n".encode())


def main(arguments: list[str] | None = None) -> int:
    """Compiles and counts what is missing."""
    parser = argparse.ArgumentParser(prog="python -m perf_plots.trial_demands", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=H100, help="the device's folder, which has its trials")
    parser.add_argument("--out", type=Path, default=DEMANDS)
    parser.add_argument("--processes", type=number, metavar="N")
    parser.add_argument("--limit", type=number, metavar="N", help="no more than so many compilations")
    options = parser.parse_args(arguments)
    rows: dict[int, list[float]] = {}
    if options.out.is_file():
        rows = {int(row[0]): row for row in json.loads(options.out.read_text())["rows"]}
    wanted = list(jobs(journal(options.results), set(rows)))[: options.limit]
    failed = 0
    for count, (index, row) in enumerate(compile_all([job for _, job in wanted], options.processes), start=1):
        line, job = wanted[index]
        launch = of_row(row, job)
        if launch is None:
            failed += 1
        else:
            rows[line] = [line, row.spill_bytes, *(short(number) for number in launch.demand.astuple())]
        if count % _BATCH == 0 or count == len(wanted):
            write(options.out, rows, triton.__version__)
    print(f"{len(wanted)} compiled, {failed} in vain; {options.out} holds {len(rows)} trials")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
