"""The tuner's commands on a simulated device: what they refuse, and those that need none."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_commands
import torch
from filelock import FileLock
from test_commands import DEVICE, NAME, PART, recorded, run, tuned, winners

import triton_conv as tc
from triton_conv import workloads, writing
from triton_conv.aot import Compiled
from triton_conv.autotune import journal, store, upkeep
from triton_conv.autotune.funnel import filtered
from triton_conv.autotune.journal import read_trials, tables
from triton_conv.autotune.lab import Trial
from triton_conv.autotune.search import Candidate
from triton_conv.autotune.selection import of_model, select, workload_of
from triton_conv.autotune.simulated import Simulation
from triton_conv.errors import StoreError, WorkloadError
from triton_conv.kernels import KERNELS
from triton_conv.target import KNOWN

here, tuned_store = test_commands.here, test_commands.tuned_store
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of devices that are not there")


# ----------------------------------------------------------------------------------------------------- what is refused


def test_two_tuners_of_one_store(tuned_store, capsys):
    before = winners(tuned_store)
    with FileLock(tuned_store / PART / "tuning.lock"):
        assert tuned(tuned_store) == 2
    assert "another tuner is writing" in " ".join(capsys.readouterr().err.split())
    assert winners(tuned_store) == before


def test_a_store_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert tuned(tmp_path / "file" / "store") == 2
    assert "store: cannot create" in " ".join(capsys.readouterr().err.split())


def test_a_full_disk_leaves_the_file_of_before(tuned_store, monkeypatch, capsys):
    before = winners(tuned_store)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    # What is written takes its place after this.
    monkeypatch.setattr(writing.os, "chmod", full)
    assert tuned(tuned_store, "--preset", "normal") == 1
    assert "not stored: [Errno 28]" in capsys.readouterr().out
    monkeypatch.undo()
    assert winners(tuned_store) == before


def test_a_disk_that_fills_up_while_trials_are_kept(tuned_store, monkeypatch, capsys):
    before, lines = winners(tuned_store), (tuned_store / PART / "trials.jsonl").read_bytes()
    write = journal.Journal.write

    def full(self, *arguments):
        full.count += 1
        if full.count > 5:
            raise OSError(28, "No space left on device", str(self._path))
        write(self, *arguments)

    full.count = 0
    monkeypatch.setattr(journal.Journal, "write", full)
    assert tuned(tuned_store, "--preset", "normal") == 2
    assert "trials.jsonl: No space left on device" in capsys.readouterr().err.replace("\n", "")
    monkeypatch.undo()
    assert winners(tuned_store) == before
    assert (tuned_store / PART / "trials.jsonl").read_bytes().startswith(lines)
    assert len(read_trials(tuned_store / PART / "trials.jsonl")) == 16 + 5


def test_a_full_disk_leaves_the_session_of_before(tuned_store, monkeypatch, capsys):
    file = tuned_store / PART / "session.json"
    before = file.read_bytes()

    def full(self, text):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.Path, "write_text", full)
    assert tuned(tuned_store, "--preset", "normal") == 2
    monkeypatch.undo()
    assert "session.json:Nospaceleftondevice" in "".join(capsys.readouterr().err.split())
    assert file.read_bytes() == before
    assert not list(file.parent.glob(".*.new"))


def test_a_journal_that_cannot_grow_is_named():
    problem = workloads.find("dilated_d4")[0].problem()
    tile = KERNELS["implicit_gemm"].safe_tile
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        journal.Journal(Path("/dev/full"), Simulation().target).write(
            "dilated_d4", problem, Candidate("implicit_gemm", tile), Trial(1.0, 1e-3)
        )


def test_a_file_in_another_devices_folder_is_reported(tuned_store, capsys):
    (tuned_store / PART).rename(tuned_store / "simulated-sm_90" / "b200-148sm")
    assert run("report", "--store", str(tuned_store)) == 2
    assert "inanotherdevice'sfolder" in "".join(capsys.readouterr().err.split())


def test_a_tile_that_its_kernel_no_longer_takes_is_no_winner(tuned_store, monkeypatch):
    """A constraint that was declared after it was measured."""
    (before,) = winners(tuned_store).values()
    unfit = type(before).mismatch
    monkeypatch.setattr(
        type(before), "mismatch", lambda tile, problem: "declared" if tile == before else unfit(tile, problem)
    )
    assert tuned(tuned_store, "--preset", "normal") == 0
    (after,) = winners(tuned_store).values()
    assert after != before
    problem = workloads.find(NAME)[0].problem()
    rows = tables(read_trials(tuned_store / PART / "trials.jsonl"))
    assert before in {candidate.tile for candidate in rows[problem.describe()]}
    kept = upkeep.fitting(rows, {problem.describe(): problem}, KNOWN["sm_90"])
    assert before not in {candidate.tile for candidate in kept[problem.describe()]}


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["tune", "--workload", "nope", "--budget", "1"], "workload: 'nope' is not known"),
        (["tune", "--budget", "1"], "name either --workload or --model"),
        (["tune", "--workload", NAME, "--op", "conv3d", "--budget", "1"], "no workload of conv3d"),
        (["tune", "--model", "no.module:step", "--budget", "1"], "cannot import 'no.module'"),
        (["tune", "--model", "json:loads_not", "--budget", "1"], "json has no 'loads_not'; it has"),
        (["tune", "--workload", NAME, "--budget", "1", "--device", "simulated:z80"], "'z80' cannot be simulated"),
        (["tune", "--workload", "absent.json", "--budget", "1"], "cannot read absent.json: No such file or directory"),
        (["tune", "--workload", NAME, "--budget", "1"], "no GPU here"),
        (["tune", "--workload", NAME, "--budget", "1", "--gpus", "all", "--device", "cuda:1"], "no GPU here"),
        (["resume", "--budget", "1"], "nothing was tuned in"),
        (["report"], "there is no folder"),
        (["verify"], "there is no folder"),
        (["promote"], "there is no folder"),
        (["merge", "absent"], "there is no folder"),
    ],
)
def test_input_it_cannot_use(arguments, phrase, capsys):
    assert run(*arguments) == 2
    assert phrase in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_no_list_of_layers(tmp_path, capsys):
    file = tmp_path / "layers.json"
    for text, phrase in (
        ("{", "layers.json is not JSON: Expecting property name"),
        ("{}", "is no list of layers"),
        ("[]", "is no list of layers"),
        ("[3]", "is no list of layers"),
        ('[{"kind": "grouped", "function": "conv2d"}]', "layer 0: without name, input, weight"),
    ):
        file.write_text(text)
        assert run("predict", "--workload", file, "--target", "sm_90") == 2
        assert phrase in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "phrase"),
    [
        ({"dtype": "float8"}, "dtype: 'float8' is not known; choose of float16, bfloat16, float32, float64"),
        ({"kind": "dense"}, "kind: 'dense' is not known; choose of grouped, depthwise,"),
        ({"function": "conv7d"}, "function: triton_conv has no 'conv7d'"),
        ({"input": "8x96"}, "input: expected a list of sizes, got '8x96'"),
        ({"weight": [96, 1, -7, 7]}, "weight: expected a list of sizes, got [96, 1, -7, 7]"),
        ({"weight": [96, 1]}, "weight should have at least three dimensions"),
        ({"channels_lst": True}, "channels_lst: not known; choose of name, kind, function,"),
        ({"arguments": {"grops": 96}}, "unexpected keyword argument 'grops'"),
        ({"arguments": {"groups": 95}}, "weight: Given groups=95, expected weight to be divisible by 95"),
        ({"arguments": 3}, "'int' object is not iterable"),
    ],
    ids=lambda wrong: next(iter(wrong)) if isinstance(wrong, dict) else "",
)
def test_a_layer_that_is_not_one(wrong, phrase, tmp_path, capsys):
    """The message names the file, the layer, what is wrong with it, and is one line wherever it is written to."""
    layer = {"name": "mine", "kind": "depthwise", "function": "conv2d", "input": [8, 96, 9, 9], "weight": [96, 1, 7, 7]}
    file = tmp_path / "layers.json"
    file.write_text(json.dumps([layer | wrong]))
    assert run("plan", "--workload", file, "--target", "sm_90") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"triton-conv: workload: {file}, layer 'mine': ") and phrase in line


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["predict", "--target", "sm_90", "--top", "0"], "argument --top: expected a positive number, got 0"),
        (["predict", "--target", "sm_90", "--compile", "-3"], "expected a positive number of seconds, got -3"),
        (["plan", "--compile", "nan"], "argument --compile: expected a positive number of seconds, got nan"),
        (["tune", "--budget", "0"], "argument --budget: expected a positive number of seconds, got 0"),
        (["resume", "--budget", "soon"], "argument --budget: invalid seconds value: 'soon'"),
        (["verify", "--budget", "-1"], "argument --budget: expected a positive number of seconds, got -1"),
        (["inspect", "--processes", "0"], "argument --processes: expected a positive number, got 0"),
        (["cost", "--groups", "-4"], "argument --groups: expected a positive number, got -4"),
    ],
)
def test_an_amount_of_nothing(arguments, phrase, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2 and phrase in capsys.readouterr().err


def test_a_folder_that_is_no_store(tmp_path, capsys):
    assert run("verify", "--store", tmp_path) == 2
    assert f"there is no file of tiles in {tmp_path}" in "".join(capsys.readouterr().err.split("\n"))


def test_a_step_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mine_for_tuning.py").write_text(
        "import torch, triton_conv as tc\n"
        "def step(): tc.conv1d(torch.empty(1, 2, 9, device='meta'), torch.empty(3, 2, 3, device='meta'))\n"
        "def broken(): raise ValueError('boom')\n"
    )
    monkeypatch.chdir(tmp_path)
    (workload,) = select(None, "mine_for_tuning:step", None, False)
    assert workload.weight == (3, 2, 3)
    with pytest.raises(WorkloadError, match=r"broken\(\) raised ValueError: boom \(.*mine_for_tuning.py, line 3\)"):
        select(None, "mine_for_tuning:broken", None, False)


# ------------------------------------------------------------------------------------------- plan, predict, and models


def test_plan_shows_what_the_funnel_removes(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert run("plan", "--workload", "dilated_d4", "--target", "sm_90", "--funnel", "--json", file) == 0
    (row,) = json.loads(file.read_text())["plans"]
    shown = capsys.readouterr().out
    funnels = row["funnel"]["kernels"]
    assert [funnel["kernel"] for funnel in funnels] == [
        "implicit_gemm_boxed", "implicit_gemm_persistent", "implicit_gemm",
    ]  # fmt: skip
    assert len(row["funnel"]["ranked"]) == 64
    for funnel in funnels:
        assert funnel["left"] + sum(funnel["removed"].values()) == funnel["space"]
        left = funnel["space"]
        for stage in funnel["stages"]:
            left -= sum(stage["removed"].values())
            assert left == stage["left"]
        assert any("shared memory" in reason for reason in funnel["removed"])
        assert f"{funnel['space']} candidates, {funnel['left']} left" in shown


def test_the_compilers_figures_filter_what_is_ranked():
    tile = KERNELS["implicit_gemm"].safe_tile
    candidates = [Candidate("implicit_gemm", replace(tile, BLOCK_M=m)) for m in (16, 32, 64, 128, 256)]
    good = Compiled("implicit_gemm", "sm_90", "bfloat16", "", occupancy=0.5, registers=64)
    made = [good, replace(good, error="boom"), replace(good, spill_bytes=8), replace(good, occupancy=0.3), good]
    stage, left = filtered(candidates, made)
    assert left == [candidates[0], candidates[4]]
    assert (stage.left, list(stage.removed.values())) == (2, [1, 1, 1])
    # What was not compiled in the time is not left either.
    assert filtered(candidates, made[:1])[1] == candidates[:1]


@pytest.mark.slow
def test_plan_compiles_what_is_ranked(tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = ("--target", "sm_90", "--funnel", "--top", 3, "--compile", 60, "--json", file)
    assert run("plan", "--workload", NAME, *arguments) == 0
    funnel = json.loads(file.read_text())["plans"][0]["funnel"]
    assert len(funnel["compiled"]) == 3
    assert "3 compiled in the time" in capsys.readouterr().out


def test_tune_without_a_gpu_lists_what_compiles(tmp_path, capsys):
    # One compilation takes longer than the budget and is finished all the same.
    arguments = ("--budget", 0.5, "--target", "sm_90", "--store", tmp_path)
    assert run("tune", "--workload", NAME, *arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("no GPU here")
    listed = [line.split()[0] for line in lines if line.startswith("  ") and "num_warps" in line]
    assert len(listed) == 16 and set(listed) == {"grouped_packed", "grouped_slab"}
    assert "without an error or a spill" in lines[-1]
    assert not winners(tmp_path)


@pytest.mark.parametrize("command", ["plan", "predict"])
def test_a_store_that_is_not_there(command, tmp_path, capsys):
    assert run(command, "--workload", "dilated_d4", "--target", "sm_90", "--store", tmp_path / "nowhere") == 2
    assert "nowhere is not a folder" in " ".join(capsys.readouterr().err.split())


def test_plan_looks_into_the_store_it_is_given(tmp_path, capsys):
    recorded(tmp_path)
    assert run("plan", "--workload", "dilated_d4", "--target", "sm_90", "--store", tmp_path) == 0
    assert "source   user tuned" in capsys.readouterr().out


@pytest.mark.parametrize("goal", ["sm_80", "sm_100", "gfx942"])
def test_predict_ranks_for_a_device_that_is_not_here(goal, tmp_path, capsys):
    file = tmp_path / "predicted.json"
    assert run("predict", "--workload", "dilated_d4", "--target", goal, "--top", 5, "--json", file) == 0
    (row,) = json.loads(file.read_text())["workloads"]
    tiles = [KERNELS[c["kernel"]].tile_type(**c["tile"]) for c in row["candidates"]]
    assert len(set(tiles)) == 5
    problem = workloads.find("dilated_d4")[0].problem()
    assert all(tile.unfit(problem, KNOWN[goal]) is None for tile in tiles)
    assert "nothing is measured" in capsys.readouterr().out


def step():
    """A step of a small model, on the meta device."""
    x = torch.empty(2, 8, 16, 16, device="meta", dtype=torch.bfloat16)
    w = torch.empty(16, 8, 3, 3, device="meta", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.empty(16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(3):
        y = tc.conv2d(x, w, bias, padding=1, activation="relu")
    tc.conv_transpose2d(y, w, stride=2).sum().backward()


def nothing():
    """A step without a convolution."""


def test_a_models_convolutions_are_its_workloads():
    found = of_model(step)
    functions = {(workload.function, workload.part) for workload in found}
    assert {("conv2d", "forward"), ("conv_transpose2d", "forward")} <= functions
    assert any(part == "weight gradient" for _, part in functions)
    assert len({workload.title for workload in found}) == len(found)
    assert any(workload.bias and workload.arguments.get("activation") == "relu" for workload in found)
    with pytest.raises(WorkloadError, match=r"^model: it calls no convolution.*takes nothing and runs a step"):
        of_model(nothing)


def test_tune_takes_a_model(tmp_path):
    sys.modules["a_model"] = sys.modules[__name__]
    try:
        arguments = ("--model", "a_model:step", "--budget", 1000, "--device", DEVICE, "--preset", "rapid")
        assert run("tune", *arguments, "--store", tmp_path) == 0
    finally:
        del sys.modules["a_model"]
    assert len(winners(tmp_path)) == len(of_model(step))


@pytest.mark.parametrize("workload", workloads.FLAGSHIPS, ids=lambda w: w.name)
def test_a_problem_becomes_a_workload_again(workload):
    for part in workload.parts():
        problem = part.problem()
        assert workload_of(problem).problem().describe() == problem.describe()


def test_a_store_waits_for_another_writer_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_PATIENCE", 0.1)
    recorded(tmp_path)
    (path, file), *_ = upkeep.files(tmp_path)
    with FileLock(path.parent / "store.lock"), pytest.raises(StoreError, match="locked by another process"):
        store.merge_file(tmp_path, file)


def test_the_times_of_finals_replace_those_of_screening(tmp_path):
    recorded(tmp_path)
    files = {file.kernel: file for _, file in upkeep.files(tmp_path)}
    entry = files["implicit_gemm"].entries[workloads.find("dilated_d4")[0].problem().describe()]
    known = tables(read_trials(tmp_path / KNOWN["sm_90"].config_folder / "trials.jsonl"))
    key = workloads.find("dilated_d4")[0].problem().describe()
    candidate = next(c for c in known[key] if c.tile == entry.tile)
    known[key][candidate] = replace(known[key][candidate], time_us=3861.0)
    assert upkeep.corrected(known, files)[key][candidate].time_us == entry.time_us
