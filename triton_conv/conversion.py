"""`convert` and `revert`: an existing model on our kernels, by one line and without editing it.

A converted layer is the same object with the same parameters, hooks and name: only its class becomes the one of that
name in `triton_conv.nn`, and is changed back by `revert`.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import comparisons, functional, policy, trial
from . import nn as ours
from . import target as targets
from .errors import BackendWarning, DeviceError
from .policy import Choice
from .report import Report, Row

LAYERS: dict[type[nn.Module], type[ours.Routed]] = {
    nn.Conv1d: ours.Conv1d,
    nn.Conv2d: ours.Conv2d,
    nn.Conv3d: ours.Conv3d,
    nn.ConvTranspose1d: ours.ConvTranspose1d,
    nn.ConvTranspose2d: ours.ConvTranspose2d,
    nn.ConvTranspose3d: ours.ConvTranspose3d,
}
# Layers of which there is one kind.
_OURS_ALWAYS: tuple[type[nn.Module], ...] = (
    ours.SeparableConv1d,
    ours.SeparableConv2d,
    ours.SeparableConv3d,
    ours.ShuffleConv2d,
    ours.LocallyConnected1d,
    ours.LocallyConnected2d,
    ours.LocallyConnected3d,
)
_TORCHVISION = "torchvision.ops.deform_conv.DeformConv2d"
# Where a converted layer keeps the class that it had.
_MARK = "_converted_from"
_METHODS = ("forward", "_conv_forward")
_NAMES = tuple(layer.__name__ for layer in (*LAYERS, ours.DeformConv2d))


def convert(model: nn.Module, report: bool = False, force: bool = False, *, example: Any = None) -> nn.Module:
    """Lets the convolutions of a model run on our kernels wherever a stored measurement says that they are faster.

    Each call of a layer decides by its own sizes. Without any measurement for the model's device this warns and changes
    nothing. Layers that cannot be converted stay as they are: the report says why. Convert before compiling, exporting,
    tracing or sharding the model. `revert` undoes it.

    Args:
        model: any module, also one layer; changed in place.
        report: whether to print a table of the layers: choice, reason and expected gain, as `plan` returns it.
        force: whether to take our kernels wherever they can run, measured or not; in layers converted before, too.
        example: the model's input, or a tuple of its inputs, for the report's sizes.

    Returns:
        The model.

    Raises:
        ArgumentTypeError (a TypeError): the model is not an `nn.Module`.

    Warns:
        BackendWarning: there is no measurement for this device, or our kernels do not run on it.
    """
    trial.check_model(model)
    problem = "" if force else _unmeasured(model)
    if problem:
        warnings.warn(
            f"{problem}: nothing is converted. Measure with `python -m perf_plots.gpu` and `python -m "
            "perf_plots.comparisons`, or take our kernels all the same with convert(model, force=True)",
            BackendWarning,
            stacklevel=2,
        )
    else:
        _converted(model)
        if force:
            for layer in model.modules():
                if _MARK in layer.__dict__:
                    layer.__dict__["backend"] = policy.OURS
    if report:
        inputs = example if isinstance(example, tuple) else () if example is None else (example,)
        print(plan(model, *inputs))
    return model


def _converted(model: nn.Module) -> list[nn.Module]:
    """Changes the class of every layer that can be ours and is not; returns those."""
    changed = []
    for _, layer, _ in _convolutions(model):
        routed = None if isinstance(layer, (ours.Routed, *_OURS_ALWAYS)) else _routed_class(layer)[0]
        if routed is not None:
            layer.__dict__[_MARK] = type(layer)
            layer.__class__ = routed
            changed.append(layer)
    return changed


def revert(model: nn.Module) -> nn.Module:
    """Undoes `convert`: every layer that it changed has its class back.

    Args:
        model: any module, converted or not; changed in place.

    Returns:
        The model.

    Raises:
        ArgumentTypeError (a TypeError): it is not an `nn.Module`.
    """
    trial.check_model(model)
    _revert(layer for layer in model.modules() if _MARK in layer.__dict__)
    return model


def _revert(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        before, cls = layer.__dict__.pop(_MARK), type(layer)
        layer.__dict__.pop("backend", None)
        # A parametrization that came or went since has changed the class too.
        if parametrize.is_parametrized(layer) and "reverts_to" not in vars(cls):
            layer.__class__ = _rebased(cls, _reverted(cls.__bases__[0], before))
        else:
            layer.__class__ = _reverted(cls, before)


def _reverted(cls: type, before: type) -> type:
    """The class that one of ours stands for, of a layer that had the class `before`."""
    plain: dict[type, type] = {routed: cls for cls, routed in LAYERS.items()}
    return plain.get(cls) or vars(cls).get("reverts_to", before)


def _unmeasured(model: nn.Module) -> str:
    """Why nothing is known of the device that a model is on, or nothing."""
    tensor = next((t for tensors in (model.parameters(), model.buffers()) for t in tensors), None)
    try:
        target = targets.of_device(torch.device("cpu") if tensor is None else tensor.device)
    except DeviceError as error:
        return str(error)
    return "" if comparisons.entries(target) else f"no measurement for this device ({target.name})"


def _convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, layer, name of its kind) of every convolution, whether we can take it or not."""
    for name, layer in model.named_modules():
        if isinstance(layer, (*LAYERS, *_OURS_ALWAYS, ours.DeformConv2d)) or _plain(type(layer)) is not None:
            yield name or "(the model)", layer, type(layer).__name__
        elif isinstance(layer, torch.jit.ScriptModule) and layer.original_name in _NAMES:
            yield name or "(the model)", layer, layer.original_name


def _is_torchvisions(cls: type) -> bool:
    return f"{cls.__module__}.{cls.__qualname__}" == _TORCHVISION


def _plain(cls: type) -> type | None:
    """The layer of torch's or torchvision's that a class is, or is made of."""
    return next((base for base in cls.__mro__ if base in LAYERS or _is_torchvisions(base)), None)


def _routed_class(layer: nn.Module) -> tuple[type[ours.Routed] | None, str]:
    """The class that a layer is to have, or None and why it cannot have one."""
    cls = type(layer)
    if isinstance(layer, torch.jit.ScriptModule):
        return None, "scripted: TorchScript cannot call our kernels"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return None, "has no sizes yet; run the model once before"
    if parametrize.is_parametrized(layer):
        base, reason = _routed_subclass(cls.__bases__[0])  # type: ignore[arg-type]
        if base is None:
            return None, reason
        return _rebased(cls, base, reverts_to=cls), ""
    return _routed_subclass(cls)  # type: ignore[arg-type]


def _rebased(cls: type, base: type, **attributes: Any) -> Any:
    """The class that a parametrization made, with another one below it."""
    body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return types.new_class(cls.__name__, (base,), exec_body=lambda d: d.update(body, **attributes))


@functools.lru_cache(maxsize=256)
def _routed_subclass(cls: Any) -> tuple[type[ours.Routed] | None, str]:
    plain = _plain(cls)
    assert plain is not None
    routed = LAYERS.get(plain, ours.DeformConv2d)
    if cls is plain:
        return routed, ""
    own = [name for name in _METHODS if getattr(cls, name, None) is not getattr(plain, name, None)]
    if own:
        return None, f"{cls.__name__} has a {own[0]} of its own; accelerate() reaches the calls in it"
    body = {"reverts_to": cls, "__module__": cls.__module__, "__reduce_ex__": _reduce}
    return types.new_class(cls.__name__, (routed, cls), exec_body=lambda d: d.update(body)), ""


def _reduce(layer: Any, protocol: Any) -> tuple[Any, ...]:
    """A class made here has no name to be pickled by; the one that it was made from has."""
    return _remade, (type(layer).reverts_to,), layer.__dict__


def _remade(cls: type[nn.Module]) -> nn.Module:
    routed, _ = _routed_subclass(cls)  # type: ignore[arg-type]
    assert routed is not None
    return routed.__new__(routed)


# ------------------------------------------------------------------------------------------------ plans of whole models


def plan(what: Callable[..., Any] | nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a call would run, and why, without running it.

    Of a function of triton_conv: the `Plan` of its kernel, which prints kernel, tile and where the tile came from;
    raises what the call would; the forward pass alone, and for meta tensors that of an H100. Of a module: a `Report`
    with a row for every convolution: the library that it runs on (after `convert`, if it is not converted yet), the
    reason, and the expected gain. Without inputs a model's sizes are not known, and so nothing that depends on them.

    >>> print(tc.plan(tc.conv2d, input, weight, padding=1, groups=64))
    >>> print(tc.plan(model, input))
    """
    if not isinstance(what, nn.Module):
        return functional.plan(what, *args, **kwargs)
    report = Report(f"{type(what).__name__}")
    sized = bool(args or kwargs)
    rows = _planned(what, args, kwargs) if sized else {}
    problem = _unmeasured(what)
    for name, layer, kind in _convolutions(what):
        if isinstance(layer, _OURS_ALWAYS):
            report.add(Row(name, kind, Choice(policy.OURS, "torch has no such layer: always ours")))
            continue
        reason = "" if isinstance(layer, ours.Routed) else _routed_class(layer)[1]
        if reason:
            report.add(Row(name, kind, Choice(policy.TORCH, reason)))
        elif layer in rows:
            for choice in rows[layer]:
                report.add(Row.of(name, kind, choice))
        elif sized:
            report.add(Row(name, kind, Choice(policy.TORCH, "not called with these inputs")))
        else:
            report.add(Row(name, kind, _unsized(layer, problem)))
    return report


def _unsized(layer: nn.Module, problem: str) -> Choice:
    """What is known of a layer's choice without an input."""
    backend = getattr(layer, "backend", None) or policy.current_backend()
    if backend != policy.AUTO:
        return Choice(backend, "asked for")
    return Choice(policy.TORCH, problem) if problem else Choice(policy.AUTO, "each call decides by its sizes")


def _planned(model: nn.Module, args: Any, kwargs: Any) -> dict[nn.Module, list[Choice]]:
    """The choices of every layer that a call of the model reaches."""
    found: dict[nn.Module, list[Choice]] = {}

    def before(layer: Any, args: Any, kwargs: Any) -> None:
        choice = layer.choose(*args, **kwargs)
        choices = found.setdefault(layer, [])
        if choice not in choices:
            choices.append(choice)

    lent = _converted(model)
    layers = [layer for layer in model.modules() if isinstance(layer, ours.Routed)]
    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    try:
        trial.follow(model, args, kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        _revert(lent)
    return found
