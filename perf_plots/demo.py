"""The five kinds on a photograph: `python -m perf_plots.demo [--out DIR]`, what `make demo` runs.

Writes a picture of inputs and outputs, a table of agreement with torch in float64, the plan of each call, and the
figures. On a machine with no GPU the kernels run in Triton's interpreter, on a smaller picture.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, below

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import cbook
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import triton_conv as tc
from triton_conv.reference import reference, relative_error, tolerance

from .__main__ import main as draw_figures


@dataclass(frozen=True)
class Example:
    """One call on the photograph: `show` turns its result into something to look at."""

    kind: str
    caption: str
    function: str
    arguments: dict[str, Any]
    show: Callable[[Tensor], Tensor]
    terms: int
    sampled: int = 0  # the longer side, where samples are taken between pixels


def photograph(device: torch.device) -> Tensor:
    """matplotlib's own sample photograph, (1, 3, H, W) in [0, 1]; at half size where it is interpreted."""
    path = str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    pixels = torch.from_numpy(plt.imread(path).copy())
    image = pixels.permute(2, 0, 1)[None, :, :512].to(device, torch.float32) / 255
    return image if device.type == "cuda" else torch.nn.functional.avg_pool2d(image, 2)


def _gaussian(size: int) -> Tensor:
    at = torch.arange(size) - (size - 1) / 2
    row = torch.exp(-(at**2) / (2 * (size / 5) ** 2))
    kernel = row[:, None] * row
    return kernel / kernel.sum()


def _swirl(height: int, width: int, device: torch.device) -> Tensor:
    """Offsets that turn the picture about its centre, less with the distance: (1, 2 * 9, H, W), (y, x) for each tap."""
    y = torch.arange(height, device=device)[:, None] - height / 2
    x = torch.arange(width, device=device)[None, :] - width / 2
    angle = 1.2 * torch.exp(-(x**2 + y**2) / (0.35 * width) ** 2)
    dy = x * angle.sin() + y * (angle.cos() - 1)
    dx = x * (angle.cos() - 1) - y * angle.sin()
    return torch.stack([dy, dx]).repeat(9, 1, 1)[None]


def examples(image: Tensor) -> list[Example]:
    """Each kind with filters whose effect the eye can check."""
    device, (height, width) = image.device, image.shape[2:]
    luminance = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    sobel = torch.tensor([[1.0, 2, 1], [0, 0, 0], [-1, -2, -1]])
    edges = torch.stack([luminance * sobel, luminance * sobel.T])
    laplace = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]])
    colours = torch.eye(3)[:, :, None, None]
    ramp = 1 - (torch.arange(8) - 3.5).abs() / 4
    small = image[:, :, ::4, ::4].contiguous()
    mask = torch.full((1, 9, height, width), 1.0, device=device)
    return [
        Example(
            "grouped", "2 groups of 3 channels: edges down, edges across", "conv2d",
            {"input": image.repeat(1, 2, 1, 1), "weight": edges.to(device), "padding": 1, "groups": 2},
            lambda y: y.abs().mean(1, keepdim=True), 27,
        ),
        Example(
            "depthwise", "9 x 9 Gaussian on each channel, reflected border", "conv2d",
            {"input": image, "weight": _gaussian(9).repeat(3, 1, 1, 1).to(device), "padding": 4, "groups": 3,
             "padding_mode": "reflect"},
            lambda y: y, 81,
        ),
        Example(
            "dilated", "3 x 3 Laplacian, dilation 3, ReLU", "conv2d",
            {"input": image, "weight": (colours * laplace).to(device), "padding": 3, "dilation": 3,
             "activation": "relu"},
            lambda y: 2 * y, 27,
        ),
        Example(
            "transposed", "a quarter of the size, enlarged by stride 4", "conv_transpose2d",
            {"input": small, "weight": (ramp[:, None] * ramp).repeat(3, 1, 1, 1).to(device), "stride": 4, "padding": 2,
             "groups": 3},
            lambda y: y, 4,
        ),
        Example(
            "deformable", "3 x 3 mean whose samples follow a swirl", "deform_conv2d",
            {"input": image, "offset": _swirl(height, width, device), "padding": 1, "mask": mask,
             "weight": (colours / 9).repeat(1, 1, 3, 3).to(device)},
            lambda y: y, 27, max(height, width),
        ),
    ]  # fmt: skip


def _picture(image: Tensor, results: list[tuple[Example, Tensor]], path: Path) -> None:
    panels = [("input", "matplotlib's sample photograph", image)]
    panels += [(e.kind, e.caption, e.show(y)) for e, y in results]
    figure, axes = plt.subplots(2, 3, figsize=(12, 8.6), layout="constrained")
    for axis, (title, caption, content) in zip(axes.flat, panels, strict=True):
        pixels = content[0].clamp(0, 1).permute(1, 2, 0).cpu()
        axis.imshow(pixels.squeeze(-1), cmap="gray", interpolation="nearest")
        axis.set_title(title, fontsize=14, fontweight="bold", loc="left")
        axis.set_xlabel(caption, fontsize=10, loc="left")
        axis.set_xticks([])
        axis.set_yticks([])
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(w_pad=0.15, h_pad=0.15)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Runs every example, prints what came of it, and where the pictures are."""
    parser = argparse.ArgumentParser(prog="python -m perf_plots.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures (default: demo)")
    out: Path = parser.parse_args(argv).out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        parser.error(f"argument --out: {out} cannot be made a folder: {reason.strerror}")
    console = Console(width=None if os.isatty(1) else 120)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "Triton's interpreter (no GPU here)"
    console.print(f"[bold]Five kinds of convolution on a photograph[/], on {where}\n", highlight=False)

    image = photograph(device)
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # compared with float64 below
    results, plans = [], []
    table = Table(box=None, header_style="bold")
    for column in ("kind", "kernel", "output", "largest error", "allowed", "agrees", "seconds"):
        table.add_column(column, justify="right" if column in ("largest error", "allowed", "seconds") else "left")
    wrong = 0
    todo = examples(image)
    with Progress(console=console, transient=True) as progress:
        for example in progress.track(todo, description="convolving"):
            function = getattr(tc, example.function)
            plan = tc.plan(function, **example.arguments)
            started = time.perf_counter()
            output = function(**example.arguments)
            seconds = time.perf_counter() - started
            error = relative_error(output, reference(example.function, example.arguments))
            allowed = tolerance(torch.float32, example.terms, sampled=example.sampled)
            wrong += not error <= allowed
            shape = " x ".join(map(str, output.shape))
            table.add_row(
                example.kind, plan.kernel.name, shape, f"{error:.1e}", f"{allowed:.1e}",
                "[green]yes[/]" if error <= allowed else "[red]NO[/]", f"{seconds:.1f}",
            )  # fmt: skip
            results.append((example, output))
            plans.append(f"{example.kind}: {plan}")
    console.print(
        "[bold]Agreement with torch in float64[/] (deviation relative to the value plus the root mean square)"
    )
    console.print(table)
    console.print("\n[bold]Plans[/]")
    for text in plans:
        console.print(text, markup=False, highlight=False)
    picture = out / "photograph.png"
    _picture(image, results, picture)
    code = draw_figures(["--out", str(out / "figures")])
    console.print(f"\nThe pictures: {picture.resolve()}\n              {(out / 'figures').resolve()}/", highlight=False)
    return 1 if wrong else code


if __name__ == "__main__":
    raise SystemExit(main())
