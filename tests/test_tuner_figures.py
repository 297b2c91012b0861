"""The tuner's figures: small tables whose regrets are known, and the command that keeps them."""

import json
import math
import statistics
from dataclasses import replace

import pytest

from perf_plots import shared_memory, tuner
from triton_conv import inspection, workloads
from triton_conv.aot import Job, compile_all
from triton_conv.autotune.lab import Trial
from triton_conv.autotune.portfolio import percentile, won
from triton_conv.autotune.search import Candidate
from triton_conv.autotune.simulated import Simulation, table
from triton_conv.autotune.upkeep import known_problems
from triton_conv.defaults import default_tile
from triton_conv.kernels import KERNELS
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


def test_defaults_come_near_the_best_tiles_that_an_h100_timed():
    problems = known_problems()
    rows = [
        (row, default_tile(kernel, problems[key], TARGET))
        for kernel, costs in won(tuner.recorded_tables(tuner._TRIALS)).items()
        for key, row in costs.items()
    ]
    regrets = [row[tile] for row, tile in rows if tile in row]
    assert len(regrets) >= 45
    assert math.expm1(statistics.fmean(regrets)) < 0.03
    assert math.expm1(percentile(regrets, 0.95)) < 0.15


def test_portfolios_are_judged_on_problems_that_the_others_tiles_were_tried_on():
    a = KERNELS["implicit_gemm"].safe_tile
    b = replace(a, num_warps=8)
    layers = workloads.find("dilated_d4,dilated_d12,dilated_d36")
    first, second, third = (layer.problem().describe() for layer in layers)

    def recorded(**times):
        return {Candidate("implicit_gemm", {"a": a, "b": b}[name]): Trial(time, 1e-3) for name, time in times.items()}

    # The second has not been tried with what won on the first.
    found = {first: recorded(a=1.0, b=2.0), second: recorded(b=1.0), third: recorded(a=1.5, b=1.0)}
    assert tuner.complete(found, TARGET) == {first, third}
    judged = tuner.portfolio_figures(found, TARGET, 8.0)
    assert judged["all"]["asked"] == 3
    assert judged["problems with complete trials"]["asked"] == 2
    found[second] |= recorded(a=1.1)
    assert tuner.complete(found, TARGET) == {first, second, third}
    # A kernel that won on one problem alone has no others that could answer.
    assert tuner.portfolio_figures({first: recorded(a=1.0)}, TARGET, 8.0)["problems with complete trials"]["asked"] == 0


def test_twelve_tiles_are_judged_beside_none_tried_and_by_whom_they_were_chosen(monkeypatch):
    cases = [(w.problem(), TARGET) for w in workloads.find("wide_groups_56,dilated_d36")]
    simulation = Simulation(seed=2)
    monkeypatch.setattr(tuner, "further_layers", lambda: workloads.find("dilated_d4"))
    # Of a layer that nobody measures here the table says one thing: the safe tile.
    safe = Candidate("implicit_gemm", KERNELS["implicit_gemm"].safe_tile)
    monkeypatch.setattr(tuner, "table", lambda problem, simulation: {safe: 1.0})
    known = [(p, target, table(p, simulation)) for p, target in cases]
    others = tuner.experiences(2, known)
    searched = tuner.search_figures(known, (4,), others=others)
    assert {f"{tuner.SHIPPED}, 1 problems", f"{tuner.SHIPPED}, 4 problems"} < set(searched)
    regrets = tuner.twelve_regrets(2, known, others)
    figures = tuner.twelve_figures([regrets])
    best, first = figures["best of twelve, likeliest by 1 problems"], figures["without a trial, by 1 problems"]
    assert 0 <= best["geomean"] <= first["geomean"] < figures["default"]["geomean"]
    assert best["geomean"] < figures["best of twelve, random"]["geomean"]
    assert "best of twelve, likeliest by 4 problems" in figures
    # Tails are named, the worst first; several devices count as one table.
    worst = [float(line.rpartition(": ")[2]) for line in first["worst"]]
    assert worst == sorted(worst, reverse=True) and worst[0] == pytest.approx(first["p95"], abs=1e-3)
    assert first["worst"][0].startswith(cases[0][0].describe())
    twice = tuner.twelve_figures([regrets, regrets])
    assert twice["cases"] == 4 and twice["default"] == figures["default"]


def test_look_ups_are_measured():
    figures = tuner.look_ups(50)
    assert 0 < figures["warm_us"] < 1e3 * figures["first_ms"]


def test_the_command_keeps_its_figures_and_adds_to_them(tmp_path, monkeypatch, capsys):
    file = tmp_path / "figures.json"
    file.write_text('{"overshoot": 1}')
    monkeypatch.setattr(tuner.shared_memory, "figures", dict)
    assert tuner.main(["--out", str(file), "--seeds", "0", "--trials", str(tmp_path / "none")]) == 0
    content = json.loads(file.read_text())
    assert content["overshoot"] == 1
    assert set(content["look-ups"]) == {"warm_us", "first_ms", "entries"}
    assert content["environment"]["triton"]
    assert "warm_us" in capsys.readouterr().out


def test_the_count_of_shared_memory_never_misses_an_overflow():
    """Over the kept table of what the compiler took; false alarms are below one in a hundred."""
    _, rows = shared_memory.read_table(shared_memory.TABLE)
    found, archs = shared_memory.cases(rows), {row.arch for row in rows}
    assert archs >= set(inspection.TARGETS)
    for arch in archs:
        result = shared_memory.judged(found, arch)
        assert result["compiled"] >= 300
        assert result["missed"] == 0, result["examples"]
        assert result["false_alarm_share"] < 0.01, result["examples"]


def test_a_wrong_constant_is_found_out_by_the_fit(monkeypatch):
    _, rows = shared_memory.read_table(shared_memory.TABLE)
    found = [case for case in shared_memory.cases(rows) if case[0].arch == "sm_90"][:120]
    right = shared_memory.counting.STAGING["sm_90"]
    # Operands of wgmma counted as if they passed through registers: too few buffers.
    monkeypatch.setitem(shared_memory.counting.STAGING, "sm_90", replace(right, rows=1 << 30))
    assert shared_memory.judged(found, "sm_90")["undercounted"] > 10
    assert shared_memory.fitted(found, "sm_90")[0].rows == right.rows


def test_a_table_comes_back_as_it_was_written(tmp_path):
    version, rows = shared_memory.read_table(shared_memory.TABLE)
    shared_memory.write_table(tmp_path / "table.json", rows[:50])
    assert set(shared_memory.read_table(tmp_path / "table.json")[1]) == set(rows[:50])
    assert version


@pytest.mark.slow
def test_tiles_that_are_compiled_to_the_end_take_what_was_allocated():
    jobs = [job for _, job in shared_memory.draw("sm_90", 12, seed=5)]
    allocated = {index: row.shared_bytes for index, row in compile_all(jobs)}
    whole = [Job(job.kernel, job.problem, job.tile, job.target) for job in jobs]
    assert {index: row.shared_bytes for index, row in compile_all(whole) if not row.error} == allocated
