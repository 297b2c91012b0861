"""What won on other problems: which tiles, in which order, and a tuning that tries nothing else."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from test_commands import DEVICE, PART, here, run, trials, tuned
from test_portfolio import FLAGSHIP, A, B, C, key

from triton_conv import configs, workloads
from triton_conv.autotune import cover, upkeep
from triton_conv.autotune.journal import Journal, tables
from triton_conv.autotune.lab import Trial
from triton_conv.autotune.portfolio import won
from triton_conv.autotune.search import LIKELIEST, Candidate, Search
from triton_conv.autotune.simulated import SimulatedLab, Simulation
from triton_conv.autotune.store import store_entry
from triton_conv.autotune.tune import tune
from triton_conv.defaults import default_tile
from triton_conv.dispatch import forms

assert here  # a fixture, for every test

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of devices that are not there")

KERNEL, TARGET = "implicit_gemm", Simulation().target
FEW = "narrow_groups_4,narrow_groups_8,wide_groups_56,dilated_d4,dilated_d12,dilated_d36"


def layer(channels):
    return replace(FLAGSHIP, input=(8, channels, 65, 65), weight=(channels, channels, 3, 3))


# ------------------------------------------------------------------------------------------------------- which tiles


def test_what_won_elsewhere_the_nearest_first():
    costs = {
        key(64): {A: 0.0, B: 0.4, C: 0.5},
        key(512): {B: 0.0, A: 0.4, C: 0.5},
        key(2048): {C: 0.0, A: 0.4, B: 0.5},
        key(4096): {C: 0.0},
    }
    assert cover.of_others(costs, key(512)) == [C, A]
    assert cover.of_others(costs, key(64)) == [B, C]
    # Of what nobody tried all the others speak.
    assert cover.of_others(costs, key(128)) == [A, B, C]
    assert cover.of_others({key(64): {A: 0.0}}, key(64)) == []


def test_there_are_at_most_twelve():
    grown = [replace(A, BLOCK_M=m, BLOCK_N=n) for m in (16, 32, 64, 128) for n in (16, 32, 64, 128)]
    costs = {key(16 * (i + 1)): {tile: 0.0} for i, tile in enumerate(grown)}
    assert len(cover.of_others(costs, key(512))) == 12


def test_lacking_is_what_fits_and_was_not_tried():
    problem = layer(512).problem()
    huge = replace(A, BLOCK_M=1024, BLOCK_N=1024, num_stages=8)
    costs = {KERNEL: {key(64): {A: 0.0}, key(128): {B: 0.0}, key(256): {huge: 0.0}}}
    assert cover.lacking(costs, {}, problem, TARGET) == [Candidate(KERNEL, B), Candidate(KERNEL, A)]
    failed = {Candidate(KERNEL, B): Trial(failure="wrong result")}
    assert cover.lacking(costs, failed, problem, TARGET) == [Candidate(KERNEL, A)]


def test_the_store_and_the_journal_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "FOLDERS", (("user tuned", lambda: tmp_path), configs.FOLDERS[1]))
    entry = configs.Entry(A, 10.0, (9.0, 11.0), 20.0, 1e-3, 1)
    store_entry(tmp_path, KERNEL, TARGET, layer(64).problem(), entry)
    configs.forget()
    journal = Journal(tmp_path / "trials.jsonl", TARGET)
    found, problem = cover.Cover(TARGET, journal), layer(512).problem()
    default = Candidate(KERNEL, default_tile(KERNEL, problem, TARGET))
    assert found.of(problem) == [Candidate(KERNEL, A)]
    assert found.untried(problem) == [default, Candidate(KERNEL, A)]
    # What is written counts at once, and is read by the next process.
    journal.write("w", layer(256).problem(), Candidate(KERNEL, B), Trial(5.0, 1e-3))
    journal.write("w", problem, Candidate(KERNEL, A), Trial(7.0, 1e-3))
    journal.write("w", problem, default, Trial(8.0, 1e-3))
    for each in (found, cover.Cover(TARGET, Journal(tmp_path / "trials.jsonl", TARGET))):
        assert each.untried(problem) == [Candidate(KERNEL, B)]
        assert each.table(problem)[default].time_us == 8.0


def test_a_search_begins_with_what_won_elsewhere_though_it_is_no_value_of_the_space():
    problem = layer(512).problem()
    odd, huge = replace(A, BLOCK_N=512), replace(A, BLOCK_M=1024, BLOCK_N=1024, num_stages=8)
    assert odd.unfit(problem, TARGET) is None
    search = Search(problem, TARGET, None, [Candidate(KERNEL, odd), Candidate(KERNEL, huge)])
    first = search.round()
    assert first[: len(search.defaults) + 1] == [*search.defaults, Candidate(KERNEL, odd)]
    assert Candidate(KERNEL, huge) not in first


# ----------------------------------------------------------------------------------------------------- a tuning of them


def told(folder):
    """Costs and tables of all that is written down."""
    file = folder / PART / "trials.jsonl"
    # A line that a process was killed over has no end.
    found = tables([json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")])
    return won(found), found


def lacking(folder, names=FEW):
    costs, found = told(folder)
    problems = [workload.problem() for workload in workloads.find(names)]
    return [c for p in problems for c in cover.lacking(costs, found.get(p.describe(), {}), p, TARGET)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Stores of six layers, sixteen tiles tried on each, that know nothing of each other."""
    folder = tmp_path_factory.mktemp("alone")
    for name in FEW.split(","):
        assert tuned(folder / name, "--preset", "rapid", workload=name) == 0
    return [folder / name for name in FEW.split(",")]


@pytest.fixture
def store(alone, tmp_path):
    """All of them in one."""
    assert run("merge", *alone, "--store", tmp_path) == 0
    return tmp_path


def test_the_command_tries_the_portfolio_and_nothing_else(store, capsys):
    before, missing = len(trials(store)), lacking(store)
    assert missing
    assert tuned(store, "--portfolio", workload=FEW) == 0
    assert "6 of 6 workloads tried with every tile of a portfolio of the others" in capsys.readouterr().out
    assert lacking(store) == []
    rows = [str((row["problem"], row["kernel"], row["tile"])) for row in trials(store)]
    assert len(rows) == len(set(rows)) > before
    # What is new had won somewhere: few tiles are, of the hundreds that each space has.
    assert len(rows) - before <= 6 * 12
    # All is known: the second call finds nothing to do, and says so.
    assert tuned(store, "--portfolio", workload=FEW) == 0
    assert "6 of 6" in capsys.readouterr().out
    assert len(trials(store)) == len(rows)


def test_a_call_that_was_killed_is_resumed(store, tmp_path_factory):
    killed, before = tmp_path_factory.mktemp("killed") / "store", len(trials(store))
    shutil.copytree(store, killed)
    assert tuned(store, "--portfolio", workload=FEW) == 0
    lines = (store / PART / "trials.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) > before + 1
    # In the middle of its second trial, and before any final.
    (killed / PART / "trials.jsonl").write_text("".join(lines[: before + 1]) + lines[before + 1][:40])
    shutil.copy(store / PART / "session.json", killed / PART)
    assert lacking(killed)
    assert run("resume", "--budget", 1000, "--store", killed) == 0
    assert lacking(killed) == []
    after = (killed / PART / "trials.jsonl").read_text().splitlines(keepends=True)
    assert after[: before + 1] == lines[: before + 1]
    rows = [json.loads(line) for line in after if line.endswith("}\n")]
    tried = {str((row["problem"], row["kernel"], row["tile"])) for row in rows}
    assert len(tried) == len(rows) > before + 1


def test_the_budget_is_kept(store):
    lab = SimulatedLab(Simulation.parse(DEVICE))
    outcomes = tune(
        workloads.find(FEW), seconds=0.8, lab=lab, folder=store, journal=store / PART / "trials.jsonl", portfolio=True
    )
    assert lab.spent <= 0.8 * 1.05
    assert len(outcomes) < 6


def test_trials_of_other_files_are_not_repeated(store, tmp_path_factory):
    """As the GPU run does with what is committed: an empty store, and all that is known of the device."""
    known, fresh = store / PART / "trials.jsonl", tmp_path_factory.mktemp("fresh")
    seen = {str((row["problem"], row["kernel"], row["tile"])) for row in trials(store)}
    tune(
        workloads.find(FEW), seconds=1000.0, lab=SimulatedLab(Simulation.parse(DEVICE)), folder=fresh,
        journal=fresh / "trials.jsonl", known=(known,), portfolio=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in (fresh / "trials.jsonl").read_text().splitlines()]
    new = {str((row["problem"], row["kernel"], row["tile"])) for row in rows}
    assert new
    assert not new & seen


def test_a_faster_tile_of_another_gets_a_final_and_no_other_does(tmp_path):
    """Two layers of one shape but for the images: the tile that won on the one is the fastest on the other too."""
    near = replace(FLAGSHIP, name="near", input=(9, 512, 65, 65))
    lab = SimulatedLab(Simulation.parse(DEVICE))
    journal = tmp_path / "trials.jsonl"
    tune([FLAGSHIP], seconds=1000.0, lab=lab, folder=tmp_path, journal=journal, most_trials=150)
    names = [kernel.name for kernel in forms(near.problem(), TARGET)[0]]
    found = {o.workload: o for o in tune([FLAGSHIP, near], seconds=1000.0, lab=lab, folder=tmp_path, journal=journal,
                                         portfolio=True)}  # fmt: skip
    winner, stays = found[near.title], found[FLAGSHIP.title]
    assert winner.trials == len(names) + 1
    assert winner.gain > 1
    assert winner.interval_us[0] > 0
    assert stays.tile == winner.tile
    assert stays.interval_us[0] != stays.interval_us[0], "it was not run again"
    stored = {key: e.tile for _, f in upkeep.files(tmp_path) for key, e in f.entries.items()}
    assert str(stored[near.problem().describe()]) == winner.tile


def test_every_tuning_begins_with_what_won_elsewhere(store):
    """The likeliest few after the defaults, and before what this problem's own trials speak for."""
    before = len(trials(store))
    near = replace(FLAGSHIP, name="near", input=(9, 512, 65, 65))
    problem = near.problem()
    names = [kernel.name for kernel in forms(problem, TARGET)[0]]
    defaults = [Candidate(name, default_tile(name, problem, TARGET)) for name in names]
    journal = Journal(None, TARGET, [store / PART / "trials.jsonl"])
    expected = [*defaults, *cover.Cover(TARGET, journal).of(problem)[:LIKELIEST]]
    assert len(expected) > len(defaults)
    tune(
        [near], seconds=1000.0, lab=SimulatedLab(Simulation.parse(DEVICE)), folder=store,
        journal=store / PART / "trials.jsonl", most_trials=16,
    )  # fmt: skip
    rows = [json.loads(line) for line in (store / PART / "trials.jsonl").read_text().splitlines()][before:]
    assert [(row["kernel"], row["tile"]) for row in rows[: len(expected)]] == [
        (candidate.kernel, candidate.tile.asdict()) for candidate in expected
    ]
    assert len(rows) == 16
