"""`python -m perf_plots.host_overhead`: what a call costs on the host, the kernel launch replaced by nothing.

Everything else is in it: normalising the arguments, torch's dispatcher, the look-up of the plan, the allocation of the
output; through a module also the choice of the library, and with autograd what backward will need. Then with the launch
too, which Triton makes and the device does not wait for: without a GPU for an H100 that nobody has, by a driver that
does nothing. Then forward and backward, as `torch.autograd.grad` of a module's tensors, of other kinds of modules
too, and a module that stays with torch. Beside it, torch's own conv2d and module, which have no such seam: on meta
tensors, where they compute shapes only, and on CPU tensors of one element, where the arithmetic is negligible.

Times are those of single calls of which 2% were faster: what else the machine does lengthens the others. Beside them
stand the calls that a call makes, of Python's functions and of C's, which depend on nothing of that kind.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton

from triton_conv.aot import Driver

_CALLS, _FASTER = 5000, 50
GOAL_US, MODULE_GOAL_US = 25.0, 35.0


@dataclass(frozen=True)
class Cost:
    """Microseconds of a call, and the functions of Python and of C that are called in it."""

    us: float
    python: int
    c: int

    def __str__(self) -> str:
        return f"{self.us:8.2f} us {self.python:5d} {self.c:5d}"


def cost(call: Callable[[], object]) -> Cost:
    """What a call costs, after some to warm up."""
    samples = []
    for _ in range(_CALLS):
        start = time.perf_counter_ns()
        call()
        samples.append(time.perf_counter_ns() - start)
    made: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        made[event] += 1

    sys.setprofile(count)
    call()
    sys.setprofile(None)
    # But for the one that ends it.
    return Cost(sorted(samples)[_CALLS // _FASTER] / 1e3, made["call"], made["c_call"] - 1)


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
    import triton_conv.verdicts

    triton.runtime.driver.set_active(_NoDriver("nvidia", "sm_90", 32))
    triton_conv.target.of_device = lambda device: triton_conv.target.KNOWN["sm_90"]
    # Nothing is computed that could be checked: as where every form was used before.
    triton_conv.verdicts.needless = lambda *arguments: "no launch"


def _others(device: torch.device) -> Iterator[tuple[str, torch.nn.Module, list[torch.Tensor]]]:
    """Other layers, with their names and inputs: one whose weight is copied and whose gradient is added up, and the
    other kinds."""
    from triton_conv import nn

    def inputs(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]

    ours: Any = {"padding": 1, "device": device, "backend": "triton"}
    yield "dense nn.Conv2d", nn.Conv2d(16, 16, 3, bias=False, **ours), inputs((2, 16, 64, 64))
    yield "nn.ConvTranspose2d", nn.ConvTranspose2d(16, 16, 4, stride=2, **ours), inputs((1, 16, 4, 4))
    yield "nn.SeparableConv2d", nn.SeparableConv2d(16, 16, 3, padding=1, device=device), inputs((1, 16, 8, 8))
    yield "nn.DeformConv2d", nn.DeformConv2d(16, 16, 3, **ours), inputs((1, 16, 8, 8), (1, 18, 8, 8))


def measure(device: torch.device) -> dict[str, Cost]:
    """Costs by what was called."""
    import triton_conv as tc
    from triton_conv import dispatch, ops, ops_conv, policy

    x, w = torch.randn(1, 4, 8, 8, device=device), torch.randn(4, 1, 3, 3, device=device)
    b, dy = torch.randn(4, device=device), torch.randn(1, 4, 8, 8, device=device)
    one, filter_one, dy_one = (torch.randn(1, 1, 1, 1) for _ in range(3))
    meta, filter_meta, b_meta = (tensor.to("meta") for tensor in (x, w, b))
    flat = (1, 1), (1, 1, 1, 1), (1, 1), 4, False, (0, 0), "zeros", "none"
    layer = tc.nn.Conv2d(4, 4, 3, padding=1, groups=4, backend="triton", device=device)
    layer_meta, layer_one = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4, device="meta"), torch.nn.Conv2d(1, 1, 1)

    def conv2d() -> torch.Tensor:
        return tc.conv2d(x, w, b, padding=1, groups=4)

    def step(layer: torch.nn.Module, *inputs: torch.Tensor, dy: torch.Tensor) -> Callable[[], object]:
        tensors = [*inputs, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(*inputs), tensors, dy)

    found: dict[str, Cost] = {}
    with torch.no_grad(), mock.patch.object(dispatch, "launch", _nothing):
        plan = ops_conv.plan_conv(x, w, b, *flat)
        found |= {
            "triton_conv.conv2d, launch replaced by nothing": cost(conv2d),
            "  of which the allocation of the output": cost(lambda: ops.allocate(plan.out_shape, plan.out_strides, x)),
            "triton_conv.nn.Conv2d, likewise": cost(lambda: layer(x)),
            "torch.nn.functional.conv2d on meta tensors, same shapes": cost(
                lambda: F.conv2d(meta, filter_meta, b_meta, padding=1, groups=4)
            ),
            "torch.nn.functional.conv2d on CPU tensors of one element": cost(lambda: F.conv2d(one, filter_one)),
        }
    x_grad, one_grad = x.clone().requires_grad_(), one.clone().requires_grad_()
    with mock.patch.object(dispatch, "launch", _nothing):
        found |= {
            "triton_conv.conv2d with autograd": cost(lambda: tc.conv2d(x_grad, w, b, padding=1, groups=4)),
            "triton_conv.nn.Conv2d with autograd": cost(lambda: layer(x_grad)),
            "  a choice of the library, which its first call makes": cost(
                lambda: policy.choose("conv", "triton", (x, w, b), flat)
            ),
            "torch.nn.Conv2d with autograd on meta tensors, same shapes": cost(lambda: layer_meta(meta)),
            "torch.nn.Conv2d with autograd on CPU tensors of one element": cost(lambda: layer_one(one)),
        }
    with torch.no_grad():
        found["triton_conv.conv2d with its launch"] = cost(conv2d)
    one_here, staying = one.to(device).requires_grad_(), tc.nn.Conv2d(1, 1, 1, backend="auto", device=device)
    found |= {
        "triton_conv.nn.Conv2d with autograd and its launch": cost(lambda: layer(x_grad)),
        "triton_conv.nn.Conv2d, forward and backward, launches too": cost(step(layer, x_grad, dy=dy)),
        "torch.nn.Conv2d, forward and backward, on CPU tensors of one element": cost(
            step(layer_one, one_grad, dy=dy_one)
        ),
        "triton_conv.nn.Conv2d that stays with torch, with autograd, on one element": cost(lambda: staying(one_here)),
    }
    unaware = torch.nn.Conv2d(1, 1, 1, device=device)
    with tc.accelerate():
        found["torch.nn.Conv2d in triton_conv.accelerate() that stays with torch, likewise"] = cost(
            lambda: unaware(one_here)
        )
    unaware = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4, device=device)
    with tc.accelerate(force=True):
        found["torch.nn.Conv2d in triton_conv.accelerate(force=True), with autograd and its launch"] = cost(
            lambda: unaware(x_grad)
        )
    for name, other, inputs in _others(device):
        kept = other(*inputs).detach()
        found[f"{name} with autograd and its launches"] = cost(functools.partial(other, *inputs))
        found[f"{name}, forward and backward, launches too"] = cost(step(other, *inputs, dy=kept))
    if x.is_cuda:
        with torch.no_grad():
            found["torch.nn.functional.conv2d on the GPU"] = cost(lambda: F.conv2d(x, w, b, padding=1, groups=4))
        layer_cuda = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4, device=device)
        found["torch.nn.Conv2d with autograd on the GPU"] = cost(lambda: layer_cuda(x_grad))
        found["torch.nn.Conv2d, forward and backward, on the GPU"] = cost(step(layer_cuda, x_grad, dy=dy))
    return found


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m perf_plots.host_overhead", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    cuda = torch.cuda.is_available()
    if not cuda:
        _without_a_gpu()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"Host time of a call (2% of {_CALLS} were faster), calls of Python and of C; on {device}, {versions}")
    for name, found in measure(device).items():
        print(f"{found}  {name}")
    print(f"Goals: at most {GOAL_US:g} us for triton_conv.conv2d, {MODULE_GOAL_US:g} us for a module with autograd")


if __name__ == "__main__":
    main()
