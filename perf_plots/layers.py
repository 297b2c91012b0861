"""The layers of real networks and the scaling sweeps of `layers.json`, as workloads."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_conv.workloads import Workload

LAYERS = Path(__file__).parent / "layers.json"
_WORD = re.compile(r"(?P<name>[a-z]+?)(?P<value>\d+(?:,\d+)?)?")


class LayerError(ValueError):
    """A layer of `layers.json` is not written in the words that it explains."""


@dataclass(frozen=True)
class Sweep:
    """One layer at growing values of one number."""

    name: str
    title: str
    kind: str
    workloads: dict[int, Workload]


@functools.cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(LAYERS.read_text())
    return content


def networks() -> list[Workload]:
    """Every layer of every network, in the format that it is trained in."""
    return [
        parse(layer, name=network, batch=entry["batch"], channels_last=entry["format"] == "nhwc")
        for network, entry in _content()["networks"].items()
        for layer in entry["layers"]
    ]


@functools.cache
def sweeps() -> tuple[Sweep, ...]:
    """Every sweep."""
    found = []
    for name, entry in _content()["sweeps"].items():
        points = {
            value: parse(
                entry["layer"].format(value), name=f"sweep_{name}", batch=entry.get("batch", 1),
                channels_last=entry["format"] == "nhwc", kind=entry["kind"], suffix=str(value),
            )
            for value in entry["values"]
        }  # fmt: skip
        found.append(Sweep(name, entry["title"], entry["kind"], points))
    return tuple(found)


def parse(
    layer: str, *, name: str, batch: int, channels_last: bool = False, kind: str = "", suffix: str = ""
) -> Workload:
    """A workload from the words of `layers.json`: "144 56x56 k5 s2 dw"; raises `LayerError`.

    Its name is `name` with `suffix`, or with what tells the layer from its network's others.
    """
    try:
        first, second, *rest = layer.split()
        c_in, c_out = (int(c) for c in (first.split("-") * 2)[:2])
        size = tuple(int(s) for s in second.split("x"))
        words = dict(_word(word) for word in rest)
        kernel = int(words.pop("k"))
        stride, dilation = int(words.pop("s", 1)), int(words.pop("d", 1))
        transposed, deformable = "t" in words, "v" in words
        groups = c_in if "dw" in words else int(words.pop("g", 1))
        padding = _padding(words.pop("p", str(dilation * (kernel - 1) // 2)))
        batch, output_padding = int(words.pop("n", batch)), int(words.pop("op", 0))
        offset_groups, mask = int(words.pop("o", 1)) if deformable else 0, words.get("v") == "2"
        spread = float(words.pop("u", 2))
        if unknown := set(words) - {"dw", "t", "v", "x"}:
            raise ValueError(f"unknown words {', '.join(sorted(unknown))}")
    except (ValueError, KeyError) as error:
        raise LayerError(f"layers.json: {name}: {layer!r}: {type(error).__name__}: {error}") from error
    arguments: dict[str, Any] = {"padding": padding}
    arguments |= {"stride": stride} if stride > 1 else {}
    arguments |= {"dilation": dilation} if dilation > 1 else {}
    arguments |= {"output_padding": output_padding} if output_padding else {}
    # Deformable convolution takes its groups from the shapes.
    arguments |= {"groups": groups} if groups > 1 and not deformable else {}
    channels = (c_in, c_out // groups) if transposed else (c_out, c_in // groups)
    function = "deform_conv2d" if deformable else f"conv{'_transpose' if transposed else ''}{len(size)}d"
    if not suffix:
        factors = "".join(f"{letter}{value}" for letter, value in (("s", stride), ("d", dilation)) if value > 1)
        suffix = f"{first}x{size[-1]}k{kernel}{factors}"
    return Workload(
        f"{name}_{suffix}", kind or _kind(words, groups, c_in, dilation), function, (batch, c_in, *size),
        (*channels, *(kernel,) * len(size)), arguments, channels_last=channels_last, offset_groups=offset_groups,
        mask=mask, origin=name, spread=spread,
    )  # fmt: skip


def _word(word: str) -> tuple[str, str]:
    matched = _WORD.fullmatch(word)
    if matched is None:
        raise ValueError(f"unknown word {word!r}")
    return matched["name"], matched["value"] or ""


def _padding(text: str) -> Any:
    """The same on both sides, or "before,after" of a one-dimensional layer."""
    return (tuple(map(int, text.split(","))),) if "," in text else int(text)


def _kind(words: dict[str, str], groups: int, channels: int, dilation: int) -> str:
    if "t" in words:
        return "transposed"
    if "v" in words:
        return "deformable"
    if groups == channels:
        return "depthwise"
    return "dilated" if dilation > 1 else "grouped"
