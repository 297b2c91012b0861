"""The launch that serves all kernels: one that Triton compiled before starts without another look at its arguments."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import threading
from collections import Counter
from typing import Any

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel

from .arguments import Arguments
from .kernel import Kernel, Tile

# How a compiled kernel is run is known of these; of others, how it is asked to run itself.
_KNOWN = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"], ["3", "8"], ["3", "9"])
_knobs: Any = triton.knobs.runtime
_interpreting = threading.Lock()

launches: Counter[str] = Counter()
"""Launches by kernel name since import, or since a caller cleared it."""


def launch(kernel: Kernel, grid: int, tile: Tile, values: Arguments, *tensors: torch.Tensor | None) -> None:
    """Launches on the current device, the tensors': allocates nothing but what an `Ahead` lays out and a `Join` adds
    up, decides nothing. Tensors in the order of `kernel.pointers`.
    """
    launches[kernel.name] += 1
    start = _start_with_scratch if kernel.descriptors else start_kernel
    programs, options = (grid, 1, 1), (tile.num_warps, tile.num_stages)
    if kernel.ahead is not None and (first := values.first) is not None:
        x, weight, *others = tensors
        assert weight is not None
        made = memory(first.numbers, weight.device, weight.dtype)
        start_kernel(kernel.ahead.function, (first.grid, 1, 1), first.values, (weight, made))
        tensors = (x, made, *others)
    if kernel.join is None:
        start(kernel.function, programs, values, tensors, *options)
    elif (second := values.second) is None:
        start(kernel.function, programs, values, (*tensors, None), *options)
    else:
        *_, bias, output = tensors
        assert output is not None
        partial = memory(second.numbers, output.device)
        start(kernel.function, programs, values, (*tensors, partial), *options)
        start_kernel(kernel.join.function, (second.grid, 1, 1), second.values, (partial, bias, output), *options)


def memory(numbers: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Where a kernel leaves what the launch after it reads: uninitialised."""
    return torch.empty(numbers, dtype=dtype, device=device)


def compiler_options(*of_a_tile: int | None) -> dict[str, Any]:
    """What Triton is asked for besides a kernel's arguments: warps and stages, if any are given, and that a product is
    added in one instruction, unless the environment says otherwise.

    It was the default until Triton 3.9, which warns where nobody asks: in registers a tap takes two instructions
    otherwise.
    """
    options: dict[str, Any] = dict(zip(("num_warps", "num_stages"), of_a_tile, strict=False))
    return options if "TRITON_DEFAULT_FP_FUSION" in os.environ else options | {"enable_fp_fusion": True}


def start_kernel(
    function: Any,
    grid: tuple[int, int, int],
    values: Arguments,
    tensors: tuple[torch.Tensor | None, ...],
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> None:
    """Starts a jitted function, of as many warps and stages as Triton takes by itself if none are given.

    Triton looks at each of some fifty arguments in every call to find what it compiled before: 19 of 32 us. Only the
    tensors can differ between calls with the same values, and of them only what is in this key. Asking the compiled
    kernel to run itself takes another 1.3 us: for hooks, mostly, of which there are none unless someone is profiling.
    It takes addresses for tensors, and then asks neither them nor the driver for theirs.
    """
    device = tensors[0].get_device()  # type: ignore[union-attr]
    places: list[int | None] = []
    kinds: list[Any] = [device, num_warps, num_stages]
    for tensor in tensors:
        if tensor is None:
            places.append(None)
            kinds.append(None)
        else:
            places.append(place := tensor.data_ptr())
            kinds.append(tensor.dtype)
            if place % 16:
                kinds.append("unaligned")
    key = tuple(kinds)
    if (found := values.compiled.get(key)) is None:
        options = compiler_options() if num_warps is None else compiler_options(num_warps, num_stages)
        if _knobs.interpret:
            _keep_truths()
        # The interpreter knows but one kernel at a time.
        with _interpreting if _knobs.interpret else contextlib.nullcontext():
            compiled = function[grid](*tensors, **values, **options)
        # It compiles nothing.
        if compiled is not None:
            run = compiled.run if _KNOWN and isinstance(compiled, CompiledKernel) else None
            values.compiled[key] = compiled, run, tuple(values.values())
        return
    compiled, run, others = found
    if run is None or _hooked():
        compiled[grid](*tensors, *others)
    else:
        stream = triton.runtime.driver.active.get_current_stream(device)
        run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *places, *others)


@functools.cache
def _keep_truths() -> None:
    """Has Triton's interpreter spread a truth over a block as one, for the rest of the process.

    It calls what a comparison of two numbers gives by their type, and so spreads int32: a mask that loads and stores
    took until Triton 3.9, which refuses it. A GPU's masks are of truths.
    """
    from triton.runtime import interpreter

    spread = interpreter.InterpreterBuilder.create_splat

    def create_splat(builder: Any, block: Any, value: Any) -> Any:
        is_truth = value.data.dtype == bool
        return spread(builder, block, interpreter.TensorHandle(value.data, tl.int1) if is_truth else value)

    interpreter.InterpreterBuilder.create_splat = create_splat


def _hooked() -> bool:
    """Whether somebody is to be told of launches; their chains of hooks are there even where they are empty."""
    before, after = _knobs.launch_enter_hook, _knobs.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def _start_with_scratch(*arguments: Any) -> None:
    # Triton's allocator belongs to the context of whoever calls: it is set in a copy, and theirs stays.
    contextvars.copy_context().run(_scratched, *arguments)


def _scratched(*arguments: Any) -> None:
    triton.set_allocator(_scratch)
    start_kernel(*arguments)


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    # torch's allocations are aligned to 512 bytes, and live until the stream has passed them.
    return torch.empty(size, dtype=torch.int8, device="cuda")
