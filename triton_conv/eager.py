"""Plain eager calls: those in which nothing stands between the caller and a kernel.

A crossing of torch's dispatcher into Python costs 5 us of the host's time, and a training step has three of them a
layer. It is for transforms, tracing, modes, subclasses and profiling: where there is none of these, the implementation
of an op is called as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_C: Any = torch._C
_TYPES = frozenset((Tensor, nn.Parameter))
# What tensors and threads have in the dispatcher that changes nothing here: the backends that run our ops; autograd,
# for which an autograd.Function stands; autocast, whose casts come before. All else has a key of its own: fake and
# wrapped tensors, views that are to be negated, memory that is not dense, dispatch modes, transforms, tracing.
_HARMLESS = "CPU CUDA BackendSelect ADInplaceOrView AutogradCPU AutogradCUDA AutocastCPU AutocastCUDA"
_INTERVENING: int = ~functools.reduce(
    or_, (_C.DispatchKeySet(getattr(_C.DispatchKey, name)).raw_repr() for name in _HARMLESS.split())
)
# As names of this module: an attribute of an attribute is looked up for as long as some of these take.
_keys, _keys_of_thread = _C._dispatch_keys, _C._dispatch_tls_local_include_set
_function_mode, _profiled = _C._is_torch_function_mode_enabled, _C._autograd._profiler_enabled
_guards = _C._dynamo.guards
_Guards, _empty_cpu, _empty_cuda = _guards.TensorGuards, _guards._empty_strided_cpu, _guards._empty_strided_cuda


def undisturbed() -> bool:
    """Whether a call of `ordinary` tensors is a plain one."""
    return not (torch.compiler.is_compiling() or forward_ad._current_level >= 0 or _function_mode() or _profiled())


def traced() -> bool:
    """Whether a graph is made of the calls, by torch.compile, torch.export or torch.jit.trace: sizes are symbols then,
    or tensors."""
    return torch.compiler.is_compiling() or _C._is_tracing()


def plain(*tensors: Tensor | None) -> bool:
    """Whether a call of these is one."""
    return undisturbed() and ordinary(*tensors)


def ordinary(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher has nothing to do with these tensors here. 1.2 us for three."""
    keys = _keys_of_thread().raw_repr()
    for tensor in tensors:
        if tensor is not None:
            if type(tensor) not in _TYPES:
                return False
            keys |= _keys(tensor).raw_repr()
    return not keys & _INTERVENING


# In the places of tensors that are not there, of as many as any call has.
_ABSENT = [torch.empty(0, device="cpu") for _ in range(5)]


def likeness(*tensors: Tensor | None) -> Callable[..., bool]:
    """Tells of as many tensors whether they are `ordinary` as these are, of the same sizes, strides, dtypes, devices,
    and with gradients or without, or absent; never of two that are one.

    It is what torch.compile guards its graphs by, in C: 0.3 us for three, where reading and comparing takes 2.5.
    """
    present = _filled(tensors)
    sizes, strides = [list(tensor.shape) for tensor in present], [list(tensor.stride()) for tensor in present]
    check: Callable[..., bool] = _Guards(*present, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    if all(tensor is not None for tensor in tensors):
        return check
    return lambda *others: check(*_filled(others))


def _filled(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [absent if tensor is None else tensor for tensor, absent in zip(tensors, _ABSENT)]


def allocate(shape: Sequence[int], strides: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result of these sizes, on the device of `like`, which is the current one, and in its dtype.

    It comes as to code that torch.compile generates, past the dispatcher: 0.5 us where `new_empty_strided` takes 1.
    """
    empty = _empty_cuda if like.is_cuda else _empty_cpu
    return empty(shape, strides, dtype or like.dtype)  # type: ignore[no-any-return]


def on_device(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of an op, run with its first tensor's GPU, if it is on one, as the current one.

    Triton launches on the current device, and asks it for its stream and for scratch memory.
    """

    @functools.wraps(implementation)
    def there(input: Tensor, *arguments: Any) -> Any:
        if input.is_cuda and input.get_device() != _C._cuda_getDevice():
            with torch.cuda.device(input.device):
                return implementation(input, *arguments)
        return implementation(input, *arguments)

    return there


implementations: dict[Any, Callable[..., Any]] = {}
"""What each op runs on a CPU or a GPU."""


_Formula = Callable[..., Any]


def differentiated(op: Any, backward: _Formula, setup: _Formula, jvp: _Formula | None = None) -> _Formula:
    """Registers an op's gradient for graphs; returns the op with the same gradient for eager calls and for torch.func.

    What `register_autograd` makes of the formulas costs 28 us a call on the host where an autograd.Function costs 5
    (perf_plots.host_overhead), and torch.func's transforms and forward mode refuse it. `vmaps` adds the rule for vmap.
    """
    torch.library.register_autograd(op.name(), backward, setup_context=setup)
    direct = implementations[op]
    # They come first.
    tensors = sum("Tensor" in str(argument.type) for argument in op._schema.arguments)

    def below(*arguments: Any) -> Any:
        if plain(*arguments[:tensors]):
            return direct(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = below(*arguments)
            setup(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return below(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup(ctx, inputs, output)
            if jvp is not None:
                ctx.save_for_forward(*ctx.to_save)
                ctx.shape = output.shape

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    if jvp is not None:
        Transformed.jvp = staticmethod(jvp)  # type: ignore[method-assign]
    for function in (Eager, Transformed):
        function.__name__ = function.__qualname__ = op.name()

    def call(*arguments: Any) -> Any:
        if traced():
            return op(*arguments)
        if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
            return Transformed.apply(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return Eager.apply(*arguments)
        return below(*arguments)

    call.transformed = Transformed  # type: ignore[attr-defined]
    return call
