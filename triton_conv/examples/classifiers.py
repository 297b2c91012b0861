"""Image classifiers: MobileNet and ShuffleNet, and GoogLeNet and VGG-16 that they were compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _block(layers: Any, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    conv = layers.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


def _classifier(channels: int, classes: int, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, classes))


# ------------------------------------------------------------------------------------------------------------ MobileNet


def mobilenet(classes: int = 1000, width: float = 1.0, depth: int = 13, layers: Any = nn) -> nn.Sequential:
    """MobileNet v1: `(N, 3, H, W)` -> `(N, classes)`; the first `depth` of its 13 separable blocks.

    A separable block is a depthwise 3x3 and a 1x1, each with batch norm and ReLU; `width` multiplies every layer's
    channels. Howard et al., "MobileNets", arXiv:1704.04861.
    """
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    channels = int(32 * width)
    body = [_block(layers, 3, channels, 3, stride=2)]
    for c_out, stride in plan[:depth]:
        c_out = int(c_out * width)
        body += [
            _block(layers, channels, channels, 3, stride, groups=channels),
            _block(layers, channels, c_out, 1),
        ]
        channels = c_out
    return nn.Sequential(*body, _classifier(channels, classes))


# ----------------------------------------------------------------------------------------------------------- ShuffleNet

# Channels of the first stage by number of groups: each next stage has twice as many.
_FIRST_STAGE = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}


class ShuffleUnit(nn.Module):
    """ShuffleNet v1's unit: grouped 1x1 and shuffle, depthwise 3x3, grouped 1x1, beside a shortcut.

    With stride 2 the shortcut is a pooling, and its channels are put beside the branch's instead of added.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int, first_groups: int, layers: Any = nn) -> None:
        super().__init__()
        branch, middle = c_out - c_in if stride == 2 else c_out, c_out // 4
        if hasattr(layers, "ShuffleConv2d"):
            squeeze = layers.ShuffleConv2d(c_in, middle, 1, groups=first_groups, bias=False)
        else:
            conv = layers.Conv2d(c_in, middle, 1, groups=first_groups, bias=False)
            squeeze = nn.Sequential(conv, nn.ChannelShuffle(first_groups))
        self.branch = nn.Sequential(
            squeeze,
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            layers.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False),
            nn.BatchNorm2d(middle),
            layers.Conv2d(middle, branch, 1, groups=groups, bias=False),
            nn.BatchNorm2d(branch),
        )
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x)
        return torch.relu(x + y if self.pool is None else torch.cat((self.pool(x), y), 1))


def shufflenet(
    classes: int = 1000, groups: int = 3, scale: float = 1.0, repeats: tuple[int, ...] = (3, 7, 3), layers: Any = nn
) -> nn.Sequential:
    """ShuffleNet v1: `(N, 3, H, W)` -> `(N, classes)`, stages of one unit of stride 2 and `repeats` of stride 1.

    `scale` multiplies every layer's channels.

    Zhang et al., "ShuffleNet", arXiv:1707.01083.
    """
    channels = int(24 * scale)
    body: list[nn.Module] = [_block(layers, 3, channels, 3, stride=2), nn.MaxPool2d(3, 2, 1)]
    for stage, repeat in enumerate(repeats):
        c_out = int(_FIRST_STAGE[groups] * scale) * 2**stage
        for index in range(repeat + 1):
            # The very first 1x1 reads too few channels to divide them.
            first_groups = 1 if stage == index == 0 else groups
            unit = ShuffleUnit(channels, c_out, 2 if index == 0 else 1, groups, first_groups, layers)
            body.append(unit)
            channels = c_out
    return nn.Sequential(*body, _classifier(channels, classes))


# ------------------------------------------------------------------------------------------------- what they are beside


class Inception(nn.Module):
    """GoogLeNet's module: 1x1, 3x3, 5x5 and pooling branches side by side, squeezed by 1x1 convolutions before."""

    def __init__(self, c_in: int, widths: tuple[int, ...], layers: Any = nn) -> None:
        super().__init__()
        one, squeeze3, three, squeeze5, five, pooled = widths

        def conv(c_in: int, c_out: int, kernel: int) -> nn.Sequential:
            return nn.Sequential(layers.Conv2d(c_in, c_out, kernel, padding=kernel // 2), nn.ReLU())

        self.branches = nn.ModuleList((
            conv(c_in, one, 1),
            nn.Sequential(conv(c_in, squeeze3, 1), conv(squeeze3, three, 3)),
            nn.Sequential(conv(c_in, squeeze5, 1), conv(squeeze5, five, 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(c_in, pooled, 1)),
        ))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


_INCEPTION: dict[str, tuple[int, ...]] = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def googlenet(classes: int = 1000, layers: Any = nn) -> nn.Sequential:
    """GoogLeNet as published, without its auxiliary classifiers: `(N, 3, 224, 224)` -> `(N, classes)`.

    Szegedy et al., "Going deeper with convolutions", arXiv:1409.4842.
    """

    def pool() -> nn.MaxPool2d:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    net = nn.Sequential()
    net.add_module("stem", nn.Sequential(layers.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), pool()))
    narrow, wide = layers.Conv2d(64, 64, 1), layers.Conv2d(64, 192, 3, padding=1)
    net.add_module("conv", nn.Sequential(narrow, nn.ReLU(), wide, nn.ReLU(), pool()))
    channels = 192
    for name, widths in _INCEPTION.items():
        net.add_module(name, Inception(channels, widths, layers))
        channels = widths[0] + widths[2] + widths[4] + widths[5]
        if name in ("3b", "4e"):
            net.add_module(f"pool{name[0]}", pool())
    net.add_module("linear", _classifier(channels, classes, dropout=0.4))
    return net


def vgg16(classes: int = 1000, layers: Any = nn) -> nn.Sequential:
    """VGG-16: thirteen 3x3 convolutions and three fully connected layers, `(N, 3, 224, 224)` -> `(N, classes)`.

    Simonyan and Zisserman, arXiv:1409.1556.
    """
    body: list[nn.Module] = []
    channels = 3
    for c_out, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            body += [layers.Conv2d(channels, c_out, 3, padding=1), nn.ReLU()]
            channels = c_out
        body.append(nn.MaxPool2d(2))
    head = [
        nn.Flatten(), nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(),
        nn.Dropout(), nn.Linear(4096, classes),
    ]  # fmt: skip
    return nn.Sequential(*body, *head)
