"""Files of measured tiles: `<folder>/<vendor>-<arch>/<device>-<SMs>sm/<kernel>.json`.

A file has entries, one for each problem that was measured, and may have a portfolio for all the others.

A user's own folder is looked at before the one that ships with the package. A file that is broken, of another schema or
of another device is reported once, skipped, and left as it is; so is an entry whose tile the kernel would not take. A
file written for other kernel code is stale: reported, and not used.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import os
import textwrap
import threading
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import ConfigError, ConfigWarning, StaleConfigError
from .kernels import KERNELS, Kernel, Tile
from .portfolio import Portfolio
from .target import Target
from .writing import write_json

SCHEMA = 1

# Python 3.11 counts how deep the tree that it makes is for all threads together, and fails if they take turns.
_parsing = threading.Lock()


@dataclass(frozen=True)
class Entry:
    """A winner: its tile and the measurement that made it one. Times in microseconds."""

    tile: Tile
    time_us: float
    interval_us: tuple[float, float]
    default_time_us: float
    relative_error: float
    trials: int


@dataclass
class ConfigFile:
    """All winners of one kernel on one device, by the problem's description, and the portfolio made of them."""

    kernel: str
    target: Target
    environment: Mapping[str, str] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    portfolio: Portfolio | None = None

    def path(self, folder: Path) -> Path:
        return folder / self.target.config_folder / f"{self.kernel}.json"

    def write(self, folder: Path) -> Path:
        """Writes whole or not at all; returns where."""
        path = self.path(folder)
        content: dict[str, Any] = {
            "schema": SCHEMA,
            "kernel": self.kernel,
            "kernel_hash": kernel_hash(self.kernel),
            "device": _device(self.target),
            "environment": dict(self.environment),
            "entries": {
                key: asdict(entry) | {"tile": entry.tile.asdict()} for key, entry in sorted(self.entries.items())
            },
        }
        if self.portfolio is not None:
            content["portfolio"] = self.portfolio.asdict()
        write_json(path, content)
        return path


def _device(target: Target) -> dict[str, object]:
    return {name: getattr(target, name) for name in ("vendor", "arch", "name", "sms", "shared_bytes")}


@functools.cache
def kernel_hash(name: str) -> str:
    """Hash of the kernel's code and of the device functions that it reaches, blind to comments and docstrings; with the
    code of the launches before and after it, if it has any.
    """
    kernel = KERNELS[name]
    return code_hash(kernel.function, *(other.function for other in (kernel.ahead, kernel.join) if other))


def code_hash(*functions: Any) -> str:
    """The same of any jitted functions."""
    digest = hashlib.sha256()
    for code in sorted(ast.unparse(tree) for tree in _reached(*functions).values()):
        digest.update(code.encode())
    return digest.hexdigest()[:16]


def _reached(*functions: Any) -> dict[str, ast.AST]:
    """The syntax trees of jitted functions and of those they call, without docstrings, by qualified name."""
    found: dict[str, ast.AST] = {}
    waiting = [*functions]
    while waiting:
        plain = waiting.pop().fn
        key = f"{plain.__module__}.{plain.__qualname__}"
        if key in found:
            continue
        # Not ast.dump of it: that form differs between versions of Python.
        with _parsing:
            tree = ast.parse(textwrap.dedent(inspect.getsource(plain)))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                    body.pop(0)
        found[key] = tree
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        # Of Triton's own functions the version tells, which is stored beside the hash.
        reached = (plain.__globals__.get(name) for name in names)
        waiting += [
            f for f in reached if inspect.isfunction(getattr(f, "fn", None)) and f.fn.__module__.startswith(__package__)
        ]
    return found


def read(path: Path, kernel: Kernel, target: Target, sibling: bool = False) -> ConfigFile:
    """Reads and checks one file; raises `ConfigError` saying what is wrong with it.

    `sibling` takes a file of another device of the target's architecture.
    """
    try:
        content: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable JSON file ({error})") from error
    try:
        if content["schema"] != SCHEMA:
            raise ConfigError(f"{path}: schema {content['schema']!r}, expected {SCHEMA}")
        if content["kernel"] != kernel.name:
            raise ConfigError(f"{path}: of kernel {content['kernel']!r}, expected {kernel.name!r}")
        if sibling:
            own = content["device"]
            target = replace(target, name=own["name"], sms=own["sms"], shared_bytes=own["shared_bytes"])
        if content["device"] != _device(target):
            raise ConfigError(f"{path}: measured on {content['device']}, this is {_device(target)}")
        if content["kernel_hash"] != kernel_hash(kernel.name):
            raise StaleConfigError(f"{path}: stale, measured with other kernel code; tune again")
        result = ConfigFile(kernel.name, target, content["environment"])
        for key, raw in content["entries"].items():
            result.entries[key] = Entry(
                tile=kernel.tile_type(**raw["tile"]),
                time_us=float(raw["time_us"]),
                interval_us=(float(raw["interval_us"][0]), float(raw["interval_us"][1])),
                default_time_us=float(raw["default_time_us"]),
                relative_error=float(raw["relative_error"]),
                trials=int(raw["trials"]),
            )
        if "portfolio" in content:
            result.portfolio = Portfolio.read(content["portfolio"], kernel)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError) and str(path) in str(error):
            raise
        raise ConfigError(f"{path}: malformed ({type(error).__name__}: {error})") from error
    return result


def user_folder() -> Path:
    """Where `triton-conv tune` writes, and where a user's own results are looked for first."""
    home = os.environ.get("TRITON_CONV_HOME")
    return (Path(home) if home else Path.home() / ".triton_conv") / "autotune_configs"


def shipped_folder() -> Path:
    """The `autotune_configs` package, installed or beside the source."""
    import autotune_configs

    return Path(autotune_configs.__file__).parent


FOLDERS = (("user tuned", user_folder), ("shipped exact", shipped_folder))
SOURCES = tuple(source for source, _ in FOLDERS)
PORTFOLIOS = {"user tuned": "user portfolio", "shipped exact": "shipped portfolio"}
"""What a plan's source is called where the file of a source answers with its portfolio."""


@functools.cache
def files(kernel: str, target: Target) -> tuple[tuple[str, ConfigFile], ...]:
    """(source, file) of a kernel on a device, best source first; each file is read, and complained of, once."""
    found = []
    for source, folder in FOLDERS:
        path = ConfigFile(kernel, target).path(folder())
        if not path.is_file():
            continue
        try:
            found.append((source, read(path, KERNELS[kernel], target)))
        except ConfigError as error:
            warnings.warn(f"skipping a tile configuration file: {error}", ConfigWarning, stacklevel=2)
    return tuple(found)


@functools.cache
def siblings(kernel: str, target: Target) -> tuple[ConfigFile, ...]:
    """Files of other devices of the same architecture, those of as many multiprocessors first.

    They are hints: one that cannot be used is its own device's affair, and passed over in silence.
    """
    found = []
    for _, folder in FOLDERS:
        own = ConfigFile(kernel, target).path(folder())
        for path in sorted(own.parent.parent.glob(f"*/{own.name}")):
            if path == own:
                continue
            try:
                found.append(read(path, KERNELS[kernel], target, sibling=True))
            except ConfigError:
                continue
    return tuple(sorted(found, key=lambda file: abs(file.target.sms - target.sms)))


def portfolio_tiles(kernel: str, target: Target) -> list[Tile]:
    """The tiles of all portfolios that could answer for a kernel on a device."""
    every = [file for _, file in files(kernel, target)] + list(siblings(kernel, target))
    return list(dict.fromkeys(tile for file in every if file.portfolio for tile in file.portfolio.tiles.values()))


def forget() -> None:
    """Drops what was read, for callers that changed the files."""
    files.cache_clear()
    siblings.cache_clear()
