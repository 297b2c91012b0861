"""Every form under compute-sanitizer: which units there are, and what its output is taken for."""

import json
import time

import pytest

from perf_plots import sanitizer
from perf_plots.budget import Deadline
from perf_plots.record import COMMITTED, SANITIZER, ResultError
from triton_conv import dispatch
from triton_conv.kernels import KERNELS

pytest.importorskip("matplotlib")

ABOUT = {"device": "a card", "triton": "3.6"}
# As its lines look: three of an illegal access, the same once more, and a process that ends by itself.
OUTPUT = """\
========= COMPUTE-SANITIZER
@@ begin one/kernel
@@ end 3
@@ begin two/kernel
========= Invalid __global__ write of size 2 bytes
=========     at depthwise_kernel+0x1a0 in depthwise.py:80
=========     by thread (31,0,0) in block (7,0,0)
========= Invalid __global__ read of size 16 bytes
@@ end 2
@@ begin three/kernel
RuntimeError: CUDA error: unspecified launch failure
"""


def test_every_kernel_is_watched():
    found = sanitizer.units()
    kernels = [kernel for _, kernel in found.values()]
    assert set(kernels) == set(KERNELS)
    # No device may have run those that wait for a measurement: they come first.
    waiting = [kernel in dispatch.WAITING for kernel in kernels]
    assert waiting == sorted(waiting, reverse=True) and any(waiting)
    for workload, _ in found.values():
        assert max(workload.input[2:]) < 500 and workload.input[0] <= 2


def test_reading():
    first, second, third = sanitizer.read("memcheck", OUTPUT.splitlines())
    assert first == sanitizer.Finding("one/kernel", "memcheck", 3)
    assert second.launches == 2 and second.complaint.startswith("Invalid __global__ write of size 2 bytes")
    assert third.launches == 0 and "unspecified launch failure" in third.complaint
    # What the time limit ended says nothing.
    assert sanitizer.read("memcheck", OUTPUT.splitlines(), ended=False) == [first, second]


def test_a_rehearsal_and_what_is_kept(tmp_path):
    total, left, complaints = sanitizer.run(tmp_path, ABOUT, Deadline(time.monotonic() + 60), rehearse=True)
    assert (total, left, complaints) == (2, 0, 0)
    content = json.loads((tmp_path / SANITIZER).read_text())
    assert not content["measured"] and all(row["launches"] >= 1 for row in content["findings"])
    # What the same code was watched for is not watched again: there would be no time for it.
    assert sanitizer.run(tmp_path, ABOUT, Deadline(0.0), rehearse=True) == (2, 0, 0)
    assert sanitizer.run(tmp_path, ABOUT | {"triton": "9.9"}, Deadline(0.0), rehearse=True) == (2, 2, 0)
    content["findings"][0]["kernel_hash"] = "another"
    (tmp_path / SANITIZER).write_text(json.dumps(content))
    assert sanitizer.run(tmp_path, ABOUT, Deadline(0.0), rehearse=True) == (2, 1, 0)


def test_a_blind_sanitizer_is_told_from_a_clean_form(tmp_path, monkeypatch):
    answers = {True: [sanitizer.Finding("planted", "memcheck", 0, "Invalid __global__ write")], False: []}
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: name)
    watched = []
    for sees in (False, True):

        def watch(tool, deadline, rehearse, todo, sees=sees):
            watched.append((tool, len(todo)))
            return answers[sees] if todo == [sanitizer._PLANTED] else [sanitizer.Finding(t, tool, 3) for t in todo]

        monkeypatch.setattr(sanitizer, "_watch", watch)
        if not sees:
            with pytest.raises(RuntimeError, match="does not see a write past the end"):
                sanitizer.run(tmp_path, ABOUT, Deadline(1.0))
            assert not (tmp_path / SANITIZER).exists() and watched == [("memcheck", 1)]
            continue
        total, left, complaints = sanitizer.run(tmp_path, ABOUT, Deadline(1.0))
        assert total == 2 * len(sanitizer.units()) and (left, complaints) == (0, 0)
    assert json.loads((tmp_path / SANITIZER).read_text())["planted"] == "Invalid __global__ write"


def test_refusals(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="CUDA toolkit"):
        sanitizer.run(tmp_path, ABOUT, Deadline(1.0))
    with pytest.raises(ResultError, match="rehearsal"):
        sanitizer.run(COMMITTED / "a", ABOUT, Deadline(1.0), rehearse=True)
