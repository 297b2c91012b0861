"""What the kernels run on: the device at hand, or one that is only compiled for.

A `Target` holds what planning needs to know. `current` asks the device, once per device; `KNOWN` lists the targets that
the compiler serves without one, with the vendor's datasheet figures for a typical board.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, replace

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
    def capability(self) -> int:
        """NVIDIA's compute capability, 90 for 9.0; 0 of any other device."""
        return int(self.arch.removeprefix("sm_")) if self.arch.startswith("sm_") else 0

    @property
    def family(self) -> str:
        """The architecture whose matrix unit it has: code for it is laid out as for that one.

        Consumer's Blackwell (sm_120) multiplies with the instructions of sm_80.
        """
        if self.capability:
            return next((f"sm_{of}" for of, end in ((90, 100), (100, 120)) if of <= self.capability < end), "sm_80")
        # AMD's letters are a generation and two hexadecimal digits.
        return {"gfx9": "gfx942", "gfx11": "gfx1100"}.get(self.arch[:-2], self.arch)

    @property
    def bulk_copies(self) -> bool:
        """Whether an engine copies boxes of a tensor into shared memory, computing the addresses itself."""
        return self.interpreted or (self.vendor == "nvidia" and self.capability >= 90)

    @property
    def tensor_memory(self) -> bool:
        """Whether the matrix unit makes its sums in a memory of its own, not in registers."""
        return self.vendor == "nvidia" and self.family == "sm_100"

    @property
    def tf32(self) -> bool:
        """Whether products of float32 can be made in tf32; of AMD's matrix units one kind can."""
        return self.interpreted or self.capability > 0 or self.arch == "gfx942"

    @property
    def config_folder(self) -> str:
        """Where this device's tile configurations live, below a folder of configurations."""
        device = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-").removeprefix(f"{self.vendor}-")
        return f"{self.vendor}-{self.arch}/{device}-{self.sms}sm"

    def rate(self, dtype: str, precision: str = "tf32") -> float:
        """FLOP a second for a dtype name such as "bfloat16"; float32 by the `precision` of its products."""
        return dict(self.rates).get("tf32" if dtype == "float32" and precision == "tf32" and self.tf32 else dtype, 0.0)

    def floor_seconds(self, flops: int, least_bytes: int, dtype: str, precision: str = "tf32") -> float:
        """The roofline floor of a call: no kernel can be faster than the slower of its arithmetic and its traffic.

        NaN for a device whose datasheet is not known.
        """
        rate = self.rate(dtype, precision)
        return max(flops / rate, least_bytes / self.bandwidth) if rate and self.bandwidth else math.nan


def _rates(half: float, tf32: float, single: float, double: float) -> tuple[tuple[str, float], ...]:
    return (("float16", half), ("bfloat16", half), ("tf32", tf32), ("float32", single), ("float64", double))


# Datasheets and whitepapers of the boards named; without sparsity, sums in float32. Shared memory is what one block may
# take. The device is one of an MI250X's two dies, and a Radeon's multiprocessor a pair of its compute units.
KNOWN: dict[str, Target] = {
    "sm_80": Target(
        "nvidia", "sm_80", "A100-SXM4-80GB", 108, 163 * 1024,
        bandwidth=2.039e12, rates=_rates(312e12, 156e12, 19.5e12, 19.5e12),
    ),
    "sm_86": Target(
        "nvidia", "sm_86", "GeForce RTX 3090", 82, 99 * 1024, threads_per_sm=1536,
        bandwidth=0.936e12, rates=_rates(71e12, 35.6e12, 35.6e12, 0.556e12),
    ),
    "sm_89": Target(
        "nvidia", "sm_89", "L40S", 142, 99 * 1024, threads_per_sm=1536,
        bandwidth=0.864e12, rates=_rates(362e12, 183e12, 91.6e12, 1.43e12),
    ),
    "sm_90": Target(
        "nvidia", "sm_90", "H100 80GB HBM3", 132, 227 * 1024,
        bandwidth=3.35e12, rates=_rates(989e12, 494e12, 67e12, 67e12),
    ),
    "sm_100": Target(
        "nvidia", "sm_100", "B200", 148, 227 * 1024,
        bandwidth=8.0e12, rates=_rates(2250e12, 1125e12, 75e12, 37e12),
    ),
    "sm_120": Target(
        "nvidia", "sm_120", "GeForce RTX 5090", 170, 99 * 1024, threads_per_sm=1536,
        bandwidth=1.792e12, rates=_rates(209.5e12, 104.8e12, 104.8e12, 1.64e12),
    ),
    "gfx90a": Target(
        "amd", "gfx90a", "MI250X", 110, 64 * 1024, warp_size=64, registers=131072,
        bandwidth=1.638e12, rates=_rates(191.5e12, 0.0, 47.9e12, 47.9e12),
    ),
    "gfx942": Target(
        "amd", "gfx942", "MI300X", 304, 64 * 1024, warp_size=64, registers=131072,
        bandwidth=5.3e12, rates=_rates(1307e12, 653e12, 163e12, 163e12),
    ),
    "gfx950": Target(
        "amd", "gfx950", "MI355X", 256, 160 * 1024, warp_size=64, registers=131072,
        bandwidth=8.0e12, rates=_rates(2517e12, 0.0, 157e12, 78.6e12),
    ),
    "gfx1100": Target(
        "amd", "gfx1100", "Radeon RX 7900 XTX", 48, 64 * 1024, registers=196608,
        bandwidth=0.96e12, rates=_rates(123e12, 0.0, 61.4e12, 1.92e12),
    ),
}  # fmt: skip

# Boards with the chip of a KNOWN one and other memory: bytes a second by a part of the name, the first that is one.
_BANDWIDTH = {
    "GH200 480GB": 4.0e12,
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "A100-SXM4-40GB": 1.555e12,
    "A100-PCIE": 1.555e12,
    "A100 80GB PCIe": 1.935e12,
}

# The first with tensor cores that Triton has instructions for.
_OLDEST = 80

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
    name = board(properties.name)
    if vendor == "nvidia" and 10 * properties.major < _OLDEST:
        raise DeviceError(
            f"input: it is on a {name} ({arch}), for whose tensor cores Triton makes no code; our kernels take NVIDIA "
            f"GPUs from sm_{_OLDEST} on. Call torch.nn.functional there: modules, convert and accelerate do"
        )
    limits = triton.runtime.driver.active.utils.get_device_properties(index)
    sheet = datasheet(arch, name)
    return Target(
        vendor,
        arch,
        name,
        properties.multi_processor_count,
        limits["max_shared_mem"],
        limits["warpSize"],
        registers=limits["max_num_regs"],
        threads_per_sm=properties.max_threads_per_multi_processor,
        bandwidth=sheet.bandwidth if sheet else 0.0,
        rates=sheet.rates if sheet else (),
    )


def board(name: str) -> str:
    """A board's name as its driver says it, without the maker's."""
    return name.replace("NVIDIA ", "").replace("AMD Instinct ", "").removeprefix("AMD ")


def datasheet(arch: str, name: str) -> Target | None:
    """The known target with the figures of a board; None for one whose datasheet is not here.

    An RTX 3060 and an RTX 3090 are of one architecture: another board's figures would be no floor.
    """
    sheet = KNOWN.get(arch)
    bandwidth = next((figure for part, figure in _BANDWIDTH.items() if part in name), 0.0)
    if sheet is None or not (bandwidth or name == sheet.name):
        return None
    return replace(sheet, bandwidth=bandwidth or sheet.bandwidth)
