"""What `--model MODULE:FUNCTION` names."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any

from .errors import WorkloadError


def load(path: str) -> Any:
    """The object that `MODULE:NAME` names; the working directory is searched too, as `python -m` would."""
    module_name, _, name = path.partition(":")
    if not (module_name and name):
        raise WorkloadError(f"model: expected MODULE:FUNCTION, such as triton_conv.examples:mobilenet, got {path!r}")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise WorkloadError(f"model: cannot import {module_name!r}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    found = getattr(module, name, None)
    if found is None:
        raise WorkloadError(f"model: {module_name} has no {name!r}; it has {_callables_of(module)}")
    return found


def _callables_of(module: Any) -> str:
    names = [name for name, value in vars(module).items() if inspect.isroutine(value) or inspect.isclass(value)]
    return ", ".join(name for name in names if not name.startswith("_")) or "no function"
