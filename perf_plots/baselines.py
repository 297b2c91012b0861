"""What we are compared with: other libraries on the same operation, and the standard convolution.

Whatever can be prepared before the call is prepared outside the timed region, to the baseline's advantage: formats,
casts, inserted zeros, the uneven padding of a standard convolution. The baseline's note says so.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_conv.geometry import ConvGeometry
from triton_conv.workloads import FORWARD, LECTURE_KINDS, Workload, differentiated

from . import lecture_baselines
from .floors import Work
from .record import COMPILED

Call = Callable[[], Tensor]

# Of the device's memory, for weights and activations of a standard convolution.
_MEMORY_SHARE = 0.6


@dataclass(frozen=True)
class Baseline:
    """A call, or why there is none."""

    call: Call | None = None
    absent: str = ""
    note: str = ""


@contextlib.contextmanager
def fastest_algorithms(search: bool = True) -> Iterator[None]:
    """cuDNN searches for its fastest algorithm on the first call of a shape; without `search` it takes a guess."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = search
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def build(workload: Workload, tensors: Mapping[str, Any], compiled: bool = False) -> dict[str, Baseline]:
    """Every baseline of a workload by name; a baseline that cannot be built is absent with its reason.

    "cudnn" is torch's own function, which picks cuDNN or a kernel of its own; it and "standard" run in the workload's
    memory format and in the other one. `compiled` asks for torch.compile too, whose search takes up to a minute a case.
    """
    makers: dict[str, Callable[[], Baseline]] = {}
    geometry = workload.layer.problem().whole
    if workload.kind in LECTURE_KINDS:
        for name, call in lecture_baselines.calls(workload, tensors, _formatted).items():
            makers[name] = functools.partial(Baseline, call)
    elif workload.offset_groups:
        makers["cudnn"] = lambda: Baseline(absent="cuDNN has no deformable convolution")
        makers["torchvision"] = lambda: _torchvision(workload.part, tensors, None)
        if workload.dtype == "bfloat16":
            makers["torchvision float16"] = lambda: _torchvision(workload.part, tensors, torch.float16)
    else:
        makers["cudnn"] = lambda: _torch(workload, geometry, tensors, workload.channels_last)
        makers["cudnn other format"] = lambda: (
            _torch(workload, geometry, tensors, not workload.channels_last) if geometry.rank > 1 else _ONE_FORMAT
        )
        if workload.kind == "depthwise":
            for kernel in ("cudnn", "native"):
                makers[f"{kernel} depthwise kernel"] = functools.partial(_forced, kernel, makers["cudnn"])
        if compiled:
            makers[COMPILED] = lambda: _compiled(workload, geometry, tensors)
    makers["standard"] = lambda: _standard(workload, geometry, tensors, workload.channels_last)
    makers["standard other format"] = lambda: (
        _standard(workload, geometry, tensors, not workload.channels_last) if geometry.rank > 1 else _ONE_FORMAT
    )
    makers["device copy"] = lambda: _copy(workload, tensors)
    makers["matrix product"] = lambda: _product(workload, tensors)
    built = {}
    for name, make in makers.items():
        try:
            built[name] = make()
        except Exception as error:  # whatever a library raises is the reason why it is absent
            built[name] = Baseline(absent=reason(error))
    return built


_ONE_FORMAT = Baseline(absent="one-dimensional: torch has one memory format")


def reason(error: Exception) -> str:
    """One line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _formatted(tensor: Tensor, channels_last: bool) -> Tensor:
    """The tensor dense in one of the two memory formats; the same one if it is so already."""
    order = (0, *range(2, tensor.dim()), 1) if channels_last else tuple(range(tensor.dim()))
    inverse = [order.index(dim) for dim in range(tensor.dim())]
    return tensor.permute(order).contiguous().permute(inverse)


def _torch(
    workload: Workload,
    g: ConvGeometry,
    tensors: Mapping[str, Any],
    channels_last: bool,
    function: Callable[..., Tensor] | None = None,
) -> Baseline:
    """torch's own function on the same operation, or `function` in its place."""
    function = function or getattr(F, workload.function)
    arguments = dict(tensors)
    mode = arguments.pop("padding_mode", "zeros")
    for name in ("input", "weight"):
        # A one-dimensional weight of one channel is dense in either format; torch takes it as it is.
        arguments[name] = _formatted(arguments[name], channels_last)
    pads = g.padding[3 - g.rank :]
    if mode == "zeros" and all(before == after for before, after in pads):
        return Baseline(differentiated(lambda tensors: function(**tensors), arguments, workload.part))
    if mode == "zeros" and all(before >= after for before, after in pads):
        arguments["padding"] = tuple(before for before, _ in pads)
        window: tuple[Any, ...] = (..., *(slice(0, size) for size in g.out_size[3 - g.rank :]))
        note = "padded alike before and after, the surplus outputs sliced off as a view"
        call = differentiated(lambda tensors: function(**tensors)[window], arguments, workload.part)
        return Baseline(call, note=note)
    arguments["padding"] = 0
    flat = [p for pair in reversed(pads) for p in pair]
    pad_mode = "constant" if mode == "zeros" else mode
    note = "torch.nn.functional.pad is timed: torch cannot do without"

    def padded(tensors: Mapping[str, Any]) -> Tensor:
        return function(**{**tensors, "input": F.pad(tensors["input"], flat, mode=pad_mode)})

    return Baseline(differentiated(padded, arguments, workload.part), note=note)


def _compiled(workload: Workload, g: ConvGeometry, tensors: Mapping[str, Any]) -> Baseline:
    """torch's own function, compiled: the search measures cuDNN and Inductor's own Triton templates."""
    if tensors["input"].device.type != "cuda":
        return Baseline(absent="compiled on a GPU alone")
    # One graph a case: without this, the ninth shape of a function would run uncompiled.
    torch.compiler.reset()
    function = torch.compile(getattr(F, workload.function), mode="max-autotune-no-cudagraphs", dynamic=False)
    made = _torch(workload, g, tensors, workload.channels_last, function)
    return Baseline(made.call, note="mode max-autotune, without CUDA graphs, whose copies would be timed")


def _copy(workload: Workload, tensors: Mapping[str, Any]) -> Baseline:
    """The memory limit: a copy that reads and writes as many bytes as the operation must move."""
    half = max(1, Work.of(workload).least_bytes // 2)
    source = torch.zeros(half, dtype=torch.int8, device=tensors["input"].device)
    target = torch.empty_like(source)
    return Baseline(lambda: target.copy_(source), note=f"{half / 1e6:.1f} MB read and written")


def _product(workload: Workload, tensors: Mapping[str, Any]) -> Baseline:
    """The arithmetic limit: a square matrix product of as many FLOPs, the sides a multiple of 8."""
    work, x = Work.of(workload), tensors["input"]
    side = max(8, round((work.flops / 2) ** (1 / 3) / 8) * 8)
    a, b = (torch.randn(side, side, dtype=torch.float32, device=x.device).to(x.dtype) for _ in range(2))
    out = torch.empty_like(a)
    settings = torch.backends.cuda.matmul

    def product() -> Tensor:
        before = settings.fp32_precision
        settings.fp32_precision = "tf32" if work.precision == "tf32" else "ieee"
        try:
            return torch.mm(a, b, out=out)
        finally:
            settings.fp32_precision = before

    return Baseline(product, note=f"{side} x {side} x {side}, {2e-9 * side**3:.1f} GFLOP")


def _forced(kernel: str, make: Callable[[], Baseline]) -> Baseline:
    """The same call with torch's choice between cuDNN and its own depthwise kernel taken from it."""
    call = make().call
    if not hasattr(torch.backends.cudnn, "depthwise_kernel") or call is None:
        return Baseline(absent=f"torch {torch.__version__} lets nobody choose its depthwise kernel")

    def forced() -> Tensor:
        before = torch.backends.cudnn.depthwise_kernel
        torch.backends.cudnn.depthwise_kernel = kernel
        try:
            return call()
        finally:
            torch.backends.cudnn.depthwise_kernel = before

    return Baseline(forced, note=f"torch.backends.cudnn.depthwise_kernel = {kernel!r}")


def _torchvision(part: str, tensors: Mapping[str, Any], dtype: torch.dtype | None) -> Baseline:
    try:
        from torchvision.ops import deform_conv2d
    except Exception as error:  # a torchvision built for another torch fails in many ways
        return Baseline(absent=f"torchvision cannot be imported ({reason(error)})")
    arguments = {
        name: value.to(dtype or value.dtype, memory_format=torch.contiguous_format)
        if isinstance(value, Tensor) else value
        for name, value in tensors.items()
    }  # fmt: skip
    note = "contiguous, the only format it reads without a copy"
    if part != FORWARD:
        note += "; its backward computes every gradient at once, whatever is asked for"
    call = differentiated(lambda tensors: deform_conv2d(**tensors), arguments, part)
    return Baseline(call, note=note + ("; cast beforehand" if dtype else ""))


def _standard(workload: Workload, g: ConvGeometry, tensors: Mapping[str, Any], channels_last: bool) -> Baseline:
    """One group, no dilation, the same input, kernel size and output; for a transposed one on zeros inserted before."""
    dense = g.dense()
    x: Tensor = tensors["input"]
    need, most = dense.least_bytes(x.element_size()), _MEMORY_SHARE * _memory(x.device)
    if need > most:
        return Baseline(absent=f"needs {need / 1e9:.0f} GB, more than {most / 1e9:.0f} GB of this device's memory")
    notes = []
    if g.transposed:
        spread = x.new_zeros((g.batch, g.c_in, *dense.in_size[3 - g.rank :]))
        every: tuple[Any, ...] = (..., *(slice(None, None, s) for s in g.stride[3 - g.rank :]))
        spread[every] = x
        x = spread
        notes.append("zeros inserted between the inputs beforehand")
    pads = dense.padding[3 - g.rank :]
    if any(before != after for before, after in pads):
        # `dense` puts what is left over of an odd padding behind; torch pads alike on both sides.
        x = F.pad(x, [p for before, after in reversed(pads) for p in (0, after - before)])
        notes.append("uneven padding added beforehand")
    shape = (g.c_out, g.c_in, *g.kernel[3 - g.rank :])
    weight = torch.randn(shape, dtype=x.dtype, device=x.device).mul_((g.c_in * g.taps) ** -0.5)
    x, weight = _formatted(x, channels_last), _formatted(weight, channels_last)
    function: Callable[..., Tensor] = getattr(F, f"conv{g.rank}d")
    stride, padding = dense.stride[3 - g.rank :], tuple(before for before, _ in pads)
    if workload.offset_groups:
        notes.append("the offsets are not read")
    operands = {"input": x, "weight": weight, "stride": stride, "padding": padding}
    call = differentiated(lambda tensors: function(**tensors), operands, workload.part)
    return Baseline(call, note="; ".join(notes))


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
