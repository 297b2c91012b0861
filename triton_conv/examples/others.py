"""What else convolutions are for: segmentation, autoencoders, generators, deformable shapes, video and sound."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import functional as F


class SegmentationHead(nn.Module):
    """A class for every pixel, with context from dilated convolutions: `(N, c_in, H, W)` -> `(N, classes, H, W)`.

    Each layer sees twice as far as the one before at no further cost: the d - 1 zeros between the taps are never read.
    Yu and Koltun, arXiv:1511.07122.
    """

    def __init__(
        self,
        c_in: int = 256,
        channels: int = 64,
        classes: int = 21,
        dilations: tuple[int, ...] = (1, 2, 4),
        layers: Any = nn,
    ) -> None:
        super().__init__()
        body: list[nn.Module] = []
        for dilation in dilations:
            body += [layers.Conv2d(c_in, channels, 3, padding=dilation, dilation=dilation), nn.ReLU()]
            c_in = channels
        self.body = nn.Sequential(*body, layers.Conv2d(c_in, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


def autoencoder(c_in: int = 1, channels: int = 16, layers: Any = nn) -> nn.Sequential:
    """An image through a code of a quarter of its height and width, and back: `(N, c_in, H, W)` to the same shape.

    The decoder's transposed convolutions take the encoder's steps in the opposite direction; they do not undo them.
    H and W are multiples of four.
    """
    return nn.Sequential(
        layers.Conv2d(c_in, channels, 4, stride=2, padding=1),
        nn.ReLU(),
        layers.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
        nn.ReLU(),
        layers.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1),
        nn.ReLU(),
        layers.ConvTranspose2d(channels, c_in, 4, stride=2, padding=1),
    )


def dcgan_generator(
    code: int = 100, channels: int = 64, c_out: int = 3, doublings: int = 4, layers: Any = nn
) -> nn.Sequential:
    """DCGAN's generator: `(N, code, 1, 1)` -> `(N, c_out, S, S)`, S = 4 * 2^doublings; 64 x 64 as published.

    Radford, Metz and Chintala, arXiv:1511.06434.
    """
    width = channels * 2 ** (doublings - 1)
    body: list[nn.Module] = [layers.ConvTranspose2d(code, width, 4, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(doublings - 1):
        body += [
            layers.ConvTranspose2d(width, width // 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
        ]
        width //= 2
    return nn.Sequential(*body, layers.ConvTranspose2d(width, c_out, 4, 2, 1, bias=False), nn.Tanh())


class DeformableClassifier(nn.Module):
    """A classifier whose second layer looks where an offset layer tells it to: `(N, c_in, H, W)` -> `(N, classes)`.

    The 2 p q offsets of each pixel start at zero, where the layer is an ordinary convolution, and are learned.
    Dai et al., arXiv:1703.06211.
    """

    def __init__(self, c_in: int = 1, channels: int = 16, classes: int = 10, layers: Any = nn) -> None:
        super().__init__()
        self.stem = nn.Sequential(layers.Conv2d(c_in, channels, 3, stride=2, padding=1), nn.ReLU())
        self.offset = layers.Conv2d(channels, 2 * 3 * 3, 3, padding=1)
        # Its weight and bias alone are used: what is sampled is not its own input.
        self.deformed = layers.Conv2d(channels, channels, 3, padding=1)
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.deform_conv2d(x, self.offset(x), self.deformed.weight, self.deformed.bias, padding=1)
        y: Tensor = self.head(x)
        return y


def video_classifier(c_in: int = 3, channels: int = 16, classes: int = 10, layers: Any = nn) -> nn.Sequential:
    """A stem for moving pictures: `(N, c_in, T, H, W)` -> `(N, classes)`.

    Height and width first, then time, then a depthwise filter over all three, as in X3D (Feichtenhofer,
    arXiv:2004.04730).
    """
    return nn.Sequential(
        layers.Conv3d(c_in, channels, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False),
        layers.Conv3d(channels, channels, (5, 1, 1), padding=(2, 0, 0), groups=channels, bias=False),
        nn.BatchNorm3d(channels),
        nn.ReLU(),
        layers.Conv3d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.BatchNorm3d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    )


class AudioStack(nn.Module):
    """A causal stack for sound: `(N, 1, T)` -> `(N, 1, T)`, the prediction of each next sample from those before.

    Every layer has two taps, twice as far apart as the last one's; no output sees what comes after it. Van den Oord et
    al., "WaveNet", arXiv:1609.03499.
    """

    def __init__(self, channels: int = 16, depth: int = 6, layers: Any = nn) -> None:
        super().__init__()
        self.first = layers.Conv1d(1, channels, 1)
        self.dilated = nn.ModuleList(
            layers.Conv1d(channels, channels, 2, dilation=2**level, padding=2**level) for level in range(depth)
        )
        self.last = layers.Conv1d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-1]
        x = self.first(x)
        for layer in self.dilated:
            # Padded on both sides, of which the one behind would look ahead: its outputs are cut off.
            x = x + layer(x)[..., :length].relu()
        y: Tensor = self.last(x)
        return y
