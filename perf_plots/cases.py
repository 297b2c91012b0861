"""Which workloads are timed, in which order, and how a reader is told what they are."""

from __future__ import annotations

from triton_conv.workloads import FLAGSHIPS, FORWARD, INPUT_GRADIENT, KINDS, LECTURES, WEIGHT_GRADIENT, Workload

from .layers import networks, sweeps

KIND_TITLES = {
    "grouped": "Grouped convolution",
    "depthwise": "Depthwise convolution",
    "dilated": "Dilated convolution",
    "transposed": "Transposed convolution",
    "deformable": "Deformable convolution",
}


def flagships() -> list[Workload]:
    """The first tier: every flagship in the dtype and memory format that its origin uses."""
    return list(FLAGSHIPS)


def gradients() -> list[Workload]:
    """Both gradients of every flagship that has them."""
    return [part for workload in FLAGSHIPS for part in workload.parts()[1:]]


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


def second_tier() -> list[Workload]:
    """What is timed with the time that is left: scaling sweeps, variants, the layers of real networks."""
    swept = [workload for sweep in sweeps() for workload in sweep.workloads.values()]
    return swept + variants() + networks()


def rehearsal() -> list[Workload]:
    """The cheapest flagship of each kind, shrunk until the interpreter runs it in a moment: every kernel once."""
    found = []
    for kind in KINDS:
        small = [workload.shrunk() for workload in FLAGSHIPS if workload.kind == kind]
        found.append(min(small, key=lambda workload: workload.problem().geometry.flops))
    return found


def label(workload: Workload) -> str:
    """The name of the layer, and which gradient."""
    return workload.name + {FORWARD: "", INPUT_GRADIENT: " dx", WEIGHT_GRADIENT: " dw"}[workload.part]


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
