"""Writing measured tiles: one writer at a time, each file old or new and never half of one."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from filelock import FileLock, Timeout

from ..configs import ConfigFile, Entry, read
from ..errors import StaleConfigError, StoreError
from ..kernels import KERNELS
from ..problem import Problem
from ..target import Target

_LOCK, _TUNING_LOCK = "store.lock", "tuning.lock"
# Seconds to wait for another process that is writing one file: reading and writing it takes milliseconds.
_PATIENCE = 10.0


def environment() -> dict[str, str]:
    """The versions a measurement depends on, and its date."""
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "python": platform.python_version(),
    }


def store_entry(folder: Path, kernel: str, target: Target, problem: Problem, entry: Entry) -> Path:
    """Adds a winner to its kernel's file, or replaces the one of the same problem.

    A broken or foreign file is its owner's to move away: `ConfigError`.
    """
    path = ConfigFile(kernel, target).path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / _LOCK):
        file = ConfigFile(kernel, target)
        if path.is_file():
            # Winners of older kernel code are of no more use.
            with contextlib.suppress(StaleConfigError):
                file = read(path, KERNELS[kernel], target)
        file.environment = environment()
        file.entries[problem.describe()] = entry
        return file.write(folder)


def merge_file(folder: Path, new: ConfigFile) -> int:
    """Puts a file's winners into a store, where they are faster or the first of their problem; how many were.

    A file of older kernel code there is replaced; a broken one raises `ConfigError`.
    """
    path = new.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / _LOCK):
        file = ConfigFile(new.kernel, new.target, dict(new.environment))
        if path.is_file():
            with contextlib.suppress(StaleConfigError):
                file = read(path, KERNELS[new.kernel], new.target)
        known = file.entries
        taken = {k: e for k, e in new.entries.items() if k not in known or e.time_us < known[k].time_us}
        file.entries |= taken
        file.portfolio = new.portfolio or file.portfolio
        file.write(folder)
    return len(taken)


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all: a full disk leaves the one of before."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with naming(path):
            temporary.write_text(text)
            temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has an error of the disk name the file, which one of writing does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise StoreError(f"{path}: locked by another process for {_PATIENCE:g} s") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def tuning(folder: Path, target: Target) -> Iterator[Path]:
    """Holds a device's part of a store for one tuner, and yields its folder.

    Raises `StoreError` if another tuner holds it, or it cannot be written: before anything is measured.
    """
    device = folder / target.config_folder
    try:
        device.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"store: cannot create {device} ({error.strerror})") from error
    if not os.access(device, os.W_OK):
        raise StoreError(f"store: {device} cannot be written")
    lock = FileLock(device / _TUNING_LOCK, timeout=0)
    try:
        with lock:
            yield device
    except Timeout:
        raise StoreError(f"store: another tuner is writing {device}; wait for it, or name another --store") from None
    except PermissionError as error:
        raise StoreError(f"store: {device} cannot be written ({error.strerror})") from error
