"""`triton-conv verify` with a device: stored winners run again, and what no longer holds is named."""

import json

import pytest
import test_commands
import torch
from test_commands import DEVICE, NAME, SIMULATION, WORKLOAD, run, tuned

from triton_conv.autotune import upkeep, verification
from triton_conv.autotune.simulated import table

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of devices that are not there")
here, tuned_store = test_commands.here, test_commands.tuned_store


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    monkeypatch.setattr(verification, "WorkerLab", test_commands.InProcess)


def verified(folder, *more, device=DEVICE):
    return run("verify", "--store", folder, "--device", device, *more)


def changed(folder, **changes):
    """The only entry of the only file, changed."""
    ((path, _),) = upkeep.files(folder)
    content = json.loads(path.read_text())
    (entry,) = content["entries"].values()
    entry |= changes
    path.write_text(json.dumps(content))
    return path


def test_winners_run_again(tuned_store, tmp_path, capsys):
    file = tmp_path / "verified.json"
    assert verified(tuned_store, "--json", file) == 0
    assert "1 of 1 winners of this device ran again" in capsys.readouterr().out
    (row,) = json.loads(file.read_text())["entries"]
    assert row["time_us"] == pytest.approx(row["stored_time_us"], rel=0.05)
    assert row["default_time_us"] > row["time_us"]


def test_a_winner_that_is_slower_than_the_default(tuned_store, capsys):
    every = table(WORKLOAD.problem(), SIMULATION)
    slow = max((candidate for candidate in every if candidate.kernel == "grouped_packed"), key=every.get)
    changed(tuned_store, tile=slow.tile.asdict())
    assert verified(tuned_store) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "slower than the default:" in shown
    assert "tune it again" in shown


def test_a_time_that_no_longer_holds(tuned_store, capsys):
    path = changed(tuned_store, time_us=1.0, interval_us=[0.9, 1.1])
    before = path.read_bytes()
    assert verified(tuned_store) == 1
    assert "1.0 us when it was stored" in " ".join(capsys.readouterr().out.split())
    assert path.read_bytes() == before


@pytest.mark.parametrize(("fault", "phrase"), [("nan", "wrong result"), ("oob", "out-of-bounds write")])
def test_a_winner_that_is_wrong_now(fault, phrase, tuned_store, capsys):
    assert verified(tuned_store, device=f"{DEVICE},{fault}=1.0") == 1
    assert f"its tile fails now: {phrase}" in " ".join(capsys.readouterr().out.split())


def test_without_a_device_only_the_files_are_checked(tuned_store, capsys):
    assert run("verify", "--store", tuned_store) == 0
    assert "no time was checked" in " ".join(capsys.readouterr().out.split())


def test_a_problem_that_no_workload_has(tuned_store, tmp_path, capsys):
    ((path, _),) = upkeep.files(tuned_store)
    content = json.loads(path.read_text())
    content["entries"] = {key.replace("n64 ", "n63 "): entry for key, entry in content["entries"].items()}
    path.write_text(json.dumps(content))
    assert verified(tuned_store) == 0
    assert "no workload known here has this problem" in " ".join(capsys.readouterr().out.split())
    layer = {"name": "mine", "kind": "grouped", "function": "conv2d", "input": [63, 104, 28, 28],
             "weight": [104, 8, 3, 3], "arguments": {"padding": 1, "groups": 13}, "channels_last": True}  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps([layer]))
    assert verified(tuned_store, "--workload", tmp_path / "mine.json") == 0
    assert "1 of 1 winners" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "phrase"),
    [("cuda", "no GPU here"), ("simulated:z80", "cannot be simulated"), ("simulated:a100", "nothing in")],
)
def test_devices_it_cannot_use(device, phrase, tuned_store, capsys):
    assert verified(tuned_store, device=device) == 2
    assert phrase in " ".join(capsys.readouterr().err.split())


def test_the_budget_ends_it(tuned_store, capsys):
    assert verified(tuned_store, "--budget", "1e-9") == 0
    assert "out of time" in capsys.readouterr().out
    assert tuned(tuned_store, workload=NAME, budget=2) == 0
