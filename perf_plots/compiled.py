"""`python -m perf_plots.compiled`: cases with torch.compile's search among the baselines, in a process of its own.

The search takes seconds to a minute a case, and may hang or crash: the stage of that name kills what takes too long.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from . import children
from .record import write
from .run import Run
from .runner import run_case


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases of these titles and writes their results; exit status 1 at the first that fails."""
    options = children.options("compiled", __doc__, "flagships", arguments)
    run = Run(options.work, torch.device("cpu") if options.rehearse else torch.device("cuda", 0), options.rehearse)
    bench = run.bench(compiled=True)
    found = {workload.title: workload for workload in run.cases("compiled")}
    with tempfile.TemporaryDirectory(prefix="perf_plots-compiled-") as folder:
        for title in options.units.split(","):
            # A search that breaks the device takes no earlier result of the case along.
            record = run_case(found[title], replace(bench, folder=Path(folder)))
            if record.error:
                print(record.error, flush=True)
                return 1
            write(record, bench.folder)
            print(f"{title}: done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
