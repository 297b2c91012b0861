"""The commands `cost` and `explain`, and the arithmetic that the second one draws, against torch."""

import json

import pytest
import torch
import torch.nn.functional as F

from triton_conv import cli
from triton_conv.cost.arithmetic import explain


def linked(found):
    """The links as a matrix [outputs, inputs] of tap numbers, from 1."""
    matrix = torch.zeros(found.out_size, found.size, dtype=torch.float64)
    for link in found.links:
        if link.source is not None:
            matrix[link.output, link.source] += 2.0**link.tap
    return matrix


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, (1, 1), 1), (2, (3, 0), 2), (3, (0, 4), 1)])
def test_links_of_a_convolution(stride, padding, dilation, mode):
    found = explain(7, 3, stride, padding, dilation, padding_mode=mode)
    # Each input on its own, through filters that tell the taps apart.
    x = torch.eye(7, dtype=torch.float64)[:, None]
    w = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).view(1, 1, 3)
    padded = F.pad(x, padding, mode="constant" if mode == "zeros" else mode)
    assert torch.equal(linked(found), F.conv1d(padded, w, stride=stride, dilation=dilation)[:, 0].T)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "extra"),
    [(3, 2, 1, 1, 0), (4, 2, 1, 1, 1), (2, 3, 0, 1, 0), (3, 2, 0, 3, 1), (3, 1, 3, 1, 0)],
)
def test_links_of_a_transposed_convolution(kernel, stride, padding, dilation, extra):
    found = explain(5, kernel, stride, (padding, padding), dilation, output_padding=extra, transposed=True)
    x = torch.eye(5, dtype=torch.float64)[:, None]
    w = 2.0 ** torch.arange(kernel, dtype=torch.float64).view(1, 1, kernel)
    expected = F.conv_transpose1d(
        x, w, stride=stride, padding=padding, dilation=dilation, output_padding=extra
    )  # fmt: skip
    assert torch.equal(linked(found), expected[:, 0].T)


def test_explain_says_and_draws_the_arithmetic(tmp_path, capsys):
    picture, file = tmp_path / "links.svg", tmp_path / "links.json"
    call = ["explain", "conv_transpose2d", "--kernel", "3", "--stride", "2", "--padding", "1", "--plot", str(picture)]
    assert cli.main([*call, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    for phrase in (
        "z = s - 1 = 1 zeros", "border p' = k - p - 1 = 1, stride s' = 1", "= (4 - 1) 2 + 3 - 2 x 1 + 0 = 7",
        "y[1]    w[0] x[1] + w[2] x[0]",
    ):  # fmt: skip
        assert phrase in printed
    content = json.loads(file.read_text())
    assert len(content) == 1, "two dimensions that are alike are shown once"
    assert content[0]["out_size"] == 7
    drawn = picture.read_text()
    for phrase in ("x3", "y6", "w2", "z = 1 zeros inserted, border p' = 1, stride s' = 1"):
        assert f"{phrase}<" in drawn
    first = picture.read_bytes()
    assert cli.main(call) == 0
    assert picture.read_bytes() == first, "the same numbers, the same bytes"


def test_explain_shows_a_mirrored_border(capsys):
    call = ["explain", "conv2d", "--size", "6,4", "--kernel", "3,2", "--padding", "same", "--padding-mode", "reflect"]
    assert cli.main(call) == 0
    printed = capsys.readouterr().out
    assert "y[0]    w[0] x[1] (for x[-1]) + w[1] x[0] + w[2] x[1]" in printed
    assert "padding 0 before and 1 after, its border reflect" in printed


def test_cost_of_an_example(tmp_path, capsys):
    file, picture, shared = tmp_path / "cost.json", tmp_path / "forms.svg", tmp_path / "sharing.png"
    call = ["cost", "--model", "triton_conv.examples:mobilenet", "depth=2", "--input", "2,3,32,32", "--device", "A100"]
    assert cli.main([*call, "--json", str(file), "--plot", str(picture), "--sharing", str(shared)]) == 0
    printed = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["device"] == "A100-SXM4-80GB"
    assert f"{content['macs']:,}" in printed
    assert "partial  locally connected" in printed
    drawn = picture.read_text()
    for form in ("standard", "grouped, up to 4 groups", "separable", "shuffle, up to 4 groups"):
        assert f">{form}<" in drawn
    assert shared.stat().st_size > 5000


def test_networks_beside_each_other(capsys):
    names = [f"triton_conv.examples:{name}" for name in ("mobilenet", "googlenet", "vgg16")]
    assert cli.main(["cost", "--model", names[0], "--beside", names[1], "--beside", names[2]]) == 0
    *_, mobile, google, vgg = (line.split() for line in capsys.readouterr().out.splitlines())
    assert [row[0] for row in (mobile, google, vgg)] == names
    assert mobile[1:4] == ["4,231,976", "568,740,352", "1"]
    assert [float(row[3]) for row in (google, vgg)] == [2.78, 27.2]


def test_cost_of_ones_own_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine_for_cost.py").write_text(
        "import torch\nnet = torch.nn.Conv1d(2, 3, 5)\nnumber = lambda: 3\nbroken = lambda: 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["cost", "--model", "mine_for_cost:net", "--input", "1,2,9", "--dtype", "float16"]) == 0
    assert " 33 " in capsys.readouterr().out
    for name, phrase in (
        ("number", "mine_for_cost:number gave 3, expected an nn.Module"),
        ("no", "has no"),
        ("broken", "mine_for_cost:broken() raised ZeroDivisionError: division by zero"),
    ):
        assert cli.main(["cost", "--model", f"mine_for_cost:{name}"]) == 2
        assert phrase in " ".join(capsys.readouterr().err.split())


def test_formulas(capsys):
    assert cli.main(["cost", "--formula", "separable_macs", "k1=5", "k2=5", "ci=3", "co=256", "w=8", "h=8"]) == 0
    assert "= 53952" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["cost", "--formula", "receptive_field", "kernels=[3,3]"]) == 0
    assert "= 5" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["cost", "--formula", "all"]) == 0
    printed = capsys.readouterr().out
    assert all(f"L{row} " in printed for row in range(1, 14))


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["cost", "--model", "nowhere_at_all:net"], "model: cannot import 'nowhere_at_all'"),
        (["cost", "--model", "triton_conv.examples"], "expected MODULE:FUNCTION"),
        (["cost", "--model", "triton_conv.examples:resnet"], "has no 'resnet'; it has"),
        (["cost", "--model", "triton_conv.examples:vgg16", "depth=3"], "vgg16(depth=3) raised TypeError: vgg16() got"),
        (["cost", "--model", "triton_conv.examples:vgg16", "depth"], "expected NAME=VALUE, got 'depth'"),
        (["cost", "--model", "triton_conv.examples:vgg16", "--input", "1,4,224,224"], "expected input[1, 4, 224, 224]"),
        (["cost", "--model", "triton_conv.examples:vgg16", "--input", "1x3"], "expected whole numbers"),
        (["cost", "--model", "triton_conv.examples:vgg16", "--dtype", "half_and_half"], "is not one of torch's"),
        (["cost", "--model", "triton_conv.examples:mobilenet", "--device", "TPU"], "device: 'TPU' is not known"),
        (["cost", "--formula", "separable_macs", "k1=5"], "separable_macs takes k1, k2, ci, co, w, h, got k1"),
        (["explain", "conv2d", "--kernel", "3,3,3"], "kernel: conv2d takes one number or 2, got [3, 3, 3]"),
        (["cost", "--formula", "output_size", "size=5", "kernel=x"], "has no value for size=5, kernel='x'"),
        (["explain", "conv2d", "--output-padding", "1"], "output_padding: that of a transposed convolution"),
        (["explain", "conv1d", "--kernel", "9"], "Kernel size can't be greater than actual input size"),
        (["explain", "conv1d", "--plot", "links.gif"], "links.gif should end in one of .svg, .png, .pdf"),
        (
            ["explain", "conv_transpose1d", "--padding-mode", "reflect"],
            "a transposed convolution has no border to fill",
        ),
        (["explain", "conv_transpose1d", "--padding", "same"], "padding: expected whole numbers"),
        (["explain", "conv1d", "--size", "9000", "--plot", "links.svg"], "take a smaller --size"),
    ],
)
def test_bad_input(arguments, phrase, capsys):
    assert cli.main(arguments) == 2
    assert phrase in " ".join(capsys.readouterr().err.split())
