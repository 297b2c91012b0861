"""Devices that nobody measured: what is asked of them, what is known of them, and what serves there."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import launches, random

import triton_conv as tc
from triton_conv import aot, dispatch, inspection, target, workloads
from triton_conv.autotune.likely import counted
from triton_conv.defaults import default_tile
from triton_conv.errors import BackendWarning, DeviceError
from triton_conv.kernels import KERNELS
from triton_conv.target import INTERPRETER, KNOWN

WIDE = workloads.find("wide_groups_56")[0]


@pytest.fixture
def device(monkeypatch):
    """A GPU as its drivers describe it, by name and architecture, and its target."""

    def present(name, arch, shared=101376):
        amd = arch.startswith("gfx")
        properties = SimpleNamespace(name=name, multi_processor_count=128, max_threads_per_multi_processor=1536)
        properties.gcnArchName, properties.major, properties.minor = arch, 9, 0
        if not amd:
            properties.major, properties.minor = divmod(int(arch.removeprefix("sm_")), 10)
        limits = {"max_shared_mem": shared, "warpSize": 64 if amd else 32, "max_num_regs": 65536}
        utils = SimpleNamespace(get_device_properties=lambda index: limits)
        driver = SimpleNamespace(active=SimpleNamespace(utils=utils))
        monkeypatch.setattr(torch.version, "hip", "7.0" if amd else None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(target.triton.runtime, "driver", driver)
        target._of_cuda.cache_clear()
        return target.of_device(torch.device("cuda", 0))

    yield present
    target._of_cuda.cache_clear()


@pytest.mark.parametrize(
    ("name", "arch", "folder", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", "sm_90", "nvidia-sm_90/h100-80gb-hbm3-128sm", 3.35e12),
        ("NVIDIA H200", "sm_90", "nvidia-sm_90/h200-128sm", 4.8e12),
        ("NVIDIA GH200 480GB", "sm_90", "nvidia-sm_90/gh200-480gb-128sm", 4.0e12),
        ("NVIDIA L40S", "sm_89", "nvidia-sm_89/l40s-128sm", 0.864e12),
        # Boards of an architecture that is known, and figures of none of them.
        ("NVIDIA GeForce RTX 4090", "sm_89", "nvidia-sm_89/geforce-rtx-4090-128sm", 0.0),
        ("NVIDIA H20", "sm_90", "nvidia-sm_90/h20-128sm", 0.0),
        ("NVIDIA GB10", "sm_121", "nvidia-sm_121/gb10-128sm", 0.0),
        ("AMD Instinct MI300X", "gfx942:sramecc+:xnack-", "amd-gfx942/mi300x-128sm", 5.3e12),
        ("AMD Radeon RX 9070 XT", "gfx1201", "amd-gfx1201/radeon-rx-9070-xt-128sm", 0.0),
    ],
)
def test_a_device_is_asked_and_its_figures_are_its_boards(device, name, arch, folder, bandwidth):
    found = device(name, arch)
    assert (found.arch, found.config_folder, found.bandwidth) == (arch.split(":")[0], folder, bandwidth)
    assert (found.shared_bytes, found.threads_per_sm) == (101376, 1536)
    assert math.isnan(found.floor_seconds(1, 1, "bfloat16")) == (not bandwidth)


def test_an_unknown_device_is_served(device):
    found = device("NVIDIA GB10", "sm_121")
    for workload in workloads.FLAGSHIPS:
        made = dispatch.plan(workload.problem(), found)
        assert made.source == "analytic default", str(made)
        assert math.isfinite(counted(made.kernel.name, made.tile, made.problem, found))
    text = str(tc.cost.of(torch.nn.Conv2d(3, 8, 3), (1, 3, 8, 8), device=found))
    assert "nan" not in text
    assert "no floors without the datasheet of GB10" in text


def test_gpus_without_code_for_their_tensor_cores_are_left_to_torch(device, monkeypatch):
    with pytest.raises(DeviceError, match=r"Tesla T4 \(sm_75\).*from sm_80 on.*torch.nn.functional") as refused:
        device("NVIDIA Tesla T4", "sm_75")

    def refuse(device):
        raise refused.value

    monkeypatch.setattr(target, "of_device", refuse)
    tc.ops.forget_plans()
    model, x = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3)), random((1, 2, 5, 5))
    expected = model.cpu()(x.cpu())
    with pytest.raises(DeviceError, match="Tesla T4"):
        tc.conv2d(x, model[0].weight)
    with pytest.warns(BackendWarning, match="Tesla T4.*modules, convert and accelerate do: nothing is converted"):
        tc.convert(model)
    tc.convert(model, force=True)
    with pytest.warns(BackendWarning, match="a layer runs on torch's kernel: .*Tesla T4"):
        found = model(x)
    assert torch.equal(found, expected)
    assert "sm_75" in str(tc.plan(model, x))
    with tc.accelerate():
        assert torch.equal(F.conv2d(x, model[0].weight, model[0].bias), expected)
    assert not launches
    tc.ops.forget_plans()


@pytest.mark.parametrize(
    ("arch", "family", "tf32", "boxes"),
    [
        ("sm_86", "sm_80", True, False),
        ("sm_90", "sm_90", True, True),
        ("sm_103", "sm_100", True, True),
        # The copy engine of sm_90 and the matrix instructions of sm_80.
        ("sm_121", "sm_80", True, True),
        ("gfx90a", "gfx942", False, False),
        ("gfx942", "gfx942", True, False),
        ("gfx950", "gfx942", False, False),
        ("gfx1101", "gfx1100", False, False),
        ("gfx1201", "gfx1201", False, False),
    ],
)
def test_what_an_architecture_can(arch, family, tf32, boxes):
    made = replace(KNOWN["sm_90" if arch.startswith("sm") else "gfx942"], arch=arch)
    assert (made.family, made.tf32, made.bulk_copies) == (family, tf32, boxes)
    assert made.tensor_memory == (family == "sm_100")
    problem = replace(WIDE.problem(), dtype=torch.float32, precision="tf32")
    plan = dispatch.plan(problem, made)
    assert plan.values["PRECISION"] == ("tf32" if tf32 else "ieee")
    assert plan.problem is problem, "what was asked for names its measurements"


def test_products_are_tf32_in_the_interpreter():
    problem = replace(WIDE.problem(), dtype=torch.float32, precision="tf32")
    assert dispatch.plan(problem, INTERPRETER).values["PRECISION"] == "tf32"


@pytest.mark.parametrize("name", ["sm_89", "sm_120"])
def test_every_default_fits_99_kib(name):
    """Gradients and channels_last too, of every form that could serve or wait for a measurement."""
    unfit, found = [], set()
    for workload in workloads.FLAGSHIPS + workloads.LECTURES:
        for variant in workload.variants(("bfloat16", "float32"), both_formats=True):
            for part in variant.parts():
                problem = part.problem()
                for kernel in dispatch.forms(problem, KNOWN[name])[0]:
                    reason = default_tile(kernel.name, problem, KNOWN[name]).unfit(problem, KNOWN[name])
                    unfit += [f"{kernel.name} {part.title}: {reason}"] if reason else []
                    found.add(kernel.name)
    assert unfit == []
    assert found == {kernel for kernel in KERNELS if not KERNELS[kernel].unavailable(KNOWN[name])}


def test_a_block_may_take_all_shared_memory_of_a_multiprocessor():
    for made in KNOWN.values():
        assert aot.occupancy(made, 4, 32, made.shared_bytes) > 0


@pytest.mark.slow
def test_boxes_in_99_kib_and_float32_without_tf32_compile():
    boxed = workloads.find("dilated_d4")[0].problem()
    plain = replace(WIDE.problem(), dtype=torch.float32, precision="tf32")
    jobs = [
        aot.Job(name, problem, default_tile(name, problem, KNOWN[arch]), KNOWN[arch])
        for name, problem, arch in (("implicit_gemm_boxed", boxed, "sm_120"), ("implicit_gemm", plain, "gfx90a"))
    ]
    for index, row in aot.compile_all(jobs):
        assert inspection.complaints(jobs[index], row) == [], row
        assert row.mma and not row.wgmma
