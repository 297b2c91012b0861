"""Result files that do not hold up: each is named with what is wrong in it, and everything else is drawn."""

import json
import shutil
from dataclasses import replace

import pytest
from perf_results import CLOCKS, DEVICE, PROVENANCE, record, without_counts, write_models

pytest.importorskip("matplotlib")

from perf_plots import figures
from perf_plots.record import CEILINGS, COLD_START, OURS, write
from perf_plots.state import TRIALS
from perf_plots.store import load
from perf_plots.style import Sheet

CASE = "narrow_groups_4-bfloat16-nhwc.json"
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def folder(tmp_path):
    """A device with two cases, its ceilings, first calls, trials and a model, all sound."""
    folder = tmp_path / "results" / DEVICE
    plan = {"kernel": "grouped_slab", "kernel_hash": "ab", "tile": {"BLOCK_M": 64}, "source": "user tuned"}
    for name in ("narrow_groups_4", "convnext_dw7"):
        write(record(name, {OURS: 100, "cudnn": 250, "standard": 400}, plan=plan, clocks=CLOCKS), folder)
    write_models(folder, ["convnext_tiny"])
    rates = {"bytes_per_s": 3e12, "flops_per_s": {"bfloat16": 8e14}, "measured": True, "provenance": PROVENANCE}
    (folder / CEILINGS).write_text(json.dumps(rates))
    case = {"title": "dcnv2", "kind": "deformable", "error": "", "seconds": {"torch": 0.1}}
    (folder / COLD_START).write_text(json.dumps({"measured": True, "cases": [case], "provenance": PROVENANCE}))
    trial = {"workload": CASE[:-5], "kernel": "grouped_slab", "tile": {"BLOCK_M": 64}, "time_us": 100.0}
    (folder / TRIALS).write_text(json.dumps(trial) + "\n")
    return folder


def change(path, keys, value):
    """Sets what lies below these keys of a JSON file."""
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


def drawn(folder, monkeypatch, tmp_path):
    """Draws everything but pixels; the names of the figures, and the complaints."""
    without_counts(monkeypatch)

    def save(sheet, footer, stem):
        path = stem.with_suffix(".svg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("<svg/>")
        return [path]

    monkeypatch.setattr(Sheet, "save", save)
    paths, complaints = figures.draw_all(folder.parent, tmp_path / "out", say=lambda line: None)
    return {path.stem for path in paths}, complaints


def test_a_sound_folder_has_no_complaints(folder, monkeypatch, tmp_path):
    names, complaints = drawn(folder, monkeypatch, tmp_path)
    assert not complaints
    assert {"grouped", "depthwise", "models_forward", "cold_start", "index"} <= names


@pytest.mark.parametrize(
    ("keys", "value", "phrase"),
    [
        (["contestants", OURS, "samples_us"], [NAN] * 20, "triton_conv: a time is not a positive number"),
        (["contestants", "cudnn", "samples_us"], [0.0] * 20, "cudnn: a time is not a positive number"),
        (["contestants", "cudnn", "samples_us"], ["12"] * 20, "cudnn: a time is not a number"),
        (["contestants", "cudnn", "interval_us"], ["a", "b"], "cudnn: interval: a time is not a number"),
        (["contestants", "cudnn", "interval_us"], [1.0], "ValueError"),
        (["contestants", "cudnn", "interval_us"], [9.0, 1.0], "cudnn: the interval from 9 to 1 is upside down"),
        (["contestants", "cudnn"], None, "cudnn: expected an object, got None"),
        (["floor_us"], NAN, "floor_us: expected a number, got nan"),
        (["floor_us"], -3.0, "floor_us: -3.0 is not positive"),
        (["standard_floor_us"], INF, "standard_floor_us: expected a number, got inf"),
        (["relative_error"], "x", "relative_error: expected a number, got 'x'"),
        (["work", "least_bytes"], 0, "work: least_bytes: 0 is not positive"),
        (["work", "flops"], "a lot", "work: flops: expected a number"),
        (["plan"], [1], "plan: expected an object, got [1]"),
        (["plan", "tile"], "oops", "plan: tile: expected an object"),
        (["clocks"], "hot", "clocks: expected an object, got 'hot'"),
        (["clocks", "before", "celsius"], "hot", "clocks: before: celsius: expected a number"),
        (["provenance"], {}, "provenance: no device"),
        (["provenance", "sms"], "many", "provenance: sms: expected a count"),
        (["case", "kind"], "quantum", "case: kind 'quantum' is none of grouped, depthwise"),
        (["case", "function"], "conv9d", "case: no layer (WorkloadError"),
        (["case", "input"], [64, 256, -1, 56], "case: no layer ("),
        (["case", "dtype"], "int3", "case: no layer (DtypeError"),
        (["case", "part"], "sideways", "case: part 'sideways' is none of forward, input gradient"),
        (["case", "name"], "another", "it holds another-bfloat16-nhwc, whose file has that name"),
        (["schema"], 0, "schema 0, expected 1"),
        (["error"], 5, "error: expected a text, got 5"),
    ],
)  # fmt: skip
def test_a_case_that_does_not_hold_up(keys, value, phrase, folder):
    change(folder / CASE, keys, value)
    (device,), (complaint,) = load(folder.parent)
    assert f"left out: {folder / CASE}: {phrase}" in complaint
    assert [each.workload.name for each in device.records] == ["convnext_dw7"]
    assert device.cold_start
    assert device.ceilings
    assert device.models


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b'{"schema": 1, "meas', "not JSON, or cut short"),
        (b"", "not JSON, or cut short"),
        (b"null", "not a JSON object"),
        (b"{}", "nothing under 'schema'"),
        (b"\xff\xfe\x00", "UnicodeDecodeError"),
        (b"[" * 100_000, "RecursionError"),
        (None, "cannot be read: Is a directory"),
    ],
)
def test_a_file_that_is_no_result(content, phrase, folder):
    (folder / CASE).unlink()
    if content is None:
        (folder / CASE).mkdir()
    else:
        (folder / CASE).write_bytes(content)
    (device,), (complaint,) = load(folder.parent)
    assert f"left out: {folder / CASE}: {phrase}" in complaint
    assert len(device.records) == 1


def test_a_case_counts_once(folder):
    shutil.copy(folder / CASE, folder / "copy.json")
    (device,), (complaint,) = load(folder.parent)
    assert len(device.records) == 2
    assert "copy.json: it holds narrow_groups_4-bfloat16-nhwc, whose file has that name" in complaint


def test_a_kernel_that_is_gone_is_drawn(folder, monkeypatch, tmp_path):
    """It was measured, whatever ran then; and a plan may say less than today's."""
    change(folder / CASE, ["plan"], {"kernel": "kernel_of_yore"})
    names, complaints = drawn(folder, monkeypatch, tmp_path)
    assert not complaints
    assert "grouped" in names


@pytest.mark.parametrize(
    ("name", "keys", "value", "phrase"),
    [
        (CEILINGS, ["bytes_per_s"], INF, "bytes_per_s: expected a number, got inf"),
        (CEILINGS, ["bytes_per_s"], None, "bytes_per_s: no rate"),
        (CEILINGS, ["flops_per_s"], [], "flops_per_s: expected an object"),
        (CEILINGS, ["provenance", "device"], "NVIDIA B200", "of NVIDIA B200 among results of NVIDIA H100 80GB HBM3"),
        (COLD_START, ["measured"], False, "a rehearsal, unlike the cases beside it"),
        (COLD_START, ["provenance", "device"], "NVIDIA B200", "of NVIDIA B200 among results of NVIDIA H100 80GB HBM3"),
        (COLD_START, ["cases", 0, "seconds", "torch"], NAN, "torch: a time is not a positive number"),
        (COLD_START, ["provenance"], None, "provenance: expected an object, got None"),
        ("models/convnext_tiny-nhwc-eager-forward.json", ["clocks"], "hot", "clocks: expected an object"),
        ("models/convnext_tiny-nhwc-eager-forward.json", ["layers"], {"x": 1}, "nothing under 'convolutions'"),
        ("models/convnext_tiny-nhwc-eager-forward.json", ["contestants", "mystery"], {"samples_us": [], "absent": "x"},
         "contestant 'mystery' is none of torch, converted"),
        ("models/convnext_tiny-nhwc-eager-forward.json", ["unit", "model"], "other", "it holds other-nhwc-eager"),
    ],
)  # fmt: skip
def test_what_lies_beside_the_cases(name, keys, value, phrase, folder):
    change(folder / name, keys, value)
    (device,), (complaint,) = load(folder.parent)
    assert f"left out: {folder / name}: {phrase}" in complaint
    assert len(device.records) == 2
    assert (device.cold_start is None) == (name == COLD_START)
    assert (device.ceilings is None) == (name == CEILINGS)


def test_a_trial_without_a_time_is_counted(folder):
    with (folder / TRIALS).open("a") as file:
        file.write('{"workload": "a", "kernel": "b", "tile": {}, "time_us": NaN}\nnull\n{"kernel": []}\n')
    (device,), (complaint,) = load(folder.parent)
    assert "no trial in 3 lines" in complaint
    assert set(device.trials) == {CASE[:-5]}


def test_the_rest_of_a_broken_folder_is_drawn(folder, monkeypatch, tmp_path):
    """Another device's result, a rehearsal's, a file cut short, first calls without a time, and a broken ceiling."""
    made = record("dilated_1d", {OURS: 100, "cudnn": 250})
    write(replace(made, provenance=PROVENANCE | {"device": "NVIDIA B200", "arch": "sm_100"}), folder)
    write(replace(record("dcnv2", {OURS: 100}), measured=False), folder)
    (folder / CASE).write_text('{"schema": 1, "meas')
    change(folder / COLD_START, ["cases", 0, "seconds"], [])
    change(folder / CEILINGS, ["bytes_per_s"], NAN)
    names, complaints = drawn(folder, monkeypatch, tmp_path)
    assert {"depthwise", "overview", "models_forward", "index"} <= names
    assert len(complaints) == 5
    for phrase in (
        "1 result of NVIDIA B200 among 1 of NVIDIA H100 80GB HBM3; a folder holds one device",
        "a rehearsal among measurements: dcnv2-bfloat16-nhwc", "not JSON, or cut short", "seconds: expected an object",
        "bytes_per_s: expected a number, got nan",
    ):  # fmt: skip
        assert any(phrase in complaint for complaint in complaints), phrase
