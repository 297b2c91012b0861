"""Outcomes of tests on disk as they happen, and what has passed before left out: for runs that are cut short.

The environment names the files: TRITON_CONV_FAILURES (a line each), TRITON_CONV_TRACEBACKS and TRITON_CONV_PASSED are
written; TRITON_CONV_SKIP (what has passed) and TRITON_CONV_FIRST (what has failed) are read.
"""

import os
import re
from pathlib import Path

# With --dist loadgroup a report's name ends with the test's group.
_GROUP = re.compile(r"@[\w-]+$")
# Lines of a traceback's end that say where and why.
_LINES = 60


def pytest_runtest_logreport(report):
    """Writes each failure and success down as it happens: a run that is stopped at its time limit has no summary."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    name = _GROUP.sub("", report.nodeid)
    if report.failed and (log := os.environ.get("TRITON_CONV_FAILURES")):
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = " ".join(str(crash.message if crash else report.longrepr).split())[:300]
        _append(log, f"FAILED {name} - {reason}")
    if report.failed and (log := os.environ.get("TRITON_CONV_TRACEBACKS")):
        text = "\n".join(report.longreprtext.splitlines()[-_LINES:])
        _append(log, f"==== {name} ({report.when})\n{text}\n")
    if report.passed and report.when == "call" and (log := os.environ.get("TRITON_CONV_PASSED")):
        _append(log, name)


def _append(log, line):
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def leave_out_passed(config, items):
    """Every process of tests reads the same names; what failed before, be it after it had passed, comes first."""
    passed, failed = (
        set(Path(file).read_text(encoding="utf-8").splitlines()) if (file := os.environ.get(name)) else set()
        for name in ("TRITON_CONV_SKIP", "TRITON_CONV_FIRST")
    )
    left_out = passed - failed
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]
    items.sort(key=lambda item: item.nodeid not in failed)
