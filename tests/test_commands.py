"""The tuner's commands on a simulated device: what they write, and what they go on from."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from triton_conv import cli, configs, dispatch, ops, workloads
from triton_conv.autotune import commands, search, space, store, upkeep
from triton_conv.autotune.journal import read_trials
from triton_conv.autotune.simulated import SimulatedLab, Simulation, table
from triton_conv.autotune.tune import tune
from triton_conv.configs import ConfigFile, Entry
from triton_conv.target import KNOWN

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of devices that are not there")

DEVICE = "simulated:h100,seed=1"
NAME = "narrow_groups_8"
WORKLOAD = workloads.find(NAME)[0]
SIMULATION = Simulation(seed=1)
PART = Path("simulated-sm_90/h100-80gb-hbm3-132sm")


class InProcess(SimulatedLab):
    """What a command would start a process for, in this one."""

    def __init__(self, device):
        super().__init__(Simulation.parse(device))


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "WorkerLab", InProcess)
    monkeypatch.setenv("TRITON_CONV_HOME", str(tmp_path / "home"))
    ops.forget_plans()
    yield
    ops.forget_plans()


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def tuned(folder, *more, workload=NAME, budget=1000, device=DEVICE):
    return run("tune", "--workload", workload, "--budget", budget, "--device", device, "--store", folder, *more)


def trials(folder):
    return read_trials(folder / PART / "trials.jsonl")


def winners(folder):
    return {key: entry.tile for _, file in upkeep.files(folder) for key, entry in file.entries.items()}


# -------------------------------------------------------------------------------------------------------- tune, resume


def test_tune_finds_the_best_tile_and_writes_it_down(tmp_path, capsys):
    outcome = tmp_path / "outcome.json"
    assert tuned(tmp_path, "--json", outcome) == 0
    every = table(WORKLOAD.problem(), SIMULATION)
    best = min(every, key=every.get)
    assert winners(tmp_path) == {WORKLOAD.problem().describe(): best.tile}
    assert len(trials(tmp_path)) == len(every) == len({str(row) for row in trials(tmp_path)})
    (row,) = json.loads(outcome.read_text())["outcomes"]
    assert (row["kernel"], row["tile"], row["trials"]) == (best.kernel, str(best.tile), len(every))
    assert "winners and trials are in" in capsys.readouterr().out


@pytest.mark.parametrize(("preset", "count"), [("rapid", 16), ("normal", 96)])
def test_a_preset_ends_the_search(preset, count, tmp_path):
    assert tuned(tmp_path, "--preset", preset) == 0
    assert len(trials(tmp_path)) == count


def test_resume_goes_on_and_repeats_nothing(tmp_path):
    assert tuned(tmp_path, budget=2) == 0
    first = trials(tmp_path)
    assert run("resume", "--store", tmp_path, "--budget", 1000) == 0
    every = trials(tmp_path)
    assert every[: len(first)] == first
    given = [(row["kernel"], str(row["tile"])) for row in every]
    assert len(first) < len(given) == len(set(given)) == len(table(WORKLOAD.problem(), SIMULATION))


def test_a_run_cut_anywhere_is_resumed_to_the_same_winner(tmp_path, monkeypatch):
    """As after kill -9 at any byte: the journal ends where the process did."""
    # All of a small space, so that the winner depends on no order.
    monkeypatch.setattr(search, "candidates", lambda *of: space.candidates(*of)[:60])
    assert tuned(tmp_path / "whole", device=DEVICE + ",noise=0") == 0
    goal = winners(tmp_path / "whole")
    content = (tmp_path / "whole" / PART / "trials.jsonl").read_bytes()
    draw = random.Random(0)
    for number in range(20):
        folder = tmp_path / str(number)
        (folder / PART).mkdir(parents=True)
        cut = content[: draw.randrange(len(content))]
        (folder / PART / "trials.jsonl").write_bytes(cut)
        (folder / PART / "session.json").write_bytes((tmp_path / "whole" / PART / "session.json").read_bytes())
        assert run("resume", "--store", folder, "--budget", 1000) == 0
        assert winners(folder) == goal
        whole = [json.loads(line) for line in content.splitlines()]
        kept = [row for line in (folder / PART / "trials.jsonl").read_text().splitlines() if (row := read(line))]
        # At most the trial under way is lost, and made up for.
        assert kept[: cut.count(b"\n")] == whole[: cut.count(b"\n")]


def read(line):
    try:
        return json.loads(line)
    except ValueError:
        return None


FAULTY = DEVICE + ",nan=0.1,oob=0.1,abort=0.1"


def test_faults_are_recorded_never_stored_and_never_tried_again(tmp_path):
    assert tuned(tmp_path, device=FAULTY) == 0
    rows, simulation = trials(tmp_path), Simulation.parse(FAULTY)
    assert len({str(row["tile"]) + str(row["kernel"]) for row in rows}) == len(rows)
    found = {kind: sum(row.get("failure") == kind for row in rows) for kind in KINDS}
    assert all(found.values())
    assert sum(found.values()) == sum("failure" in row for row in rows)
    (stored,) = (entry for _, file in upkeep.files(tmp_path) for entry in file.entries.values())
    every = table(WORKLOAD.problem(), simulation)
    assert stored.tile == min(every, key=every.get).tile
    assert run("resume", "--store", tmp_path, "--budget", 1000) == 0
    assert trials(tmp_path) == rows


KINDS = ("wrong result", "out-of-bounds write", "compiler aborted")


def test_the_budget_is_kept_by_the_devices_own_clock(tmp_path):
    """Ten runs on a clock that only the device's work moves."""
    for seed in range(10):
        lab = SimulatedLab(Simulation(seed=seed, noise=0.05))
        few = workloads.find("grouped")
        outcomes = tune(few, seconds=9.0, lab=lab, folder=tmp_path / str(seed), report=lambda line: None)
        assert len(outcomes) == len(few)
        assert 0.9 * 9 < lab.now() <= 1.05 * 9


def test_the_first_interrupt_finishes_and_writes(tmp_path, monkeypatch, capsys):
    judged = commands.Race.trial

    def interrupt(self, *arguments):
        judged(self, *arguments)
        if self._trials == 20:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(commands.Race, "trial", interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert tuned(tmp_path) == 130
    assert len(trials(tmp_path)) == 20
    assert winners(tmp_path)
    captured = capsys.readouterr()
    assert "resume" in captured.out
    assert "Ctrl-C again" in captured.err
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_interrupt_stops_at_once(tmp_path, monkeypatch, capsys):
    def interrupt(self, *arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(commands.Race, "trial", interrupt)
    assert tuned(tmp_path) == 130
    assert not winners(tmp_path)
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """kill -9 of the real command, again and again: files stay valid, and in the end the winners are the same."""
    device = "simulated:h100,seed=1,pace=2"
    command = [sys.executable, "-m", "triton_conv.cli"]
    tune = ["tune", "--workload", NAME, "--device", device, "--preset", "normal"]
    journal, draw = tmp_path / PART / "trials.jsonl", random.Random(1)
    for number in range(20):
        size = journal.stat().st_size if journal.is_file() else 0
        process = subprocess.Popen(
            [*command, *(["resume"] if size else tune), "--budget", "600", "--store", str(tmp_path)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ,
        )  # fmt: skip
        # Until it is under way, and then anywhere in its first few trials.
        while process.poll() is None and (journal.stat().st_size if journal.is_file() else 0) == size:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.7))
        process.kill()
        process.wait()
        for path, file in upkeep.files(tmp_path):
            assert isinstance(file, ConfigFile), path
        # Of each process at most the trial that it was killed over.
        assert sum(read(line) is None for line in journal.read_text().splitlines()) <= number + 1
    done = subprocess.run(
        [*command, "resume", "--budget", "600", "--store", str(tmp_path)], check=False, env=os.environ, timeout=120
    )
    assert done.returncode == 0
    assert tuned(tmp_path / "whole", "--preset", "normal") == 0
    assert winners(tmp_path).keys() == winners(tmp_path / "whole").keys()
    assert len(trials(tmp_path)) == 96


# ------------------------------------------------------------------------------------- report, verify, merge, promote


@pytest.fixture
def tuned_store(tmp_path):
    assert tuned(tmp_path / "store", "--preset", "rapid") == 0
    return tmp_path / "store"


def test_report_shows_gains_with_their_intervals(tuned_store, tmp_path, capsys):
    file = tmp_path / "report.json"
    assert run("report", "--store", tuned_store, "--json", file) == 0
    assert "1 problem, 0 slower than the default" in capsys.readouterr().out
    (row,) = json.loads(file.read_text())["entries"]
    assert row["gain"] == pytest.approx(row["default_time_us"] / row["time_us"])


SPOILT = {
    "truncated": (lambda text: text[: len(text) // 2], "not a readable file"),
    "schema": (lambda text: text.replace('"schema": 1', '"schema": 9'), "schema 9, expected 1"),
    "hash": (lambda text: text.replace('"kernel_hash": "', '"kernel_hash": "0'), "stale"),
    "device": (lambda text: text.replace('"device": {', '"devise": {'), "not a readable file"),
    "tile": (lambda text: text.replace('"BLOCK_M": ', '"BLOCK_M": 3'), "BLOCK_M"),
    "interval": (lambda text: text.replace('"time_us": ', '"time_us": 9'), "outside its interval"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_verify_finds_what_is_wrong(name, tuned_store, capsys):
    assert run("verify", "--store", tuned_store) == 0
    change, phrase = SPOILT[name]
    (path,) = (path for path, _ in upkeep.files(tuned_store))
    spoilt = change(path.read_text())
    path.write_text(spoilt)
    capsys.readouterr()
    assert run("verify", "--store", tuned_store) == 1
    assert phrase in " ".join(capsys.readouterr().out.split())
    assert path.read_text() == spoilt


def test_a_truncated_file_is_left_as_it_is_by_tune_and_merge(tuned_store, tmp_path, capsys):
    (path,) = (path for path, _ in upkeep.files(tuned_store))
    path.write_text(path.read_text()[:50])
    with pytest.warns(UserWarning, match="skipping"):
        assert tuned(tuned_store, "--preset", "normal") == 1
    assert "not stored" in capsys.readouterr().out
    assert run("merge", tuned_store, "--store", tmp_path / "other") == 2
    assert len(path.read_text()) == 50


def test_merge_takes_the_faster_winner_and_every_trial_once(tuned_store, tmp_path):
    other, goal = tmp_path / "other", tmp_path / "goal"
    assert tuned(other, "--preset", "normal") == 0
    for _ in range(2):
        assert run("merge", tuned_store, other, "--store", goal) == 0
        assert winners(goal) == winners(other)
        known = {str(row) for row in trials(goal)}
        assert len(known) == len(trials(goal))
        assert {str(row) for row in trials(tuned_store) + trials(other)} == known


def test_what_was_simulated_is_not_promoted(tuned_store, tmp_path, capsys):
    assert run("promote", "--store", tuned_store, "--into", tmp_path / "shipped") == 2
    assert "not measured on a device but simulated" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "shipped").exists()


def recorded(folder, simulation=SIMULATION):
    """A store as if tables of real trials had been measured: all the flagships of one kernel."""
    target = KNOWN["sm_90"]
    lines = []
    for name in ("dilated_1d", "dilated_d4", "dilated_d12", "dilated_d36", "wide_groups_56"):
        problem = workloads.find(name)[0].problem()
        every = table(problem, simulation)
        best = min(every, key=every.get)
        entry = Entry(best.tile, every[best], (every[best], every[best]), 2 * every[best], 1e-3, len(every))
        store.store_entry(folder, best.kernel, target, problem, entry)
        for candidate, time_us in every.items():
            lines.append(
                {"problem": problem.describe(), "kernel": candidate.kernel, "tile": candidate.tile.asdict(),
                 "kernel_hash": configs.kernel_hash(candidate.kernel), "time_us": time_us, "relative_error": 1e-3}
            )  # fmt: skip
    journal = folder / target.config_folder / "trials.jsonl"
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_promote_ships_winners_and_a_portfolio_that_plans_use(tmp_path, monkeypatch):
    recorded(tmp_path / "store")
    shipped = tmp_path / "shipped"
    report = tmp_path / "report.json"
    assert run("promote", "--store", tmp_path / "store", "--into", shipped, "--json", report) == 0
    assert winners(shipped) == winners(tmp_path / "store")
    figures = json.loads(report.read_text())["portfolios"][KNOWN["sm_90"].config_folder]["implicit_gemm"]
    assert figures["geomean"] < figures["default_geomean"]
    monkeypatch.setattr(configs, "FOLDERS", (("shipped exact", lambda: shipped),))
    monkeypatch.setattr(configs, "SOURCES", ("shipped exact",))
    ops.forget_plans()
    new = replace(workloads.find("dilated_d12")[0], input=(7, 2048, 65, 65))
    made = dispatch.plan(new.problem(), KNOWN["sm_90"])
    assert made.source == "shipped portfolio"
    assert "hw65x65" in made.notes[-1]
