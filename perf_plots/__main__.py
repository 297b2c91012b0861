"""`python -m perf_plots`: draws every figure from the result files and prints the numbers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .figures import draw_all
from .record import COMMITTED


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if a result file had to be left out; the rest is drawn all the same."""
    parser = argparse.ArgumentParser(prog="python -m perf_plots", description=__doc__)
    parser.add_argument("--results", type=Path, default=COMMITTED, help="folder of results, one folder a device in it")
    parser.add_argument("--out", type=Path, default=COMMITTED.parent / "figures", help="where the figures go")
    options = parser.parse_args(arguments)
    paths, complaints = draw_all(options.results, options.out)
    print(f"\n{len(paths)} files written below {options.out}")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
