"""`python -m perf_plots`: draws every figure and the page from the result files and prints the numbers.

`python -m perf_plots compare A B` compares two folders of results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from triton_conv.amounts import counted

from .evidence import EVIDENCE
from .record import COMMITTED

_MISSING = 2


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if a result file had to be left out, though the rest is drawn, or if a comparison finds a loss.

    2 if nothing could be done.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _compare(arguments[1:]) if arguments[:1] == ["compare"] else _draw(arguments)
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed: pip install 'triton-conv[plots]' brings all that figures need",
              file=sys.stderr)  # fmt: skip
        return _MISSING


def _draw(arguments: list[str]) -> int:
    from .figures import draw_all

    parser = argparse.ArgumentParser(
        prog="python -m perf_plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=COMMITTED, help="folder of results, one folder a device in it")
    parser.add_argument("--out", type=Path, default=COMMITTED.parent / "figures", help="where figures and page go")
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="what triton-conv inspect --json wrote")
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {options.out} cannot be made a folder: {error.strerror}")
    if options.evidence != EVIDENCE and not options.evidence.is_file():
        parser.error(f"argument --evidence: {options.evidence} is no file")
    paths, complaints = draw_all(options.results, options.out, evidence=options.evidence)
    print(f"\n{counted(len(paths), 'file')} written below {options.out}; the page: {paths[-1]}")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


def _compare(arguments: list[str]) -> int:
    from .compare import compare

    parser = argparse.ArgumentParser(
        prog="python -m perf_plots compare",
        description="What became faster or slower beyond its interval. Exit status 1 if a case became slower or fails.",
    )
    parser.add_argument("before", type=Path, metavar="A", help="folder of results, one folder a device in it")
    parser.add_argument("after", type=Path, metavar="B", help="the same, measured later")
    options = parser.parse_args(arguments)
    for path in (options.before, options.after):
        if not path.is_dir():
            parser.error(f"{path} is no folder of results")
    found = compare(options.before, options.after)
    print("\n".join(found.lines))
    return 1 if found.worse else 0


if __name__ == "__main__":
    sys.exit(main())
