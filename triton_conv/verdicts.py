"""What first uses of a form found on an architecture: remembered in the user's folder, `first_use.json`.

A form is one kernel's code for a dtype and a number of warps, as one version of Triton compiles it for an architecture.
The plain form of every kind needs no verdict, nor does one that was checked against float64 while tiles were measured
for this architecture with this version.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import threading
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from filelock import FileLock, Timeout

from . import configs
from .errors import ConfigWarning
from .kernels import Kernel, Tile
from .problem import Problem
from .target import Target
from .writing import write_json

FILE = "first_use.json"
SCHEMA = 1
# Seconds to wait for another process that checks the same form: a check and a compilation.
_PATIENCE = 10.0


@dataclass(frozen=True)
class Form:
    """What is right or wrong as a whole; `dtype` with the precision of float32's products, as plans print it."""

    kernel: str
    kernel_hash: str
    arch: str
    triton: str
    dtype: str
    num_warps: int

    @classmethod
    def of(cls, kernel: Kernel, tile: Tile, problem: Problem, target: Target) -> Form:
        return cls(
            kernel.name, configs.kernel_hash(kernel.name), target.arch, triton.__version__, problem.dtype_name,
            tile.num_warps,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.kernel} {self.kernel_hash} {self.arch} triton {self.triton} {self.dtype} w{self.num_warps}"


@dataclass(frozen=True)
class Verdict:
    """The largest relative difference from float64 on a small input, what rounding explains of it, and the date.

    `failure` says why there was no result to compare. `seconds` are those of the check, compiling included.
    """

    difference: float
    tolerance: float
    date: str
    seconds: float = 0.0
    failure: str = ""

    @property
    def right(self) -> bool:
        return not self.failure and self.difference <= self.tolerance

    def __str__(self) -> str:
        if self.failure:
            return self.failure
        return f"relative difference {self.difference:.3g} from float64, {self.tolerance:.3g} is rounding"


def needless(kernel: Kernel, tile: Tile, problem: Problem, target: Target, plain: str) -> str | None:
    """Why a form needs no check of its own, or None."""
    if target.interpreted:
        return "interpreted, not compiled"
    if kernel.name == plain:
        return "the plain form"
    own = [file for _, file in configs.files(kernel.name, target)]
    for file in (*own, *configs.siblings(kernel.name, target)):
        if file.environment.get("triton") != triton.__version__:
            continue
        alike = (entry.tile for key, entry in file.entries.items() if problem.dtype_name in key.split())
        if any(measured.num_warps == tile.num_warps for measured in alike):
            return f"measured on {file.target.name} with Triton {triton.__version__}, against float64"
    return None


def against(kernel: Kernel, problem: Problem, target: Target) -> str | None:
    """Why a kernel must not run problems of this dtype on a target, or None: one wrong form of it rules it out."""
    if target.interpreted:
        return None
    for form, verdict in _all().items():
        same = form.kernel, form.kernel_hash, form.arch, form.triton, form.dtype
        here = kernel.name, configs.kernel_hash(kernel.name), target.arch, triton.__version__, problem.dtype_name
        if same == here and not verdict.right:
            where = f"{target.arch} with Triton {triton.__version__}"
            return f"its first use on {where} was wrong on {verdict.date}: {verdict}"
    return None


# ------------------------------------------------------------------------------------------------------------ memory

_here: dict[Form, Verdict] = {}
_reported: set[Path] = set()
_mutex = threading.RLock()


def path() -> Path:
    """The file in the user's folder."""
    return configs.user_folder().parent / FILE


def known(form: Form) -> Verdict | None:
    """The verdict on a form, if it was ever used here."""
    return _all().get(form)


def _all() -> dict[Form, Verdict]:
    return {**_stored(path()), **_here} if _here else _stored(path())


@functools.cache
def _stored(file: Path) -> dict[Form, Verdict]:
    """The file's verdicts; one that cannot be read is reported, left as it is, and counts as none."""
    try:
        content: Any = json.loads(file.read_text())
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, expected {SCHEMA}")
        return {Form(**row["form"]): _verdict(row["verdict"]) for row in content["forms"]}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        if file not in _reported:
            _reported.add(file)
            warnings.warn(f"skipping {file}: {type(error).__name__}: {error}", ConfigWarning, stacklevel=2)
        return {}


def _verdict(raw: dict[str, Any]) -> Verdict:
    difference = math.inf if raw["difference"] is None else float(raw["difference"])
    return Verdict(difference, float(raw["tolerance"]), str(raw["date"]), float(raw["seconds"]), str(raw["failure"]))


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Holds the file, so that of several processes one checks and the others read what it found.

    Where the folder cannot be written, or another process holds it too long, nothing is held: a check too many.
    """
    lock = None
    with _mutex:
        try:
            path().parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path().with_suffix(".lock"))
            lock.acquire(timeout=_PATIENCE)
        except (OSError, Timeout):
            lock = None
        try:
            _stored.cache_clear()
            yield
        finally:
            if lock is not None:
                lock.release()


def remember(form: Form, verdict: Verdict) -> bool:
    """Keeps a verdict for this process and, where the folder can be written, for all later ones; whether it could.

    To be called while the file is held.
    """
    _here[form] = verdict
    file = path()
    stored = _stored(file)
    if file.exists() and not stored:
        # A broken file is its owner's to move away.
        return False
    rows = [
        {
            "form": asdict(f),
            "verdict": asdict(v) | {"difference": v.difference if math.isfinite(v.difference) else None},
        }
        for f, v in sorted({**stored, form: verdict}.items(), key=lambda item: str(item[0]))
    ]
    try:
        write_json(file, {"schema": SCHEMA, "forms": rows})
    except OSError:
        return False
    _stored.cache_clear()
    return True


def forget() -> None:
    """Drops what this process found or read, for callers that changed the file."""
    _here.clear()
    _stored.cache_clear()
