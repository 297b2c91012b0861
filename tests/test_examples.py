"""The example networks, and the layers of the lectures as modules: right against torch, and they learn."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, channels_last, launches, random
from torch import nn

import triton_conv as tc
from triton_conv import examples, nn_lectures
from triton_conv.errors import ArgumentError


class Ours:
    """A convolution of torch.nn whose forward pass is our function of that name."""

    function = None

    def forward(self, x):
        options = {"output_padding": self.output_padding} if self.transposed else {}
        return type(self).function(
            x, self.weight, self.bias, self.stride, self.padding, dilation=self.dilation, groups=self.groups, **options
        )


LAYERS = SimpleNamespace(
    ShuffleConv2d=nn_lectures.ShuffleConv2d,
    **{
        name: type(name, (Ours, getattr(nn, name)), {"function": staticmethod(function)})
        for name, function in (
            ("Conv1d", tc.conv1d), ("Conv2d", tc.conv2d), ("Conv3d", tc.conv3d),
            ("ConvTranspose2d", tc.conv_transpose2d),
        )
    },
)  # fmt: skip

# (network, size of one input, kernels that must have run, whether it predicts classes)
NETWORKS = {
    "mobilenet": (
        lambda layers: examples.mobilenet(4, width=0.25, depth=1, layers=layers), (3, 8, 8),
        {"depthwise_banded", "implicit_gemm"}, 4,
    ),
    "shufflenet": (
        lambda layers: examples.shufflenet(4, groups=3, scale=1 / 4, repeats=(1,), layers=layers), (3, 8, 8),
        {"shuffle_gemm", "grouped_packed", "depthwise_banded"}, 4,
    ),
    "segmentation": (
        lambda layers: examples.SegmentationHead(4, 4, 3, (1, 2), layers), (4, 6, 6), {"implicit_gemm"}, 3,
    ),
    "autoencoder": (lambda layers: examples.autoencoder(1, 4, layers), (1, 4, 4), {"transposed_phase"}, 0),
    "dcgan": (
        lambda layers: examples.dcgan_generator(4, 4, 1, 1, layers), (4, 1, 1), {"transposed_phase"}, 0,
    ),
    "deformable": (
        lambda layers: examples.DeformableClassifier(1, 4, 3, layers), (1, 6, 6),
        {"deformable", "deformable_input_gradient", "deformable_weight_gradient"}, 3,
    ),
    "video": (
        lambda layers: examples.video_classifier(2, 2, 3, layers), (2, 3, 4, 4), {"implicit_gemm"}, 3,
    ),
    "audio": (lambda layers: examples.AudioStack(4, 3, layers), (1, 24), {"implicit_gemm"}, 0),
}  # fmt: skip


def pair(name):
    """The network in torch's layers and in ours, with the same numbers in them."""
    build = NETWORKS[name][0]
    torch.manual_seed(1)
    theirs, ours = build(nn).to(DEVICE), build(LAYERS).to(DEVICE)
    values = list(theirs.state_dict().values())
    state = ours.state_dict()
    assert [v.shape for v in state.values()] == [v.shape for v in values]
    ours.load_state_dict(dict(zip(state, values, strict=True)))
    return theirs, ours


def loss_of(y, name, batch):
    """What the network is to learn: labels, or a picture or sound that it is to give back."""
    if classes := NETWORKS[name][3]:
        labels = torch.arange(y[:, 0].numel(), device=DEVICE).view(y[:, 0].shape) % classes
        return F.cross_entropy(y, labels)
    return F.mse_loss(y, batch if y.shape == batch.shape else random(y.shape, seed="goal").tanh())


# A few seconds each in the interpreter.
LONG = ("autoencoder", "dcgan", "deformable", "video", "shufflenet")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in NETWORKS]
)
def test_a_network_is_torchs_and_learns(name):
    theirs, ours = pair(name)
    batch = random((2, *NETWORKS[name][1]), seed=name)
    launches.clear()
    torch.testing.assert_close(ours(batch), theirs(batch), rtol=1e-3, atol=1e-3)
    optimizer = torch.optim.SGD(ours.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(3):
        loss = loss_of(ours(batch), name, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert NETWORKS[name][2] <= set(launches)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in ours.parameters())


# The whole networks, each with one input.
LARGER = {
    "mobilenet": (lambda: examples.mobilenet(10, layers=LAYERS), (3, 64, 64)),
    "shufflenet": (lambda: examples.shufflenet(10, layers=LAYERS), (3, 64, 64)),
    "segmentation": (lambda: examples.SegmentationHead(layers=LAYERS), (256, 33, 33)),
    "autoencoder": (lambda: examples.autoencoder(layers=LAYERS), (1, 28, 28)),
    "dcgan": (lambda: examples.dcgan_generator(layers=LAYERS), (100, 1, 1)),
    "deformable": (lambda: examples.DeformableClassifier(layers=LAYERS), (1, 28, 28)),
    "video": (lambda: examples.video_classifier(layers=LAYERS), (3, 8, 32, 32)),
    "audio": (lambda: examples.AudioStack(layers=LAYERS), (1, 4000)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGER)
def test_a_larger_network_learns(name):
    build, shape = LARGER[name]
    torch.manual_seed(2)
    network = build().to(DEVICE)
    batch = random((16, *shape), seed=name)
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9)
    losses = []
    launches.clear()
    for _ in range(10):
        loss = loss_of(network(batch), name, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(launches.values()) >= 30 and losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("network", "shape", "out"),
    [
        (lambda: examples.mobilenet(), (2, 3, 224, 224), (2, 1000)),
        (lambda: examples.shufflenet(groups=8), (2, 3, 224, 224), (2, 1000)),
        (lambda: examples.googlenet(), (2, 3, 224, 224), (2, 1000)),
        (lambda: examples.vgg16(), (2, 3, 224, 224), (2, 1000)),
        (lambda: examples.SegmentationHead(256, 64, 21), (1, 256, 65, 65), (1, 21, 65, 65)),
        (lambda: examples.autoencoder(3), (2, 3, 64, 32), (2, 3, 64, 32)),
        (lambda: examples.dcgan_generator(), (2, 100, 1, 1), (2, 3, 64, 64)),
        (lambda: examples.video_classifier(), (1, 3, 8, 32, 32), (1, 10)),
        (lambda: examples.AudioStack(), (1, 1, 100), (1, 1, 100)),
    ],
)
def test_published_sizes(network, shape, out):
    with torch.device("meta"):
        assert network().eval()(torch.empty(shape)).shape == out


INPUTS = {
    "AudioStack": (1, 1, 100),
    "DeformableClassifier": (1, 1, 28, 28),
    "SegmentationHead": (1, 256, 33, 33),
    "autoencoder": (1, 1, 32, 32),
    "dcgan_generator": (1, 100, 1, 1),
    "googlenet": (1, 3, 224, 224),
    "mobilenet": (1, 3, 224, 224),
    "shufflenet": (1, 3, 224, 224),
    "vgg16": (1, 3, 224, 224),
    "video_classifier": (1, 3, 8, 32, 32),
}


def test_every_example_is_counted():
    assert set(INPUTS) == set(examples.__all__) - {"Inception", "ShuffleUnit"}


@pytest.mark.parametrize("name", INPUTS)
def test_an_example_is_counted_whole(name):
    """As `triton-conv cost` does it: built with its defaults, nothing computed, no parameter left out."""
    with torch.device("meta"):
        model = getattr(examples, name)()
    found = tc.cost.of(model, INPUTS[name])
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
                for p in m.parameters())  # fmt: skip
    everything = sum(p.numel() for p in model.parameters())
    assert everything - norms <= found.parameters <= everything
    assert found.macs > 0


def test_sound_does_not_look_ahead():
    # Of some weights a unit passes nothing on.
    torch.manual_seed(0)
    net, x = examples.AudioStack(4, 4).double(), torch.zeros(1, 1, 40, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(net(x)[0, 0, 20], x)
    assert not grad[0, 0, 21:].any()
    assert grad[0, 0, 20 - 15 : 21].all(), "two taps at distances of 1, 2, 4 and 8 see 16 samples"
    assert not grad[0, 0, : 20 - 15].any()


def test_a_dilated_head_sees_twice_as_far_with_every_layer():
    found = tc.cost.of(examples.SegmentationHead(4, 4, 2), (1, 4, 32, 32))
    assert [layer.field.size[0] for layer in found.layers] == [3, 7, 15, 15]


# ------------------------------------------------------------------------------------------------------------ modules


@pytest.mark.usefixtures("exact_products", "one_kernel")
def test_a_separable_layer_of_two_with_their_norms():
    torch.manual_seed(0)
    first = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4, bias=False)
    second = nn.Conv2d(8, 5, 1)
    norms = nn.BatchNorm2d(8), nn.BatchNorm2d(5)
    plain = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.SiLU()).to(DEVICE)
    x = random((2, 4, 6, 5))
    plain(x)  # statistics
    plain.eval()
    fused = nn_lectures.SeparableConv2d.of(first, second, *norms, mid_activation="relu", activation="silu")
    launches.clear()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    assert dict(launches) == {"separable": 1}
    with pytest.raises(ArgumentError, match="pointwise: expected a 1x1 from 8 channels"):
        nn_lectures.SeparableConv2d.of(first, nn.Conv2d(8, 5, 3))
    with pytest.raises(ArgumentError, match="depthwise: expected one channel a group"):
        nn_lectures.SeparableConv2d.of(nn.Conv2d(4, 8, 3), second)


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("first", tc.nn.Conv2d(4, 8, 3, groups=4, activation="relu"), "without an activation.* give it as activation="),
        ("first", nn.ConvTranspose2d(4, 4, 3, groups=4), "depthwise: expected a convolution such as torch.nn.Conv2d"),
        ("first", tc.nn.ShuffleConv2d(4, 8, 3, groups=4), "depthwise: expected a convolution such as torch.nn.Conv2d"),
        ("second", tc.nn.Conv2d(8, 5, 1, activation="silu"), "pointwise: expected a layer without an activation"),
        ("second", nn.Conv2d(8, 5, 1, stride=2), "of stride 1 and without padding"),
        ("second", nn.Conv2d(8, 5, 1, padding=(0, 1)), "of stride 1 and without padding"),
        ("second", tc.nn.Conv2d(8, 5, 1, padding=((0, 1), (0, 0))), "of stride 1 and without padding"),
    ],
    ids=lambda value: value if value in ("first", "second") else "",
)
def test_layers_that_do_more_are_not_made_one(name, layer, message):
    layers = {"first": nn.Conv2d(4, 8, 3, groups=4), "second": nn.Conv2d(8, 5, 1, padding="same"), name: layer}
    with pytest.raises(ArgumentError, match=message):
        nn_lectures.SeparableConv2d.of(*layers.values())


def test_a_norm_of_each_batch_is_not_folded():
    layers = nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 5, 1)
    with pytest.raises(ArgumentError, match="norm: expected one with running statistics"):
        nn_lectures.SeparableConv2d.of(*layers, nn.BatchNorm2d(8, track_running_stats=False))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_separable_layers(rank):
    layer = getattr(nn_lectures, f"SeparableConv{rank}d")(3, 5, 2, padding=1, depth_multiplier=2, mid_bias=True)
    layer = layer.to(DEVICE)
    x = random((2, 3, *(3,) * rank))
    state = {name: p.detach() for name, p in layer.named_parameters()}
    expected = getattr(tc, f"separable_conv{rank}d")(x, padding=1, **state)
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert f"6, 5, kernel_size={(2,) * rank}" in repr(layer)


@pytest.mark.parametrize("rank", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_locally_connected_layers(rank):
    layer = getattr(nn_lectures, f"LocallyConnected{rank}d")(4, 6, 2, 2, padding=((1, 0),) * rank, groups=2).to(DEVICE)
    assert layer.weight.shape == (*(2,) * rank, 6, 2, *(2,) * rank)
    assert layer.weight.stride(rank + 1) == 1, "channels innermost"
    assert layer.bias.shape == (6, *(2,) * rank)
    assert layer.weight.abs().max() <= (2 * 2**rank) ** -0.5
    x = random((2, 4, *(2,) * rank)).requires_grad_()
    y = layer(x)
    assert y.shape == (2, 6, *(2,) * rank)
    y.square().sum().backward()
    assert layer.weight.grad.stride() == layer.weight.stride()
    assert f"out_size={(2,) * rank}" in repr(layer)
    copy = type(layer)(4, 6, 2, 2, padding=((1, 0),) * rank, groups=2).to(DEVICE)
    copy.load_state_dict(layer.state_dict())
    assert torch.equal(copy(x), y)


def test_a_layer_of_another_size_says_so():
    layer = nn_lectures.LocallyConnected2d(3, 4, 6, 3).to(DEVICE)
    with pytest.raises(ArgumentError, match=r"each of \[3, 4\] outputs of input \[1, 3, 5, 6\], got weight \[4, 4,"):
        layer(random((1, 3, 5, 6)))
    with pytest.raises(ArgumentError, match="2 groups do not divide in_channels=3"):
        nn_lectures.LocallyConnected2d(3, 4, 6, 3, groups=2)
    with pytest.raises(ArgumentError, match="Kernel size can't be greater"):
        nn_lectures.LocallyConnected2d(3, 4, 2, 3)


def test_a_locally_connected_layer_learns_what_a_convolution_cannot():
    """The position of a pixel: a filter that is the same everywhere cannot tell."""
    torch.manual_seed(0)
    layer = nn_lectures.LocallyConnected2d(1, 1, 4, 1, bias=False).to(DEVICE)
    goal = torch.arange(16.0, device=DEVICE).view(1, 1, 4, 4) / 16
    optimizer = torch.optim.SGD(layer.parameters(), 6.0)
    for _ in range(5):
        loss = F.mse_loss(layer(torch.ones_like(goal)), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01 * goal.var().item()


@pytest.mark.usefixtures("exact_products")
def test_shuffle_layers():
    layer = nn_lectures.ShuffleConv2d(6, 9, 1, groups=3).to(DEVICE)
    plain = nn.Sequential(nn.Conv2d(6, 9, 1, groups=3), nn.ChannelShuffle(3)).to(DEVICE)
    plain[0].load_state_dict(layer.state_dict())
    x = channels_last(random((2, 6, 3, 4)))
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(nn_lectures.ChannelShuffle(2)(x), nn.ChannelShuffle(2)(x))
    with pytest.raises(ArgumentError, match="a border of zeros alone, got 'reflect'"):
        nn_lectures.ShuffleConv2d(6, 9, 1, groups=3, padding_mode="reflect")
    assert math.isclose(tc.cost.of(layer, (2, 6, 3, 4)).macs, 2 * 12 * 9 * 2)
