"""What calls, layers and networks cost, against counts by other means: published tables, autograd, arithmetic."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import triton_conv as tc
from triton_conv import cost, examples
from triton_conv.errors import ArgumentError, ArgumentTypeError, WorkloadError
from triton_conv.target import KNOWN


def counted(network, size=224, **options):
    with torch.device("meta"):
        return cost.of(network(**options), (1, 3, size, size))


def within(value, published, share=0.01):
    return abs(value - published) <= share * published


def test_mobilenets_table():
    # MobileNets, arXiv:1704.04861, tables 4 and 8: million products, million parameters.
    mobile = counted(examples.mobilenet)
    assert within(mobile.macs, 569e6)
    assert within(mobile.parameters, 4.2e6)
    vgg = counted(examples.vgg16)
    # The published 15,300 are those of the convolutions; the three fully connected layers have 124 more.
    convolutions = sum(layer.macs for layer in vgg.layers if layer.geometry)
    assert within(convolutions, 15_300e6)
    assert vgg.macs - convolutions == 25088 * 4096 + 4096 * 4096 + 4096 * 1000
    assert within(vgg.parameters, 138e6)
    # GoogLeNet's own table (arXiv:1409.4842) counts in units of 2^10 and 2^20, weights without biases.
    google = counted(examples.googlenet)
    biases = 1000 + sum(layer.output_shape[1] for layer in google.layers if layer.geometry)
    assert within(google.parameters - biases, 6_797.7 * 2**10)
    assert within(google.macs, 1_502 * 2**20)
    assert not within(google.macs, 1_550e6), "MobileNet's table has 1,550, for which neither of these accounts"
    assert within(google.macs, 1_550e6, 0.025)
    # 8 to 9 times fewer products than with standard convolutions (4,866 million; 29.3 million parameters).
    standard = sum(
        math.prod(layer.output_shape[2:]) * 9 * layer.geometry.c_in * following.geometry.c_out
        if layer.kind == "depthwise"
        else 0
        for layer, following in zip(mobile.layers[:-2], mobile.layers[2:])
    )
    stem_and_head = mobile.layers[0].macs + mobile.layers[-1].macs
    assert within(standard + stem_and_head, 4_866e6)


@pytest.mark.parametrize(("groups", "published"), [(1, 143), (2, 140), (3, 137), (4, 133), (8, 137)])
def test_shufflenets_complexity(groups, published):
    # ShuffleNet, arXiv:1707.01083, table 1; the fully connected layer is not part of it.
    shuffle = counted(examples.shufflenet, groups=groups)
    assert within(shuffle.macs - shuffle.layers[-1].macs, published * 1e6, 0.004)


def test_shufflenets_units_are_the_formula():
    shuffle = counted(examples.shufflenet)
    layers = [layer for layer in shuffle.layers if layer.name.startswith("4.") and layer.geometry]
    assert sum(layer.macs for layer in layers) == cost.shuffle_unit_macs(28, 28, 240, 60, 3)


@pytest.mark.parametrize("device", KNOWN)
def test_a_layers_numbers(device):
    layer = nn.Conv2d(64, 128, 3, stride=2, padding=1).to(torch.bfloat16)
    (row,) = cost.of(layer, (8, 64, 56, 56), device=device).layers
    assert row.parameters == 64 * 128 * 9 + 128
    assert row.macs == 8 * 28 * 28 * 128 * 64 * 9
    assert row.least_bytes == 2 * (8 * 64 * 56 * 56 + 64 * 128 * 9 + 8 * 128 * 28 * 28)
    assert row.intensity == 2 * row.macs / row.least_bytes
    goal = KNOWN[device]
    assert row.floor_seconds(goal) == max(2 * row.macs / goal.rate("bfloat16"), row.least_bytes / goal.bandwidth)
    assert (row.kind, row.output_shape, row.dtype) == ("standard", (8, 128, 28, 28), "bfloat16")


def test_calls_of_ours_and_of_torchs_are_counted_alike():
    x, w, b = torch.empty(2, 8, 9, 9), torch.empty(12, 4, 3, 3), torch.empty(12)
    arguments = {"padding": 1, "stride": 2, "groups": 2}
    ours, theirs = cost.of(tc.conv2d, x, w, b, **arguments), cost.of(F.conv2d, x, w, b, **arguments)
    assert ours.layers == theirs.layers
    assert ours.parameters == theirs.parameters == 12 * 36 + 12
    assert ours.layers[0].kind == "grouped"
    assert cost.of(tc.conv2d, input=x, weight=w, groups=2).parameters == 12 * 36
    (row,) = cost.of(tc.conv_transpose2d, torch.empty(1, 4, 5, 5), torch.empty(4, 6, 3, 3), stride=2).layers
    assert (row.kind, row.macs, row.output_shape) == ("transposed", 25 * 4 * 6 * 9, (1, 6, 11, 11))


def test_a_deformable_call_counts_its_offsets_as_data():
    x, offset, w = torch.empty(2, 4, 6, 6), torch.empty(2, 18, 6, 6), torch.empty(5, 4, 3, 3)
    found = cost.of(tc.deform_conv2d, x, offset, w, padding=1)
    (row,) = found.layers
    assert (row.kind, row.parameters, row.macs) == ("deformable", 5 * 36, 2 * 36 * 5 * 36)
    assert row.least_bytes == 4 * (x.numel() + offset.numel() + w.numel() + 2 * 5 * 36)
    assert found.parameters == w.numel()


def test_another_dtype():
    layer = nn.Conv1d(4, 4, 3)
    single, half = cost.of(layer, (1, 4, 10)), cost.of(layer, (1, 4, 10), dtype=torch.float16)
    assert 2 * half.least_bytes == single.least_bytes
    assert half.layers[0].dtype == "float16"
    assert layer.weight.dtype == torch.float32


def test_a_network_is_left_as_it_was():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout()).train()
    net[2].eval()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    cost.of(net, (1, 1, 5, 5))
    assert [part.training for part in net.modules()] == [True, True, True, False]
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


def test_a_shared_layer_holds_its_parameters_once():
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    found = cost.of(nn.Sequential(conv, nn.ReLU(), conv), (1, 3, 8, 8))
    assert [layer.parameters for layer in found.layers] == [81, 0]
    assert found.parameters == 81
    assert found.macs == 2 * 81 * 64


def test_fully_connected_layers_and_products():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 2, bias=False))
    found = cost.of(net, (3, 3, 2, 2))
    assert [(layer.kind, layer.macs, layer.parameters) for layer in found.layers] == [
        ("fully connected", 3 * 60, 65), ("fully connected", 3 * 10, 10),
    ]  # fmt: skip
    assert cost.of(torch.bmm, torch.empty(2, 3, 4), torch.empty(2, 4, 5)).macs == 2 * 3 * 4 * 5


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 1, 3, 2, 1, bias=False), nn.Conv2d(1, 1, 5, 2, 2, dilation=1, bias=False)
        self.after = nn.Conv2d(2, 1, 3, padding=1, dilation=1, bias=False)

    def forward(self, x):
        return self.after(torch.cat((self.a(x), self.b(x)), 1))


STACKS = {
    "two 3x3": nn.Sequential(nn.Conv2d(1, 1, 3, bias=False), nn.Conv2d(1, 1, 3, bias=False)),
    "strides": nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1, bias=False), nn.Conv2d(1, 1, 5, 3, 2, bias=False)),
    "dilation": nn.Sequential(nn.Conv2d(1, 1, 3, dilation=3, padding=3, bias=False), nn.AvgPool2d(2)),
    "transposed": nn.Sequential(
        nn.Conv2d(1, 1, 3, 2, 1, bias=False),
        nn.ConvTranspose2d(1, 1, 4, 2, 1, bias=False),
        nn.Conv2d(1, 1, 3, bias=False),
    ),
    "transposed by 3": nn.Sequential(nn.ConvTranspose2d(1, 1, 5, 3, 2, bias=False), nn.Conv2d(1, 1, 1, bias=False)),
    "branches": Residual(),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_receptive_fields_are_where_gradients_come_from(name):
    net = STACKS[name].double()
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    (axis, _) = cost.of(net, (1, 1, 96, 96)).field.axes
    x = torch.zeros(1, 1, 96, 96, dtype=torch.float64, requires_grad=True)
    y = net(x)
    middle, seen = y.shape[-1] // 2, []
    for at in range(middle, middle + 6):
        (grad,) = torch.autograd.grad(y[0, 0, middle, at], x, retain_graph=True)
        columns = grad[0, 0].abs().sum(0).nonzero().flatten()
        low, high = columns[0].item(), columns[-1].item()
        seen.append(high - low + 1)
        # Behind a transposed layer, phases that see unequally much are centred up to half a step of its inputs aside.
        bound = float(max(1, axis.jump)) * ("transposed" in name)
        assert abs((low + high) / 2 - float(axis.centre + at * axis.jump)) <= bound
    assert max(seen) == axis.size


def test_a_mean_sees_everything():
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    assert cost.of(net, (1, 1, 10, 12)).field.size == (12, 14)
    flat = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(80, 2))
    assert cost.of(flat, (1, 1, 10, 12)).field.size == (10, 12)


def test_one_dimensional_pooling():
    found = cost.of(nn.Sequential(nn.Conv1d(1, 1, 3), nn.MaxPool1d(2), nn.Conv1d(1, 1, 3)), (1, 1, 20))
    assert [layer.field.size for layer in found.layers if layer.geometry] == [(3,), (8,)]


def test_forms_of_a_layer():
    (row,) = cost.of(F.conv2d, torch.empty(1, 3, 12, 12), torch.empty(256, 3, 5, 5)).layers
    forms = cost.forms(row.geometry)
    assert forms["standard"].macs == 1_228_800
    assert forms["separable"].macs == 53_952
    assert forms["separable"].weights == cost.separable_weights(5, 5, 3, 256)
    assert forms["grouped"] == forms["standard"], "no group but one divides 3 and 256"
    (row,) = cost.of(F.conv2d, torch.empty(1, 64, 8, 8), torch.empty(128, 64, 1, 1)).layers
    assert cost.forms(row.geometry, 8)["shuffle"].macs * 8 == row.macs
    (row,) = cost.of(F.conv2d, torch.empty(1, 64, 8, 8), torch.empty(128, 64, 3, 3), padding=1).layers
    forms = cost.forms(row.geometry, 8)
    assert (forms["grouped"].macs, forms["grouped"].weights) == (
        cost.grouped_macs(64, 3, 3, 128, 8, 8, 8), cost.grouped_parameters(64, 3, 3, 128, 8) - 128,
    )  # fmt: skip
    assert forms["shuffle"].macs == cost.depthwise_macs(64, 3, 3, 8, 8) + cost.grouped_macs(64, 1, 1, 128, 8, 8, 8)
    (row,) = cost.of(F.conv_transpose2d, torch.empty(1, 8, 4, 4), torch.empty(8, 4, 4, 4), stride=2).layers
    assert cost.forms(row.geometry)["standard"].macs == row.macs


def test_sharing_of_a_layer():
    (row,) = cost.of(F.conv2d, torch.empty(1, 3, 8, 6), torch.empty(7, 3, 5, 3)).layers
    found = cost.sharing(row.geometry)
    w2, h2 = row.output_shape[2:]
    assert found.full == cost.full_sharing(3, 5, 3, 7)
    assert found.partial == cost.partial_sharing(3, 5, 3, 7, w2, h2)
    assert found.none == cost.no_sharing(3, 8, 6, 7, w2, h2)
    table = cost.sharing_table(row.geometry)
    assert "locally connected" in table
    assert f"{found.none:,}" in table


def test_plain_data_and_text():
    found = cost.of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 1)), (1, 1, 5, 5))
    content = json.loads(json.dumps(found.asdict()))
    assert content["parameters"] == 20 + 19
    assert content["layers"][0]["receptive_field"] == {"size": [3, 3], "jump": [1, 1], "centre": [1, 1]}
    text = str(found)
    for phrase in ("fully connected", "total", "39", "datasheet of H100", "3x3"):
        assert phrase in text


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: cost.of(nn.Conv2d(3, 4, 3), (1, 2, 5, 5)),
            ArgumentError,
            r"\[4, 3, 3, 3\], expected input\[1, 2, 5, 5\]",
        ),
        (lambda: cost.of(nn.Conv2d(3, 4, 3), (1, 3, 5, 5), device="GTX"), WorkloadError, "'GTX' is not known; choose"),
        (lambda: cost.of(3), ArgumentTypeError, "subject: expected a function or an nn.Module, got int"),
        (lambda: cost.of(torch.relu), ArgumentTypeError, "relu was given no tensor"),
        (
            lambda: cost.of(tc.conv2d, torch.empty(1, 3, 5, 5), torch.empty(4, 2, 3, 3)),
            ArgumentError,
            r"weight of size \[4, 2, 3, 3\], expected input\[1, 3, 5, 5\]",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_network_without_a_layer_that_counts():
    counted = cost.of(torch.nn.Sequential(torch.nn.ReLU()), (1, 3, 8, 8))
    assert counted.macs == 0
    assert "nan" not in str(counted)
    assert "nan" not in cost.summary({"a": counted})
