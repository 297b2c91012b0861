"""Another revision measured beside this one, `python -m perf_plots.gpu --base REV`; no gain on red tests."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from .compare import FASTER, Change, compare
from .provenance import ROOT
from .state import load_state
from .style import ratio

# What is run once, for this revision alone: only single layers are compared.
_OURS_ALONE = ("tests", "models", "cold_start", "compiled", "figures")
# pytest's exit statuses: all passed, none collected.
_GREEN = (0, 5)


class BaseError(RuntimeError):
    """The revision cannot be checked out, or its run failed."""


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """The revision in a folder of its own, which is gone afterwards; raises `BaseError`."""
    with tempfile.TemporaryDirectory(prefix="perf_plots-base-") as folder:
        tree = Path(folder) / "tree"
        done = subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), revision], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise BaseError(f"--base: {revision!r} cannot be checked out: {reason}")
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, capture_output=True)


def measure(revision: str, work: Path, stages: Sequence[str], seconds: float, rehearse: bool) -> Path:
    """Runs the same stages of that revision, its own tiles and its own program, and returns its folder of results."""
    folder = work / "base"
    with checked_out(revision) as tree:
        command = [
            sys.executable, "-m", "perf_plots.gpu", f"--budget={seconds:.0f}", f"--work={folder}", f"--out={folder}",
            f"--only={','.join(stage for stage in stages if stage not in _OURS_ALONE)}",
        ]  # fmt: skip
        print(f"== base {revision} ({seconds:.0f} s)", flush=True)
        done = subprocess.run([*command, *(["--rehearse"] if rehearse else [])], cwd=tree)
    # A case that failed there is in its results; a run that was not begun has none.
    if done.returncode not in (0, 1, 3):
        raise BaseError(f"--base: the run of {revision!r} ended with status {done.returncode}")
    return folder / "results"


def report(before: Path, work: Path) -> tuple[list[str], bool]:
    """The comparison with the results in `work`, and whether all is well: no loss, and green tests behind any gain."""
    found = compare(before, work / "results")
    tests = load_state(work).get("tests")
    if tests and tests.get("status") in _GREEN and not tests.get("timed_out"):
        return list(found.lines), not found.worse
    why = "the tests were not run" if not tests else "the tests did not end" if tests.get("timed_out") else "tests fail"
    losses = [_line(change) for change in found.changes if change.verdict not in (FASTER,) and change.gain < 1]
    return [f"No gain is reported: {why}.", *found.broken, *losses], False


def _line(change: Change) -> str:
    return f"{change.title}: {ratio(change.gain)}, {change.verdict}"
