"""The check of a form's first use on an architecture: what it finds, what it remembers, and where it stays away."""

import json
import threading
import warnings
from dataclasses import replace

import pytest
import torch
import triton
from filelock import FileLock
from helpers import DEVICE, launches, random
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources

import triton_conv as tc
from triton_conv import dispatch, first_use, ops, ops_conv, target, verdicts, workloads
from triton_conv.errors import CaptureError, ConfigWarning, FormWarning
from triton_conv.problem import Problem
from triton_conv.workloads import FLAGSHIPS, Workload

# An architecture that nobody measured.
NEW = replace(target.KNOWN["sm_90"], arch="sm_95", name="H900")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user's folder of its own, and no memory of other tests."""
    monkeypatch.setenv("TRITON_CONV_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(first_use.SWITCH, raising=False)
    ops.forget_plans()
    yield tmp_path / "home"
    ops.forget_plans()


@pytest.fixture
def checks(monkeypatch):
    """How often a result was compared, and what is found then: the test sets it."""

    class Checks:
        count, found = 0, 0.0

        def __call__(self, made, device):
            self.count += 1
            if isinstance(self.found, Exception):
                raise self.found
            return self.found

    fake = Checks()
    monkeypatch.setattr(first_use, "difference", fake)
    return fake


def problem():
    return Workload("dw", "depthwise", "conv2d", (1, 2, 5, 8), (2, 1, 3, 3), {"padding": 1, "groups": 2}).problem()


def planned(what=None):
    return dispatch.plan(what or problem(), NEW)


def next_process():
    """What a new process knows: what is in the user's folder."""
    ops.forget_plans()


# -------------------------------------------------------------------------------------------------- verdict and memory


def test_a_right_form_is_checked_once(checks, home):
    made = planned()
    assert made.pending
    assert "at its first launch" in str(made)
    assert first_use.settle(made, CPU) is first_use.settle(made, CPU) is made
    assert checks.count == 1
    next_process()
    again = planned()
    assert not again.pending
    assert "at its first use, on" in again.checked
    assert checks.count == 1
    (row,) = json.loads((home / "first_use.json").read_text())["forms"]
    assert (row["form"]["kernel"], row["form"]["arch"]) == (made.kernel.name, "sm_95")


def test_a_wrong_form_is_ruled_out_loudly_and_for_good(checks):
    made = planned()
    checks.found = 0.3
    with pytest.warns(FormWarning) as caught:
        chosen = first_use.settle(made, CPU)
    for phrase in (made.kernel.name, "sm_95", "0.3", "Triton", chosen.kernel.name):
        assert phrase in str(caught[0].message)
    assert chosen.kernel.name == "depthwise" != made.kernel.name
    assert any(f"not {made.kernel.name}: its first use on sm_95" in note for note in chosen.notes)
    next_process()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert planned().kernel.name == "depthwise"
    # Another dtype is other code.
    assert dispatch.plan(replace(problem(), dtype=torch.float16), NEW).kernel.name == made.kernel.name


def in_the_compiler(monkeypatch, error):
    """The error, raised where Triton compiles."""

    def fail(target):
        raise error

    monkeypatch.setattr(triton.compiler.compiler, "make_backend", fail)
    with pytest.raises(type(error)) as caught:
        triton.compile("", target=GPUTarget("cuda", 90, 32))
    return caught.value


def test_a_form_that_does_not_compile_is_ruled_out(checks, monkeypatch):
    checks.found = in_the_compiler(monkeypatch, ValueError("PassManager::run failed\nand more"))
    with pytest.warns(FormWarning, match="ValueError: PassManager::run failed"):
        assert first_use.settle(planned(), CPU).kernel.name == "depthwise"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        OutOfResources(300_000, 232_448, "shared memory"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA error: unspecified launch failure, of a kernel launched before"),
        pytest.param(OSError(28, "No space left on device"), id="a full disk while it compiles"),
    ],
    ids=str,
)
def test_what_the_form_is_not_to_blame_for_says_nothing(checks, error, monkeypatch):
    checks.found = in_the_compiler(monkeypatch, error) if isinstance(error, OSError) else error
    made = planned()
    assert first_use.settle(made, CPU) is made
    next_process()
    assert planned().pending


@pytest.mark.parametrize("part", workloads.PARTS)
def test_a_call_of_no_image_says_nothing(part, home):
    """Not even that the form is right; and of its weight gradient every partial sum would be missing."""
    call = Workload("dw", "depthwise", "conv2d", (0, 2, 5, 8), (2, 1, 3, 3), {"padding": 1, "groups": 2})
    made = planned(replace(call, part=part).problem())
    assert made.pending
    assert first_use.settle(made, CPU) is made
    assert not (home / "first_use.json").exists()


def test_a_folder_that_cannot_be_written(checks, home, monkeypatch):
    home.write_text("a file where the folder would be")
    checks.found = 0.3
    with pytest.warns(FormWarning):
        assert first_use.settle(planned(), CPU).kernel.name == "depthwise"
    assert planned().kernel.name == "depthwise"
    assert checks.count == 1


def test_a_broken_file_is_reported_and_left_alone(checks, home):
    home.mkdir()
    (home / "first_use.json").write_text("{")
    with pytest.warns(ConfigWarning, match=r"first_use\.json"):
        made = planned()
    first_use.settle(made, CPU)
    assert (home / "first_use.json").read_text() == "{"
    assert not planned_anew().pending


def planned_anew():
    dispatch.plan.cache_clear()
    return planned()


def test_of_two_processes_at_once_one_checks(checks, home):
    made = planned()
    first_use.settle(made, CPU)
    written = (home / "first_use.json").read_text()
    (home / "first_use.json").unlink()
    next_process()
    made, other = planned(), FileLock(home / "first_use.lock")
    assert made.pending
    other.acquire()
    thread = threading.Thread(target=first_use.settle, args=(made, CPU))
    thread.start()
    # What the other process found, while this one waits.
    (home / "first_use.json").write_text(written)
    other.release()
    thread.join()
    assert checks.count == 1


def test_a_lock_that_is_never_given_back_does_not_stop_anything(checks, home, monkeypatch):
    monkeypatch.setattr(verdicts, "_PATIENCE", 0.01)
    home.mkdir()
    with FileLock(home / "first_use.lock"):
        first_use.settle(planned(), CPU)
    assert checks.count == 1


# ------------------------------------------------------------------------------------------------- where there is none


def test_the_switches(checks, monkeypatch):
    made = planned()
    with tc.set_first_use_check(False):
        assert first_use.settle(made, CPU) is made
    monkeypatch.setenv(first_use.SWITCH, "0")
    first_use.settle(made, CPU)
    assert checks.count == 0
    monkeypatch.delenv(first_use.SWITCH)
    first_use.settle(made, CPU)
    assert checks.count == 1


def test_never_while_a_graph_is_captured(checks, monkeypatch):
    made = planned()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(CaptureError, match="warmup"):
        first_use.settle(made, CPU)
    assert checks.count == 0


def test_plain_interpreted_and_measured_forms_need_none(monkeypatch):
    plain = replace(problem(), geometry=replace(problem().geometry, padding_mode="reflect"))
    assert (planned(plain).kernel.name, planned(plain).checked) == ("depthwise", "the plain form")
    assert "not compiled" in dispatch.plan(problem(), target.INTERPRETER).checked
    workload = next(w for w in FLAGSHIPS if w.name == "dilated_d4")
    monkeypatch.setattr(verdicts.triton, "__version__", "3.6.0")
    made = dispatch.plan(workload.problem(), target.KNOWN["sm_90"])
    assert made.kernel.name == "implicit_gemm_boxed"
    assert "measured on H100" in made.checked
    assert not made.pending
    # Another dtype of the same kernel was not.
    assert dispatch.plan(replace(workload, dtype="float16").problem(), target.KNOWN["sm_90"]).pending


# ------------------------------------------------------------------------------------------------------ through the ops


@pytest.fixture
def new_device(monkeypatch):
    """Calls run in the interpreter, and are planned as for an architecture that nobody measured."""
    if DEVICE != "cpu":
        pytest.skip("a GPU runs what is compiled for it")
    monkeypatch.setattr(ops_conv.targets, "of_device", lambda device: NEW)


def test_a_call_checks_before_it_launches(new_device, home):
    x, w = random((1, 4, 5, 8)).requires_grad_(), random((4, 1, 3, 3)).requires_grad_()
    y = tc.conv2d(x, w, padding=1, groups=4)
    y.square().sum().backward()
    kernels = {row["form"]["kernel"] for row in json.loads((home / "first_use.json").read_text())["forms"]}
    assert kernels == {"depthwise_banded", "depthwise_banded_weight_gradient"}


def test_a_wrong_form_serves_nobody(new_device, checks):
    x, w = random((1, 4, 5, 8)), random((4, 1, 3, 3))
    checks.found = 1.0
    with pytest.warns(FormWarning):
        y = tc.conv2d(x, w, padding=1, groups=4)
    assert dict(launches) == {"depthwise": 1}
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, w, padding=1, groups=4))
    assert "not depthwise_banded" in str(tc.plan(tc.conv2d, x, w, padding=1, groups=4))


def test_fake_tensors_and_plans_check_nothing(new_device, checks):
    with FakeTensorMode():
        tc.conv2d(torch.empty(1, 4, 5, 8), torch.empty(4, 1, 3, 3), padding=1, groups=4)
    assert tc.plan(tc.conv2d, random((1, 4, 5, 8)), random((4, 1, 3, 3)), padding=1, groups=4).pending
    assert checks.count == 0


def test_every_kind_has_a_plain_form():
    for workload in FLAGSHIPS:
        for part in workload.parts():
            made = part.problem()
            kernel = dispatch.KERNELS[dispatch.family(made)[0][-1]]
            assert isinstance(made, Problem)
            assert kernel.unsuited(made) is None
