"""The benchmark run: its rehearsal from end to end, what it refuses, and that its check can fail."""

import json
import os
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")

from perf_plots import baselines, cases, check, gpu, model_bench, model_record, runner, stages, state, testing
from perf_plots.budget import Budget, BudgetError
from perf_plots.floors import DATASHEET
from perf_plots.record import OURS, read
from perf_plots.run import Run
from perf_plots.summary import LINES
from triton_conv import dispatch
from triton_conv.autotune import expected as expected_values
from triton_conv.autotune.expected import Expected
from triton_conv.autotune.measure import DeviceLostError, RehearsalTimer
from triton_conv.workloads import find

ROOT = Path(__file__).parent.parent


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "perf_plots.gpu", *map(str, arguments)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def titles(run, *names):
    return {f"{workload.title}.json" for name in names for workload in run.cases(name)}


@pytest.mark.slow
def test_rehearsal_from_end_to_end(tmp_path):
    """Every stage, its children too."""
    out, bundle = tmp_path / "work", tmp_path / "out"
    first = run("--rehearse", "--work", out, "--out", bundle)
    assert first.returncode == 0, first.stdout + first.stderr
    assert [line.split()[1] for line in first.stdout.splitlines() if line.startswith("== ")] == [
        *gpu.STAGE_NAMES,
        "summary",
    ]
    with tarfile.open(bundle / "results.tar.gz") as archive:
        names = archive.getnames()
    folder = "results/rehearsal"
    models = {f"{folder}/models/{unit.title}.json" for unit in model_bench.units(True)}
    assert models | {f"{folder}/cold_start.json", "figures/rehearsal/overview.png", "figures/index.html"} <= set(names)
    assert all(not name.startswith(("/", "..")) for name in names)
    assert (bundle / "overview.png").is_file()
    for path in (out / "results" / "rehearsal").glob("models/*.json"):
        made = model_record.read(path)
        assert not made.error
        assert made.us("torch")
        assert not made.measured
    (workload,) = cases.of_stage("compiled", True)
    compiled = read(out / folder / f"{workload.title}.json").contestants["torch.compile"]
    assert compiled.absent == "compiled on a GPU alone"
    again = run("--rehearse", "--work", out, "--out", bundle, "--only", "models,cold_start,compiled")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "0 run, 3 kept, 0 left" in again.stdout
    assert "0 run, 1 kept, 0 left" in again.stdout


def test_a_rehearsal_and_again(tmp_path, monkeypatch, capfd):
    """The stages that run in the program itself."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CONV_HOME", str(tmp_path))
    out, bundle = tmp_path / "work", tmp_path / "out"
    timed, kinds = ("benchmark", "gradients", "lectures", "steps", "variants"), ("grouped", "deformable", "local")
    names = ("environment", "ceilings", "tests", "tuning", "portfolio", *timed)
    arguments = ["--rehearse", f"--work={out}", f"--out={bundle}"]
    assert gpu.main([*arguments, f"--only={','.join([*names, *kinds])}"]) == 0, capfd.readouterr()
    printed = capfd.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed if line.startswith("== ")] == [*names, "summary"]

    records = {path.name: json.loads(path.read_text()) for path in (out / "results" / "rehearsal").glob("*-*.json")}
    work = Run(out, torch.device("cpu"), True, kinds=kinds)
    assert set(records) == titles(work, *timed)
    for content in records.values():
        assert content["measured"] is False
        assert not content["error"]
        assert 0 < content["relative_error"] <= content["tolerance"]
        assert content["plan"]["kernel_hash"]
        assert content["clocks"] == {"before": None, "after": None}
        assert content["provenance"]["torch"] == torch.__version__
    summary = (bundle / "summary.txt").read_text().splitlines()
    assert len(summary) <= LINES
    assert any("REHEARSAL" in line for line in summary)
    assert summary == printed[-len(summary) :]
    with tarfile.open(bundle / "results.tar.gz") as archive:
        found = archive.getnames()
    assert {"run.json", "tests.txt", "passed.txt", "tuning.json", "results/rehearsal/ceilings.json"} <= set(found)
    assert any(name.startswith("autotune_configs/") for name in found)

    assert gpu.main([*arguments, f"--only={','.join(['tests', *timed, *kinds])}"]) == 0
    printed = capfd.readouterr().out
    assert [line for line in printed.splitlines() if "cases run" in line] == [
        f"0 cases run, {len(work.cases(name))} kept, 0 left for want of time" for name in timed
    ]
    assert "already run for this code" in printed
    assert gpu.main([*arguments, "--only=tuning,portfolio,grouped"]) == 0
    trials = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    tried = [(trial["workload"], trial["kernel"], *trial["tile"].items()) for trial in trials]
    assert len(tried) == len(set(tried)) > 0, "nothing is tried twice"


# Runs in every Python that finds it on its path: what a bare GPU machine lacks is missing here too.
_BARE = """
import sys
class Bare:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("rich", "hypothesis", "expecttest", "xdist"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Bare)
"""


@pytest.fixture
def bare(tmp_path):
    """Runs a Python command as on such a machine; returns what it printed."""
    (tmp_path / "sitecustomize.py").write_text(_BARE)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    def run(*command):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    return run


def test_a_bare_machine_runs_every_stage_but_the_tests(bare):
    assert "--rehearse" in bare("-m", "perf_plots.gpu", "--help")
    modules = "perf_plots.stages, perf_plots.figures, perf_plots.summary, triton_conv.autotune.tune, triton_conv.aot"
    bare("-c", f"import {modules}")


def test_a_bare_machine_leaves_out_the_random_calls_alone(bare):
    listing = bare("-m", "pytest", "-q", "-p", "no:hypothesispytest", "--collect-only", *testing.files())
    assert "test_gradients.py::test_smoke" in listing
    assert "test_opinfo.py::test_samples" in listing
    assert [line.split()[2].partition(":")[0] for line in listing.splitlines() if line.startswith("SKIPPED")] == [
        "tests/test_addresses.py",
        "tests/test_fuzz.py",
    ]


@pytest.mark.parametrize("budget", ["0", "-5", "nan"])
def test_a_budget_must_be_positive(budget, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main([f"--budget={budget}", f"--out={tmp_path}"])
    assert stopped.value.code == 2
    assert "argument --budget: the budget must be a positive number of seconds" in capsys.readouterr().err
    with pytest.raises(BudgetError):
        Budget(float(budget))


def test_without_a_gpu_it_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--budget=100", f"--out={tmp_path / 'out'}"]) == 2
    message = capsys.readouterr().err
    assert "sees no GPU" in message
    assert "--rehearse" in message
    assert not (tmp_path / "out").exists()


def test_unknown_stages_are_named(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse", "--only=benchmark,dance"])
    assert "dance is not known" in capsys.readouterr().err


def test_unused_time_flows_on():
    now = [100.0]
    budget = Budget(100, reserve=20, clock=lambda: now[0])
    deadlines = budget.deadlines({"a": 1, "b": 3})
    assert deadlines["a"].left == 20
    now[0] = 105
    assert deadlines["b"].left == 75, "what a left, and its own"
    now[0] = 190
    assert deadlines["b"].passed
    assert budget.end.left == 10


@pytest.fixture
def bench(tmp_path):
    return runner.Bench(torch.device("cpu"), RehearsalTimer(), tmp_path, DATASHEET)


@pytest.fixture
def small():
    return cases.rehearsal()[0]


def interpreted(function):
    return pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")(function)


@interpreted
def test_a_kernel_that_writes_nothing_gets_no_time(bench, small, monkeypatch):
    monkeypatch.setattr(dispatch, "launch", lambda *arguments: None)
    record = runner.run_case(small, bench)
    assert "never written" in record.error
    assert not record.contestants
    assert read(bench.folder / f"{small.title}.json").error == record.error


@interpreted
def test_a_wrong_kernel_gets_no_time(bench, small, monkeypatch):
    launch = dispatch.launch
    monkeypatch.setattr(dispatch, "launch", lambda *arguments: (launch(*arguments), arguments[-1].mul_(1.01)))
    record = runner.run_case(small, bench)
    assert "relative error 0.0" in record.error
    assert not record.contestants


def test_sums_in_another_order_are_no_race():
    expected = Expected(((slice(0, 1), torch.ones(1)),), "", 1e-3)
    results = iter([torch.ones(4), torch.ones(4) + 1e-4, torch.ones(4), torch.ones(4) + 1e-2])
    assert 0 < check.check(lambda: next(results), expected, repeatable=False) < 1e-3
    with pytest.raises(check.CheckError, match="second run"):
        check.check(lambda: next(results), expected, repeatable=False)


def test_a_race_is_an_error():
    results = iter([torch.ones(4), torch.ones(4) + 1e-7])
    expected = Expected(((slice(0, 1), torch.ones(1)),), "", 1e-3)
    with pytest.raises(check.CheckError, match="race"):
        check.check(lambda: next(results), expected)


@pytest.mark.parametrize("name", ["causal_dw1d", "conformer_dw1d"])
def test_a_reference_too_large_for_the_memory_is_taken_of_the_outermost_channels(name, monkeypatch):
    workload = find(name)[0].shrunk()
    tensors, problem = workload.tensors("cpu"), workload.problem()
    whole = expected_values.expect(workload, problem, tensors)
    compute, channels = expected_values.reference, problem.geometry.c_in

    def scarce(function, arguments):
        if arguments["input"].shape[1] == channels:
            raise torch.OutOfMemoryError("no memory for the whole image")
        return compute(function, arguments)

    monkeypatch.setattr(expected_values, "reference", scarce)
    monkeypatch.setattr(expected_values, "_FEW_CHANNELS", 1)
    ends = expected_values.expect(workload, problem, tensors)
    assert "outermost 1 channels" in ends.description
    result = torch.full(problem.geometry.out_shape, float("inf"), dtype=torch.float64)
    result[0], result[-1] = whole.parts[0][1][0], whole.parts[-1][1][0]
    assert whole.error(result) == 0
    assert ends.error(result) < 1e-12
    result[-1, -1, -1] += 1
    assert ends.error(result) > 0.1


@interpreted
def test_a_case_without_a_plan_is_recorded(bench, small, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("no plan today")

    monkeypatch.setattr(runner, "plan", refuse)
    assert runner.run_case(small, bench).error == "RuntimeError: no plan today"
    assert runner.finished(small, bench) is not None
    monkeypatch.undo()
    assert runner.finished(small, bench) is None, "now there is one: it must run"


@interpreted
def test_absent_baselines_have_reasons(bench, small, monkeypatch):
    monkeypatch.setattr(baselines, "_memory", lambda device: 1000)
    wrong = SimpleNamespace(conv2d=lambda *arguments, **options: torch.zeros(small.problem().geometry.out_shape))
    monkeypatch.setattr(baselines, "F", wrong)
    record = runner.run_case(small, bench)
    assert record.ours_us
    assert "needs" in record.contestants["standard"].absent
    assert "too far from the float64 result" in record.contestants["cudnn"].absent
    assert record.speedup(False) is None


@interpreted
def test_baselines_beyond_reach_are_not_tried(bench, small, monkeypatch):
    def never():
        raise AssertionError("it was tried")

    monkeypatch.setattr(runner, "build", lambda *arguments: {"cudnn": baselines.Baseline(never)})
    record = runner.run_case(small, replace(bench, seconds=1e-9))
    assert "its limit alone is" in record.contestants["cudnn"].absent
    assert "it was tried" in runner.run_case(small, bench).contestants["cudnn"].absent


@interpreted
@pytest.mark.parametrize(("most", "part", "searched"), [(400, 2, True), (2, 2, False), (2, 0, False)])
def test_no_search_where_some_algorithms_take_minutes(most, part, searched, bench, small, monkeypatch):
    seen = []

    def baseline(workload, tensors, *options):
        call = runner.differentiated(workload.call, tensors, workload.part)
        return {"cudnn": baselines.Baseline(lambda: (seen.append(torch.backends.cudnn.benchmark), call())[1])}

    monkeypatch.setattr(runner, "_MANY_TAPS", most)
    monkeypatch.setattr(runner, "build", baseline)
    # However slow the machine.
    record = runner.run_case(small.parts()[part], replace(bench, seconds=100.0))
    assert record.contestants["cudnn"].samples_us, record.error
    assert set(seen) == {searched}
    assert ("guesses" in record.contestants["cudnn"].note) == (not searched)
    assert not record.contestants[OURS].note


@pytest.mark.parametrize("name", ["decoder_t2d", "dcgan_t2d", "vocoder_t1d_s8"])
def test_the_standard_convolution_of_a_transposed_one(name, monkeypatch):
    """Over the prepared input, with the filter turned round, it is the transposed convolution."""
    (workload,) = find(name)[0].shrunk().variants(("float32",))
    tensors = workload.tensors("cpu")
    weight, g = tensors["weight"], workload.problem().geometry
    turned = weight.flip(tuple(range(2, weight.dim()))).transpose(0, 1) / (g.c_in * g.taps) ** -0.5
    monkeypatch.setattr(torch, "randn", lambda *arguments, **options: turned.clone())
    built = baselines.build(workload, tensors)
    expected = getattr(F, workload.function)(**tensors)
    for baseline in ("cudnn", "standard"):
        torch.testing.assert_close(built[baseline].call(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("workload", [w.shrunk() for w in cases.flagships()], ids=lambda workload: workload.name)
def test_every_standard_convolution_has_our_shape(workload):
    built = baselines.build(workload, workload.tensors("cpu"))
    assert built["standard"].call().shape == workload.problem().geometry.out_shape


def test_a_lost_device_goes_on_in_a_new_process(tmp_path, monkeypatch):
    def lose(run, deadline):
        raise DeviceLostError("gone")

    class ReplacedError(Exception):
        pass

    def other_process(path, command):
        raise ReplacedError(command)

    monkeypatch.setenv("TRITON_CONV_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(stages.STAGES, "benchmark", (1.0, lose))
    monkeypatch.setattr(os, "execv", other_process)
    arguments = ["--rehearse", "--budget=100", f"--work={tmp_path}", "--only=benchmark", "--fresh"]
    with pytest.raises(ReplacedError) as replaced:
        gpu.main(arguments)
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    # One left behind would end this process at the end of the budget.
    assert all(timer.finished.is_set() for timer in timers)
    command = replaced.value.args[0]
    assert command[1:3] == ["-m", "perf_plots.gpu"]
    assert "--restarts=1" in command
    assert "--fresh" not in command
    # Not for ever: then the failure stands in the summary.
    assert gpu.main([*arguments, "--restarts=5"]) == 1
    assert "FAILED stage benchmark: gone" in (tmp_path / state.SUMMARY).read_text()


def test_a_case_seen_before_is_not_run_again(bench, small):
    record = runner.run_case(small, bench)
    assert record.contestants[OURS].samples_us
    assert runner.finished(small, bench) is not None
    other = next(workload for workload in small.variants(("float16",)))
    assert runner.finished(other, bench) is None


def test_what_is_committed_is_not_measured_again(bench, small, tmp_path, monkeypatch, capsys):
    """Nor does it replace what the run has measured itself."""
    committed, work = tmp_path / "committed", tmp_path / "work"
    own = replace(bench, folder=committed / "rehearsal")
    record = runner.run_case(small, own)
    (committed / "rehearsal" / state.TRIALS).write_text("")
    (committed / "rehearsal" / "README.md").write_text("in words\n")
    monkeypatch.setattr("perf_plots.record.COMMITTED", committed)
    monkeypatch.setenv("TRITON_CONV_HOME", str(work))
    monkeypatch.setitem(stages.STAGES, "figures", (1.0, lambda run, deadline: {}))
    arguments = ["--rehearse", "--committed", f"--work={work}", "--budget=60", "--only=figures"]
    assert gpu.main(arguments) == 0
    assert "to begin with 2 committed files of rehearsal" in capsys.readouterr().out
    found = runner.finished(small, replace(bench, folder=work / "results" / "rehearsal"))
    assert found is not None and found.ours_us == record.ours_us
    assert not list(work.rglob("README.md"))
    (committed / "rehearsal" / state.TRIALS).write_text("{}\n")
    assert gpu.main(arguments) == 0
    assert (work / state.TRIALS).read_text() == ""
