"""Where the tests run, and what is done around each of them.

Without a GPU the kernels run in Triton's interpreter, which must be asked for before Triton is imported.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    # The check of a form's first use launches and allocates, which tests count: it has tests of its own. This holds for
    # the processes that tests start, too.
    os.environ.setdefault("TRITON_CONV_FIRST_USE", "0")

import pytest
from helpers import DEVICE, INTERPRETED, launches
from interpreter import quicken
from outcomes import leave_out_passed, pytest_runtest_logreport  # noqa: F401, which pytest calls

from triton_conv import configs, ops
from triton_conv.kernels import launching
from triton_conv.ops_fused import set_separable_fusion

# One process a core runs the tests; torch's own threads would only get in the way.
torch.set_num_threads(1)
if INTERPRETED:
    quicken()


@pytest.fixture(autouse=True)
def nan_outputs_and_no_launches(monkeypatch):
    """Outputs and partial sums start as NaN: an element that a kernel forgets to write fails the comparison, instead of
    passing by luck."""
    for owner, name in ((ops, "allocate"), (launching, "memory")):
        allocate = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, allocate=allocate: allocate(*given).fill_(float("nan")))
    launches.clear()
    yield
    if DEVICE == "cuda" and torch.cuda.memory_reserved() > 2**31:
        # Other test processes share the card.
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def cudnn_flags_may_be_set():
    """torch.testing, which opcheck imports, forbids setting them for the rest of the process."""
    with getattr(torch.backends, "__allow_nonbracketed_mutation")():
        yield


@pytest.fixture
def one_kernel():
    """Separable convolutions are one kernel, also where two are faster."""
    with set_separable_fusion(True):
        yield


@pytest.fixture
def conv_precision():
    """torch's setting of how float32 convolutions multiply, which the test may change: a GPU's default is tf32."""
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    yield setting
    setting.fp32_precision = before


@pytest.fixture
def exact_products(conv_precision):
    """float32 in full, ours and torch's: for tests that compare the two, or formulas, to float32's last digits."""
    conv_precision.fp32_precision = "ieee"


@pytest.fixture
def nothing_measured(monkeypatch, tmp_path):
    """A user's folder of its own, without measurements or tiles shipped, and nothing remembered before or after."""
    monkeypatch.setenv("TRITON_CONV_HOME", str(tmp_path))
    monkeypatch.setattr(configs, "FOLDERS", (("user tuned", configs.user_folder),))
    ops.forget_plans()
    yield tmp_path / "autotune_configs"
    ops.forget_plans()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    leave_out_passed(config, items)
    if DEVICE == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    # With --dist loadgroup two processes, and no more, hold the 16 GiB that these tests share.
    for i, item in enumerate(item for item in items if item.path.stem == "test_large"):
        item.add_marker(pytest.mark.xdist_group(f"large-{i % 2}"))
