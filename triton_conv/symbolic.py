"""Symbolic tracing by torch.fx: a call of a function or of a layer of ours is one node of the graph, as of torch's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.overrides import handle_torch_function, has_torch_function

_FORWARDS = (f"{__package__}.nn", f"{__package__}.nn_lectures", nn.modules.conv.__name__)


def recorded(function: Callable[..., Any], *arguments: Any) -> Any:
    """For the handler of an argument's wrong type: what stands for a tensor, such as a proxy, says what the call is.

    `arguments` are all that the function takes, in its order. Raises the error again if none of them stands for one.
    """
    if not has_torch_function(arguments):
        raise
    parameters = inspect.signature(function).parameters.values()
    named = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    count = len(arguments) - len(named)
    return handle_torch_function(
        function, arguments, *arguments[:count], **dict(zip(named, arguments[count:], strict=True))
    )


def leaf(layer: nn.Module, *arguments: Any) -> Any:
    """The node of a layer's call in symbolic tracing; None elsewhere.

    None, too, of the module that is traced itself, and of a subclass with a forward of its own.
    """
    proxy = arguments[0]
    if not isinstance(proxy, fx.Proxy) or getattr(proxy.tracer, "root", layer) is layer:
        return None
    methods = [getattr(type(layer), name, None) for name in ("forward", "_conv_forward")]
    if not all(method is None or method.__module__ in _FORWARDS for method in methods):
        return None
    tracer: Any = proxy.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), arguments, {})
