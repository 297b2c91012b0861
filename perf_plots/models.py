"""Published models in plain `torch.nn`, as their authors define them, weights random: what `convert` is tried on.

`width` and `depth` scale the channels and the blocks of a stage, so that the same definition is a real model (1.0) or
one for the interpreter. Nothing here knows of triton_conv.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


@dataclass(frozen=True)
class Scale:
    """Channels by `width`, in multiples of `step`; blocks of a stage by `depth`, one at least."""

    width: float = 1.0
    depth: float = 1.0
    step: int = 8

    def channels(self, c: int) -> int:
        return max(self.step, round(c * self.width / self.step) * self.step)

    def blocks(self, n: int) -> int:
        return max(1, round(n * self.depth))


def _conv_norm(c_in: int, c_out: int, k: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(c_in, c_out, k, stride, k // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6()] if act else []))


def _head(c: int, classes: int = 10) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes)]


class _Inverted(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = c_in * expand
        first = [_conv_norm(c_in, hidden, 1)] if expand > 1 else []
        self.body = nn.Sequential(
            *first, _conv_norm(hidden, hidden, 3, stride, hidden), _conv_norm(hidden, c_out, 1, act=False)
        )
        self.skip = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.skip else y


def mobilenet_v2(scale: Scale) -> nn.Module:
    """Sandler et al., arXiv:1801.04381: depthwise 3 x 3 between 1 x 1."""
    c = scale.channels(32)
    layers: list[nn.Module] = [_conv_norm(3, c, 3, 2)]
    for expand, width, n, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
    ):  # fmt: skip
        for i in range(scale.blocks(n)):
            out = scale.channels(width)
            layers.append(_Inverted(c, out, stride if i == 0 else 1, expand))
            c = out
    last = scale.channels(1280)
    return nn.Sequential(*layers, _conv_norm(c, last, 1), *_head(last))


def _shuffle(x: Tensor) -> Tensor:
    halves: Tensor = x.unflatten(1, (2, -1))  # type: ignore[no-untyped-call]
    return halves.transpose(1, 2).flatten(1, 2)


class _ShuffleUnit(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        half, self.stride = c_out // 2, stride
        source = c_in if stride > 1 else c_in // 2
        self.right = nn.Sequential(
            _conv_norm(source, half, 1), _conv_norm(half, half, 3, stride, half, act=False), _conv_norm(half, half, 1)
        )
        self.left = nn.Sequential()
        if stride > 1:
            self.left = nn.Sequential(_conv_norm(c_in, c_in, 3, stride, c_in, act=False), _conv_norm(c_in, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = (x, x) if self.stride > 1 else x.chunk(2, 1)
        return _shuffle(torch.cat((self.left(left), self.right(right)), 1))


def shufflenet_v2(scale: Scale) -> nn.Module:
    """Ma et al., arXiv:1807.11164."""
    c = scale.channels(24)
    layers: list[nn.Module] = [_conv_norm(3, c, 3, 2), nn.MaxPool2d(3, 2, 1)]
    for width, n in ((116, 4), (232, 8), (464, 4)):
        out = 2 * scale.channels(width // 2)
        layers.append(_ShuffleUnit(c, out, 2))
        layers += [_ShuffleUnit(out, out, 1) for _ in range(scale.blocks(n - 1))]
        c = out
    last = scale.channels(1024)
    return nn.Sequential(*layers, _conv_norm(c, last, 1), *_head(last))


class _ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x.movedim(1, -1))
        return y.movedim(-1, 1)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c, c, 7, padding=3, groups=c),
            _ChannelNorm(c, eps=1e-6),
            nn.Conv2d(c, 4 * c, 1),
            nn.GELU(),
            nn.Conv2d(4 * c, c, 1),
        )
        self.gamma = nn.Parameter(torch.full((c, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + self.gamma * y


def convnext_tiny(scale: Scale) -> nn.Module:
    """Liu et al., arXiv:2201.03545: depthwise 7 x 7."""
    c = scale.channels(96)
    layers: list[nn.Module] = [nn.Conv2d(3, c, 4, 4), _ChannelNorm(c, eps=1e-6)]
    for stage, n in enumerate((3, 3, 9, 3)):
        if stage:
            layers += [_ChannelNorm(c, eps=1e-6), nn.Conv2d(c, 2 * c, 2, 2)]
            c *= 2
        layers += [_ConvNeXtBlock(c) for _ in range(scale.blocks(n))]
    return nn.Sequential(*layers, *_head(c))


class _Bottleneck(nn.Module):
    def __init__(self, c_in: int, c: int, groups: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(),
            nn.Conv2d(c, c, 3, stride, dilation, dilation, groups, bias=False), nn.BatchNorm2d(c), nn.ReLU(),
            nn.Conv2d(c, 2 * c, 1, bias=False), nn.BatchNorm2d(2 * c),
        )  # fmt: skip
        self.skip = nn.Sequential()
        if stride > 1 or c_in != 2 * c:
            self.skip = nn.Sequential(nn.Conv2d(c_in, 2 * c, 1, stride, bias=False), nn.BatchNorm2d(2 * c))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.body(x))


def _stages(c_in: int, scale: Scale, groups: int, plan: Sequence[tuple[int, int, int, int]]) -> list[nn.Module]:
    """Bottlenecks by (channels, blocks, stride, dilation)."""
    layers: list[nn.Module] = []
    for width, n, stride, dilation in plan:
        c = scale.channels(width)
        for i in range(scale.blocks(n)):
            layers.append(_Bottleneck(c_in, c, min(groups, c // 4), stride if i == 0 else 1, dilation))
            c_in = 2 * c
    return layers


def resnext50(scale: Scale) -> nn.Module:
    """Xie et al., arXiv:1611.05431: 32 groups of 4 channels and more."""
    c = scale.channels(64)
    plan = ((128, 3, 1, 1), (256, 4, 2, 1), (512, 6, 2, 1), (1024, 3, 2, 1))
    layers = _stages(c, scale, 32, plan)
    return nn.Sequential(_conv_norm(3, c, 7, 2), nn.MaxPool2d(3, 2, 1), *layers, *_head(2 * scale.channels(1024)))


class _Pyramid(nn.Module):
    def __init__(self, c_in: int, c: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(c_in, c, 1)])
        self.branches += [nn.Conv2d(c_in, c, 3, padding=rate, dilation=rate) for rate in rates]
        self.join = nn.Conv2d((len(rates) + 1) * c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.join(torch.cat([branch(x).relu() for branch in self.branches], 1))
        return y


def deeplab_v3(scale: Scale) -> nn.Module:
    """Chen et al., arXiv:1706.05587: dilated stages and a pyramid of dilations 12, 24 and 36."""
    c = scale.channels(64)
    plan = ((128, 3, 1, 1), (256, 4, 2, 1), (512, 6, 1, 2), (1024, 3, 1, 4))
    out = scale.channels(256)
    return nn.Sequential(
        _conv_norm(3, c, 7, 2),
        *_stages(c, scale, 1, plan),
        _Pyramid(2 * scale.channels(1024), out, (12, 24, 36)),
        nn.Conv2d(out, out, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(out, 21, 1),
        nn.Upsample(scale_factor=4, mode="bilinear"),
    )


def dcgan(scale: Scale) -> nn.Module:
    """The generator of Radford et al., arXiv:1511.06434: transposed 4 x 4, stride 2."""
    widths = [scale.channels(c) for c in (512, 256, 128, 64)]
    layers: list[nn.Module] = [nn.ConvTranspose2d(100, widths[0], 4, bias=False)]
    for c_in, c_out in itertools.pairwise(widths):
        layers += [nn.BatchNorm2d(c_in), nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False)]
    return nn.Sequential(
        *layers, nn.BatchNorm2d(widths[-1]), nn.ReLU(), nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1), nn.Tanh()
    )


class _X3DBlock(nn.Module):
    def __init__(self, c_in: int, c: int, stride: int) -> None:
        super().__init__()
        hidden, steps = 2 * c, (1, stride, stride)
        self.body = nn.Sequential(
            nn.Conv3d(c_in, hidden, 1, bias=False), nn.BatchNorm3d(hidden), nn.ReLU(),
            nn.Conv3d(hidden, hidden, 3, steps, 1, groups=hidden, bias=False), nn.BatchNorm3d(hidden), nn.SiLU(),
            nn.Conv3d(hidden, c, 1, bias=False), nn.BatchNorm3d(c),
        )  # fmt: skip
        self.skip = nn.Sequential() if c_in == c and stride == 1 else nn.Conv3d(c_in, c, 1, steps, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.body(x))


def x3d(scale: Scale) -> nn.Module:
    """Feichtenhofer, arXiv:2004.04730: depthwise 3 x 3 x 3, and a stem in space, then in time."""
    c = scale.channels(24)
    layers: list[nn.Module] = [
        nn.Conv3d(3, c, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False),
        nn.Conv3d(c, c, (5, 1, 1), padding=(2, 0, 0), groups=c, bias=False),
        nn.BatchNorm3d(c),
        nn.ReLU(),
    ]
    for width, n in ((24, 3), (48, 5), (96, 11), (192, 7)):
        out = scale.channels(width)
        layers += [_X3DBlock(c if i == 0 else out, out, 2 if i == 0 else 1) for i in range(scale.blocks(n))]
        c = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(c, 10))


class _Residual1d(nn.Module):
    def __init__(self, c: int, k: int) -> None:
        super().__init__()
        self.wide = nn.ModuleList(
            [parametrizations.weight_norm(nn.Conv1d(c, c, k, padding="same", dilation=d)) for d in (1, 3, 5)]
        )
        self.plain = nn.ModuleList([parametrizations.weight_norm(nn.Conv1d(c, c, k, padding="same")) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for wide, plain in zip(self.wide, self.plain, strict=True):
            x = x + plain(F.leaky_relu(wide(F.leaky_relu(x, 0.1)), 0.1))
        return x


class _Vocoder(nn.Module):
    def __init__(self, scale: Scale) -> None:
        super().__init__()
        c = scale.channels(512)
        self.first = parametrizations.weight_norm(nn.Conv1d(80, c, 7, padding=3))
        self.up, self.mix = nn.ModuleList(), nn.ModuleList()
        for k, stride in ((16, 8), (16, 8), (4, 2), (4, 2)):
            half = max(c // 2, 4)
            self.up.append(parametrizations.weight_norm(nn.ConvTranspose1d(c, half, k, stride, (k - stride) // 2)))
            self.mix.append(nn.ModuleList([_Residual1d(half, width) for width in (3, 7, 11)[: scale.blocks(3)]]))
            c = half
        self.last = parametrizations.weight_norm(nn.Conv1d(c, 1, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for up, blocks in zip(self.up, self.mix, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            x = torch.stack([block(x) for block in blocks.children()]).mean(0)
        return torch.tanh(self.last(F.leaky_relu(x)))


def hifi_gan(scale: Scale) -> nn.Module:
    """The generator of Kong et al., arXiv:2010.05646: transposed 1-D, then dilated 1-D, weights normalised."""
    return _Vocoder(scale)


@dataclass(frozen=True)
class Model:
    """A model, the shape of one input, and that of one for the interpreter."""

    build: Callable[[Scale], nn.Module]
    input: tuple[int, ...]
    small: tuple[int, ...]


MODELS: dict[str, Model] = {
    "mobilenet_v2": Model(mobilenet_v2, (3, 224, 224), (3, 32, 32)),
    "shufflenet_v2": Model(shufflenet_v2, (3, 224, 224), (3, 32, 32)),
    "convnext_tiny": Model(convnext_tiny, (3, 224, 224), (3, 32, 32)),
    "resnext50": Model(resnext50, (3, 224, 224), (3, 32, 32)),
    "deeplab_v3": Model(deeplab_v3, (3, 256, 256), (3, 16, 16)),
    "dcgan": Model(dcgan, (100, 1, 1), (100, 1, 1)),
    "x3d": Model(x3d, (3, 16, 160, 160), (3, 4, 16, 16)),
    "hifi_gan": Model(hifi_gan, (80, 32), (80, 2)),
}
SMALL = Scale(width=0.03, depth=0.2, step=4)
