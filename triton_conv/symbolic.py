"""Symbolic tracing by torch.fx: a call of a function or of a layer of ours is one node of the graph, as of torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.overrides import handle_torch_function, has_torch_function


def recorded(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """For the handler of an argument's wrong type: what stands for a tensor, such as a proxy, says what the call is.

    Raises the error again if nothing does.
    """
    if not has_torch_function(arguments):
        raise
    return handle_torch_function(function, arguments, *arguments, **named)


def leaf(layer: nn.Module, *arguments: Any) -> Any:
    """The node of a layer's call, if its first argument is a proxy; else None. The traced module itself is no node."""
    proxy = arguments[0]
    if not isinstance(proxy, fx.Proxy) or getattr(proxy.tracer, "root", layer) is layer:
        return None
    tracer: Any = proxy.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), arguments, {})
