"""The lectures' layers as workloads: planned, tuned, and timed beside what users write without these functions."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")

from helpers import DEVICE, INTERPRETED

from perf_plots import baselines, cases, runner
from perf_plots.floors import DATASHEET, Work
from triton_conv import configs, dispatch, ops, workloads
from triton_conv.autotune import tune as tuning
from triton_conv.autotune.expected import expect
from triton_conv.autotune.lab import DeviceLab
from triton_conv.autotune.measure import RehearsalTimer
from triton_conv.target import INTERPRETER, KNOWN

made_up = pytest.mark.skipif(not INTERPRETED, reason="made-up times are for machines without a GPU")
KERNEL = {"separable": "separable", "shuffle": "shuffle_gemm", "local": "locally_connected"}
PARTS = [
    part for name in ("separable_56", "shuffle_g3", "local2d") for part in workloads.find(name)[0].shrunk().parts()
]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CONV_HOME", str(tmp_path))
    ops.forget_plans()
    yield tmp_path
    ops.forget_plans()


def test_they_are_found_and_planned():
    assert {workload.kind for workload in workloads.find("lectures")} == set(workloads.LECTURE_KINDS)
    for workload in workloads.LECTURES:
        made = dispatch.plan(workload.problem(), KNOWN["sm_90"])
        assert made.kernel.name == KERNEL[workload.kind]
        assert workloads.find(workload.name) == [workload]
    problems = [part.problem() for part in cases.lectures()]
    assert {kernel.name for problem in problems for kernel in dispatch.forms(problem, KNOWN["sm_90"])[0]} == {
        *KERNEL.values(), "separable_whole", "locally_connected_input_gradient",
        "locally_connected_input_gradient_rolling", "locally_connected_input_gradient_shifted",
        "locally_connected_weight_gradient",
    }  # fmt: skip


def test_floors_count_both_products_of_a_separable_layer():
    (workload,) = workloads.find("separable_56")
    work, pixels = Work.of(workload), 64 * 56 * 56
    assert work.flops == 2 * pixels * (128 * 9 + 128 * 128)
    assert work.standard_flops == 2 * pixels * 128 * 128 * 9
    assert work.least_bytes == 2 * (2 * pixels * 128 + 128 * (9 + 128))
    (workload,) = workloads.find("local2d")
    work = Work.of(workload)
    assert work.flops == work.standard_flops
    assert work.bound(DATASHEET) == "memory"
    assert work.least_bytes == 2 * (28 * 28 * 64 * 64 * 9 + 2 * 64 * 64 * 28 * 28)


@pytest.mark.parametrize("workload", PARTS, ids=lambda w: w.title)
def test_baselines_compute_the_same(workload):
    tensors = workload.tensors(DEVICE)
    expected = expect(workload, workload.problem(), tensors)
    built = baselines.build(workload, tensors)
    names = {"local": {"unfold"}}.get(workload.kind, {"cudnn", "cudnn other format", "two kernels"})
    assert {*names, "standard"} <= set(built)
    for name in names:
        assert built[name].absent == ""
        assert expected.error(built[name].call()) < 0.05, name
    ours = runner.differentiated(workload.call, tensors, workload.part)
    assert expected.error(ours()) <= expected.tolerance


@made_up
@pytest.mark.parametrize(
    "workload",
    [pytest.param(part, id=part.title, marks=pytest.mark.slow if part is not PARTS[1] else ()) for part in PARTS],
)
def test_the_tuner_takes_them(workload):
    workload = replace(workload, dtype="float32")
    (outcome,) = tuning.tune(
        [workload], seconds=60.0, lab=DeviceLab(torch.device("cpu"), RehearsalTimer()), folder=configs.user_folder(),
        most_trials=2, report=lambda line: None,
    )  # fmt: skip
    assert outcome.error == ""
    assert outcome.trials >= 1
    assert dispatch.plan(workload.problem(), INTERPRETER).source == "user tuned"


@made_up
def test_a_case_is_checked_timed_and_written(home):
    workload = PARTS[1]
    bench = runner.Bench(torch.device("cpu"), RehearsalTimer(), home, DATASHEET, seconds=1.0)
    record = runner.run_case(workload, bench)
    assert record.error == ""
    assert 0 < record.relative_error <= record.tolerance
    assert {"triton_conv", "cudnn", "two kernels"} <= set(record.contestants)
    assert runner.finished(workload, bench) is not None
