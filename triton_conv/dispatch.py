"""`plan`: which kernel runs a problem, with which tile, and why. Nothing is launched here."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from . import configs
from .defaults import default_tile
from .errors import PlanError
from .kernels import KERNELS, Kernel, Tile, launch
from .problem import (
    DeformInputGradientProblem,
    DeformProblem,
    DeformWeightGradientProblem,
    Problem,
    WeightGradientProblem,
)
from .target import Target

# Problems with other operands than a plain convolution have kernels of their own.
_APART: dict[type[Problem], tuple[str, tuple[str, ...]]] = {
    DeformProblem: ("it has offsets", ("deformable",)),
    WeightGradientProblem: ("it is a weight gradient", ("weight_gradient", "depthwise_weight_gradient")),
    DeformWeightGradientProblem: ("it has offsets", ("deformable_weight_gradient",)),
    DeformInputGradientProblem: ("it is the gradient of what is sampled", ("deformable_input_gradient",)),
}


@dataclass(frozen=True, eq=False)
class Plan:
    """What a call will launch: immutable, printable, made once for a problem and a target.

    `source` says where the tile came from: "forced", "user tuned", "shipped exact", "analytic default" or "safe".
    `reason` says why this kernel, `notes` what was passed over on the way to this tile.
    """

    problem: Problem
    target: Target
    kernel: Kernel
    tile: Tile
    source: str
    reason: str
    notes: tuple[str, ...]
    grid: int
    values: dict[str, Any]
    out_shape: tuple[int, ...]
    out_strides: tuple[int, ...]

    def launch(self, *tensors: torch.Tensor | None) -> None:
        """Runs the kernel on tensors in the order of `kernel.pointers`; allocates nothing."""
        launch(self.kernel, self.grid, self.tile, self.values, *tensors)

    def __str__(self) -> str:
        g = self.problem.geometry
        lines = [
            f"{self.kernel.name} on {self.target.name} ({self.target.arch})",
            f"  problem  {self.problem.describe()}",
            f"  why      {self.reason}",
            f"  tile     {self.tile}",
            f"  source   {self.source}",
            *(f"  note     {note}" for note in self.notes),
            f"  grid     {self.grid} programs",
            f"  GEMM     M={g.M} N={g.N} K={g.K} groups={g.groups}",
            f"  work     {g.flops / 1e9:.4g} GFLOP, at least {self.problem.least_bytes / 1e6:.4g} MB",
        ]
        return "\n".join(lines)


def choose_kernel(problem: Problem) -> tuple[Kernel, str]:
    """The kernel for a problem, and the reason."""
    g = problem.geometry
    if isinstance(problem, DeformWeightGradientProblem):
        return KERNELS["deformable_weight_gradient"], "it is a sum over pixels of samples at offsets"
    if isinstance(problem, DeformInputGradientProblem):
        return KERNELS["deformable_input_gradient"], "it scatters to where samples came from"
    # One input channel and many outputs is a product over the taps, worth a tensor core.
    direct = not g.transposed and g.c_in_group == 1 and (g.groups > 1 or g.c_out < 8)
    if isinstance(problem, WeightGradientProblem):
        name = "depthwise_weight_gradient" if direct else "weight_gradient"
        return KERNELS[name], "it is a sum over pixels"
    if isinstance(problem, DeformProblem):
        return KERNELS["deformable"], "it samples the input at offsets"
    if g.transposed:
        return KERNELS["transposed_phase"], f"it is transposed: {g.phases} output phases, no inserted zeros"
    if direct:
        return KERNELS["depthwise"], f"one input channel a group, multiplier {g.c_out_group}"
    widest = max(g.c_in_group, g.c_out_group)
    if g.groups > 1 and g.c_in_group > 0 and widest <= 32:
        return KERNELS["grouped_packed"], f"groups of at most {widest} channels: several fill one tile"
    return KERNELS["implicit_gemm"], "a product over channels and taps"


@functools.lru_cache(maxsize=4096)
def plan(problem: Problem, target: Target, kernel: str | None = None, tile: Tile | None = None) -> Plan:
    """The plan for a problem on a target; `kernel` and `tile` force a choice.

    Raises `PlanError` if a forced kernel or tile cannot run the problem, naming the reason.
    """
    if kernel is None:
        chosen, reason = choose_kernel(problem)
    else:
        if kernel not in KERNELS:
            raise PlanError(f"kernel: {kernel!r} is not known; choose one of {', '.join(KERNELS)}")
        chosen, reason = KERNELS[kernel], "forced"
        unsuited = chosen.unsuited(problem)
        reason_apart, family = _APART.get(type(problem), ("", (kernel,)))
        if unsuited is None and kernel not in family:
            unsuited = reason_apart
        if unsuited:
            raise PlanError(f"kernel: {kernel} cannot run {problem.describe()}: {unsuited}")
    picked, source, notes = _choose_tile(chosen, problem, target, tile)
    return Plan(
        problem=problem,
        target=target,
        kernel=chosen,
        tile=picked,
        source=source,
        reason=reason,
        notes=tuple(notes),
        grid=chosen.grid(problem, picked),
        values=chosen.values(problem, picked),
        out_shape=problem.result_shape,
        out_strides=problem.result_strides,
    )


def _choose_tile(kernel: Kernel, problem: Problem, target: Target, forced: Tile | None) -> tuple[Tile, str, list[str]]:
    if forced is not None:
        if not isinstance(forced, kernel.tile_type):
            raise PlanError(f"tile: {kernel.name} takes {kernel.tile_type.__name__}, got {type(forced).__name__}")
        if reason := forced.unfit(problem, target):
            raise PlanError(f"tile: {forced} cannot run {problem.describe()} on {target.arch}: {reason}")
        return forced, "forced", []
    candidates: list[tuple[Tile, str]] = []
    key = problem.describe()
    for source, entries in configs.entries(kernel.name, target):
        if key in entries:
            candidates.append((entries[key].tile, source))
    candidates.append((default_tile(kernel.name, problem, target), "analytic default"))
    candidates.append((kernel.safe_tile, "safe"))
    notes: list[str] = []
    for tile, source in candidates:
        reason = tile.unfit(problem, target)
        if reason is None:
            return tile, source, notes
        notes.append(f"passed over {source} ({tile}): {reason}")
    raise PlanError(f"no tile of {kernel.name} fits {key} on {target.arch}: {'; '.join(notes)}")
