"""What a run on a lent machine relies on: work in children that may be killed, tests that go on, clocks, a summary."""

import sys
import time
from types import SimpleNamespace

import outcomes
import pytest
import torch
from perf_results import CLOCKS, DEVICE, PROVENANCE, record

pytest.importorskip("matplotlib")

from perf_plots import cases, children, clocks, floors, gpu, runner, stages, state, summary, testing, warm
from perf_plots.budget import Budget, Deadline
from perf_plots.record import OURS, Record, write
from perf_plots.run import Run
from triton_conv import dispatch
from triton_conv.autotune.journal import Journal
from triton_conv.autotune.lab import Trial
from triton_conv.autotune.measure import RehearsalTimer
from triton_conv.autotune.search import Candidate
from triton_conv.defaults import default_tile
from triton_conv.target import KNOWN
from triton_conv.workloads import STEP, find

# A child that writes a file for each of its units; "hang" never ends, "die" ends the process.
_CHILD = """
import sys, time, pathlib
for name in sys.argv[2].split(","):
    if name == "hang": time.sleep(60)
    if name == "die": sys.exit("no luck with " + name)
    pathlib.Path(sys.argv[1], name).touch()
"""


def work_off(folder, units, seconds=1.5, deadline=None):
    failures = {}
    begun = children.work_off(
        units,
        lambda left: [sys.executable, "-c", _CHILD, str(folder), ",".join(left)],
        lambda name: (folder / name).exists(),
        failures.__setitem__,
        seconds,
        deadline or Deadline(time.monotonic() + 30),
    )
    return begun, failures


def test_what_hangs_or_dies_takes_only_its_own_unit_along(tmp_path):
    begun, failures = work_off(tmp_path, ["a", "die", "b", "hang", "c"])
    assert begun == 5
    assert failures == {
        "die": "the process ended with status 1: no luck with die",
        "hang": "it took more than 2 s",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}
    assert not children._live


def test_at_the_deadline_a_child_is_killed_and_its_unit_is_left(tmp_path):
    begun, failures = work_off(tmp_path, ["a", "hang", "b"], seconds=30, deadline=Deadline(time.monotonic() + 1.0))
    assert (begun, failures) == (1, {})
    assert work_off(tmp_path, ["b"], deadline=Deadline(0.0)) == (0, {})


def test_all_that_runs_ends_with_the_program():
    # One that starts another, as pytest its workers.
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with open("/dev/null", "w") as log:
        child = children.start([sys.executable, "-c", code], log)
        children.end_all()
        assert child.wait(5) == -9
        children.end(child)
    assert not children._live


# ------------------------------------------------------------------------------------------------- tests on the device


def test_outcomes_are_written_down_as_they_happen(tmp_path, monkeypatch):
    failures, passed, tracebacks = (tmp_path / f"{name}.txt" for name in ("failures", "passed", "tracebacks"))
    monkeypatch.setenv("TRITON_CONV_FAILURES", str(failures))
    monkeypatch.setenv("TRITON_CONV_TRACEBACKS", str(tracebacks))
    monkeypatch.setenv("TRITON_CONV_PASSED", str(passed))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    crash = SimpleNamespace(reprcrash=SimpleNamespace(message="assert 1 == 2\n  where 1"))
    for failed, name in ((True, "a.py::test"), (False, "b.py::test[x@y]@large-0")):
        outcome = {"failed": failed, "passed": not failed, "when": "call", "longreprtext": "line\n" * 99 + "end"}
        outcomes.pytest_runtest_logreport(SimpleNamespace(nodeid=name, longrepr=crash, **outcome))
    assert failures.read_text() == "FAILED a.py::test - assert 1 == 2 where 1\n"
    assert passed.read_text() == "b.py::test[x@y]\n"
    head, *lines, end, last = tracebacks.read_text().splitlines()
    assert (head, lines, end, last) == ("==== a.py::test (call)", ["line"] * 59, "end", "")


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A small suite in place of this one: runs it, and returns the report and the names that pytest ran."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "conftest.py").write_text(
        "from outcomes import leave_out_passed, pytest_runtest_logreport\n"
        "def pytest_collection_modifyitems(config, items): leave_out_passed(config, items)\n"
    )
    (tests / "test_few.py").write_text(
        "import pathlib\ndef test_good(): pass\ndef test_bad(): assert pathlib.Path('mended').exists()\n"
    )
    monkeypatch.setattr(testing, "_command", lambda *arguments: [sys.executable, "-m", "pytest", "-v", str(tests)])
    monkeypatch.setattr(children, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(testing.ROOT / "tests"))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    out = tmp_path / "out"
    out.mkdir()

    def run():
        said = []
        report = testing.run(out, torch.device("cpu"), 60, said.append)
        state.save_stage(out, "tests", report)
        return report, said, (out / state.TESTS).read_text()

    return run


def test_a_second_call_runs_only_what_has_not_passed(suite, tmp_path, monkeypatch):
    report, _, log = suite()
    assert report["counts"] == {"failed": 1, "passed": 1}
    assert report["status"] == 1
    assert report["failed"][0].startswith("FAILED tests/test_few.py::test_bad")
    report, _, log = suite()
    assert "1 failed, 1 deselected" in log
    assert len(report["failed"]) == 1
    (tmp_path / "mended").touch()
    report, _, log = suite()
    assert "1 passed, 1 deselected" in log
    assert (report["counts"]["passed"], report["failed"], report["status"]) == (2, [], 0)
    assert suite()[1] == ["already run for this code"]
    monkeypatch.setattr(testing, "source_hash", lambda *folders: "other code")
    assert "2 passed in" in suite()[2], "of other code nothing is known"


def test_of_other_code_what_failed_comes_first(suite, tmp_path, monkeypatch):
    (tmp_path / "tests" / "test_home.py").write_text(
        "import os, pathlib\n"
        "def test_home(): assert pathlib.Path(os.environ['TRITON_CONV_HOME']).parts[-2:] == ('out', 'tests_home')\n"
    )
    _, _, log = suite()
    assert log.index("::test_good") < log.index("::test_bad") < log.index("::test_home")
    # One that passes, and whose fixture fails afterwards, has not passed.
    with (tmp_path / "out" / state.PASSED).open("a") as passed:
        passed.write("tests/test_few.py::test_bad\n")
    assert "1 failed, 2 deselected" in suite()[2]
    assert "mended').exists()" in (tmp_path / "out" / state.TRACEBACKS).read_text()
    monkeypatch.setattr(testing, "source_hash", lambda *folders: "other code")
    report, _, log = suite()
    assert log.index("::test_bad") < log.index("::test_good")
    assert len(report["failed"]) == 1


def test_what_a_stopped_call_did_not_come_to_fails_still(suite, monkeypatch):
    suite()

    def stopped(command, environment, log, seconds):
        return -9, True

    monkeypatch.setattr(testing, "_pytest", stopped)
    report, _, _ = suite()
    assert report["timed_out"]
    assert [line.partition(" - ")[0] for line in report["failed"]] == ["FAILED tests/test_few.py::test_bad"]


def test_a_test_run_that_hangs_is_stopped():
    with open("/dev/null", "w") as log:
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        assert testing._pytest(command, {}, log, 0.3) == (-9, True)


def test_the_order_of_the_tests():
    files = testing.files()
    assert files[:2] == [f"tests/test_{name}.py" for name in testing._FIRST[:2]]
    assert len(files) == len(set(files))
    every = {f"tests/{path.name}" for path in (testing.ROOT / "tests").glob("test_*.py")}
    left_out = {f"tests/test_{name}.py" for name in testing.NO_DEVICE}
    assert left_out <= every
    assert set(files) == every - left_out
    # An H100's memory is for 13 processes, not for all of 16 cores.
    assert testing.workers(80 * 10**9, 16) == 13
    assert testing.workers(16 * 10**9, 16) == 2
    assert testing.workers(80 * 10**9, 1) == 1


# ----------------------------------------------------------------------------------------------- clocks, steps, summary


def test_clocks_from_the_library(monkeypatch):
    nvml = SimpleNamespace(
        NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetClockInfo=lambda handle, what: {1: 1755, 2: 2619}[what],
        nvmlDeviceGetTemperature=lambda handle, what: 63, nvmlDeviceGetPowerUsage=lambda handle: 690_123,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x4 | 0x1 | 0x40,
    )  # fmt: skip
    monkeypatch.setattr(clocks, "_handle", lambda device: (nvml, "handle"))
    found = clocks._from_library(torch.device("cuda"))
    assert found == {
        "sm_mhz": 1755, "memory_mhz": 2619, "celsius": 63, "watts": 690.1,
        "throttled": ["power cap", "temperature, by hardware"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "throttled"),
    [
        ("1980, 2619, 41, 120.50, 0x0000000000000000", []),
        ("1410, 2619, 80, 700.00, 0x0000000000000024", ["power cap", "temperature, by software"]),
        ("1980, 2619, 41, [N/A], 0x0", None),
        (None, None),
    ],
)
def test_clocks_from_the_command(line, throttled, monkeypatch):
    monkeypatch.setattr(clocks, "_uuid", lambda device: "GPU-1")
    monkeypatch.setattr(clocks, "output", lambda *command: line)
    found = clocks._from_command(torch.device("cuda"))
    assert (found and found["throttled"]) == throttled


def test_every_stage_has_a_share():
    assert tuple(stages.STAGES) == gpu.STAGE_NAMES
    assert sum(share for share, _ in stages.STAGES.values()) == pytest.approx(1.0)
    assert all(Budget(10).deadlines({name: share})[name].left > 9 for name, (share, _) in stages.STAGES.items())


def test_what_no_trial_tells_of_is_tuned_first(tmp_path, monkeypatch):
    """Forms that wait in the order of their predicted gains; then, if there is time, the rest."""
    target, few = KNOWN["sm_90"], [find(name)[0] for name in ("dcgan_t2d", "narrow_groups_8", "causal_dw1d")]
    hope = {("dcgan_t2d", "forward"): 10.0, ("narrow_groups_8", "forward"): 20.0}
    for name in ("stages", "run"):
        monkeypatch.setattr(f"perf_plots.{name}.of_device", lambda device: target)
    monkeypatch.setattr(stages, "provenance", lambda device: {})
    monkeypatch.setattr(stages, "gains", lambda page: hope)
    monkeypatch.setattr(cases, "of_stage", lambda stage, rehearse: few if stage == "benchmark" else [])
    problem, journal = few[2].problem(), Journal(tmp_path / state.TRIALS, target)
    for form in dispatch.forms(problem, target)[0]:
        tried = Candidate(form.name, default_tile(form.name, problem, target))
        journal.write(few[2].title, problem, tried, Trial(1.0, 0.0))

    def asked(takes):
        """Who is tuned, if each call takes so many of a hundred seconds."""
        found, now = [], [0.0]

        def tuned(run, seconds, some):
            found.append((seconds, [workload.name for workload in some]))
            now[0] += takes
            return []

        monkeypatch.setattr(stages, "_tuned", tuned)
        stages.tuning(Run(tmp_path, torch.device("cuda", 0)), Deadline(100.0, lambda: now[0]))
        return found

    waiting = ["narrow_groups_8", "dcgan_t2d"]
    assert asked(takes=100.0) == [(100.0, waiting)]
    assert asked(takes=10.0) == [(100.0, waiting), (90.0, ["causal_dw1d"])]


def test_clocks_in_words():
    assert clocks.sample(torch.device("cpu")) is None
    assert clocks.describe(CLOCKS) == "1980 to 1755 MHz, 41 to 63 °C, throttled: power cap"
    assert clocks.describe({"before": None, "after": CLOCKS["before"]}) == "1980 MHz, 41 °C, not throttled"
    assert clocks.describe({"before": None, "after": None}) == "clocks unknown"


def test_a_step_is_its_three_parts(tmp_path):
    (step,) = cases.of_stage("steps", True)
    assert step.title.endswith("-fb")
    whole, part = floors.Work.of(step), floors.Work.of(step.layer)
    assert (whole.flops, whole.standard_bytes) == (3 * part.flops, 3 * part.standard_bytes)
    bench = runner.Bench(torch.device("cpu"), RehearsalTimer(), tmp_path, floors.DATASHEET)
    made = runner.describe_plans(step, runner.of_device(bench.device))
    assert len(made["kernel"].split(", ")) == len(made["kernel_hash"].split(", ")) == 3
    assert set(made["tile"]) == {"forward", "input gradient", "weight gradient"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
@pytest.mark.parametrize("wrong", ["forward", "input gradient", "weight gradient"])
def test_a_step_with_one_wrong_part_gets_no_time(tmp_path, monkeypatch, wrong):
    (step,) = cases.of_stage("steps", True)
    bench = runner.Bench(torch.device("cpu"), RehearsalTimer(), tmp_path, floors.DATASHEET)
    real = runner.differentiated

    def differentiated(call, tensors, part):
        made = real(call, tensors, part)
        return (lambda: 1.01 * made()) if part == wrong else made

    monkeypatch.setattr(runner, "differentiated", differentiated)
    found = runner.run_case(step, bench)
    assert "relative error 0.0" in found.error
    assert not found.contestants


def test_a_step_is_the_gradient_of_a_call():
    (step,) = cases.of_stage("steps", True)
    tensors = step.tensors("cpu")
    _, _, weight = (part.call for part in step.layer.parts())
    alone = runner.differentiated(weight, tensors, "weight gradient")()
    assert torch.equal(runner.differentiated(step.call, tensors, STEP)(), alone)


def test_nothing_is_compiled_for_the_interpreter():
    said = warm.of_workloads(cases.rehearsal(), torch.device("cpu"), 1.0)
    assert "interpreter" in said or "compiled" in said
    (step,) = cases.of_stage("steps", True)
    assert len(list(warm._problems([step, step.layer]))) == 4


def test_the_summary_has_a_line_a_stage_and_says_who_was_throttled(tmp_path):
    workloads = [*cases.flagships(), *cases.gradients(), *cases.steps(), *cases.sweeps()]
    for index, workload in enumerate(workloads):
        made = record("dw3d", {OURS: 100, "cudnn": 49 + index, "torch.compile": 300})
        made = Record(
            workload, True, made.work, PROVENANCE, contestants=made.contestants, clocks=CLOCKS if index == 5 else {}
        )
        write(made, tmp_path / "results" / DEVICE)
    lines = summary.summarise(tmp_path)
    assert len(lines) == summary.LINES
    (first,) = (line for line in lines if line.startswith("benchmark: "))
    assert "21 timed, 21 against the fastest library" in first
    assert "worst 0.50x (narrow_groups_4-bfloat16-nhwc)" in first
    assert any(line.startswith(f"sweeps: {len(cases.sweeps())} timed") for line in lines)
    assert any(
        line.startswith("compiled: ") and "against torch.compile: geometric mean 2.98x" in line for line in lines
    )
    assert any(line.startswith(f"the device was throttled in 1 case: {workloads[5].title}") for line in lines)
