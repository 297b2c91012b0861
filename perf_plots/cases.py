"""Which workloads are timed, in which order, and how a reader is told what they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from triton_conv.workloads import (
    FLAGSHIPS,
    FORWARD,
    INPUT_GRADIENT,
    KINDS,
    LECTURES,
    STEP,
    WEIGHT_GRADIENT,
    Workload,
)

from . import layers

KIND_TITLES = {
    "grouped": "Grouped convolution",
    "depthwise": "Depthwise convolution",
    "dilated": "Dilated convolution",
    "transposed": "Transposed convolution",
    "deformable": "Deformable convolution",
    "separable": "Depthwise separable convolution",
    "shuffle": "Shuffle convolution",
    "local": "Locally connected layers",
}


_LABELS = {FORWARD: "", INPUT_GRADIENT: " dx", WEIGHT_GRADIENT: " dw", STEP: " step"}


def flagships() -> list[Workload]:
    """The first tier: every flagship in the dtype and memory format that its origin uses."""
    return list(FLAGSHIPS)


def gradients() -> list[Workload]:
    """Both gradients of every flagship that has them."""
    return [part for workload in FLAGSHIPS for part in workload.parts()[1:]]


def steps() -> list[Workload]:
    """Forward and backward of every flagship in one call."""
    return [replace(workload, part=STEP) for workload in FLAGSHIPS]


def lectures() -> list[Workload]:
    """Layers of the kinds that torch has no function for, and the gradients that have kernels of their own."""
    return [part for workload in LECTURES for part in workload.parts()]


def variants() -> list[Workload]:
    """The second tier: the flagships in the other common dtypes, and in the other memory format."""
    first = {workload.title for workload in FLAGSHIPS}
    found = []
    for workload in FLAGSHIPS:
        dtypes = tuple(dtype for dtype in ("float16", "float32") if dtype != workload.dtype)
        candidates = workload.variants(dtypes) + workload.variants(both_formats=True)
        found += [candidate for candidate in candidates if candidate.title not in first]
    return found


def sweeps() -> list[Workload]:
    """Every point of the scaling sweeps, a point of each in turn: what is cut short has the ends of every line."""
    lines = [_ends_first(list(sweep.workloads.values())) for sweep in layers.sweeps()]
    longest = max(map(len, lines))
    return [line[i] for i in range(longest) for line in lines if i < len(line)]


def _ends_first(points: list[Workload]) -> list[Workload]:
    """First and last, then what lies between."""
    return [points[0], points[-1], *points[1:-1]]


def networks() -> list[Workload]:
    """The layers of real networks."""
    return layers.networks()


def network_gradients() -> list[Workload]:
    """Both gradients of the layers of networks: with them `convert` can decide for a training step."""
    return [part for workload in layers.networks() for part in workload.parts()[1:]]


OF_STAGE: dict[str, Callable[[], list[Workload]]] = {
    "benchmark": flagships,
    "gradients": gradients,
    "steps": steps,
    "lectures": lectures,
    "sweeps": sweeps,
    "networks": networks,
    "network_gradients": network_gradients,
    "variants": variants,
    "compiled": lambda: [w for w in flagships() if not w.offset_groups],
}
"""The workloads of the stages that time some."""


def of_stage(stage: str, rehearse: bool = False) -> list[Workload]:
    """The workloads of a stage; in a rehearsal a few small ones."""
    if not rehearse:
        return OF_STAGE[stage]()
    first = rehearsal()[0]
    few = {
        "benchmark": rehearsal(),
        "gradients": first.parts()[1:],
        "steps": [replace(first, part=STEP)],
        "lectures": [LECTURES[-1].shrunk()],
        "sweeps": [sweeps()[0].shrunk()],
        "networks": [networks()[0].shrunk()],
        "network_gradients": [network_gradients()[0].shrunk()],
        "variants": first.variants(("float16",)),
        "compiled": [first],
    }
    return few.get(stage, [])


def rehearsal() -> list[Workload]:
    """The cheapest flagship of each kind, shrunk until the interpreter runs it in a moment: every kernel once."""
    return list(_smallest())


@functools.cache
def _smallest() -> tuple[Workload, ...]:
    shrunk = [workload.shrunk() for workload in FLAGSHIPS]
    return tuple(min((w for w in shrunk if w.kind == kind), key=lambda w: w.problem().geometry.flops) for kind in KINDS)


def label(workload: Workload) -> str:
    """The name of the layer, and which gradient."""
    return workload.name + _LABELS[workload.part]


def describe(workload: Workload) -> str:
    """The shapes in a few readable words, leaving out what has its default value."""
    g = workload.layer.problem().geometry

    def each(values: tuple[int, ...]) -> str:
        shown = values[3 - g.rank :]
        return "×".join(map(str, shown))

    parts = [f"N{g.batch}", f"C{g.c_in}" if g.c_in == g.c_out else f"C{g.c_in}→{g.c_out}"]
    parts.append(("L" if g.rank == 1 else "") + each(g.in_size))
    parts.append(f"k{each(g.kernel)}" if len(set(g.kernel[3 - g.rank :])) > 1 else f"k{g.kernel[-1]}")
    if g.stride[-1] > 1:
        parts.append(f"s{g.stride[-1]}")
    if g.dilation[-1] > 1:
        parts.append(f"d{g.dilation[-1]}")
    if 1 < g.groups < g.c_in:
        parts.append(f"g{g.groups}")
    if workload.offset_groups:
        parts.append("v2" if workload.mask else "v1")
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}[workload.dtype]
    letters = "DHW"[3 - g.rank :] if g.rank > 1 else "L"
    parts.append(f"{dtype} N{letters}C" if workload.channels_last else f"{dtype} NC{letters}")
    if workload.part != FORWARD:
        parts.append(workload.part)
    return " ".join(parts)
