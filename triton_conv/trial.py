"""Running a model for what it does on the way and not for its result: nothing of the model is changed by it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .errors import ArgumentTypeError

# torch asks for a few runs before a capture: libraries choose their algorithms, the allocator its blocks.
_RUNS = 3


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        given = repr(model) if callable(model) else type(model).__name__
        raise ArgumentTypeError(f"model: expected an nn.Module, got {given}")


def follow(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Runs the forward pass on fake tensors, which have sizes and no data; for real where the model looks at data."""
    try:
        # Among themselves, real buffers are computed with for real: a counter counts.
        with _restored(model), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
            model(*fakes[0], **fakes[1])
    except Exception:  # whatever a model does with data that is not there
        repeat(model, args, kwargs, runs=1, backward=False)


def repeat(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], runs: int, backward: bool) -> None:
    """Runs the model, and its gradients if asked; `grad` fields, buffers and random states stay as they were."""
    devices = {t.device for t in (*tree_leaves((args, kwargs)), *model.parameters()) if isinstance(t, Tensor)}
    with _restored(model), torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        for _ in range(runs):
            outputs = model(*args, **kwargs)
            if backward:
                _differentiate(model, (args, kwargs), outputs)


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Puts the buffers back at the end, and their values."""
    kept = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffers, before in kept:
            buffers.clear()
            buffers.update(before)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def _differentiate(model: nn.Module, inputs: Any, outputs: Any) -> None:
    leaves = [t for t in (*model.parameters(), *tree_leaves(inputs)) if isinstance(t, Tensor) and t.requires_grad]
    results = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    if leaves and results:
        gradients = [torch.ones_like(result) for result in results]
        torch.autograd.grad(results, leaves, gradients, allow_unused=True)


def warmup(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Makes ready all that a call `model(*args, **kwargs)` needs, so that a CUDA graph of it can be captured.

    Chooses, plans and compiles by running the model, with its gradients where they are enabled and something requires
    them; on a GPU on a stream of its own, as torch asks for. Gradients, buffers and random states stay as they were.
    While a graph is captured nothing is tuned, read from disk or compiled: a function of triton_conv that was not made
    ready raises `CaptureError` then, and a layer warns and runs on torch's kernel.

    Args:
        model: any module, converted or not.
        args, kwargs: what it is called with; tensors of the sizes, strides and dtypes that the graph will have.

    Raises:
        ArgumentTypeError (a TypeError): the model is not an `nn.Module`.

    >>> tc.warmup(model, static_input)
    >>> with torch.cuda.graph(graph):
    ...     static_output = model(static_input)
    """
    check_model(model)
    backward = torch.is_grad_enabled()
    device = next((t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), torch.device("cpu"))
    if device.type != "cuda":
        repeat(model, args, kwargs, runs=1, backward=backward)
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            repeat(model, args, kwargs, runs=_RUNS, backward=backward)
        torch.cuda.current_stream().wait_stream(stream)
