"""`triton-conv cost` and `triton-conv explain`: what a network costs, and which input feeds which output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import cost
from .amounts import number
from .cost.arithmetic import Dimension, explain_all
from .errors import ArgumentError, WorkloadError
from .geometry import PADDING_MODES
from .loading import call, load

Say = Callable[[str], None]

_FUNCTIONS = tuple(f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3))


def add(commands: Any, say: Say) -> None:
    """Adds both commands to the parser's; `say` prints a line."""
    text = "count what a network costs, layer by layer; nothing is run"
    count = commands.add_parser("cost", help=text, description=text)
    subject = count.add_mutually_exclusive_group(required=True)
    subject.add_argument("--model", metavar="MODULE:FUNCTION", help="a function that returns an nn.Module, or a module")
    subject.add_argument("--formula", metavar="NAME", help="one formula, or 'all' for the list of them")
    count.add_argument("arguments", nargs="*", metavar="NAME=VALUE", help="arguments of the function or the formula")
    count.add_argument("--beside", action="append", default=[], metavar="MODULE:FUNCTION", help="compare (repeatable)")
    count.add_argument(
        "--input", default="1,3,224,224", metavar="SIZES", help="the input's shape (default: %(default)s)"
    )
    count.add_argument("--dtype", help="count as if everything had this dtype, for instance bfloat16")
    count.add_argument("--device", default="sm_90", metavar="NAME", help="whose datasheet the floors come from")
    count.add_argument("--groups", type=number, default=4, metavar="N", help="groups of the plot's grouped forms")
    count.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers to FILE")
    count.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw each layer as standard, separable, grouped, shuffle"
    )
    count.add_argument("--sharing", type=Path, metavar="FILE", help="draw the first layer's weights, shared and not")
    count.set_defaults(run=lambda arguments: _cost(arguments, say))

    text = "show which input feeds which output of a convolution"
    tell = commands.add_parser("explain", help=text, description=text)
    tell.add_argument("function", choices=_FUNCTIONS, metavar="FUNCTION", help=", ".join(_FUNCTIONS))
    tell.add_argument("--size", default="4", metavar="N", help="inputs a dimension (default: %(default)s)")
    tell.add_argument("--kernel", default="3", metavar="K", help="one number, or one a dimension: 3,5")
    tell.add_argument("--stride", default="1", metavar="S", help="numbers likewise")
    tell.add_argument("--padding", default="0", metavar="P", help="numbers likewise; forward ones also same or valid")
    tell.add_argument("--dilation", default="1", metavar="D", help="numbers likewise")
    tell.add_argument("--output-padding", default="0", metavar="P", help="numbers likewise, of transposed ones")
    tell.add_argument("--padding-mode", default="zeros", choices=PADDING_MODES, help="what lies beyond the border")
    tell.add_argument("--json", type=Path, metavar="FILE", help="also write all links to FILE")
    tell.add_argument("--plot", type=Path, metavar="FILE", help="draw it")
    tell.set_defaults(run=lambda arguments: _explain(arguments, say))


# ------------------------------------------------------------------------------------------------------------- cost


def _cost(arguments: argparse.Namespace, say: Say) -> int:
    named = dict(_assignment(text) for text in arguments.arguments)
    if arguments.formula == "all":
        rows = [("row", "name", "arguments", "formula")]
        rows += [(f.row, name, ", ".join(f.arguments), f.text) for name, f in cost.FORMULAS.items()]
        say(cost.layers.aligned(rows, left=4))
        return 0
    if arguments.formula:
        formula = cost.FORMULAS.get(arguments.formula)
        value = cost.evaluate(arguments.formula, **named)
        assert formula is not None
        say(f"{formula.row}  {formula.text}  =  {value}")
        return 0
    dtype = getattr(torch, arguments.dtype, None) if arguments.dtype else None
    if arguments.dtype and not isinstance(dtype, torch.dtype):
        raise WorkloadError(f"dtype: {arguments.dtype!r} is not one of torch's")
    model = _model(arguments.model, named)
    found = cost.of(model, tuple(_ints("input", arguments.input)), device=arguments.device, dtype=dtype)
    say(str(found))
    if arguments.beside:
        others = {path: _model(path, {}) for path in arguments.beside}
        shape = tuple(_ints("input", arguments.input))
        counted = {path: cost.of(net, shape, device=arguments.device, dtype=dtype) for path, net in others.items()}
        say(cost.summary({arguments.model: found} | counted))
    if arguments.json:
        _write(arguments.json, json.dumps(found.asdict(), indent=1), say)
    if arguments.plot:
        from .cost.figures import draw_forms

        say(f"wrote {draw_forms(found, arguments.plot, arguments.model, arguments.groups)}")
    geometry = next((layer.geometry for layer in found.layers if layer.geometry is not None), None)
    if arguments.sharing:
        from .cost.figures import draw_sharing

        if geometry is None:
            raise WorkloadError(f"sharing: {arguments.model} has no convolution")
        say(cost.sharing_table(geometry))
        say(f"wrote {draw_sharing(cost.sharing(geometry), arguments.sharing, geometry.describe())}")
    return 0


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise WorkloadError(f"arguments: expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _model(path: str, named: dict[str, Any]) -> torch.nn.Module:
    """The module that MODULE:FUNCTION names, made with these arguments."""
    made = load(path)
    if not isinstance(made, torch.nn.Module):
        # Without data: a network's weights are not needed to count them.
        with torch.device("meta"):
            made = call(path, made, **named)
    if not isinstance(made, torch.nn.Module):
        raise WorkloadError(f"model: {path} gave {made!r}, expected an nn.Module")
    return made


def _ints(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise WorkloadError(f"{name}: expected whole numbers separated by commas, got {text!r}") from error


def _write(path: Path, text: str, say: Say) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    say(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------- explain


def _explain(arguments: argparse.Namespace, say: Say) -> int:
    rank = int(arguments.function[-2])
    transposed = "transpose" in arguments.function

    def each(name: str) -> list[int]:
        values = _ints(name, str(getattr(arguments, name)))
        if len(values) not in (1, rank):
            wanted = "one number" if rank == 1 else f"one number or {rank}"
            raise ArgumentError(f"{name}: {arguments.function} takes {wanted}, got {values}")
        return values * (rank if len(values) == 1 else 1)

    extra = each("output_padding")
    if any(extra) and not transposed:
        raise ArgumentError(f"output_padding: that of a transposed convolution; {arguments.function} got {extra}")
    sizes, kernel, stride, dilation = (each(name) for name in ("size", "kernel", "stride", "dilation"))
    if arguments.padding in ("same", "valid") and not transposed:
        windows = zip(sizes, kernel, stride, dilation, strict=True)
        pads = [cost.formulas.pads(i, k, s, arguments.padding, d) for i, k, s, d in windows]
    else:
        pads = [(p, p) for p in each("padding")]
    found = explain_all(sizes, kernel, stride, pads, dilation, extra, arguments.padding_mode, transposed)
    for dimension in found:
        say("\n".join(dimension.lines()))
        say(dimension.table())
    if arguments.json:
        _write(arguments.json, json.dumps([_plain(dimension) for dimension in found], indent=1), say)
    if arguments.plot:
        from .cost.figures import draw_links

        say(f"wrote {draw_links(found, arguments.plot, arguments.function)}")
    return 0


def _plain(dimension: Dimension) -> dict[str, Any]:
    return {
        "size": dimension.size,
        "out_size": dimension.out_size,
        "links": [vars(link) for link in dimension.links],
    }
