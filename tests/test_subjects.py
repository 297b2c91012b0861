"""What the tuner can be given: every kernel, of every kind and part of a training step, judged with real operands."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import INTERPRETED

from triton_conv import dispatch, workloads
from triton_conv.autotune.lab import DeviceBench, Trial
from triton_conv.autotune.measure import RehearsalTimer
from triton_conv.autotune.search import Candidate
from triton_conv.defaults import default_tile
from triton_conv.kernels import KERNELS
from triton_conv.target import KNOWN, of_device
from triton_conv.workloads import WEIGHT_GRADIENT, Workload

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="candidates of the interpreter's size")

CPU = torch.device("cpu")
PARTS = [part for workload in workloads.FLAGSHIPS + workloads.LECTURES for part in workload.parts()]


def kernels(workload):
    return [kernel.name for kernel in dispatch.forms(workload.problem(), KNOWN["sm_90"])[0]]


def cases():
    """Of each kernel the first workload of each kind and part that it can run, and few enough to be quick."""
    found = {}
    for part in PARTS:
        small = part.shrunk()
        for name in kernels(small):
            found.setdefault((name, part.kind, part.part), small)
    return found


CASES = cases()
_ROWS = Workload("rows", "grouped", "conv2d", (1, 16, 4, 4), (16, 16, 3, 3), {"padding": 1}, channels_last=True)
_BOXES = Workload("boxed", "dilated", "conv2d", (1, 16, 4, 4), (16, 16, 1, 1), channels_last=True)
_HALVED = {"stride": 2, "padding": 1}
BOXED = {
    "implicit_gemm_boxed": _BOXES,
    "implicit_gemm_persistent": _BOXES,
    "implicit_gemm_rolling": _ROWS,
    "weight_gradient_taps": replace(_ROWS, part=WEIGHT_GRADIENT),
    "implicit_gemm_rows": Workload("rows", "dilated", "conv2d", (1, 16, 4, 4), (16, 16, 1, 1)),
    "implicit_gemm_windows": Workload("windows", "dense", "conv2d", (1, 16, 4, 8), (16, 16, 4, 4), _HALVED),
    "weight_gradient_rows": Workload(
        "rows", "dense", "conv2d", (1, 16, 4, 8), (16, 16, 3, 3), {"padding": 1}, part=WEIGHT_GRADIENT
    ),
    "strided_boxed": Workload(
        "boxed", "dense", "conv2d", (1, 32, 4, 4), (16, 32, 3, 3), {"stride": 2, "padding": 1}, channels_last=True
    ),
    # Its weight is packed for others: each is given what it reads.
    "transposed_overlap": Workload(
        "overlap", "transposed", "conv_transpose2d", (1, 16, 16, 16), (16, 16, 2, 2), {"stride": 2}
    ),
    "weight_gradient_clipped": Workload(
        "clipped",
        "dilated",
        "conv2d",
        (1, 16, 4, 4),
        (16, 16, 3, 3),
        {"padding": 3, "dilation": 3},
        channels_last=True,
        part=WEIGHT_GRADIENT,
    ),
    "weight_gradient_boxed": Workload(
        "boxed", "dilated", "conv2d", (1, 16, 4, 8), (16, 16, 1, 1), channels_last=True, part=WEIGHT_GRADIENT
    ),
}
"""Boxes are of aligned channels, which a layer that was made small has not."""


def test_no_kernel_is_left_out():
    assert {name for name, _, _ in CASES} | set(BOXED) == set(KERNELS)
    assert {(kind, part) for _, kind, part in CASES} == {(part.kind, part.part) for part in PARTS}


@pytest.fixture(scope="module")
def dx():
    """The gradients of what a deformable convolution samples."""
    return DeviceBench(DX, CPU, RehearsalTimer())


def judged(bench, name):
    return bench.judge(Candidate(name, default_tile(name, bench.problem, of_device(CPU))), math.inf)


def every():
    seen = set()
    for (name, kind, part), workload in CASES.items():
        # One of each kernel every time, the rest of the kinds with the long tail.
        marks = pytest.mark.slow if name in seen else ()
        seen.add(name)
        yield pytest.param(name, workload, id=f"{name}-{kind}-{part}", marks=marks)
    yield from (pytest.param(name, workload, id=name) for name, workload in BOXED.items())


@pytest.mark.parametrize(("name", "workload"), list(every()))
def test_every_kernel_is_judged(name, workload):
    trial = judged(DeviceBench(workload, CPU, RehearsalTimer()), name)
    assert trial.failure == ""
    assert 0 <= trial.relative_error < 0.05
    assert trial.time_us > 0


# --------------------------------------------------------------------------- the gradients of what is sampled

DX = workloads.find("dcnv2")[0].shrunk().parts()[1]
NAME = "deformable_input_gradient"


@pytest.mark.parametrize("pointer", ["dx_ptr", "doffset_ptr", "dmask_ptr"])
def test_each_of_its_results_is_compared(pointer, dx, monkeypatch):
    launch, place = dispatch.launch, KERNELS[NAME].pointers.index(pointer)

    def sabotaged(kernel, grid, tile, values, *tensors):
        launch(kernel, grid, tile, values, *tensors)
        tensors[place][0, 0, 0, 0] += 1000.0

    monkeypatch.setattr(dispatch, "launch", sabotaged)
    assert judged(dx, NAME).failure == "wrong result"


@pytest.mark.parametrize("pointer", ["dx_ptr", "doffset_ptr", "dmask_ptr"])
def test_a_write_beside_any_of_them_is_seen(pointer, dx, monkeypatch):
    launch, place = dispatch.launch, KERNELS[NAME].pointers.index(pointer)

    def sabotaged(kernel, grid, tile, values, *tensors):
        launch(kernel, grid, tile, values, *tensors)
        output = tensors[place]
        output.as_strided((1,), (1,), output.storage_offset() + output.numel()).fill_(0.0)

    monkeypatch.setattr(dispatch, "launch", sabotaged)
    assert judged(dx, NAME) == Trial(failure="out-of-bounds write")


def test_an_unwritten_slope_is_a_wrong_result(dx, monkeypatch):
    monkeypatch.setattr(dispatch, "launch", lambda *arguments: None)
    assert judged(dx, NAME).failure == "wrong result"


def test_coordinates_are_exact_in_float32(dx):
    """Else the slope at a coordinate next to a whole one would depend on who adds it up."""
    offset = dx._subject._inputs[KERNELS[NAME].pointers.index("offset_ptr")].double()
    assert torch.equal((offset * 64).round(), offset * 64)


def test_a_final_counts_the_copy_of_a_weight_and_a_trial_does_not(monkeypatch):
    bench, pack, copies = DeviceBench(BOXED["transposed_overlap"], CPU, RehearsalTimer()), dispatch.pack_weight, []
    monkeypatch.setattr(dispatch, "pack_weight", lambda *tensors: copies.append(pack(*tensors)))
    for name, each in (("transposed_phase", 1), ("transposed_overlap", 0)):
        assert judged(bench, name).failure == "" and not copies
        bench.rounds([Candidate(name, default_tile(name, bench.problem, bench._subject.target))], 1)
        assert len(copies) == each
        copies.clear()


def test_other_bits_in_a_second_run_are_a_wrong_result(monkeypatch):
    bench = DeviceBench(BOXED["implicit_gemm_boxed"], CPU, RehearsalTimer())
    launch, runs = dispatch.launch, []

    def drifting(kernel, grid, tile, values, *tensors):
        launch(kernel, grid, tile, values, *tensors)
        runs.append(tile)
        tensors[-1].mul_(1 + 0.004 * (len(runs) % 2))

    assert judged(bench, "implicit_gemm").failure == ""
    monkeypatch.setattr(dispatch, "launch", drifting)
    assert judged(bench, "implicit_gemm").failure == "wrong result"
