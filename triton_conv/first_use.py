"""The first use of a form on an architecture: its result on a small input is compared with float64, once.

A compiler may miscompile for a device that nobody measured; the plain form is the least likely to suffer, and serves
where a faster one turns out wrong. The reference is computed on the CPU: a second kernel to compare with would have to
be compiled first, which takes longer than all of this, and may be as wrong.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import subprocess
import time
import traceback
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton

from . import dispatch, first_use_lectures, verdicts
from .defaults import default_tile
from .dispatch import Plan
from .errors import ArgumentValueError, CaptureError, FormWarning
from .first_use_lectures import Operands
from .geometry import ConvGeometry
from .kernels import Tile, launch
from .layout import dense_strides, five, of_rank
from .problem import Problem, WeightGradientProblem
from .problem_lectures import LocalInputGradientProblem, LocalProblem, SeparableProblem
from .reference import activated, as_pad_takes, explicit_padding, reference, relative_error, rounding
from .settings import Setting
from .verdicts import Form, Verdict

SWITCH = "TRITON_CONV_FIRST_USE"
# What a wrong kernel gets wrong is no rounding; a right one must never be taken for it.
_MARGIN = 4.0
# Multiplications of the small problem at most, where there are channels left to leave out: tens of milliseconds on one
# core of a CPU.
_WORK = 3e7
# Channels of a group, and of all groups together: some steps of every loop, and several tiles.
_CHANNELS = 128

# What everything that Triton makes of a kernel's code happens in; loading the result does not.
_COMPILE = triton.compiler.compiler.compile.__code__

_enabled = True
_settled: weakref.WeakKeyDictionary[Plan, Plan] = weakref.WeakKeyDictionary()


class set_first_use_check(Setting):
    """Whether a form's first use on an architecture is checked: True (the default) or False.

    Takes effect at once; as a context manager, until its end. `TRITON_CONV_FIRST_USE=0` in the environment switches it
    off too.

    >>> tc.set_first_use_check(False)

    Raises:
        ArgumentValueError (a ValueError): for anything else.
    """

    def __init__(self, enabled: bool) -> None:
        if enabled not in (True, False):
            raise ArgumentValueError(f"enabled: expected True or False, got {enabled!r}")
        super().__init__(globals(), "_enabled", enabled)


def settle(made: Plan, device: torch.device) -> Plan:
    """The plan itself, if its form is right; else the plan of the next form that is.

    Raises `CaptureError` while a CUDA graph is captured, if the form was never used before.
    """
    if (chosen := _settled.get(made)) is not None:
        return chosen
    if not _enabled or os.environ.get(SWITCH, "1") == "0":
        return made
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise CaptureError(
            f"a CUDA graph is being captured, and {made.kernel.name} was never used on {made.target.arch} with this "
            "version of Triton: its result would be checked. Make the same call once before, or "
            "triton_conv.warmup(model, example)"
        )
    form = Form.of(made.kernel, made.tile, made.problem, made.target)
    verdict = verdicts.known(form)
    if verdict is None:
        with verdicts.exclusive():
            verdict = verdicts.known(form)
            if verdict is None and (verdict := _check(made, device)) is not None:
                verdicts.remember(form, verdict)
    chosen = made
    if verdict is not None and not verdict.right:
        dispatch.plan.cache_clear()
        chosen = dispatch.plan(made.problem, made.target)
        warnings.warn(
            f"{form.kernel} is wrong on {form.arch} with Triton {form.triton} ({form.dtype}, {form.num_warps} warps): "
            f"{verdict}. {chosen.kernel.name} serves instead, here and in later processes ({verdicts.path()}). Please "
            "report it",
            FormWarning,
            stacklevel=3,
        )
        if chosen.pending:
            chosen = settle(chosen, device)
    _settled[made] = chosen
    return chosen


def _check(made: Plan, device: torch.device) -> Verdict | None:
    """The verdict on a plan's form; None where nothing could be learned.

    Only a wrong number and an error of the compiler's own speak against a form. A lack of memory or of shared memory is
    the device's or the tile's matter, and after an error of the device (of this launch or of one before: they are told
    of late) nothing in this process can be trusted, least of all a verdict for all later ones.
    """
    began, failure, error = time.perf_counter(), "", 0.0
    problem = small(made.problem)
    g = problem.geometry
    # Without a pixel or a channel there is nothing to compare.
    if 0 in (g.M, g.N, g.K) or (tile := _fitting(made, problem)) is None:
        return None
    try:
        error = difference(replace(made, problem=problem, tile=tile), device)
    except Exception as reason:  # the compiler and the driver raise their own kinds
        if not _of_the_compiler(reason):
            return None
        failure = f"{type(reason).__name__}: {(str(reason).strip().splitlines() or [''])[0][:200]}"
    return Verdict(
        error,
        _MARGIN * rounding(problem),
        datetime.date.today().isoformat(),
        round(time.perf_counter() - began, 3),
        failure,
    )


def _of_the_compiler(error: Exception) -> bool:
    """Whether the compiler gave up on a kernel's code, and not for want of memory, of disk or of a program it runs."""
    if isinstance(error, (OSError, MemoryError, subprocess.SubprocessError)):
        return False
    return any(frame.f_code is _COMPILE for frame, _ in traceback.walk_tb(error.__traceback__))


def _fitting(made: Plan, problem: Problem) -> Tile | None:
    """The plan's tile, or the default, whichever can run the small problem."""
    if made.kernel.unsuited(problem):
        return None
    tiles = (made.tile, default_tile(made.kernel.name, problem, made.target))
    return next((tile for tile in tiles if tile.unfit(problem, made.target) is None), None)


def small(problem: Problem) -> Problem:
    """A problem like this one that a CPU computes in a moment: the same filter, border, format and alignment."""
    geometry = _small_geometry(problem.geometry, isinstance(problem, LocalProblem))
    if isinstance(problem, LocalInputGradientProblem):
        return first_use_lectures.smaller_local(replace(problem, geometry=geometry))
    innermost = problem.w_strides[1] == 1 and problem.weight_view != "flipped"
    weight = five(dense_strides(geometry.weight_shape, innermost))
    if problem.weight_view == "flipped":
        weight = (*weight[:2], -weight[2], -weight[3], -weight[4])
    gradient = isinstance(problem, WeightGradientProblem)
    last = problem.y_strides[1] == 1 and geometry.c_out > 1
    made = replace(
        problem,
        geometry=geometry,
        x_strides=five(dense_strides(geometry.in_shape, not problem.pixels_last)),
        w_strides=problem.w_strides if gradient else weight,
        y_strides=five(dense_strides(geometry.out_shape, last)),
        stride_b=1,
    )
    if isinstance(made, SeparableProblem):
        return first_use_lectures.smaller_separable(made, _less(made.c_final, _CHANNELS))
    return made


def _small_geometry(g: ConvGeometry, local: bool) -> ConvGeometry:
    """The geometry of such a problem; a `local` one has filters of its own for each pixel."""
    # Of planes nothing depends but their number, nor of rows that have filters of their own; a CPU takes long over
    # three dimensions.
    depth = min(g.in_size[0], g.extent[0] + 3 * g.stride[0])
    height = _less(g.in_size[1], max(g.extent[1] + 8 * g.stride[1], 8))
    width = _less(g.in_size[2], max(g.extent[2] + 8 * g.stride[2], 32 if g.rank > 1 else 256))
    if local and g.rank > 1:
        height = min(g.in_size[1], g.extent[1] + g.stride[1])
    # Images side by side are read as vectors.
    batch = _less(g.batch, 8) if local else min(g.batch, 2)
    channels, work = _CHANNELS, _WORK / (1 if g.rank < 3 else 4)
    while True:
        wide_in, wide_out = (_less(c, channels) for c in (g.c_in_group, g.c_out_group))
        groups = _less(g.groups, max(channels // max(g.c_in_group, g.c_out_group, 1), 1))
        geometry = replace(
            g, batch=batch, c_in=wide_in * groups, c_out=wide_out * groups, groups=groups,
            in_size=(depth, height, width),
        )  # fmt: skip
        if geometry.flops / 2 <= work or channels <= 16:
            return geometry
        channels //= 2


def _less(size: int, most: int) -> int:
    """At most about `most`, with the same remainder by 16: what kernels take for alignment stays as it is."""
    return size if size <= most + 16 else -(-most // 16) * 16 + size % 16


def difference(made: Plan, device: torch.device) -> float:
    """Largest relative difference from float64 of one run of a plan's kernel and tile on random numbers."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Sequence[int], scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(made.problem.dtype)

    def lay(tensor: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=device).copy_(tensor)

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        operands, expected = _numbers(made, draw, lay)
        return relative_error(_run(made, operands, device).cpu().reshape(expected.shape), expected)


def _numbers(made: Plan, draw: first_use_lectures.Draw, lay: first_use_lectures.Lay) -> tuple[Operands, torch.Tensor]:
    """The operands of a launch, and the result in float64."""
    problem, g = made.problem, made.problem.geometry
    if isinstance(problem, LocalInputGradientProblem):
        return first_use_lectures.of_local(problem, draw, lay)
    if isinstance(problem, SeparableProblem):
        return first_use_lectures.of_separable(problem, draw, lay)
    x = draw(g.in_shape)
    operands: Operands = [lay(x, of_rank(g.rank, problem.x_strides))]
    if isinstance(problem, WeightGradientProblem):
        dy = draw(g.out_shape)
        return [*operands, lay(dy, of_rank(g.rank, problem.y_strides))], _weight_gradient(g, x.double(), dy.double())
    weight = draw(g.weight_shape, g.K**-0.5)
    bias = draw((g.c_out,)) if problem.has_bias else None
    # A flipped weight is read from its last tap on, by negative strides.
    flipped = problem.weight_view == "flipped"
    stored = weight.flip(tuple(range(2, 2 + g.rank))) if flipped else weight
    laid = lay(stored, tuple(abs(stride) for stride in of_rank(g.rank, problem.w_strides)))
    last: tuple[Any, ...] = (..., *(slice(-1, None),) * g.rank)
    laid = laid.contiguous() if made.kernel.contiguous_weight else laid
    operands += [laid[last] if flipped else laid, None if bias is None else lay(bias, (1,))]
    return operands, _forward(problem, x.double(), weight.double(), None if bias is None else bias.double())


def _run(made: Plan, operands: Operands, device: torch.device) -> torch.Tensor:
    """The kernel's result; what it does not write is NaN."""
    kernel, problem, tile = made.kernel, made.problem, made.tile
    shape, strides = made.partial or (problem.result_shape, kernel.result_strides(problem))
    dtype = problem.accumulator if made.partial else problem.dtype
    result = torch.empty_strided(shape, strides, dtype=dtype, device=device).fill_(float("nan"))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        values = kernel.values(problem, tile, made.target)
        launch(kernel, kernel.grid(problem, tile), tile, values, *operands, result)
    return result.double().sum(0) if made.partial else result


def _window(g: ConvGeometry) -> dict[str, Any]:
    return {"stride": g.spatial(g.stride), "dilation": g.spatial(g.dilation), "groups": g.groups}


def _forward(problem: Problem, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    g = problem.geometry
    arguments = {"input": x, "weight": weight, **_window(g)}
    if not g.transposed:
        border = {"padding": g.spatial(g.padding), "padding_mode": g.padding_mode}
        epilogue = {"bias": bias, "activation": problem.activation}
        return reference(f"conv{g.rank}d", arguments | border | epilogue)
    # torch takes as much off behind as before; an input gradient may be of a convolution padded on one side.
    whole = reference(f"conv_transpose{g.rank}d", arguments)
    axes = zip(g.spatial(g.pad_before), g.out_shape[2:], whole.shape[2:], strict=True)
    cuts = [(-before, before + size - full) for before, size, full in axes]
    result = F.pad(whole, as_pad_takes(cuts))
    if bias is not None:
        result = result + bias.reshape(-1, *(1,) * g.rank)
    return activated(result, problem.activation)


def _weight_gradient(g: ConvGeometry, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    window, none = _window(g), [0] * g.rank
    weight = x.new_zeros(g.weight_shape)
    arguments = {"input": x, "weight": weight, "padding": g.spatial(g.padding)}
    padded = explicit_padding(f"conv{g.rank}d", g.padding_mode, arguments)["input"]
    # Without the forward pass that a graph would compute.
    result: torch.Tensor = torch.ops.aten.convolution_backward(
        dy, padded, weight, None, window["stride"], none, window["dilation"], False, none, g.groups,
        [False, True, False],
    )[1]  # fmt: skip
    return result
