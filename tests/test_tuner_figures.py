"""The tuner's figures: small tables whose regrets are known, and the command that keeps them."""

import json
import math

import pytest

from perf_plots import tuner
from triton_conv import workloads
from triton_conv.autotune.simulated import Simulation, table
from triton_conv.target import KNOWN

PROBLEM, TARGET = workloads.find("narrow_groups_8")[0].problem(), KNOWN["sm_90"]


@pytest.fixture(scope="module")
def times():
    return table(PROBLEM, Simulation(seed=1))


def test_a_search_that_knows_has_no_regret_and_one_that_does_not_has(times):
    order = sorted(times, key=times.get)
    assert tuner.regrets(tuner.Fixed(order), times, (1, 4), 0) == [0.0, 0.0]
    worst = tuner.regrets(tuner.Fixed(order[::-1]), times, (1, len(order)), 0)
    assert worst[0] == pytest.approx(math.log(times[order[-1]] / times[order[0]]))
    # Noise of a hundredth may take the second for the first.
    assert worst[1] < 0.05


def test_ours_is_better_than_chance(times):
    figures = tuner.search_figures([(PROBLEM, TARGET, times)] * 5, (16, 32))
    assert figures["cases"] == 5
    for count in ("16", "32"):
        assert figures["ours"][count]["geomean"] <= figures["random"][count]["geomean"]
    assert figures["ours"]["32"]["geomean"] < 0.05


def test_look_ups_are_measured():
    figures = tuner.look_ups(50)
    assert 0 < figures["warm_us"] < 1e3 * figures["first_ms"]


def test_the_command_keeps_its_figures_and_adds_to_them(tmp_path, capsys):
    file = tmp_path / "figures.json"
    file.write_text('{"overshoot": 1}')
    assert tuner.main(["--out", str(file), "--seeds", "0"]) == 0
    content = json.loads(file.read_text())
    assert content["overshoot"] == 1
    assert set(content["look-ups"]) == {"warm_us", "first_ms", "entries"}
    assert content["environment"]["triton"]
    assert "warm_us" in capsys.readouterr().out


@pytest.mark.slow
def test_shared_memory_is_never_counted_too_low():
    figures = tuner.shared_memory("sm_90", 40)
    assert figures["compiled"] > 20
    assert figures["missed"] == 0
