"""The static model against the committed measurements: its error, its constants, its figure and its page."""

import json
import math
from dataclasses import replace

import pytest

from perf_plots import prediction_page, predictions, trial_demands
from perf_plots.model_fit import fit
from perf_plots.prediction_page import _beside, _reason, _row
from perf_plots.predictions import Error, Judged
from perf_plots.trial_demands import Counted
from triton_conv.static_model.demand import Demand
from triton_conv.static_model.machine import MACHINES
from triton_conv.static_model.rows import Prediction
from triton_conv.workloads import FLAGSHIPS, LECTURES

MACHINE = MACHINES["sm_90"]
NAMES = tuple(Demand.__dataclass_fields__)


def counted(time_us, line=0, workload="a", kernel="k", **values):
    return Counted(line, workload, kernel, {}, time_us, 0, Demand(**(dict.fromkeys(NAMES, 0.0) | values)))


@pytest.fixture(scope="module")
def trials():
    return trial_demands.read()


def test_every_committed_trial_was_counted(trials):
    journal = trial_demands.journal(trial_demands.H100)
    flagships = {part.title for workload in FLAGSHIPS for part in workload.parts()}
    wanted = [i for i, row in enumerate(journal) if "failure" not in row and row["workload"] in flagships]
    assert [trial.line for trial in trials] == wanted and len(wanted) > 2000
    assert all(math.isfinite(number) and number >= 0 for trial in trials for number in trial.demand.astuple())


def test_the_error_is_what_the_page_says(trials):
    """The model may be wrong, but not more than it says."""
    judged = predictions.judge(trials, MACHINE)
    sound = [one for one in judged if not one.hiccup]
    error = Error.of(sound)
    assert len(judged) - len(sound) < 0.01 * len(judged)
    assert error.typical < 1.2
    assert error.mean < 1.32
    assert 0.95 < error.bias < 1.05
    assert str(error) in prediction_page.PAGE.read_text()


def test_it_ranks_tiles_better_than_the_count_of_work(trials):
    every = predictions.groups(predictions.judge(trials, MACHINE))
    costs = predictions.by_count(every)
    products = {key: group for key, group in every.items() if group[0].trial.line in costs}
    ours = predictions.ranking(products, lambda one: one.predicted_us)
    count = predictions.ranking(products, lambda one: costs[one.trial.line])
    assert ours.correlation > 0.7 > 0.3 > count.correlation
    assert ours.first < count.first
    assert ours.four < 1.06 < count.four


def test_errors_of_known_numbers():
    judged = [Judged(counted(100.0), factor * 100.0, "L2") for factor in (0.5, 1.0, 1.1, 2.0, 1.2)]
    error = Error.of(judged)
    assert error.typical == pytest.approx(1.2)
    assert error.mean == pytest.approx((2 * 1.0 * 1.1 * 2 * 1.2) ** (1 / 5))
    assert (error.count, error.bias, error.within) == (5, pytest.approx(1.1), 0.6)
    assert not any(one.hiccup for one in judged)
    assert Judged(counted(4000.0), 50.0, "L2").hiccup
    assert not Judged(counted(4000.0), 1000.0, "L2").hiccup


def test_rank_correlation():
    assert predictions.rank_correlation([1, 2, 3, 9], [10, 20, 30, 40]) == pytest.approx(1)
    assert predictions.rank_correlation([4, 3, 2, 1], [10, 20, 30, 40]) == pytest.approx(-1)


def test_ranking_of_a_group():
    group = [Judged(counted(time, line=i), 0.0, "L2") for i, time in enumerate((40.0, 20.0, 10.0, 30.0, 50.0, 60.0))]
    perfect = predictions.ranking({("a", "k"): group}, lambda one: one.trial.time_us)
    assert (perfect.correlation, perfect.first, perfect.four) == (pytest.approx(1), 1.0, 1.0)
    by_line = predictions.ranking({("a", "k"): group}, lambda one: one.trial.line)
    assert (by_line.first, by_line.four) == (pytest.approx(4.0), 1.0)


def test_a_fit_finds_the_constants_that_times_were_made_with():
    truth = replace(MACHINE, l2=4e12, wait=500.0, launch=5e-6)
    asked = [
        {"l2_bytes": 10.0**i, "waits": 10.0**j, "device_bytes": 1e6 * k, "issued": 1e4}
        for i in (6, 8, 9)
        for j in (1, 3, 4)
        for k in (1, 100)
    ]
    trials = [counted(1.0, **values) for values in asked]
    trials = [replace(t, time_us=1e6 * truth.predict(t.demand)[0]) for t in trials]
    found = fit(trials, MACHINE)
    assert Error.of(predictions.judge(trials, MACHINE)).mean > 1.3
    assert Error.of(predictions.judge(trials, found)).mean < 1.05
    assert found.clock == MACHINE.clock
    assert found.device <= MACHINE.ceilings[0]


def test_the_figure_says_what_it_is(tmp_path):
    trials = [counted(10.0 * 2**i, line=i, l2_bytes=1e8 * 2**i) for i in range(6)]
    paths = predictions.figure(tmp_path / "predictions", predictions.judge(trials, MACHINE))
    text = paths[0].read_text()
    assert [path.suffix for path in paths] == [".svg", ".png"]
    assert "COMPUTED and MEASURED" in text
    assert "6 tiles: median error" in text
    assert "left out" in text


def test_counting_goes_on_where_it_stopped(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    rows = [json.dumps(row) for row in trial_demands.journal(trial_demands.H100)[:2]]
    (tmp_path / "results" / "trials.jsonl").write_text("\n".join(rows) + "\n")
    file, full = tmp_path / "demands.json", {trial.line: trial for trial in trial_demands.read()}
    line = [0, 0, *map(trial_demands.short, full[0].demand.astuple())]
    trial_demands.write(file, {0: line}, "3.6.0")
    options = ["--results", str(tmp_path / "results"), "--out", str(file), "--processes", "1"]
    assert trial_demands.main(options) == 0
    assert "1 compiled, 0 in vain" in capsys.readouterr().out
    first, second = trial_demands.read(file, tmp_path / "results")
    assert first.demand == full[0].demand
    # Another version of Triton makes other code, but not quite another kernel.
    assert 0.5 < MACHINE.predict(second.demand)[0] / MACHINE.predict(full[1].demand)[0] < 2


ROW = Prediction(
    "a", "dx", "k", "", "", 1, 1, 1.0, 32, 5.0, 1.0, 2.0, 50.0, 100.0, 0.5, 0.7, "L2", None,
    {"l2": 90.0, "issue": 30.0, "tensor": 40.0}, {},
)  # fmt: skip


def test_a_row_of_the_page():
    assert ROW.missed
    assert _row(ROW, 80.0) == "| a | dx | k | 50.0 | 100.0 | 50% | **70%** | 80.0 | 62% | L2 |"
    assert _row(replace(ROW, goal=None), None).endswith("| – | – | – | L2 |")


def test_a_form_that_waits_stands_beside_the_one_that_runs():
    faster = replace(ROW, kernel="f", predicted_us=62.5, share=0.8)
    assert _beside(faster, ROW, 96.0) == "| a | dx | f | 62.5 | 80% | 70% | k | 100.0 | 96.0 |"
    assert _beside(replace(faster, error="ptxas"), ROW, None).split(" | ")[3] == "ptxas"
    reason = "* a dx: 50% of 70%; L2 takes 90 us alone, then tensor 40, issue 30."
    assert _reason(ROW, [replace(faster, part="dw"), replace(faster, error="ptxas")]) == reason
    assert _reason(ROW, [faster, replace(faster, kernel="g", share=0.6)]) == f"{reason} f would reach 80%."


def test_what_would_still_lose_to_a_library():
    other = replace(ROW, workload="b", measured_us=60.0)
    rows = [ROW, other, replace(ROW, workload="c"), replace(ROW, part="forward")]
    forms = [replace(ROW, kernel="f", predicted_us=64.0), replace(ROW, kernel="g", predicted_us=62.5)]
    forms.append(replace(other, kernel="h", predicted_us=61.0))
    measured = {("a", "dx"): 100.0, ("b", "dx"): 70.0, ("c", "dx"): 40.0, ("a", "forward"): 10.0}
    library = {("a", "dx"): 50.0, ("b", "dx"): 30.0, ("c", "dx"): 80.0}
    text = prediction_page._against(rows, [*forms, replace(ROW, error="ptxas", predicted_us=1.0)], measured, library)
    assert text.splitlines()[-2:] == [
        "| b | dx | 30.0 | 60.0 | 0.50 | – | 60.0 | 0.50 |",
        "| a | dx | 50.0 | 100.0 | 0.50 | g | 62.5 | 0.80 |",
    ]
    assert "of 3 cases the geometric mean is 0.93" in text


def test_the_page_tells_what_waiting_forms_would_save(tmp_path):
    written = tmp_path / "page.md"
    rows = [
        "| layer | forward | one | 50.0 | 10% | – | now | 100.0 | 80.0 |",
        "| layer | forward | other | 25.0 | 10% | – | now | 100.0 | 80.0 |",
        "| layer | dw | one | 50.0 | 10% | – | now | 100.0 | – |",
        # Slower than the model knows of: the form is taken to be as fast as it says.
        "| other | dw | one | 90.0 | 10% | – | now | 100.0 | 200.0 |",
        "| layer | dx | one | OutOfResources: no | 10% | – | now | 100.0 | – |",
    ]
    written.write_text("# Page\n" + prediction_page._WAITING + "\n".join(rows) + "\n\n## Goals\n| a | b |\n")
    assert prediction_page.gains(written) == {
        ("layer", "forward"): 60.0, ("layer", "weight gradient"): 50.0, ("other", "weight gradient"): 110.0
    }  # fmt: skip
    names = {workload.name for workload in FLAGSHIPS + LECTURES}
    found = prediction_page.gains(prediction_page.PAGE)
    assert {name for name, _ in found} <= names and max(found.values()) > 100
