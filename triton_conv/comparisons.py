"""What was measured of our kernels against torch's own: `<folder>/<vendor>-<arch>/<device>-<SMs>sm/comparisons.json`.

One file a device, beside its tiles, written by `python -m perf_plots.comparisons` from benchmark results. It is what
the modules, `convert` and `accelerate` decide by. As with tiles, a user's own folder is looked at first, and a file
that is broken, of another schema or of another device is reported once and skipped. Times are in microseconds.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import configs
from .errors import ConfigError, ConfigWarning
from .geometry import ConvGeometry
from .kernels import KERNELS
from .problem import Problem
from .problem_deform import DeformProblem
from .target import Target

SCHEMA = 1
FILE = "comparisons.json"
PARTS = ("forward", "input gradient", "weight gradient")
# How far a layer may be from a measured one that is to speak for it, as factors, and how clear that one's gain must be.
_CHANNELS, _PIXELS, _MARGIN = 2.0, 4.0, 1.1


class Signature(NamedTuple):
    """What a time depends on, besides the device; bias and activation cost next to nothing and are left out."""

    geometry: ConvGeometry
    dtype: str
    layout: str
    offset_groups: int = 0
    mask: bool = False

    @classmethod
    def of(cls, problem: Problem) -> Signature:
        own = problem.geometry, problem.dtype_name, problem.layout
        return cls(*own, problem.offset_groups, problem.has_mask) if isinstance(problem, DeformProblem) else cls(*own)

    def describe(self) -> str:
        sampled = f" og{self.offset_groups}{'+mask' if self.mask else ''}" if self.offset_groups else ""
        return f"{self.geometry.describe()} {self.dtype} {self.layout}{sampled}"


@dataclass(frozen=True)
class Times:
    """Ours and torch's for one part of a training step; torch's is None where it has no such operation.

    `run` is the index of the measurement's provenance in the file.
    """

    ours_us: float
    torch_us: float | None
    kernel: str
    kernel_hash: str
    run: int

    @property
    def stale(self) -> bool:
        """Whether our kernel's code is another one by now."""
        return self.kernel not in KERNELS or configs.kernel_hash(self.kernel) != self.kernel_hash


@dataclass(frozen=True)
class Comparison:
    """The times of one layer, by part."""

    signature: Signature
    parts: Mapping[str, Times]

    def total(self, training: bool) -> tuple[float, float | None] | str:
        """(ours, torch's) microseconds of the forward pass or of a whole training step; or why they are not known."""
        wanted = PARTS if training else PARTS[:1]
        if missing := [part for part in wanted if part not in self.parts]:
            return f"no measurement of its {' and '.join(missing)}"
        times = [self.parts[part] for part in wanted]
        if any(time.stale for time in times):
            return "measured with other kernel code; measure again"
        others = [time.torch_us for time in times if time.torch_us is not None]
        return sum(time.ours_us for time in times), sum(others) if len(others) == len(times) else None


def alike(a: Signature, b: Signature) -> bool:
    """Whether a layer is so much like a measured one that the same of the two libraries is faster, most probably.

    The same kernel, stride, dilation, dtype, layout and kind; groups of the same width, or as many channels up to a
    factor of two; as many pixels up to a factor of four.
    """
    g, h = a.geometry, b.geometry
    same = (
        (s.dtype, s.layout, s.offset_groups, s.mask, s.geometry.rank, s.geometry.transposed, s.geometry.kernel)
        + (s.geometry.stride, s.geometry.dilation, s.geometry.padding_mode, s.geometry.groups == 1)
        for s in (a, b)
    )
    if next(same) != next(same):
        return False
    if g.groups > 1 and (g.c_in_group, g.c_out_group) != (h.c_in_group, h.c_out_group):
        return False
    return (
        _near(g.c_in, h.c_in, _CHANNELS)
        and _near(g.c_out, h.c_out, _CHANNELS)
        and _near(g.in_pixels, h.in_pixels, _PIXELS)
        and _near(g.M, h.M, _PIXELS)
    )


def _near(a: int, b: int, factor: float) -> bool:
    return a <= b * factor and b <= a * factor


class Judgement(NamedTuple):
    """Whether ours is faster, why, and how many times as fast it is expected to be (None: torch has none of it)."""

    faster: bool
    reason: str
    gain: float | None = None


def judge(problem: Problem, target: Target, training: bool) -> Judgement:
    """What the measurements stored for a device say of a problem: of this very layer, else of the layers like it."""
    signature, stored = Signature.of(problem), entries(target)
    if not stored:
        return Judgement(False, f"no measurement for this device ({target.name})")
    step = "training step" if training else "forward pass"
    exact = stored.get(signature)
    found = [exact] if exact else [c for c in stored.values() if alike(signature, c.signature)]
    why = "no measurement of such a layer on this device"
    worst: Judgement | None = None
    for comparison in found:
        total = comparison.total(training)
        if isinstance(total, str):
            why = total
            continue
        ours, others = total
        gain = math.inf if others is None else others / ours
        where = "measured" if exact else f"like {comparison.signature.geometry.describe()}"
        times = f"{ours:.3g} us" + (", torch has none" if others is None else f" against torch's {others:.3g} us")
        judged = Judgement(gain > (1.0 if exact else _MARGIN), f"{where}: {step} {times}", gain)
        if worst is None or gain < (worst.gain or 0.0):
            worst = judged
    if worst is None:
        return Judgement(False, why)
    return worst._replace(gain=None) if worst.gain == math.inf else worst


# ------------------------------------------------------------------------------------------------------------- files


def path(folder: Path, target: Target) -> Path:
    """The file of a device in a folder of configurations."""
    return folder / target.config_folder / FILE


def _device(target: Target) -> dict[str, Any]:
    return {name: getattr(target, name) for name in ("vendor", "arch", "name", "sms")}


def to_json(target: Target, found: Mapping[Signature, Comparison], runs: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of a device's file; `runs` are the provenances that the times refer to."""
    layers = [
        {
            "layer": signature.describe(),
            "signature": {**signature._asdict(), "geometry": asdict(signature.geometry)},
            "parts": {part: asdict(times) for part, times in comparison.parts.items()},
        }
        for signature, comparison in sorted(found.items(), key=lambda item: item[0].describe())
    ]
    return {"schema": SCHEMA, "device": _device(target), "runs": runs, "layers": layers}


def read(file: Path, target: Target) -> dict[Signature, Comparison]:
    """Reads and checks one file; raises `ConfigError` saying what is wrong with it."""
    try:
        content: Any = json.loads(file.read_text())
        if content["schema"] != SCHEMA:
            raise ConfigError(f"{file}: schema {content['schema']!r}, expected {SCHEMA}")
        if content["device"] != _device(target):
            raise ConfigError(f"{file}: measured on {content['device']}, this is {_device(target)}")
        return {found.signature: found for found in _layers(content)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file}: malformed ({type(error).__name__}: {error})") from error


def _layers(content: Any) -> Iterator[Comparison]:
    for row in content["layers"]:
        geometry = ConvGeometry(**{name: _tuples(value) for name, value in row["signature"]["geometry"].items()})
        parts = {part: Times(**times) for part, times in row["parts"].items()}
        if any(not time > 0 for times in parts.values() for time in (times.ours_us, times.torch_us or 1.0)):
            raise ConfigError(f"{row['layer']}: a time is not positive")
        yield Comparison(Signature(**{**row["signature"], "geometry": geometry}), parts)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


@functools.cache
def entries(target: Target) -> Mapping[Signature, Comparison]:
    """Every comparison stored for a device, a user's own before a shipped one; each file is read once."""
    found: dict[Signature, Comparison] = {}
    for _, folder in configs.FOLDERS:
        file = path(folder(), target)
        if not file.is_file():
            continue
        try:
            found = read(file, target) | found
        except ConfigError as error:
            warnings.warn(f"skipping a file of comparisons: {error}", ConfigWarning, stacklevel=2)
    return found
