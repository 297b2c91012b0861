"""What `--model MODULE:FUNCTION` names, and calling it."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from typing import Any

from .errors import TritonConvError, WorkloadError

# Functions of a module that a message names.
_NAMED = 12


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


def call(path: str, function: Any, **named: Any) -> Any:
    """What the object of that path returns; the error says what it raised instead, and where."""
    try:
        return function(**named)
    except TritonConvError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise WorkloadError(
            f"model: {path}({', '.join(f'{name}={value!r}' for name, value in named.items())}) raised "
            f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
        ) from error


def _callables_of(module: Any) -> str:
    names = [name for name, value in vars(module).items() if inspect.isroutine(value) or inspect.isclass(value)]
    public = [name for name in names if not name.startswith("_")]
    return ", ".join(public[:_NAMED] + ["..."] * (len(public) > _NAMED)) or "no function"
