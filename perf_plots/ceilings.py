"""What the device reaches at best: a large copy, and large matrix products of random numbers."""

from __future__ import annotations

from typing import Any

import torch

from triton_conv.autotune.measure import Timer, Timing

from .provenance import provenance

_COPY_BYTES, _MATRIX, _ROUNDS = 2 * 2**30, 8192, 10
# In the interpreter nothing is measured: only the path is walked.
_REHEARSAL_BYTES, _REHEARSAL_MATRIX = 2**16, 64


def measure(device: torch.device, timer: Timer) -> dict[str, Any]:
    """Bytes a second of a copy, read and written bytes both counted, and FLOP a second by dtype ("tf32" of float32)."""
    size, n = (_COPY_BYTES, _MATRIX) if timer.measured else (_REHEARSAL_BYTES, _REHEARSAL_MATRIX)
    copy = _copy(size, device, timer)
    products = {name: _product(name, n, device, timer) for name in ("bfloat16", "float16", "tf32", "float32")}
    return {
        "measured": timer.measured,
        "bytes_per_s": 2 * size / (1e-6 * copy.median),
        "flops_per_s": {name: 2 * n**3 / (1e-6 * timing.median) for name, timing in products.items()},
        "copy_bytes": size,
        "matrix": n,
        "samples_us": {"copy": copy.samples} | {name: timing.samples for name, timing in products.items()},
        "provenance": provenance(device),
    }


def _copy(size: int, device: torch.device, timer: Timer) -> Timing:
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return timer.rounds({"copy": lambda: target.copy_(source)}, _ROUNDS)["copy"]


def _product(name: str, n: int, device: torch.device, timer: Timer) -> Timing:
    dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32" if name == "tf32" else "ieee"
    try:
        return timer.rounds({name: lambda: a @ b}, _ROUNDS)[name]
    finally:
        settings.fp32_precision = before


def describe(ceilings: dict[str, Any]) -> str:
    """One line."""
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in ceilings["flops_per_s"].items())
    return f"copy {ceilings['bytes_per_s'] / 1e12:.3g} TB/s; matrix products {rates} TFLOP/s"
