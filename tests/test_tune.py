"""The tuner on a machine without a GPU: real kernels in the interpreter, real files, made-up times."""

import json
import time
from dataclasses import replace

import pytest
import torch

from triton_conv import configs, dispatch, ops, workloads
from triton_conv.autotune import tune as tuning
from triton_conv.autotune.lab import DeviceLab
from triton_conv.autotune.measure import RehearsalTimer, Timing
from triton_conv.autotune.space import SPACES, candidates
from triton_conv.defaults import default_tile
from triton_conv.kernels import KERNELS
from triton_conv.target import INTERPRETER, KNOWN

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="made-up times are for machines without a GPU")


def small(name):
    # NCHW: of narrow groups, which one form alone runs then.
    return replace(workloads.find(name)[0].shrunk(), channels_last=False)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CONV_HOME", str(tmp_path))
    ops.forget_plans()
    yield tmp_path
    ops.forget_plans()


class UndisturbedLab(DeviceLab):
    """Counts its own work alone: what else the machine does leaves no fewer trials."""

    def now(self):
        return time.process_time()


def run(*selected, seconds=3.0, timer=None, journal=None):
    lines = []
    outcomes = tuning.tune(
        selected, seconds=seconds, lab=UndisturbedLab(CPU, timer or RehearsalTimer()), folder=configs.user_folder(),
        journal=journal, report=lines.append,
    )  # fmt: skip
    return outcomes, lines


def test_a_winner_is_stored_and_planned_with():
    workload = small("narrow_groups_8")
    (outcome,), lines = run(workload)
    assert outcome.error == ""
    assert outcome.trials > 1
    assert outcome.gain > 1
    assert "waiting for the compiler" in lines[0]
    assert lines[1:] == [tuning.describe(outcome)]
    plan = dispatch.plan(workload.problem(), INTERPRETER)
    assert plan.source == "user tuned"
    assert str(plan.tile) == outcome.tile != str(default_tile("grouped_packed", workload.problem(), INTERPRETER))
    content = json.loads(configs.ConfigFile("grouped_packed", INTERPRETER).path(configs.user_folder()).read_text())
    assert content["environment"]["torch"] == torch.__version__
    (entry,) = content["entries"].values()
    assert entry["relative_error"] < 0.01


def test_two_workloads_of_one_kernel_share_a_file():
    run(small("narrow_groups_8"), replace(small("narrow_groups_4"), dtype="float32"))
    path = configs.ConfigFile("grouped_packed", INTERPRETER).path(configs.user_folder())
    assert len(json.loads(path.read_text())["entries"]) == 2


def test_a_wrong_candidate_never_wins(monkeypatch):
    """Every tile but the default computes nonsense, and computes it fast."""
    workload = small("narrow_groups_8")
    default = default_tile("grouped_packed", workload.problem(), INTERPRETER)
    launch = dispatch.launch

    def sabotaged(kernel, grid, tile, values, *tensors):
        launch(kernel, grid, tile, values, *tensors)
        if tile != default:
            tensors[-1][-1] += 1

    monkeypatch.setattr(dispatch, "launch", sabotaged)
    (outcome,), _ = run(workload, seconds=2.0)
    assert outcome.tile == str(default)
    assert outcome.failures["wrong result"] == outcome.trials - 1 > 0
    assert dispatch.plan(workload.problem(), INTERPRETER).tile == default


def test_a_form_that_waits_for_a_measurement_is_not_the_default(monkeypatch):
    """It stands first, and may fail: what is compared with, and stored, is what serves without it."""
    workload = workloads.find("narrow_groups_8")[0].shrunk()
    forms = [kernel.name for kernel in dispatch.forms(workload.problem(), INTERPRETER)[0]]
    assert forms == ["grouped_slab", "grouped_packed"]
    launch = dispatch.launch

    def sabotaged(kernel, grid, tile, values, *tensors):
        launch(kernel, grid, tile, values, *tensors)
        if kernel.name == forms[0]:
            tensors[-1][-1] += 1

    monkeypatch.setattr(dispatch, "launch", sabotaged)
    (outcome,), _ = run(workload)
    assert (outcome.error, outcome.kernel) == ("", forms[1])
    assert outcome.failures["wrong result"] > 0
    assert outcome.default_time_us > 0
    assert dispatch.plan(workload.problem(), INTERPRETER).kernel.name == forms[1]


def test_an_unwritten_element_is_a_wrong_result(monkeypatch):
    workload = small("dw3d")
    monkeypatch.setattr(dispatch, "launch", lambda *arguments: None)
    (outcome,), _ = run(workload, seconds=1.0)
    assert "default tile failed (wrong result" in outcome.error


def test_a_gain_within_the_noise_is_no_gain():
    class Even:
        measured = False

        def rounds(self, calls, count, warmup=3):
            return {name: Timing(tuple(100.0 + i % 7 for i in range(count)), False) for name in calls}

    workload = small("narrow_groups_8")
    (outcome,), _ = run(workload, seconds=2.0, timer=Even())
    assert outcome.tile == str(default_tile("grouped_packed", workload.problem(), INTERPRETER))
    assert outcome.gain == 1


def test_a_broken_file_is_left_as_it_is():
    path = configs.ConfigFile("grouped_packed", INTERPRETER).path(configs.user_folder())
    path.parent.mkdir(parents=True)
    path.write_text("{ not json")
    with pytest.warns(UserWarning, match="not a readable JSON file"):
        (outcome,), _ = run(small("narrow_groups_8"), seconds=2.0)
    with pytest.warns(UserWarning, match="not a readable JSON file"):
        plan = dispatch.plan(small("narrow_groups_8").problem(), INTERPRETER)
    assert plan.source == "analytic default"
    assert "not stored" in outcome.error
    assert path.read_text() == "{ not json"


def test_time_runs_out_between_workloads():
    outcomes, lines = run(small("narrow_groups_8"), small("narrow_groups_4"), seconds=1e-6)
    assert len(outcomes) < 2
    assert "not tuned" in lines[-1]


@pytest.mark.parametrize("workload", workloads.FLAGSHIPS, ids=lambda w: w.name)
def test_candidates_fit_and_start_with_the_default(workload):
    problem, target = workload.problem(), KNOWN["sm_90"]
    name = dispatch.forms(problem, target)[0][0].name
    tiles = candidates(name, problem, target)
    assert tiles[0] == default_tile(name, problem, target)
    assert len(tiles) == len(set(tiles)) > 10
    assert all(tile.unfit(problem, target) is None for tile in tiles)
    assert tiles == candidates(name, problem, target), "the same order everywhere"


def test_every_kernel_has_a_space_of_its_own_parameters():
    assert set(SPACES) == set(KERNELS)
    for name, space in SPACES.items():
        assert set(space) == set(KERNELS[name].safe_tile.asdict())


def test_the_interval_of_a_median_is_from_order_statistics():
    timing = Timing(tuple(float(i) for i in range(100)))
    assert timing.median == 49.5
    assert timing.interval == (40.0, 59.0)
    assert Timing((3.0, 1.0, 2.0)).interval == (1.0, 3.0), "too few samples to leave any out"
