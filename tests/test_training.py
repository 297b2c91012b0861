"""Small networks trained with torch's layers and with ours from one seed: the losses agree step by step."""

import os

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, launches
from torch import nn

import triton_conv as tc
from triton_conv.reference import deform_conv2d

# Larger images on a GPU, if asked for; the interpreter takes about a second a step of the small ones.
FULL = os.environ.get("TRITON_CONV_FULL_TRAINING") == "1"
SIZE, BATCH, STEPS = (64, 32, 30) if FULL else (8, 4, 3)
# A program of the depthwise gradient is a channel and a tap: the interpreter takes 10 ms for each.
WIDTH = 16 if FULL else 4


class Functions:
    """The convolutions a network is built of: torch's, in the same precision everywhere."""

    conv2d = staticmethod(F.conv2d)
    conv_transpose2d = staticmethod(F.conv_transpose2d)
    deform_conv2d = staticmethod(deform_conv2d)


class MobileLike(nn.Module):
    """Pointwise, depthwise with a stride, pointwise, and a classifier."""

    def __init__(self, functions, dtype):
        super().__init__()
        self.f = functions
        self.expand = nn.Conv2d(3, WIDTH, 1, dtype=dtype)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, dtype=dtype)
        self.depthwise.weight = nn.Parameter(self.depthwise.weight[:, :1].clone())
        self.reduce = nn.Conv2d(WIDTH, 24, 1, dtype=dtype)
        self.classify = nn.Linear(24, 4, dtype=dtype)

    def forward(self, x):
        x = F.relu6(self.f.conv2d(x, self.expand.weight, self.expand.bias))
        x = F.relu6(self.f.conv2d(x, self.depthwise.weight, self.depthwise.bias, stride=2, padding=1, groups=WIDTH))
        x = self.f.conv2d(x, self.reduce.weight, self.reduce.bias)
        return self.classify(x.mean((2, 3)))


class DecoderLike(nn.Module):
    """A U-Net's step down and up again, dilated in between, with a skip connection."""

    def __init__(self, functions, dtype):
        super().__init__()
        self.f = functions
        self.down = nn.Conv2d(3, 8, 3, dtype=dtype)
        self.middle = nn.Conv2d(8, 8, 3, dtype=dtype)
        self.up = nn.ConvTranspose2d(8, 8, 2, dtype=dtype)
        self.head = nn.Conv2d(11, 4, 3, dtype=dtype)

    def forward(self, x):
        y = F.silu(self.f.conv2d(x, self.down.weight, self.down.bias, stride=2, padding=1))
        y = F.silu(self.f.conv2d(y, self.middle.weight, self.middle.bias, padding=2, dilation=2))
        y = self.f.conv_transpose2d(y, self.up.weight, self.up.bias, stride=2)
        y = self.f.conv2d(torch.cat([x, y], 1), self.head.weight, self.head.bias, padding=1)
        return y.mean((2, 3))


class DeformableClassifier(nn.Module):
    """Offsets and a mask, predicted by a convolution, and a deformable convolution that follows them."""

    def __init__(self, functions, dtype):
        super().__init__()
        self.f = functions
        self.offset = nn.Conv2d(3, 27, 3, dtype=dtype)
        self.deform = nn.Conv2d(3, 8, 3, dtype=dtype)
        self.classify = nn.Linear(8, 4, dtype=dtype)

    def forward(self, x):
        both = self.f.conv2d(x, self.offset.weight, self.offset.bias, padding=1)
        offset, mask = both[:, :18].contiguous(), both[:, 18:].sigmoid()
        x = self.f.deform_conv2d(x, offset, self.deform.weight, self.deform.bias, padding=1, mask=mask)
        return self.classify(F.relu(x).mean((2, 3)))


def losses(network, functions, dtype):
    """The loss of each step of a training on generated images, whose class is the brightest quadrant."""
    torch.manual_seed(0)
    model = network(functions, dtype).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for _ in range(STEPS):
        images = torch.rand(BATCH, 3, SIZE, SIZE, dtype=dtype).to(DEVICE)
        classes = F.adaptive_avg_pool2d(images, 2).mean(1).flatten(1).argmax(1)
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("network", [MobileLike, DecoderLike, DeformableClassifier], ids=lambda n: n.__name__)
def test_losses_agree_step_by_step(network, dtype, conv_precision):
    conv_precision.fp32_precision = "ieee"
    expected = losses(network, Functions, dtype)
    launches.clear()
    ours = losses(network, tc, dtype)
    assert sum(launches.values()) >= 3 * STEPS, "forward and gradients ran here"
    assert ours != [ours[0]] * STEPS, "something is learnt"
    # Rounding errors of a step are the starting point of the next: they grow, here about tenfold in all.
    torch.testing.assert_close(ours, expected, rtol=1e-11 if dtype == torch.float64 else 2e-4, atol=0)
