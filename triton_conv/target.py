"""What the kernels run on: the device at hand, or one that is only compiled for.

A `Target` holds what planning needs to know. `current` asks the device, once per device; `KNOWN` lists the targets that
the compiler serves without one, with the vendor's datasheet figures for a typical board.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import torch
import triton

from .errors import DeviceError, WorkloadError


@dataclass(frozen=True)
class Target:
    """A device, as far as planning and floors are concerned.

    Sizes are in bytes, `bandwidth` in bytes a second, `rates` in FLOP a second by dtype name (dense, tensor cores where
    the dtype has them). Datasheet figures: limits to compare with, not measurements.
    """

    vendor: str
    arch: str
    name: str
    sms: int
    shared_bytes: int
    warp_size: int = 32
    registers: int = 65536
    threads_per_sm: int = 2048
    bandwidth: float = 0.0
    rates: tuple[tuple[str, float], ...] = ()

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter, on the CPU."""
        return self.vendor == "interpreter"

    @property
    def bulk_copies(self) -> bool:
        """Whether an engine copies boxes of a tensor into shared memory, computing the addresses itself."""
        return self.interpreted or (self.vendor == "nvidia" and int(self.arch.removeprefix("sm_")) >= 90)

    @property
    def tensor_memory(self) -> bool:
        """Whether the matrix unit makes its sums in a memory of its own, not in registers."""
        return self.vendor == "nvidia" and 100 <= int(self.arch.removeprefix("sm_")) < 120

    @property
    def config_folder(self) -> str:
        """Where this device's tile configurations live, below a folder of configurations."""
        device = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-").removeprefix(f"{self.vendor}-")
        return f"{self.vendor}-{self.arch}/{device}-{self.sms}sm"

    def rate(self, dtype: str, precision: str = "tf32") -> float:
        """FLOP a second for a dtype name such as "bfloat16"; float32 by the `precision` of its products."""
        return dict(self.rates).get("tf32" if dtype == "float32" and precision == "tf32" else dtype, 0.0)

    def floor_seconds(self, flops: int, least_bytes: int, dtype: str, precision: str = "tf32") -> float:
        """The roofline floor of a call: no kernel can be faster than the slower of its arithmetic and its traffic.

        NaN for a device whose datasheet is not known.
        """
        rate = self.rate(dtype, precision)
        return max(flops / rate, least_bytes / self.bandwidth) if rate and self.bandwidth else math.nan


def _rates(half: float, tf32: float, single: float, double: float) -> tuple[tuple[str, float], ...]:
    return (("float16", half), ("bfloat16", half), ("tf32", tf32), ("float32", single), ("float64", double))


# Datasheets: A100 SXM 80 GB, H100 SXM 80 GB, B200 SXM, MI300X. Shared memory is what one block may take.
KNOWN: dict[str, Target] = {
    "sm_80": Target(
        "nvidia", "sm_80", "A100-SXM4-80GB", 108, 163 * 1024,
        bandwidth=2.039e12, rates=_rates(312e12, 156e12, 19.5e12, 19.5e12),
    ),
    "sm_90": Target(
        "nvidia", "sm_90", "H100 80GB HBM3", 132, 227 * 1024,
        bandwidth=3.35e12, rates=_rates(989e12, 494e12, 67e12, 67e12),
    ),
    "sm_100": Target(
        "nvidia", "sm_100", "B200", 148, 227 * 1024,
        bandwidth=8.0e12, rates=_rates(2250e12, 1125e12, 75e12, 37e12),
    ),
    "gfx942": Target(
        "amd", "gfx942", "MI300X", 304, 64 * 1024, warp_size=64, registers=131072,
        bandwidth=5.3e12, rates=_rates(1307e12, 653e12, 163e12, 163e12),
    ),
}  # fmt: skip

# Boards that share an architecture with a KNOWN one and differ in memory: bytes a second by a part of the name.
_BANDWIDTH = {
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "A100-SXM4-40GB": 1.555e12,
    "A100-PCIE": 1.555e12,
}

# The interpreter has no shared memory to run out of.
INTERPRETER = Target("interpreter", "interpreter", "CPU", 1, 2**30)


def interpreting() -> bool:
    """Whether Triton was told to interpret kernels (`TRITON_INTERPRET=1`)."""
    return bool(triton.knobs.runtime.interpret)


def known(name: str) -> Target:
    """The target of that architecture name, for compiling without a device."""
    if name not in KNOWN:
        raise WorkloadError(f"target: {name!r} is not known; choose one of {', '.join(KNOWN)}")
    return KNOWN[name]


def of_device(device: torch.device) -> Target:
    """The target that tensors on `device` are computed on; raises `DeviceError` where our kernels cannot run."""
    if device.type == "cuda":
        return _of_cuda(torch.cuda.current_device() if device.index is None else device.index)
    if interpreting() and device.type == "cpu":
        return INTERPRETER
    if device.type == "meta":
        return KNOWN["sm_90"]
    raise DeviceError(
        f"input: the tensors are on {device.type!r}, where Triton kernels do not run. Move them to a GPU "
        "(tensor.cuda()), or set TRITON_INTERPRET=1 before Python starts to run the kernels on the CPU in Triton's "
        "interpreter (slow; for tests)."
    )


@functools.cache
def _of_cuda(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        vendor, arch = "amd", properties.gcnArchName.split(":")[0]
    else:
        vendor, arch = "nvidia", f"sm_{properties.major}{properties.minor}"
    limits = triton.runtime.driver.active.utils.get_device_properties(index)
    sheet, name = KNOWN.get(arch), properties.name.replace("NVIDIA ", "").replace("AMD Instinct ", "")
    return Target(
        vendor,
        arch,
        name,
        properties.multi_processor_count,
        limits["max_shared_mem"],
        limits["warpSize"],
        registers=limits["max_num_regs"],
        threads_per_sm=properties.max_threads_per_multi_processor,
        bandwidth=next((b for part, b in _BANDWIDTH.items() if part in name), sheet.bandwidth if sheet else 0.0),
        rates=sheet.rates if sheet else (),
    )
