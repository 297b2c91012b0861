"""What one layer, or a whole network, costs: counts from shapes alone. Nothing here was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..amounts import finite
from ..errors import WorkloadError
from ..geometry import ConvGeometry
from ..target import KNOWN, Target
from .fields import Field


@dataclass(frozen=True)
class Layer:
    """One operation of a network.

    `parameters` counts those that no earlier layer has used; `macs` products, each with an addition: two FLOPs;
    `least_bytes` each operand read once and the result written once. `field` is the receptive field of the output's
    neurons, None where it cannot be told. `geometry` is there for convolutions.
    """

    name: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    least_bytes: int
    dtype: str
    field: Field | None = None
    geometry: ConvGeometry | None = None

    @property
    def intensity(self) -> float:
        """FLOPs for each byte that must cross device memory."""
        return 2 * self.macs / self.least_bytes if self.least_bytes else math.nan

    def floor_seconds(self, device: Target) -> float:
        """No kernel on the device can be faster: the slower of arithmetic and traffic, by the datasheet."""
        return device.floor_seconds(2 * self.macs, self.least_bytes, self.dtype)

    def asdict(self, device: Target) -> dict[str, Any]:
        """Everything as plain data."""
        field = self.field
        return {
            "name": self.name,
            "kind": self.kind,
            "input": list(self.input_shape),
            "output": list(self.output_shape),
            "parameters": self.parameters,
            "macs": self.macs,
            "least_bytes": self.least_bytes,
            "intensity": finite(self.intensity),
            "floor_us": finite(1e6 * self.floor_seconds(device)),
            "receptive_field": None
            if field is None
            else {"size": list(field.size), "jump": list(field.jump), "centre": list(field.centre)},
        }


@dataclass(frozen=True)
class Cost:
    """The layers of a call, a layer or a network in the order they ran, on a device named for the floors.

    `parameters` counts every parameter once, whether a layer of this run used it or not.
    """

    layers: tuple[Layer, ...]
    parameters: int
    device: Target

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def least_bytes(self) -> int:
        """Sum over the layers: each reads its operands anew, as it does unless layers are fused."""
        return sum(layer.least_bytes for layer in self.layers)

    @property
    def intensity(self) -> float:
        return 2 * self.macs / self.least_bytes if self.least_bytes else math.nan

    @property
    def floor_seconds(self) -> float:
        """Sum of the layers' floors."""
        return sum(layer.floor_seconds(self.device) for layer in self.layers)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of the last layer."""
        return self.layers[-1].output_shape

    @property
    def field(self) -> Field | None:
        """The last layer's receptive field."""
        return self.layers[-1].field

    def asdict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON."""
        return {
            "device": self.device.name,
            "parameters": self.parameters,
            "macs": self.macs,
            "least_bytes": self.least_bytes,
            "intensity": finite(self.intensity),
            "floor_us": finite(1e6 * self.floor_seconds),
            "layers": [layer.asdict(self.device) for layer in self.layers],
        }

    def __str__(self) -> str:
        head = (
            "layer",
            "kind",
            "output",
            "parameters",
            "MACs",
            "bytes",
            "FLOP/B",
            "floor us",
            "field",
            "jump",
            "centre",
        )
        rows = [head]
        for layer in self.layers:
            field = layer.field
            seen = ("-",) * 3 if field is None else tuple(_each(v) for v in (field.size, field.jump, field.centre))
            rows.append((
                layer.name or "-", layer.kind, _each(layer.output_shape), f"{layer.parameters:,}", f"{layer.macs:,}",
                f"{layer.least_bytes:,}", _figure(layer.intensity), _figure(1e6 * layer.floor_seconds(self.device)),
                seen[0], seen[1], seen[2],
            ))  # fmt: skip
        rows.append((
            "total", "", "", f"{self.parameters:,}", f"{self.macs:,}", f"{self.least_bytes:,}",
            _figure(self.intensity), _figure(1e6 * self.floor_seconds), "", "", "",
        ))  # fmt: skip
        floors = "floors computed from" if self.device.bandwidth else "no floors without"
        note = f"{floors} the datasheet of {self.device.name}; nothing was run"
        return f"{aligned(rows, left=3)}\n{note}"


def _figure(value: float) -> str:
    """A network without a layer that counts has no intensity, a device without a datasheet no floor."""
    return "-" if math.isnan(value) else f"{value:.3g}"


def summary(costs: Mapping[str, Cost]) -> str:
    """Networks beside each other: parameters, products, bytes and floors of each."""
    rows = [("network", "parameters", "MACs", "times the first's", "bytes", "FLOP/B", "floor us")]
    first = next(iter(costs.values()))
    for name, cost in costs.items():
        rows.append((
            name, f"{cost.parameters:,}", f"{cost.macs:,}", f"{cost.macs / first.macs:.3g}" if first.macs else "-",
            f"{cost.least_bytes:,}", _figure(cost.intensity), _figure(1e6 * cost.floor_seconds),
        ))  # fmt: skip
    return aligned(rows)


def _each(values: Sequence[float]) -> str:
    return "x".join(f"{value:g}" for value in values)


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of text in columns, the first `left` of them flush left and the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )


def find_device(name: str | Target) -> Target:
    """A device by its architecture or a part of its name: "sm_90", "H100", "MI300X"."""
    if isinstance(name, Target):
        return name
    for arch, known in KNOWN.items():
        if name.lower() == arch or name.lower() in known.name.lower():
            return known
    choices = ", ".join(f"{arch} ({known.name})" for arch, known in KNOWN.items())
    raise WorkloadError(f"device: {name!r} is not known; choose one of {choices}")


def kind_of(g: ConvGeometry) -> str:
    """What sort of convolution a geometry is, in a word."""
    if g.transposed:
        return "transposed"
    if g.groups > 1:
        return "depthwise" if g.c_in_group == 1 else "grouped"
    if g.dilation != (1, 1, 1):
        return "dilated"
    return "pointwise" if g.taps == 1 else "standard"
