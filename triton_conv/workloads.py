"""The flagship workloads: the layers this library is tuned for, judged by, and compiled for, as data.

Each one is a layer of a published network or of a public thread about a slow convolution (`origin`). The tuner, the
compile check and the benchmark read this one list.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from . import comparisons, functional, lectures
from .errors import WorkloadError
from .layout import dense_strides
from .ops_fused import Chain
from .problem import Problem
from .problem_lectures import local_weight_strides
from .recording import record
from .tensors import DTYPES

KINDS = ("grouped", "depthwise", "dilated", "transposed", "deformable")
LECTURE_KINDS = ("separable", "shuffle", "local")
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = PARTS = comparisons.PARTS
"""The convolutions of a training step."""
STEP = "forward and backward"
"""All of them in one call: what the benchmark times beside its parts."""

Call = Callable[[Mapping[str, Any]], torch.Tensor]

_WINDOW = {"padding": 0, "stride": 1, "dilation": 1}
_SUFFIXES = {FORWARD: "", INPUT_GRADIENT: "-dx", WEIGHT_GRADIENT: "-dw", STEP: "-fb"}


@dataclass(frozen=True)
class Workload:
    """One call of a public function, by shapes; `arguments` are its keyword arguments besides tensors.

    Of a separable convolution `weight` is the depthwise one, and `pointwise` its number of output channels. Offsets
    are drawn with a standard deviation of `spread` pixels. `calls` are how often a step of a model makes the call: what
    the tuner weights it by.
    """

    name: str
    kind: str
    function: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    channels_last: bool = False
    offset_groups: int = 0
    mask: bool = False
    bias: bool = False
    origin: str = ""
    part: str = FORWARD
    pointwise: int = 0
    spread: float = 2.0
    calls: int = 1

    @property
    def title(self) -> str:
        """Name, dtype, memory format, and which gradient if it is one: unique among the variants of a workload."""
        return f"{self.name}-{self.dtype}-{'nhwc' if self.channels_last else 'nchw'}{_SUFFIXES[self.part]}"

    def tensors(self, device: str | torch.device, seed: int = 0) -> dict[str, Any]:
        """All arguments of the call, tensors drawn anew from `seed`; on "meta", without data.

        Weights are scaled so that outputs have about unit variance.
        """
        generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(seed)

        def draw(shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
            strides = _strides(shape, self.channels_last)
            tensor = torch.empty_strided(shape, strides, dtype=getattr(torch, self.dtype), device=device)
            return tensor if generator is None else tensor.normal_(0, scale, generator=generator)

        tensors = {"input": draw(self.input)}
        if self.kind == "local":
            rank = len(self.input) - 2
            weight = draw(self.weight, math.prod(self.weight[rank + 1 :]) ** -0.5)
            tensors["weight"] = weight.as_strided(self.weight, local_weight_strides(self.weight, self.channels_last))
        elif self.pointwise:
            mid = self.weight[0]
            tensors["depthwise_weight"] = draw(self.weight, math.prod(self.weight[1:]) ** -0.5)
            tensors["pointwise_weight"] = draw((self.pointwise, mid, *(1,) * (len(self.weight) - 2)), mid**-0.5)
        else:
            tensors["weight"] = draw(self.weight, math.prod(self.weight[1:]) ** -0.5)
        if self.bias:
            channels = self.weight[1] * self.arguments.get("groups", 1) if self.transposed else self.weight[0]
            tensors["bias"] = draw((channels,))
        if self.offset_groups:
            taps = self.weight[2] * self.weight[3]
            padding, stride, dilation = (self.arguments.get(name, i) for name, i in _WINDOW.items())
            spatial = tuple(
                (s + 2 * padding - dilation * (k - 1) - 1) // stride + 1
                for s, k in zip(self.input[2:], self.weight[2:], strict=True)
            )
            tensors["offset"] = draw((self.input[0], 2 * self.offset_groups * taps, *spatial), self.spread)
            if self.mask:
                tensors["mask"] = draw((self.input[0], self.offset_groups * taps, *spatial)).sigmoid_()
        return tensors | dict(self.arguments)

    @property
    def transposed(self) -> bool:
        return "transpose" in self.function

    def problem(self) -> Problem:
        """What planning sees of the convolution, of a whole step's first one, without allocating it."""
        tensors = self.tensors("meta")
        if self.part in (FORWARD, STEP):
            made = functional.plan(_function(self.function), **tensors)
            problem: Problem = (made.fused if isinstance(made, Chain) else made).problem
            return problem
        # Before a gradient, a smooth activation has the forward pass computed anew.
        return record(differentiated(self.call, tensors, self.part))[-1]

    @property
    def layer(self) -> Workload:
        """The forward pass that this is a part of the training of."""
        return replace(self, part=FORWARD)

    def parts(self) -> list[Workload]:
        """The convolutions of a training step with this layer that are a kernel's own: the gradients of separable and
        shuffled convolution are those of plain ones.
        """
        if self.kind in ("separable", "shuffle"):
            return [self]
        return [replace(self, part=part) for part in PARTS]

    def call(self, tensors: Mapping[str, Any]) -> torch.Tensor:
        """Runs the public function on such tensors."""
        result: torch.Tensor = _function(self.function)(**tensors)
        return result

    def variants(self, dtypes: tuple[str, ...] = (), both_formats: bool = False) -> list[Workload]:
        """The same layer in other dtypes and, if asked, in both memory formats."""
        formats = (False, True) if both_formats else (self.channels_last,)
        return [replace(self, dtype=dtype, channels_last=last) for dtype in dtypes or (self.dtype,) for last in formats]

    def shrunk(self) -> Workload:
        """The same kind of call, small enough for the interpreter: a few groups, channels and pixels."""
        if self.kind == "local":
            return replace(self, input=(2, 4, 3, 3), weight=(2, 2, 4, 4, 2, 2), arguments={})
        if self.kind == "separable":
            channels = min(self.weight[0], 4)
            weight, pointwise = (channels, 1, *self.weight[2:]), min(self.pointwise, 4)
            return replace(self, input=(2, channels, 6, 6), weight=weight, pointwise=pointwise)
        groups = self.arguments.get("groups", 1)
        few = min(groups, 4)
        outer, inner = min(self.weight[0] // groups, 4) * few, min(self.weight[1], 4)
        channels = outer if self.transposed else inner * few
        if self.offset_groups:
            channels = inner = outer = 2 * self.offset_groups
        arguments = dict(self.arguments) | ({"groups": few} if groups > 1 else {})
        kernel = self.weight[2:]
        if self.kind == "depthwise" and max(kernel) > 7:
            kernel = tuple(min(k, 5) for k in kernel)
            arguments["padding"] = 2
        # Not so small that the kernel no longer fits.
        size = tuple(min(s, max(6, k)) for s, k in zip(self.input[2:], kernel, strict=True))
        if "dilation" in arguments:
            arguments["dilation"] = min(arguments["dilation"], 2)
        return replace(
            self,
            input=(min(self.input[0], 2), channels, *size),
            weight=(outer, inner, *kernel),
            arguments=arguments,
        )


def _function(name: str) -> Callable[..., torch.Tensor]:
    function: Callable[..., torch.Tensor] | None = getattr(functional, name, None) or getattr(lectures, name, None)
    if function is None:
        raise WorkloadError(f"function: triton_conv has no {name!r}")
    return function


def differentiated(forward: Call, tensors: Mapping[str, Any], part: str) -> Callable[[], torch.Tensor]:
    """One part of a training step as a call without arguments: `forward` of the tensors, or one gradient of it.

    The graph is built here, once; that of the whole step in every call, which returns the weight's gradient.
    """
    if part == FORWARD:
        return lambda: forward(tensors)
    # The gradients of offset and mask come with the input's.
    names = {INPUT_GRADIENT: ("input", "offset", "mask"), WEIGHT_GRADIENT: ("weight",)}.get(part, tuple(tensors))
    found = {name: tensors[name] for name in names if isinstance(tensors.get(name), torch.Tensor)}
    leaves = {name: value.detach().requires_grad_() for name, value in found.items()}

    def run() -> torch.Tensor:
        with torch.enable_grad():
            return forward({**tensors, **leaves})

    output, wanted = run(), tuple(leaves.values())
    grad = torch.empty_like(output).copy_(output_gradient(output.shape, output.dtype, output.device))
    if part == STEP:
        last = list(leaves).index("weight")
        return lambda: torch.autograd.grad(run(), wanted, grad)[last]
    return lambda: torch.autograd.grad(output, wanted, grad, retain_graph=True)[0]


def output_gradient(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The gradient of a layer's output that its own gradients are computed from: the same for everyone who asks."""
    if device.type == "meta":
        return torch.empty(*shape, dtype=dtype, device=device)
    return torch.randn(*shape, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(1))


def _strides(shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    if len(shape) == 1:
        return (1,)
    if channels_last and len(shape) == 3:
        _, c, length = shape
        return c * length, 1, c
    return dense_strides(shape, channels_last)


def _depthwise(name: str, input: tuple[int, ...], kernel: tuple[int, ...], padding: Any, **options: Any) -> Workload:
    arguments = {"padding": padding, "groups": input[1], **options.pop("arguments", {})}
    return Workload(
        name, "depthwise", f"conv{len(kernel)}d", input, (input[1], 1, *kernel), arguments, **options
    )  # fmt: skip


def _grouped(name: str, input: tuple[int, ...], groups: int, **options: Any) -> Workload:
    c = input[1]
    return Workload(
        name, "grouped", "conv2d", input, (c, c // groups, 3, 3), {"padding": 1, "groups": groups},
        channels_last=True, **options,
    )  # fmt: skip


def _dilated(name: str, input: tuple[int, ...], weight: tuple[int, ...], dilation: int, **options: Any) -> Workload:
    padding = dilation * (weight[-1] - 1) // 2
    return Workload(
        name, "dilated", f"conv{len(weight) - 2}d", input, weight, {"padding": padding, "dilation": dilation}, **options
    )  # fmt: skip


def _transposed(name: str, input: tuple[int, ...], weight: tuple[int, ...], **options: Any) -> Workload:
    names = ("stride", "padding", "output_padding", "groups")
    arguments: dict[str, Any] = {name: options.pop(name) for name in names if name in options}
    return Workload(name, "transposed", f"conv_transpose{len(weight) - 2}d", input, weight, arguments, **options)


FLAGSHIPS: tuple[Workload, ...] = (
    _grouped("narrow_groups_4", (64, 256, 56, 56), 64, origin="pytorch issue 70954"),
    _grouped("narrow_groups_8", (64, 104, 28, 28), 13, origin="RegNetY-400MF"),
    _grouped("wide_groups_56", (64, 224, 56, 56), 4, origin="RegNetY-8GF, pytorch issue 73764"),
    _depthwise("causal_dw1d", (1, 12288, 16384), (4,), ((3, 0),), origin="pytorch issue 192902"),
    _depthwise("conformer_dw1d", (32, 768, 500), (31,), 15, origin="pytorch issue 170138"),
    _depthwise("mobile_dw5", (128, 240, 28, 28), (5, 5), 2, origin="EfficientNet-B0"),
    _depthwise("mobile_dw5s2", (128, 144, 56, 56), (5, 5), 2, arguments={"stride": 2}, origin="EfficientNet-B0"),
    _depthwise("convnext_dw7", (64, 192, 56, 56), (7, 7), 3, channels_last=True, origin="ConvNeXt"),
    _depthwise("large_dw2d", (64, 384, 32, 32), (31, 31), 15, origin="RepLKNet issue 47, pytorch issue 74363"),
    _depthwise("dw3d", (8, 64, 32, 56, 56), (3, 3, 3), 1, origin="pytorch issues 37406, 51027"),
    _dilated("dilated_1d", (8, 128, 6400), (128, 128, 11), 5, origin="HiFi-GAN"),
    _dilated("dilated_d4", (8, 512, 65, 65), (512, 512, 3, 3), 4, channels_last=True, origin="DeepLabV3"),
    _dilated("dilated_d12", (8, 2048, 65, 65), (256, 2048, 3, 3), 12, channels_last=True, origin="DeepLabV3"),
    _dilated("dilated_d36", (8, 2048, 65, 65), (256, 2048, 3, 3), 36, channels_last=True, origin="pytorch issue 28777"),
    _transposed("vocoder_t1d_s8", (16, 512, 32), (512, 256, 16), stride=8, padding=4, origin="pytorch issue 41382"),
    _transposed("vocoder_t1d_s2", (16, 128, 6400), (128, 64, 4), stride=2, padding=1, origin="HiFi-GAN"),
    _transposed("dcgan_t2d", (128, 512, 4, 4), (512, 256, 4, 4), stride=2, padding=1, origin="DCGAN"),
    _transposed(
        "decoder_t2d", (1, 512, 128, 128), (512, 256, 3, 3), stride=2, padding=1, output_padding=1,
        channels_last=True, origin="U-Net decoder",
    ),
    _transposed(
        "modulated_t2d", (1, 8192, 16, 16), (8192, 512, 3, 3), stride=2, groups=16,
        origin="StyleGAN, FlagGems issue 3389",
    ),
    Workload(
        "dcnv2", "deformable", "deform_conv2d", (8, 256, 50, 84), (256, 256, 3, 3), {"padding": 1},
        channels_last=True, offset_groups=1, mask=True, origin="DCNv2-R50, torchvision has no bfloat16",
    ),
    Workload(
        "dcnv1_groups", "deformable", "deform_conv2d", (8, 128, 100, 168), (128, 128, 3, 3), {"padding": 1},
        channels_last=True, offset_groups=4, origin="DCN-R50 at 800 x 1344",
    ),
)  # fmt: skip

_NHWC: dict[str, Any] = {"channels_last": True}
LECTURES: tuple[Workload, ...] = (
    Workload(
        "separable_56", "separable", "separable_conv2d", (64, 128, 56, 56), (128, 1, 3, 3), {"padding": 1},
        pointwise=128, origin="MobileNet v1", **_NHWC,
    ),
    Workload(
        "separable_28", "separable", "separable_conv2d", (64, 256, 28, 28), (256, 1, 3, 3), {"padding": 1},
        pointwise=256, origin="MobileNet v1", **_NHWC,
    ),
    Workload(
        "shuffle_g3", "shuffle", "shuffle_conv2d", (128, 240, 28, 28), (60, 80, 1, 1), {"groups": 3},
        origin="ShuffleNet v1, 3 groups", **_NHWC,
    ),
    Workload(
        "shuffle_g8", "shuffle", "shuffle_conv2d", (128, 384, 28, 28), (96, 48, 1, 1), {"groups": 8},
        origin="ShuffleNet v1, 8 groups",
    ),
    Workload(
        "local2d", "local", "locally_connected2d", (64, 64, 28, 28), (28, 28, 64, 64, 3, 3), {"padding": 1},
        origin="pytorch issue 499", **_NHWC,
    ),
    Workload(
        "deepface_local", "local", "locally_connected2d", (32, 16, 71, 71), (63, 63, 16, 16, 9, 9),
        origin="DeepFace L4",
    ),
)  # fmt: skip
"""Layers of the kinds that torch has no function for; not among the flagships, whose baselines are torch's."""

NOT_SERVED = {
    "dcnv4": "its aggregation has no weight: not a convolution of the five kinds",
    "fused_chains": "a convolution, its activation and a depthwise one in one kernel are not written yet",
}
"""Flagships of the plan that no kernel serves yet, and why: reported as absent, not forgotten."""


def find(selection: str) -> list[Workload]:
    """Workloads by name, comma-separated names, kind, "all", or a JSON file with a list of them."""
    if selection in ("all", "lectures"):
        return list(FLAGSHIPS if selection == "all" else LECTURES)
    if selection.endswith(".json"):
        return _read(Path(selection))
    found: list[Workload] = []
    for part in selection.split(","):
        matching = [w for w in FLAGSHIPS + LECTURES if part in (w.name, w.kind, w.title)]
        if not matching:
            absent = f" ({NOT_SERVED[part]})" if part in NOT_SERVED else ""
            names = ", ".join(w.name for w in FLAGSHIPS + LECTURES)
            raise WorkloadError(
                f"workload: {part!r} is not known{absent}; choose all, lectures, a kind "
                f"({', '.join(KINDS + LECTURE_KINDS)}), a .json file, or of {names}"
            )
        found += matching
    return found


def _read(path: Path) -> list[Workload]:
    try:
        rows = json.loads(path.read_text())
    except OSError as error:
        raise WorkloadError(f"workload: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise WorkloadError(f"workload: {path} is not JSON: {error}") from error
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise WorkloadError(f'workload: {path} is no list of layers: [{{"name": ..., "input": [...], ...}}, ...]')
    return [_layer(row, f"workload: {path}, layer {row.get('name', index)!r}") for index, row in enumerate(rows)]


def _layer(row: dict[str, Any], where: str) -> Workload:
    """A layer of a file, planned once: what is wrong with it is said before anything is measured."""
    names = [each.name for each in fields(Workload)]
    if absent := [name for name in names[:5] if name not in row]:
        raise WorkloadError(f"{where}: without {', '.join(absent)}")
    if unknown := [name for name in row if name not in names]:
        raise WorkloadError(f"{where}: {', '.join(unknown)}: not known; choose of {', '.join(names)}")
    dtypes = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    for name, known in {"kind": KINDS + LECTURE_KINDS, "dtype": dtypes, "part": PARTS}.items():
        if row.get(name, known[0]) not in known:
            raise WorkloadError(f"{where}: {name}: {row[name]!r} is not known; choose of {', '.join(known)}")
    for name in ("input", "weight"):
        if not isinstance(row[name], list) or not all(isinstance(size, int) and size >= 0 for size in row[name]):
            raise WorkloadError(f"{where}: {name}: expected a list of sizes, got {row[name]!r}")
    workload = Workload(**row | {name: tuple(row[name]) for name in ("input", "weight")})
    try:
        workload.problem()
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise WorkloadError(f"{where}: {error}") from error
    return workload
