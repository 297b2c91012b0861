"""The command line's manners: what it prints, what it returns, what it says of input it cannot use."""

import json

import pytest
import torch

from triton_conv import __version__, cli

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do where there is no GPU")


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert __version__ in capsys.readouterr().out


def test_plan_shows_kernel_tile_and_source(capsys):
    assert cli.main(["plan", "--workload", "dcnv2", "--target", "sm_90"]) == 0
    printed = capsys.readouterr().out
    for phrase in ("deformable on H100", "BLOCK_M=", "source   shipped exact", "bfloat16 NHWC og1+mask"):
        assert phrase in printed


@pytest.mark.slow
def test_predict_shows_what_compiles(tmp_path, capsys):
    file = tmp_path / "predicted.json"
    arguments = ["--workload", "dcgan_t2d", "--target", "sm_90", "--top", "16", "--compile", "1", "--json", str(file)]
    assert cli.main(["predict", *arguments]) == 0
    assert "16 compiled" in capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["target"] == "sm_90"
    compiled = [candidate["compiled"] for candidate in content["workloads"][0]["candidates"]]
    assert all(row["error"] == "" and row["registers"] > 0 for row in compiled)
    assert any(row["spill_bytes"] == 0 for row in compiled)


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["plan", "--workload", "nope", "--target", "sm_90"], "workload: 'nope' is not known"),
        (["plan", "--workload", "dcnv4", "--target", "sm_90"], "its aggregation has no weight"),
        (["plan", "--workload", "absent.json", "--target", "sm_90"], "workload: cannot read absent.json"),
        pytest.param(["plan", "--workload", "dw3d"], "no GPU here; name one of", marks=no_gpu),
    ],
)
def test_input_it_cannot_use(arguments, phrase, capsys):
    assert cli.main(arguments) == 2
    assert phrase in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "rows", ["{}", "[1]", '[{"name": "x"}]', '[{"name": "x", "input": [1], "weight": [1], "colour": 1}]', "[", '"abc"']
)
def test_a_malformed_workload_file(rows, tmp_path, capsys):
    file = tmp_path / "layers.json"
    file.write_text(rows)
    assert cli.main(["plan", "--workload", str(file), "--target", "sm_90"]) == 2
    assert "workload: " in capsys.readouterr().err


def test_a_workload_file_of_ones_own(tmp_path, capsys):
    file = tmp_path / "layers.json"
    layer = {
        "name": "mine", "kind": "depthwise", "function": "conv2d", "input": [8, 96, 56, 56], "weight": [96, 1, 7, 7],
        "arguments": {"padding": 3, "groups": 96}, "dtype": "float16", "channels_last": True,
    }  # fmt: skip
    file.write_text(json.dumps([layer]))
    assert cli.main(["plan", "--workload", str(file), "--target", "sm_90"]) == 0
    assert "mine-float16-nhwc" in capsys.readouterr().out


def test_unknown_target_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["inspect", "--target", "sm_10"])
    assert "invalid choice: 'sm_10'" in capsys.readouterr().err
