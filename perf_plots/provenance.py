"""Where a number comes from: device, driver, versions, commit, date."""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton

import triton_conv
from triton_conv.target import of_device

ROOT = Path(__file__).parent.parent


def provenance(device: torch.device) -> dict[str, Any]:
    """Everything that a time on this device depends on besides the case."""
    return _fixed(device) | {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


@functools.cache
def _fixed(device: torch.device) -> dict[str, Any]:
    target = of_device(device)
    commit, dirty = _commit()
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()}), Triton's interpreter",
        "arch": target.arch,
        "sms": target.sms,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "triton_conv": triton_conv.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "dirty": dirty,
        "source": source_hash("triton_conv"),
    }


def _driver() -> str | None:
    """All devices of a machine have one; the tool says it once for each."""
    lines = (output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").splitlines()
    return lines[0] if lines else None


def output(*command: str) -> str | None:
    """A command's output without white space around it; None if it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> tuple[str, bool | None]:
    """Commit, and whether the code or the tiles differ from it; COMMIT from the environment in a plain copy."""
    # A plain copy may lie inside another repository, whose commit would be a lie.
    commit = output("git", "rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    if not commit:
        return os.environ.get("COMMIT", "unknown"), None
    changes = output("git", "status", "--porcelain", "--", "triton_conv", "autotune_configs", "perf_plots/*.py")
    return commit, None if changes is None else bool(changes)


@functools.cache
def source_hash(*folders: str) -> str:
    """Hash of the Python files below these folders: identifies code that has no commit."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
