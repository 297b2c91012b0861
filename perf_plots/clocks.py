"""What the device's clocks do while a case is timed: throttling is noted beside the times that it may explain.

Read through NVIDIA's management library where Python has it (nvidia-ml-py), else from `nvidia-smi`; absent where there
is neither. Nothing is ever set.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from .provenance import output

State = dict[str, Any]

# Bits of NVML's clock event reasons. An idle device and a sync boost slow nothing down that is timed.
_REASONS = {
    0x2: "application clocks", 0x4: "power cap", 0x8: "hardware slowdown", 0x20: "temperature, by software",
    0x40: "temperature, by hardware", 0x80: "power brake",
}  # fmt: skip
_QUERY = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_throttle_reasons.active"
# Cycles of half a nanosecond: a device with nothing to do would report its idle clocks.
_BUSY = 20_000_000


def sample(device: torch.device) -> State | None:
    """Clocks in MHz, degrees Celsius, watts, and why the clocks are lower than they could be; None if nobody says.

    The device is kept busy while it is asked.
    """
    if device.type != "cuda":
        return None
    torch.cuda._sleep(_BUSY)
    try:
        return _from_library(device)
    except Exception:  # not installed, or without the rights: each release of it raises its own
        return _from_command(device)
    finally:
        torch.cuda.synchronize(device)


@functools.cache
def _handle(device: torch.device) -> Any:
    import pynvml

    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(_uuid(device))


def _uuid(device: torch.device) -> str:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"GPU-{uuid}" if uuid else str(device.index or 0)


def _from_library(device: torch.device) -> State:
    nvml, handle = _handle(device)
    reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    reasons = reasons or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    return _state(
        nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        reasons(handle),
    )


def _from_command(device: torch.device) -> State | None:
    line = output("nvidia-smi", f"--id={_uuid(device)}", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
    try:
        sm, memory, celsius, watts, reasons = (line or "").split(", ")
        return _state(int(sm), int(memory), int(celsius), float(watts), int(reasons, 16))
    except ValueError:
        return None


def _state(sm: int, memory: int, celsius: int, watts: float, reasons: int) -> State:
    why = [name for bit, name in _REASONS.items() if reasons & bit]
    return {"sm_mhz": sm, "memory_mhz": memory, "celsius": celsius, "watts": round(watts, 1), "throttled": why}


def throttled(clocks: Mapping[str, Any]) -> list[str]:
    """Why the device ran slower than it could, before or after the rounds."""
    return list(dict.fromkeys(why for state in clocks.values() if state for why in state["throttled"]))


def describe(clocks: Mapping[str, Any]) -> str:
    """One line: "1980 to 1755 MHz, 41 to 63 C, throttled: power cap"; says so where nothing is known."""
    states = [state for when in ("before", "after") if (state := clocks.get(when))]
    if not states:
        return "clocks unknown"
    ends = [(state["sm_mhz"], state["celsius"]) for state in (states[0], states[-1])]
    mhz, celsius = (" to ".join(map(str, dict.fromkeys(values))) for values in zip(*ends, strict=True))
    return f"{mhz} MHz, {celsius} °C, " + (f"throttled: {', '.join(throttled(clocks))}" if throttled(clocks) else
                                           "not throttled")  # fmt: skip
