"""Several simulated devices at once: the work divided, the trials in one journal, each one's accidents its own."""

import json
import os
import subprocess
import sys

import pytest
import test_commands
import torch
from test_commands import DEVICE, PART, run, trials, winners

from triton_conv import workloads
from triton_conv.autotune import fleet, upkeep
from triton_conv.autotune.simulated import SimulatedLab, Simulation
from triton_conv.configs import ConfigFile
from triton_conv.errors import DeviceError

here = test_commands.here
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of devices that are not there")

FOUR = DEVICE + ",count=4"
GROUPED = workloads.find("grouped")


def test_devices_by_name_and_number():
    assert fleet.devices(DEVICE, None) == [DEVICE]
    assert fleet.devices(FOUR, "all") == [f"{FOUR},index={i}" for i in range(4)]
    assert fleet.devices(FOUR, "2,0,2") == [f"{FOUR},index=2", f"{FOUR},index=0"]
    assert fleet.devices(DEVICE, "all") == [f"{DEVICE},index=0"]


@pytest.mark.parametrize(
    ("device", "gpus", "phrase"),
    [(FOUR, "4", "no device 4; all, or of 0, 1, 2, 3"), (FOUR, "first", "no device first"),
     ("cuda", "0", "no device 0"), ("cuda:1", "all", "both name devices")],
)  # fmt: skip
def test_devices_that_are_not_there(device, gpus, phrase):
    with pytest.raises(DeviceError, match=phrase):
        fleet.devices(device, gpus)


def test_every_workload_is_dealt_to_one_device():
    shares = fleet.share(range(10), 4)
    assert sorted(number for share in shares for number in share) == list(range(10))
    assert {len(share) for share in shares} == {2, 3}


def test_devices_of_two_kinds_are_refused():
    labs = [SimulatedLab(Simulation(board=board)) for board in ("h100", "a100")]
    with pytest.raises(DeviceError, match=r"first is H100 .*132 multiprocessors.* and second is A100"):
        fleet.same_target(labs, ["first", "second"])


def test_devices_whose_noise_is_their_own():
    first, second = (SimulatedLab(Simulation(seed=1, index=index)) for index in (0, 1))
    assert first.sample(100.0) == SimulatedLab(Simulation(seed=1)).sample(100.0) != second.sample(100.0)


def tuned(folder, *more, device=FOUR, budget=1000):
    arguments = ("--workload", "grouped", "--budget", budget, "--device", device, "--preset", "normal", *more)
    return run("tune", *arguments, "--store", folder)


def test_four_devices_find_what_one_does(tmp_path):
    outcome = tmp_path / "outcome.json"
    quiet = FOUR + ",noise=0"
    assert tuned(tmp_path / "four", "--gpus", "all", "--json", outcome, device=quiet) == 0
    assert tuned(tmp_path / "one", device=quiet) == 0
    assert winners(tmp_path / "four").keys() == winners(tmp_path / "one").keys()
    titles = [row["workload"] for row in json.loads(outcome.read_text())["outcomes"]]
    assert titles == [workload.title for workload in GROUPED]
    rows = trials(tmp_path / "four")
    assert len(rows) == 96 * len(GROUPED) == len({str(row) for row in rows})
    assert not list((tmp_path / "four" / PART).glob("trials-*"))


def test_trials_of_a_run_that_was_killed_are_gathered(tmp_path):
    assert tuned(tmp_path, "--gpus", "0,1") == 0
    every = trials(tmp_path)
    # As a kill leaves them: each device's own journal, the last line of one cut off.
    lines = [json.dumps(row) for row in every]
    (tmp_path / PART / "trials.jsonl").write_text(lines[0] + "\n")
    (tmp_path / PART / "trials-0.jsonl").write_text("\n".join(lines[1:50]) + "\n")
    (tmp_path / PART / "trials-1.jsonl").write_text("\n".join(lines[40:]) + '\n{"problem')
    assert run("resume", "--store", tmp_path, "--budget", 1000) == 0
    assert sorted(map(str, trials(tmp_path))) == sorted(map(str, every))
    assert not list((tmp_path / PART).glob("trials-*"))


def test_an_error_of_one_device_leaves_what_the_others_found(tmp_path, monkeypatch):
    opened = SimulatedLab.open

    def broken(self, workload, *rest):
        if workload.title == GROUPED[1].title:
            raise OSError(28, "No space left on device")
        return opened(self, workload, *rest)

    monkeypatch.setattr(SimulatedLab, "open", broken)
    assert tuned(tmp_path, "--gpus", "all") == 2
    assert winners(tmp_path).keys() == {GROUPED[i].problem().describe() for i in (0, 2)}
    assert {row["workload"] for row in trials(tmp_path)} == {GROUPED[i].title for i in (0, 2)}


def test_processes_that_die_on_two_devices(tmp_path):
    """The real command, each device behind a process of its own."""
    device = "simulated:h100,count=2,seed=6,nan=0.1,crash=0.06"
    done = subprocess.run(
        [sys.executable, "-m", "triton_conv.cli", "tune", "--workload", "narrow_groups_8,narrow_groups_4", "--gpus",
         "all", "--device", device, "--preset", "rapid", "--budget", "100", "--store", str(tmp_path)],
        check=False, capture_output=True, text=True, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = trials(tmp_path)
    assert len(rows) == 32 == len({str(row) for row in rows})
    assert {"killed: the process died of SIGSEGV", "wrong result"} == {row.get("failure") for row in rows} - {None}
    assert all(isinstance(file, ConfigFile) for _, file in upkeep.files(tmp_path))
    assert len(winners(tmp_path)) == 2
    assert "\x1b" not in done.stdout + done.stderr, "plain lines where there is no terminal"
