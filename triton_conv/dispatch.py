"""`plan`: which kernel runs a problem, with which tile, and why. Nothing is launched here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from . import configs, verdicts
from .defaults import default_tile
from .errors import PlanError
from .kernels import KERNELS, Arguments, Kernel, Tile, launch
from .kernels.pack_weight import pack_weight
from .layout import of_rank
from .problem import Problem, WeightGradientProblem
from .problem_deform import DeformInputGradientProblem, DeformProblem, DeformWeightGradientProblem
from .problem_lectures import (
    LocalInputGradientProblem,
    LocalProblem,
    LocalWeightGradientProblem,
    SeparableProblem,
    ShuffleProblem,
)
from .target import Target
from .verdicts import Form

# Forms, the preferred one first.
_BOXED: tuple[str, ...] = ("implicit_gemm_boxed", "implicit_gemm_persistent", "implicit_gemm_rolling")
_DEPTHWISE = (
    "depthwise_banded", "depthwise_toeplitz", "depthwise_patch", "depthwise_rolling", "depthwise_rolling_patch",
    "depthwise",
)  # fmt: skip
_DEPTHWISE_WEIGHT_GRADIENTS = (
    "depthwise_banded_weight_gradient",
    "depthwise_fused_weight_gradient",
    "depthwise_toeplitz_weight_gradient",
    "depthwise_patch_weight_gradient",
    "depthwise_rolling_weight_gradient",
    "depthwise_rolling_patch_weight_gradient",
    "depthwise_weight_gradient",
)
_WEIGHT_GRADIENTS = (
    "weight_gradient_boxed", "weight_gradient_clipped", "weight_gradient_taps", "weight_gradient_windows",
    "weight_gradient_columns", "weight_gradient_rows", "weight_gradient",
)  # fmt: skip
# Problems with other operands than a plain convolution have kernels of their own: why, and which.
_APART: dict[type[Problem], tuple[str, tuple[str, ...]]] = {
    WeightGradientProblem: (
        "it is a weight gradient",
        (
            *_WEIGHT_GRADIENTS,
            "grouped_slab_weight_gradient",
            "grouped_packed_weight_gradient",
            *_DEPTHWISE_WEIGHT_GRADIENTS,
        ),
    ),
    DeformProblem: ("it samples the input at offsets", ("deformable",)),
    DeformWeightGradientProblem: ("it is a sum over pixels of samples at offsets", ("deformable_weight_gradient",)),
    DeformInputGradientProblem: ("it scatters to where samples came from", ("deformable_input_gradient",)),
    ShuffleProblem: ("its channels leave shuffled", ("shuffle_gemm",)),
    SeparableProblem: ("a 1x1 convolution follows it", ("separable_whole", "separable")),
    LocalProblem: ("every pixel has its own filter", ("locally_connected",)),
    LocalInputGradientProblem: (
        "every pixel has its own filter",
        (
            "locally_connected_input_gradient_shifted",
            "locally_connected_input_gradient_rolling",
            "locally_connected_input_gradient",
        ),
    ),
    LocalWeightGradientProblem: ("every pixel has its own filter", ("locally_connected_weight_gradient",)),
}
# These serve where a measurement says so, for which they wait: on an H100 rows of pixels won one of seven layers, by
# 1.34 (dcgan_t2d's dx), and lost others by up to 2.8 that counting had given to them. The others no device has timed.
WAITING = (
    "implicit_gemm_rows", "implicit_gemm_windows", "implicit_gemm_persistent", "implicit_gemm_rolling", "strided_boxed",
    "grouped_slab", "grouped_slab_weight_gradient",
    "weight_gradient_clipped", "weight_gradient_taps", "weight_gradient_windows",
    "weight_gradient_columns", "depthwise_banded_transposed",
    "depthwise_fused_weight_gradient", "depthwise_rolling", "depthwise_rolling_patch", "depthwise_toeplitz",
    "depthwise_toeplitz_weight_gradient",
    "depthwise_rolling_weight_gradient", "depthwise_rolling_patch_weight_gradient", "transposed_overlap",
    "separable_whole", "locally_connected_input_gradient_shifted",
)  # fmt: skip


Watcher = Callable[["Plan", tuple[torch.Tensor | None, ...]], None]
watchers: list[Watcher] = []
"""Called before every launch, with the plan and its operands: how the tuner comes by the operands of a gradient."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What a call will launch: immutable, printable, made once for a problem and a target.

    `source` says where the tile came from: "forced", "user tuned", "shipped exact", "user portfolio", "shipped
    portfolio", "sibling device", "analytic default" or "safe". `reason` says why this kernel, `notes` what was passed
    over on the way to this tile, or which measured problem it is taken from. `checked` says how it is known that this
    kernel is right on this architecture; `pending`, that its first launch will tell, which see `first_use`.
    """

    problem: Problem
    target: Target
    kernel: Kernel
    tile: Tile
    source: str
    reason: str
    notes: tuple[str, ...]
    grid: int
    values: Arguments
    out_shape: tuple[int, ...]
    out_strides: tuple[int, ...]
    checked: str = ""
    pending: bool = False

    @functools.cached_property
    def partial(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Shape and strides of the partial sums that a second pass adds up; None if the kernel writes the result."""
        return self.kernel.partial(self.problem, self.tile, self.target.interpreted)

    @functools.cached_property
    def result_strides(self) -> tuple[int, ...]:
        """Those of the result, whichever kernel runs: what the fake kernel says."""
        return self.problem.result_strides

    @functools.cached_property
    def _last_tap(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Sizes and strides of the last tap of a weight that is read from there, and how far from its first it is."""
        g, (outer, inner, *spatial) = self.problem.geometry, self.problem.w_strides
        reach = -sum(stride * (taps - 1) for stride, taps in zip(spatial, g.kernel, strict=True))
        return (g.groups, 1, *(1,) * g.rank), (outer, inner, *(1,) * g.rank), reach

    def arranged(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as the kernel reads it, which see `Problem.weight_view`: a copy, a view, or the tensor itself."""
        if self.kernel.contiguous_weight:
            return weight.contiguous()
        view = self.problem.weight_view
        if view == "stored":
            return weight
        rank = self.problem.geometry.rank
        if view == "packed":
            strides = of_rank(rank, self.problem.w_strides)
            packed = torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device)
            # The grid's second axis ends at 65535; a filter of thousands of taps does not fit in a tile.
            if weight.is_contiguous() and weight.shape[0] < 2**16 and self.problem.geometry.taps <= 64:
                pack_weight(weight, packed)
                return packed
            return packed.copy_(weight)
        sizes, strides, last = self._last_tap
        return weight.as_strided(sizes, strides, weight.storage_offset() + last)

    def launch(self, *tensors: torch.Tensor | None) -> None:
        """Runs the kernel on tensors in the order of `kernel.pointers`; allocates nothing but what launches of
        one kernel hand to each other."""
        for watcher in watchers:
            watcher(self, tensors)
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
            *([f"  checked  {self.checked}"] if self.checked else []),
            f"  grid     {self.grid} programs",
            f"  GEMM     M={g.M} N={g.N} K={g.K} groups={g.groups}",
            f"  work     {self.problem.flops / 1e9:.4g} GFLOP, at least {self.problem.least_bytes / 1e6:.4g} MB",
        ]
        return "\n".join(lines)


def family(problem: Problem) -> tuple[tuple[str, ...], str]:
    """The kernels of a problem's kind, the preferred form first and the one that takes all of them last; and why."""
    g = problem.geometry
    if type(problem) in _APART and type(problem) is not WeightGradientProblem:
        why, kernels = _APART[type(problem)]
        return kernels, why
    # One input channel and many outputs is a product over the taps, worth a tensor core.
    direct = not g.transposed and g.c_in_group == 1 and (g.groups > 1 or g.c_out < 8)
    widest = max(g.c_in_group, g.c_out_group)
    narrow = g.groups > 1 and g.c_in_group > 0 and widest <= 32
    if isinstance(problem, WeightGradientProblem):
        if narrow and not direct:
            packed = ("grouped_slab_weight_gradient", "grouped_packed_weight_gradient", "weight_gradient")
            return packed, f"it is a sum over pixels, in groups of at most {widest} channels"
        if direct:
            return _DEPTHWISE_WEIGHT_GRADIENTS, "it is a sum over pixels"
        # A tile of one tap is mostly empty: by the model a first layer's, of 3 channels, takes 4.5 times as long.
        few = g.c_in_group < 8
        names = tuple(name for name in _WEIGHT_GRADIENTS if not few or name != "weight_gradient_rows")
        return names, "it is a sum over pixels"
    # Rows that are not aligned are loaded pixel by pixel: by count nothing is won (modulated_t2d's dx, 33 wide).
    rows = ("implicit_gemm_rows",) if problem.x_run() >= 4 else ()
    rows = rows if g.transposed else (*rows, "implicit_gemm_windows")
    in_boxes = _BOXED if g.stride == (1, 1, 1) else ("strided_boxed",)
    # Narrow groups share tiles, which boxes and rows of one group cannot.
    boxed = () if narrow else (*in_boxes, *rows)
    slab = ("grouped_slab",) if narrow else ()
    if g.transposed:
        # One channel a group would leave all but one of a tile's products to others.
        banded = ("depthwise_banded_transposed",) if g.c_in_group == 1 and g.groups > 1 else ()
        overlap = () if narrow else ("transposed_overlap",)
        names = (*boxed, *banded, *slab, *overlap, "transposed_phase")
        return names, f"it is transposed: {g.phases} output phases, no inserted zeros"
    if direct:
        return _DEPTHWISE, f"one input channel a group, multiplier {g.c_out_group}"
    if narrow:
        return (*slab, "grouped_packed"), f"groups of at most {widest} channels: several fill one tile"
    return (*boxed, "implicit_gemm"), "a product over channels and taps"


def forms(problem: Problem, target: Target) -> tuple[list[Kernel], list[str]]:
    """The kernels that can run a problem on a target, preferred first, and why each other one of its kind cannot."""
    suited, notes = [], []
    names = family(problem)[0]
    for name in names:
        reason = KERNELS[name].unavailable(target) or KERNELS[name].unsuited(problem)
        if not reason and name != names[-1]:
            reason = verdicts.against(KERNELS[name], problem, target)
        if reason:
            notes.append(f"not {name}: {reason}")
        else:
            suited.append(KERNELS[name])
    return suited, notes


def serving(suited: Sequence[Kernel]) -> list[Kernel]:
    """Of the forms of a problem those that serve without a measurement of theirs."""
    return [kernel for kernel in suited if kernel.name not in WAITING or len(suited) == 1]


def untimed(problem: Problem, target: Target) -> list[Kernel]:
    """The forms that would serve if a measurement said so, and have none of this problem that is stored."""
    waiting = [kernel for kernel in forms(problem, target)[0] if kernel.name in WAITING]
    key = problem.describe()
    return [
        kernel for kernel in waiting if all(key not in file.entries for _, file in configs.files(kernel.name, target))
    ]


@functools.lru_cache(maxsize=4096)
def plan(problem: Problem, target: Target, kernel: str | None = None, tile: Tile | None = None) -> Plan:
    """The plan for a problem on a target; `kernel` and `tile` force a choice.

    Raises `PlanError` if a forced kernel or tile cannot run the problem, naming the reason.
    """
    if kernel is None:
        (suited, notes), reason = forms(problem, target), family(problem)[1]
    else:
        if kernel not in KERNELS:
            raise PlanError(f"kernel: {kernel!r} is not known; choose one of {', '.join(KERNELS)}")
        suited, notes, reason = [KERNELS[kernel]], [], "forced"
        unsuited = KERNELS[kernel].unavailable(target) or KERNELS[kernel].unsuited(problem)
        reason_apart, apart = _APART.get(type(problem), ("", (kernel,)))
        if unsuited is None and kernel not in apart:
            unsuited = reason_apart
        if unsuited:
            raise PlanError(f"kernel: {kernel} cannot run {problem.describe()}: {unsuited}")
    chosen, picked, source, passed = _choose_tile(suited, problem, target, tile)
    notes += [
        f"not {other.name}: it serves where a measurement says so, see `triton-conv tune`"
        for other in suited if other.name in WAITING and other is not chosen
    ]  # fmt: skip
    checked, pending = ("", False) if kernel else _checked(chosen, picked, problem, target)
    return Plan(
        problem=problem,
        target=target,
        kernel=chosen,
        tile=picked,
        source=source,
        reason=reason,
        notes=(*notes, *passed),
        grid=chosen.grid(problem, picked),
        values=chosen.values(problem, picked, target),
        out_shape=problem.result_shape,
        out_strides=chosen.result_strides(problem),
        checked=checked,
        pending=pending,
    )


def _checked(kernel: Kernel, tile: Tile, problem: Problem, target: Target) -> tuple[str, bool]:
    """How it is known that a form is right on a target, and whether that is still to be seen."""
    if reason := verdicts.needless(kernel, tile, problem, target, family(problem)[0][-1]):
        return reason, False
    if (verdict := verdicts.known(Form.of(kernel, tile, problem, target))) is not None and verdict.right:
        return f"at its first use, on {verdict.date}: {verdict}", False
    return "at its first launch, against float64", True


def _choose_tile(
    suited: list[Kernel], problem: Problem, target: Target, forced: Tile | None
) -> tuple[Kernel, Tile, str, list[str]]:
    """The first (kernel, tile) that fits: measured on this problem, the fastest first; measured on a near one, or on
    another device of the architecture; then defaults, then safe tiles.
    """
    if forced is not None:
        kernel = suited[0]
        if not isinstance(forced, kernel.tile_type):
            raise PlanError(f"tile: {kernel.name} takes {kernel.tile_type.__name__}, got {type(forced).__name__}")
        if reason := forced.unfit(problem, target):
            raise PlanError(f"tile: {forced} cannot run {problem.describe()} on {target.arch}: {reason}")
        return kernel, forced, "forced", []
    key = problem.describe()
    notes: list[str] = []
    for kernel, tile, source, like in _ladder(suited, problem, target, key):
        reason = tile.unfit(problem, target) or (idle(kernel, tile, problem, target) if like else None)
        if reason is None:
            return kernel, tile, source, [*notes, like] if like else notes
        notes.append(f"passed over {source} of {kernel.name} ({tile}): {reason}")
    raise PlanError(f"no tile fits {key} on {target.arch}: {'; '.join(notes)}")


_Rung = tuple[Kernel, Tile, str, str]
"""Kernel, tile, source, and the measured problem that it is taken from if that is another one."""


def _ladder(suited: list[Kernel], problem: Problem, target: Target, key: str) -> Iterator[_Rung]:
    files = [(source, kernel, file) for kernel in suited for source, file in configs.files(kernel.name, target)]
    for source in configs.SOURCES:
        yield from _exact([(kernel, file) for found, kernel, file in files if found == source], key, source)
    for source in configs.SOURCES:
        found = [(kernel, file) for found, kernel, file in files if found == source]
        yield from _portfolios(found, key, configs.PORTFOLIOS[source])
    others = [(kernel, file) for kernel in suited for file in configs.siblings(kernel.name, target)]
    yield from _exact(others, key, "sibling device")
    yield from _portfolios(others, key, "sibling device")
    for kernel in serving(suited):
        yield kernel, default_tile(kernel.name, problem, target), "analytic default", ""
    for kernel in reversed(suited):
        yield kernel, kernel.safe_tile, "safe", ""


def idle(kernel: Kernel, tile: Tile, problem: Problem, target: Target) -> str | None:
    """Why a tile that suits a near problem would leave multiprocessors idle on this one, or None."""
    programs = kernel.grid(problem, tile)
    default = default_tile(kernel.name, problem, target)
    if programs >= target.sms or kernel.grid(problem, default) <= programs:
        return None
    return f"{programs} programs leave some of {target.sms} multiprocessors idle"


def _exact(files: list[tuple[Kernel, configs.ConfigFile]], key: str, source: str) -> list[_Rung]:
    """Entries of this very problem, the fastest form first; of several devices the nearest one's."""
    found: dict[str, tuple[float, _Rung]] = {}
    for kernel, file in files:
        if (entry := file.entries.get(key)) is not None:
            found.setdefault(kernel.name, (entry.time_us, (kernel, entry.tile, source, "")))
    return [rung for _, rung in sorted(found.values(), key=lambda item: item[0])]


def _portfolios(files: list[tuple[Kernel, configs.ConfigFile]], key: str, source: str) -> list[_Rung]:
    """Answers of portfolios, the one from the nearest problem first."""
    found: list[tuple[float, _Rung]] = []
    for kernel, file in files:
        if file.portfolio is not None and (answer := file.portfolio.nearest(key)) is not None:
            distance, shape, tile = answer
            like = f"as for {shape} ({file.target.name}), {distance:.2f} doublings away"
            found.append((distance, (kernel, tile, source, like)))
    return [rung for _, rung in sorted(found, key=lambda item: item[0])]
