"""`python -m perf_plots.host_overhead`: what a call costs on the host, the kernel launch replaced by nothing.

Everything else is in it: normalising the arguments, torch's dispatcher, the look-up of the plan, the allocation of the
output; through a module also the choice of the library, and with autograd what backward will need. Then with the launch
too, which Triton makes and the device does not wait for: without a GPU for an H100 that nobody has, by a driver that
does nothing. Beside it, torch's own conv2d and module, which have no such seam: on meta tensors, where they compute
shapes only, and on CPU tensors of one element, where the arithmetic is negligible.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
import triton

from .compilers import Driver

_BATCHES, _CALLS = 100, 100
GOAL_US, MODULE_GOAL_US = 25.0, 35.0


def median_us(call: Callable[[], object]) -> float:
    """Microseconds a call: the median over batches, after a batch to warm up."""
    samples = []
    for _ in range(_BATCHES + 1):
        start = time.perf_counter_ns()
        for _ in range(_CALLS):
            call()
        samples.append((time.perf_counter_ns() - start) / (1e3 * _CALLS))
    return statistics.median(samples[1:])


def _nothing(*arguments: object) -> None:
    """Stands for the launch."""


class _NoDriver(Driver):
    """An H100's, whose launches end where the GPU's own driver would be called."""

    utils = SimpleNamespace(
        load_binary=lambda *arguments: (1, 1, 32, 0, 1024),
        get_device_properties=lambda index: {"max_shared_mem": 232448},
    )

    @staticmethod
    def launcher_cls(source: object, metadata: object) -> Callable[..., None]:
        return _nothing


def _without_a_gpu() -> None:
    """Has CPU tensors planned and compiled for an H100."""
    import triton_conv.target

    triton.runtime.driver.set_active(_NoDriver("nvidia", "sm_90", 32))
    triton_conv.target.of_device = lambda device: triton_conv.target.KNOWN["sm_90"]
    triton_conv.set_first_use_check(False)


def measure(device: torch.device) -> dict[str, float]:
    """Microseconds by what was called."""
    import triton_conv as tc
    from triton_conv import dispatch, ops, policy

    x, w = torch.randn(1, 4, 8, 8, device=device), torch.randn(4, 1, 3, 3, device=device)
    b = torch.randn(4, device=device)
    one, filter_one = torch.randn(1, 1, 1, 1), torch.randn(1, 1, 1, 1)
    meta, filter_meta, b_meta = (tensor.to("meta") for tensor in (x, w, b))
    flat = (1, 1), (1, 1, 1, 1), (1, 1), 4, False, (0, 0), "zeros", "none"
    layer = tc.nn.Conv2d(4, 4, 3, padding=1, groups=4, backend="triton", device=device)
    layer_meta, layer_one = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4, device="meta"), torch.nn.Conv2d(1, 1, 1)
    found: dict[str, float] = {}
    with torch.no_grad(), mock.patch.object(dispatch, "launch", _nothing):
        plan = ops.plan_conv(x, w, b, *flat)
        found |= {
            "triton_conv.conv2d, launch replaced by nothing": median_us(
                lambda: tc.conv2d(x, w, b, padding=1, groups=4)
            ),
            "  of which the look-up of the plan": median_us(lambda: ops.plan_conv(x, w, b, *flat)),
            "  of which the allocation of the output": median_us(
                lambda: torch.empty_strided(plan.out_shape, plan.out_strides, dtype=x.dtype, device=x.device)
            ),
            "triton_conv.nn.Conv2d, likewise": median_us(lambda: layer(x)),
            "torch.nn.functional.conv2d on meta tensors, same shapes": median_us(
                lambda: F.conv2d(meta, filter_meta, b_meta, padding=1, groups=4)
            ),
            "torch.nn.functional.conv2d on CPU tensors of one element": median_us(lambda: F.conv2d(one, filter_one)),
        }
    x_grad = x.clone().requires_grad_()
    with mock.patch.object(dispatch, "launch", _nothing):
        found |= {
            "triton_conv.conv2d with autograd": median_us(lambda: tc.conv2d(x_grad, w, b, padding=1, groups=4)),
            "triton_conv.nn.Conv2d with autograd": median_us(lambda: layer(x_grad)),
            "  of which the choice of the library": median_us(lambda: policy.choose("conv", "triton", (x, w, b), flat)),
            "torch.nn.Conv2d with autograd on meta tensors, same shapes": median_us(lambda: layer_meta(meta)),
            "torch.nn.Conv2d with autograd on CPU tensors of one element": median_us(lambda: layer_one(one)),
        }
    with torch.no_grad():
        found["triton_conv.conv2d with its launch"] = median_us(lambda: tc.conv2d(x, w, b, padding=1, groups=4))
    found["triton_conv.nn.Conv2d with autograd and its launch"] = median_us(lambda: layer(x_grad))
    if x.is_cuda:
        with torch.no_grad():
            found["torch.nn.functional.conv2d on the GPU"] = median_us(lambda: F.conv2d(x, w, b, padding=1, groups=4))
        layer_cuda = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4, device=device)
        found["torch.nn.Conv2d with autograd on the GPU"] = median_us(lambda: layer_cuda(x_grad))
    return found


def main() -> None:
    cuda = torch.cuda.is_available()
    if not cuda:
        _without_a_gpu()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"Host time of a call, median of {_BATCHES} batches of {_CALLS}, tensors on {device}, {versions}")
    for name, us in measure(device).items():
        print(f"{us:8.2f} us  {name}")
    print(f"Goals: at most {GOAL_US:g} us for triton_conv.conv2d, {MODULE_GOAL_US:g} us for a module with autograd")


if __name__ == "__main__":
    main()
