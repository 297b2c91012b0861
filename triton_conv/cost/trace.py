"""`of`: runs a function or a network on tensors without data, and counts what it does."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ArgumentError, ArgumentTypeError, TritonConvError
from ..geometry import ConvGeometry
from ..problem_deform import DeformProblem
from ..problem_lectures import LocalProblem, SeparableProblem, ShuffleProblem
from ..recording import problem_of
from ..target import Target
from .fields import Field, union
from .layers import Cost, Layer, find_device, kind_of

_aten: Any = torch.ops.aten
_VIEWS_OF_WEIGHTS = (_aten.t.default, _aten.transpose.int, _aten.view.default, _aten.permute.default)
_KINDS = {
    DeformProblem: "deformable", SeparableProblem: "separable", LocalProblem: "locally connected",
    ShuffleProblem: "shuffled",
}  # fmt: skip
_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1, _aten.bmm.default: 0, _aten.baddbmm.default: 1}
_POOLS = {
    _aten.max_pool2d_with_indices.default: 2, _aten.avg_pool2d.default: 2,
    _aten.max_pool3d_with_indices.default: 3, _aten.avg_pool3d.default: 3,
}  # fmt: skip


@dataclass(frozen=True)
class _Map:
    """What is known of an activation: the field of its neurons, and the spatial sizes that the field's axes have.

    `sizes` is empty once the map was flattened: then each of its neurons sees all of what the field covers.
    """

    field: Field
    sizes: tuple[int, ...]


class _Tracer(TorchDispatchMode):
    def __init__(self, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self.path: list[str] = []
        self._maps: Any = WeakIdKeyDictionary()
        self._weights: Any = WeakIdKeyDictionary()
        self._counted: set[int] = set()
        for index, parameter in enumerate(parameters):
            self._weights[parameter] = index
        for tensor in inputs:
            self._maps[tensor] = _Map(Field.of_input(max(tensor.dim() - 2, 0)), tuple(tensor.shape[2:]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # torch's own complaint about shapes without data names neither of them.
        own = _torch_geometry(args) if func is _aten.convolution.default else None
        result = func(*args, **(kwargs or {}))
        output = result[0] if isinstance(result, (tuple, list)) and result else result
        if not isinstance(output, Tensor):
            return result
        tensors = list(_tensors(args))
        if func in _VIEWS_OF_WEIGHTS and tensors[0] in self._weights:
            self._weights[output] = self._weights[tensors[0]]
            return result
        if own is not None or problem_of(func, args) is not None:
            found = self._convolution(func, args, tensors, output, own)
        else:
            found = self._others(func, args, tensors, output)
        if found is not None:
            self._maps[output] = found
        return result

    # ----------------------------------------------------------------------------------------------------- the layers

    def _convolution(
        self, func: Any, args: Any, tensors: list[Tensor], output: Tensor, own: ConvGeometry | None
    ) -> _Map | None:
        kind, least = "", 0
        if (problem := problem_of(func, args)) is not None:
            geometry, least, macs = problem.geometry, problem.least_bytes, problem.flops // 2
            kind = next((name for kind, name in _KINDS.items() if isinstance(problem, kind)), "")
        else:
            assert own is not None
            geometry, macs = own, own.flops // 2
        seen: _Map | None = self._maps.get(tensors[0])
        field = None
        if seen is not None and len(seen.field.axes) == geometry.rank and seen.sizes == tuple(args[0].shape[2:]):
            field = seen.field.convolved(geometry)
        # Where an offset leads, it is learned: the field is that of the taps without offsets.
        self._layer(
            kind or kind_of(geometry), args[0], output, tensors, macs,
            least or geometry.least_bytes(output.element_size()), field, geometry,
        )  # fmt: skip
        return None if field is None else _Map(field, tuple(output.shape[2:]))

    def _others(self, func: Any, args: Any, tensors: list[Tensor], output: Tensor) -> _Map | None:
        found = self._pool(func, args, output) if func in _POOLS else _follow(func, args, self._known(tensors), output)
        field = found.field if found else None
        moved = sum(tensor.numel() for tensor in tensors) + output.numel()
        if func in _PRODUCTS:
            a, b = tensors[_PRODUCTS[func]], tensors[_PRODUCTS[func] + 1]
            macs = a.numel() * b.shape[-1]
            fully = any(tensor in self._weights for tensor in tensors)
            kind = "fully connected" if fully else "product"
            self._layer(kind, a, output, tensors, macs, moved * output.element_size(), field)
        elif func in _POOLS:
            moved = args[0].numel() + output.numel()
            self._layer("pooling", args[0], output, (), 0, moved * output.element_size(), field)
        elif any(tensor in self._weights for tensor in tensors) and not _is_view(func):
            kind = "norm" if "norm" in func.name() else func.name().removeprefix("aten::").split(".")[0]
            self._layer(kind, tensors[0], output, tensors, 0, moved * output.element_size(), field)
        return found

    def _pool(self, func: Any, args: Any, output: Tensor) -> _Map | None:
        seen, rank = self._maps.get(args[0]), _POOLS[func]
        if seen is None or len(seen.sizes) != rank:
            return None
        kernel, *more = args[1:]
        stride = more[0] if more and more[0] else kernel
        padding = more[1] if len(more) > 1 else [0]
        field = seen.field.pooled(*(list(v) * (rank if len(v) == 1 else 1) for v in (kernel, stride, padding)))
        return _Map(field, tuple(output.shape[2:]))

    def _known(self, tensors: Sequence[Tensor]) -> list[_Map]:
        return [self._maps[tensor] for tensor in tensors if tensor in self._maps]

    def _layer(
        self, kind: str, input: Tensor, output: Tensor, operands: Sequence[Tensor], macs: int, least_bytes: int,
        field: Field | None, geometry: ConvGeometry | None = None,
    ) -> None:  # fmt: skip
        fresh = {self._weights[t]: t.numel() for t in operands if t in self._weights}
        parameters = sum(count for index, count in fresh.items() if index not in self._counted)
        self._counted.update(fresh)
        self.layers.append(
            Layer(
                self.path[-1] if self.path else "", kind, tuple(input.shape), tuple(output.shape), parameters, macs,
                least_bytes, str(output.dtype).removeprefix("torch."), field, geometry,
            )
        )  # fmt: skip


def _is_view(func: Any) -> bool:
    return any(result.alias_info is not None for result in func._schema.returns)


def _tensors(args: Any) -> Iterator[Tensor]:
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _torch_geometry(args: Any) -> ConvGeometry:
    input, weight, _, stride, padding, dilation, transposed, output_padding, groups = args
    rank = input.dim() - 2

    def each(values: Sequence[int]) -> list[int]:
        return list(values) * (rank if len(values) == 1 else 1)

    return ConvGeometry.of(
        input.shape, weight.shape, each(stride), [(p, p) for p in each(padding)], each(dilation), groups,
        transposed=transposed, output_padding=each(output_padding) or (0,) * rank,
    )  # fmt: skip


def _follow(func: Any, args: Any, maps: list[_Map], output: Tensor) -> _Map | None:
    """What an operation that is not a window makes of its operands' fields."""
    if not maps:
        return None
    if func in (_aten.unsqueeze.default, _aten.squeeze.dim):
        return _one_dimension_more_or_less(func, args, maps[0], output)
    spatial = tuple(output.shape[2:])
    # Neurons that stand where they stood, and ones that are spread over all of them.
    parts = [m.field if m.sizes == spatial or math.prod(m.sizes) == 1 else m.field.gathered(m.sizes) for m in maps]
    field = union(parts)
    if field is None:
        return None
    kept = any(m.sizes == spatial for m in maps) or (math.prod(spatial) == 1 and len(spatial) == len(field.axes))
    return _Map(field, spatial if kept else ())


def _one_dimension_more_or_less(func: Any, args: Any, seen: _Map, output: Tensor) -> _Map | None:
    if not seen.sizes:
        return seen
    added = func is _aten.unsqueeze.default
    dim = args[1] % (output.dim() if added else output.dim() + 1) - 2
    axes = list(seen.field.axes)
    if dim < 0 or args[0].shape == output.shape:
        return None
    axes[dim:dim] = Field.of_input(1).axes if added else ()
    if not added:
        del axes[dim]
    return _Map(Field(tuple(axes)), tuple(output.shape[2:]))


# ------------------------------------------------------------------------------------------------------------ the call


def of(
    subject: Callable[..., Any], *inputs: Any, device: str | Target = "sm_90", dtype: torch.dtype | None = None,
    **arguments: Any,
) -> Cost:  # fmt: skip
    """What a call of a function costs, or a run of a layer or network: counted on tensors without data.

    Args:
        subject: a function, such as `triton_conv.conv2d` or `torch.nn.functional.conv2d`, or an `nn.Module`, which is
            counted in evaluation mode and left as it is.
        inputs, arguments: what it is called with. Tensors are replaced by ones without data; for a module, a shape such
            as `(1, 3, 224, 224)` stands for an input.
        device: whose datasheet the floors come from, such as "H100" or "sm_80".
        dtype: count as if all floating-point tensors had this one.

    Returns:
        `Cost`: print it for a table of layers.

    Raises:
        ArgumentError: if the subject cannot run on these shapes, with its own message.

    >>> print(tc.cost.of(torch.nn.Conv2d(3, 64, 3), (1, 3, 224, 224)))
    """
    goal = find_device(device)
    if not callable(subject):
        raise ArgumentTypeError(f"subject: expected a function or an nn.Module, got {type(subject).__name__}")

    def bare(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return torch.empty_strided(value.shape, value.stride(), dtype=kind, device="meta")

    module = subject if isinstance(subject, torch.nn.Module) else None
    if module is not None:
        like = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        inputs = tuple(
            torch.empty(value, dtype=dtype or like, device="meta") if _is_shape(value) else value for value in inputs
        )
    bare_inputs = [bare(value) for value in inputs]
    bare_arguments = {name: bare(value) for name, value in arguments.items()}
    if module is None:
        data, held = _operands(subject, bare_inputs, bare_arguments)
        run = subject
    else:
        state = {name: bare(t) for name, t in (*module.named_parameters(), *module.named_buffers())}
        # A tensor under two names is one parameter.
        first = {id(p): name for name, p in reversed([*module.named_parameters(remove_duplicate=False)])}
        held = [state[first[id(p)]] for p in module.parameters()]
        data = [t for t in bare_inputs if isinstance(t, Tensor)]

        def run(*values: Any, **named: Any) -> Any:
            return torch.func.functional_call(module, state, values, named)

    tracer = _Tracer(data, held)
    with _evaluating(module, tracer), torch.no_grad(), tracer:
        try:
            run(*bare_inputs, **bare_arguments)
        except TritonConvError:
            raise
        except Exception as error:  # whatever the subject raises is why it cannot run
            shapes = [list(v.shape) for v in bare_inputs if isinstance(v, Tensor)]
            name = getattr(subject, "__name__", type(subject).__name__)
            raise ArgumentError(f"input: {name} cannot run on inputs of shapes {shapes}: {error}") from error
    return Cost(tuple(tracer.layers), sum(tensor.numel() for tensor in held), goal)


def _operands(
    function: Callable[..., Any], values: Sequence[Any], named: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that a function reads as data, and those that it holds: all but the first, offsets and masks."""
    try:
        names = [*inspect.signature(function).parameters][: len(values)]
    except ValueError:  # torch's own functions have no signature
        names = [str(index) for index in range(len(values))]
    tensors = {
        name: value for name, value in (*zip(names, values, strict=True), *named.items()) if isinstance(value, Tensor)
    }
    if not tensors:
        raise ArgumentTypeError(f"inputs: {getattr(function, '__name__', function)} was given no tensor")
    data = [name for index, name in enumerate(tensors) if index == 0 or name in ("offset", "mask")]
    return [tensors[name] for name in data[:1]], [tensors[name] for name in tensors if name not in data]


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value)


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module | None, tracer: _Tracer) -> Iterator[None]:
    """The module in evaluation mode, telling the tracer which of its parts is running."""
    if module is None:
        yield
        return
    modes = {part: part.training for part in module.modules()}
    hooks = []
    for name, part in module.named_modules():
        hooks.append(part.register_forward_pre_hook(lambda *_, name=name: tracer.path.append(name)))
        hooks.append(part.register_forward_hook(lambda *_: tracer.path.pop() and None))
    module.eval()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in modes.items():
            part.training = mode
