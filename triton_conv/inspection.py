"""What `triton-conv inspect` compiles, and what it demands of the result: no device is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from . import configs, dispatch, workloads
from .aot import Compiled, Job
from .defaults import default_tile
from .kernels import KERNELS
from .problem import Problem
from .problem_deform import DeformInputGradientProblem
from .problem_lectures import LocalProblem
from .target import KNOWN, Target
from .workloads import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Workload

DTYPES = ("float16", "bfloat16", "float32", "float64")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""One of each kind of matrix unit: what is compiled unless others are asked for."""

# One layer of each kernel and, below, what the flagships do not have: a stem, a folded border, channels that no vector
# load fits, narrow groups transposed, rank 3.
_PROBES: tuple[Workload, ...] = (
    Workload("stem", "dense", "conv2d", (8, 3, 224, 224), (64, 3, 7, 7), {"stride": 2, "padding": 3}),
    Workload(
        "reflect", "dense", "conv2d", (8, 64, 56, 56), (64, 64, 3, 3),
        {"padding": 1, "padding_mode": "reflect", "activation": "gelu"},
    ),
    Workload("odd_channels", "dense", "conv2d", (8, 61, 56, 56), (67, 61, 3, 3), {"padding": 1, "activation": "silu"}),
    Workload("video", "dense", "conv3d", (8, 64, 16, 56, 56), (64, 64, 3, 3, 3), {"padding": 1}),
    Workload("pointwise", "dense", "conv2d", (8, 256, 56, 56), (64, 256, 1, 1), {"activation": "relu"}),
    Workload(
        "transposed_narrow", "transposed", "conv_transpose2d", (16, 64, 16, 16), (64, 1, 4, 4),
        {"stride": 2, "padding": 1, "groups": 64},
    ),
)  # fmt: skip

_SUFFIXES = {FORWARD: "", INPUT_GRADIENT: " dx", WEIGHT_GRADIENT: " dw"}

_BRIEF = (
    "narrow_groups_4", "wide_groups_56", "mobile_dw5", "mobile_dw5s2", "convnext_dw7", "dilated_d36", "decoder_t2d",
    "dcgan_t2d", "dcnv2", "separable_56", "shuffle_g3", "local2d", "deepface_local",
)  # fmt: skip


def jobs(
    everything: bool = False,
    kernels: Sequence[str] = tuple(KERNELS),
    targets: Sequence[str] = TARGETS,
    dtypes: Sequence[str] = DTYPES,
) -> list[Job]:
    """Compilations: one flagship of each kernel as it is, or `everything`: all of them and the probes, in both formats.

    Each at the tile that a plan would use and, where that one was measured, at the analytic default too.
    """
    subjects = [w for w in workloads.FLAGSHIPS + workloads.LECTURES if everything or w.name in _BRIEF]
    subjects += _PROBES if everything else ()
    return [
        job
        for workload in subjects
        for variant in workload.variants(tuple(dtypes) if everything else ("bfloat16",), both_formats=everything)
        for part in variant.parts()
        for problem in _problems(part)
        for target in targets
        for job in _jobs(part, problem, KNOWN[target])
        if job.kernel in kernels
    ]


def _problems(workload: Workload) -> list[Problem]:
    """The workload's problem, and the one that it is in a deterministic run."""
    problem = workload.problem()
    if isinstance(problem, DeformInputGradientProblem):
        return [problem, replace(problem, fixed_point=True)]
    return [problem]


def _jobs(workload: Workload, problem: Problem, target: Target) -> list[Job]:
    """The tile that a plan would use, and the default of every form that could."""
    made = dispatch.plan(problem, target)
    tiles = {(made.kernel.name, made.tile): "" if made.source == "analytic default" else f" ({made.source})"}
    measured = {(made.kernel.name, made.tile)} if made.source in configs.SOURCES else set()
    for kernel in dispatch.forms(problem, target)[0]:
        tile = default_tile(kernel.name, problem, target)
        if tile.unfit(problem, target) is None:
            tiles.setdefault((kernel.name, tile), " (default)")
    label = f"{workload.name} {'NHWC' if workload.channels_last else 'NCHW'}{_SUFFIXES[workload.part]}"
    label += " fixed" if getattr(problem, "fixed_point", False) else ""
    return [
        Job(name, problem, tile, target, label + note, (name, tile) in measured) for (name, tile), note in tiles.items()
    ]


def complaints(job: Job, row: Compiled) -> list[str]:
    """What is wrong with a compiled kernel: each of these costs more than any tile could win back."""
    found = []
    if row.error:
        return [row.error]
    # A measured tile has shown what its spills, or smaller products, cost.
    if row.spill_bytes and not job.measured:
        found.append(f"spills {row.spill_bytes} bytes")
    if "C7515" in row.warnings:
        found.append("C7515: every wgmma waits for the one before")
    half = row.dtype in ("float16", "bfloat16")
    # Filters of other pixels cannot fill up wgmma's 64 rows: of 16 channels three quarters would be masked off.
    by_columns = job.kernel.startswith("locally_connected_input_gradient_")
    few = by_columns or (isinstance(job.problem, LocalProblem) and job.problem.geometry.c_out_group < 64)
    # Products of one warp each: wgmma's operands would pass through shared memory.
    few |= job.kernel in ("grouped_slab", "grouped_slab_weight_gradient")
    # Of pixels that are loaded one by one a tile has fewer where otherwise multiprocessors had none.
    gathered = job.kernel in ("implicit_gemm", "transposed_phase") and job.problem.pixels_last
    few |= gathered and job.tile.asdict()["BLOCK_M"] < 64
    if row.uses_dot and half and job.target.family in ("sm_90", "sm_100") and not (row.wgmma or few or job.measured):
        found.append("no wgmma")
    g = job.problem.geometry
    weight_gradient = job.kernel == "weight_gradient"
    # A weight gradient is of one group; every other kernel reads narrow groups side by side.
    channels = g.c_in_group if weight_gradient else g.c_in
    aligned = not job.problem.pixels_last and job.problem.x_vector(channels) * job.problem.itemsize >= 16
    # Its operands have channels contiguous and pixels along K; Hopper's tf32 products take K contiguous alone, so the
    # compiler turns them around while it copies them, four bytes at a time.
    turned = weight_gradient and row.dtype == "float32"
    aligned = aligned and job.tile.load_bytes(job.problem, job.target) >= 16
    if aligned and not turned and job.target.vendor == "nvidia" and not row.vector_loads:
        found.append("no 16-byte load of aligned channels")
    if job.kernel == "depthwise_banded" and job.problem.x_run() * job.problem.itemsize >= 16 and not row.vector_loads:
        found.append("no 16-byte load of aligned pixels")
    if row.shared_bytes > job.tile.shared_bytes(job.problem, job.target):
        found.append(f"takes {row.shared_bytes} bytes of shared memory, more than counted")
    return found
