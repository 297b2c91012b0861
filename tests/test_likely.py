"""Which tiles are tried first: those that other problems speak for, as they fit, by what counting says of this one."""

import math
from dataclasses import replace

import pytest
from test_portfolio import FLAGSHIP, A, B, C, key

from triton_conv import workloads
from triton_conv.autotune import likely
from triton_conv.autotune.lab import Trial
from triton_conv.autotune.portfolio import tried, won
from triton_conv.autotune.search import Candidate
from triton_conv.autotune.simulated import Simulation, table
from triton_conv.defaults import default_tile
from triton_conv.kernels import KERNELS
from triton_conv.target import KNOWN

KERNEL, TARGET, PROBLEM = "implicit_gemm", KNOWN["sm_90"], FLAGSHIP.problem()


def likeliest(tried, problems=None):
    return likely.Experience(tried, problems or {}, TARGET).likeliest(PROBLEM)


def first(costs, problems=None):
    found = likeliest({KERNEL: costs}, problems)
    return [c.tile for c in found if c.kernel == KERNEL and c.tile in (A, B, C)]


def test_the_likest_problem_speaks_loudest(monkeypatch):
    monkeypatch.setattr(likely, "counted", lambda *what: 0.0)
    costs = {key(256): {A: 0.0, B: 0.3}, key(32): {A: 0.9, B: 0.0}}
    assert first(costs) == [A, B]
    costs = {key(32): {A: 0.0, B: 0.3}, key(256): {A: 0.9, B: 0.0}}
    assert first(costs) == [B, A]


def test_the_problem_itself_says_nothing(monkeypatch):
    monkeypatch.setattr(likely, "counted", lambda *what: 0.0)
    costs = {key(256): {A: 0.0, B: 0.3}, PROBLEM.describe(): {A: 0.9, B: 0.0, C: 0.0}}
    assert first(costs) == [A, B]


def test_counting_tells_what_the_size_does(monkeypatch):
    """As slow as counted elsewhere means as slow as counted here."""
    other = replace(FLAGSHIP, input=(8, 256, 65, 65), weight=(256, 256, 3, 3)).problem()
    counts = {(A, other): 0.0, (B, other): 0.0, (A, PROBLEM): 1.0, (B, PROBLEM): 0.0}
    monkeypatch.setattr(likely, "counted", lambda kernel, tile, problem, target: counts.get((tile, problem), 0.0))
    likely._level.cache_clear()
    try:
        costs = {other.describe(): {A: 0.0, B: 0.3}, key(32): {A: 1.0, B: 0.0}}
        assert first(costs, {other.describe(): other}) == [B, A]
        counts[A, other] = 1.0
        assert first(costs, {other.describe(): other}) == [A, B]
    finally:
        likely._level.cache_clear()


def test_what_is_expected_is_what_like_problems_took_and_nothing_of_what_none_tried(monkeypatch):
    monkeypatch.setattr(likely, "counted", lambda *what: 0.0)
    costs = {key(256): {A: 0.0, B: 0.3}, key(1024): {A: 0.2}, PROBLEM.describe(): {A: 0.9, C: 0.0}}
    found = likely.Experience({KERNEL: costs}, {}, TARGET).expected(PROBLEM)
    # Both are as far away: each says as much.
    assert found == {Candidate(KERNEL, A): pytest.approx(0.1), Candidate(KERNEL, B): pytest.approx(0.3)}


def test_there_are_at_most_twelve_and_defaults_are_among_them():
    grown = [replace(A, BLOCK_M=m, BLOCK_N=n) for m in (16, 32, 64, 128) for n in (16, 32, 64, 128)]
    costs = {key(16 * (i + 1)): {tile: 0.0} for i, tile in enumerate(grown)}
    assert len(likeliest({KERNEL: costs})) == 12
    alone = likeliest({})
    assert Candidate(KERNEL, default_tile(KERNEL, PROBLEM, TARGET)) in alone


def test_costs_are_of_every_form_beside_the_fastest():
    slow = Candidate("depthwise", KERNELS["depthwise"].safe_tile)
    found = tried({"p": {Candidate(KERNEL, A): Trial(10.0, 0.0), slow: Trial(20.0, 0.0)}})
    assert found == {KERNEL: {"p": {A: 0.0}}, "depthwise": {"p": {slow.tile: math.log(2)}}}
    assert set(won({"p": {Candidate(KERNEL, A): Trial(10.0, 0.0), slow: Trial(20.0, 0.0)}})) == {KERNEL}


def test_twelve_tiles_of_like_layers_come_near_the_best():
    simulation = Simulation(seed=5)
    problems = {p.describe(): p for p in (w.problem() for w in workloads.find("dilated_d12,dilated_d36"))}
    tables = {k: table(p, simulation) for k, p in problems.items()}
    costs = tried({k: {c: Trial(t, 0.0) for c, t in times.items()} for k, times in tables.items()})
    name = workloads.find("dilated_d12")[0].problem().describe()
    found = likely.Experience(costs, problems, simulation.target).likeliest(problems[name])
    best = min(tables[name].values())
    assert min(simulation.true_time(problems[name], c) for c in found) < 1.05 * best
    assert simulation.true_time(problems[name], found[0]) == pytest.approx(best, rel=0.1)
