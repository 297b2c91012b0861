"""Whole models in the benchmark: units, their check, result files, figures, table and summary."""

import json
from dataclasses import replace

import pytest
import torch
from perf_results import DEVICE, contestant, record, text_of, without_counts, write_models
from torch import nn

pytest.importorskip("matplotlib")

import triton_conv as tc
from perf_plots import figures, model_bench, model_figures, model_record, page, provenance
from perf_plots.model_record import COMPILED, CONVERTED, FORCED, GRAPH, PLAIN, ModelRecord, Unit
from perf_plots.models import MODELS
from perf_plots.record import COMMITTED, OURS, Contestant, ResultError, write
from perf_plots.store import load
from perf_plots.summary import summarise

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")


def test_every_model_in_every_way_once_and_the_usual_format_first():
    units = model_bench.units()
    titles = [unit.title for unit in units]
    assert len(set(titles)) == len(titles)
    assert [model_bench.unit(title) for title in titles] == units
    assert {unit.model for unit in units} == set(MODELS) == set(model_bench._BATCHES)
    # The one-dimensional model has one memory format.
    assert len(units) == 2 * 2 * (2 * len(MODELS) - 1)
    first = units[: 2 * len(MODELS)]
    assert not any(unit.compiled for unit in first)
    assert {unit.model for unit in first if not unit.channels_last} == {"hifi_gan"}


@interpreted
@pytest.mark.parametrize("unit", model_bench.units(True), ids=lambda unit: unit.title)
def test_a_unit_is_checked_timed_and_written(unit, tmp_path):
    made = model_bench.run_unit(unit, tmp_path, CPU, True)
    assert made.error == ""
    assert not made.measured
    assert made.layers == {"convolutions": 2, "ours": 0}
    timed = {name for name, each in made.contestants.items() if each.samples_us}
    if unit.compiled:
        assert timed == {PLAIN, PLAIN + COMPILED, FORCED + COMPILED}
        assert "no measurement" in made.contestants[CONVERTED + COMPILED].absent
    else:
        assert timed == {PLAIN, FORCED}
        assert "no measurement" in made.contestants[CONVERTED].absent
        assert (FORCED + GRAPH in made.contestants) == (not unit.training)
    # Both in float32, against float64 or against the plain one's own gradients.
    assert all(made.contestants[name].relative_error < 1e-5 for name in timed)
    again = model_record.read(model_record.path(tmp_path, unit))
    assert again == replace(made, clocks=again.clocks)
    assert model_bench.finished(tmp_path, unit)
    assert not model_bench.finished(tmp_path, replace(unit, channels_last=not unit.channels_last))


@interpreted
def test_a_model_that_computes_something_else_gets_no_time(tmp_path, monkeypatch):
    convert = tc.convert

    def wrong(model, force=False):
        for layer in model.modules():
            if isinstance(layer, nn.ConvTranspose2d):
                with torch.no_grad():
                    layer.weight[0] += 0.1
        return convert(model, force=force)

    monkeypatch.setattr(model_bench.tc, "convert", wrong)
    for unit in model_bench.units(True)[:2]:
        made = model_bench.run_unit(unit, tmp_path, CPU, True)
        assert made.us(PLAIN)
        assert made.us(FORCED) is None
        assert "WRONG: relative error" in made.contestants[FORCED].absent


@interpreted
def test_a_model_that_fails_has_a_record(tmp_path, monkeypatch):
    unit = model_bench.units(True)[0]
    monkeypatch.setattr(model_bench.Bench, "reference", lambda bench: 1 / 0)
    made = model_bench.run_unit(unit, tmp_path, CPU, True)
    assert made.error == "ZeroDivisionError: division by zero"
    model_bench.fail(tmp_path, unit, CPU, "it took more than 240 s")
    assert model_record.read(model_record.path(tmp_path, unit)).error == "it took more than 240 s"
    assert model_bench.finished(tmp_path, unit), "it is not tried again"
    monkeypatch.setattr(model_bench, "source_hash", lambda *folders: "other code")
    assert not model_bench.finished(tmp_path, unit)


def test_what_convert_leaves_alone_is_not_compiled_again(monkeypatch):
    class Net(nn.Module):
        pass

    bench = model_bench.Bench(model_bench.units(True)[2], CPU, True)
    nets = {PLAIN: Net(), FORCED: Net(), CONVERTED: Net()}
    monkeypatch.setattr(bench, "_nets", lambda: nets)
    bench.layers = {"convolutions": 2, "ours": 0}
    assert set(bench.entrants()) == {PLAIN, PLAIN + COMPILED, FORCED + COMPILED}
    assert "no layer of ours is measured faster" in bench.absent[CONVERTED + COMPILED]


def test_convolutions_of_a_model_are_found_without_running_it():
    step = Unit("convnext_tiny", True, False, True)
    forward = list(model_bench.problems(replace(step, training=False)))
    # Four stages' blocks of three, a stem, and three reductions in between.
    assert len(forward) == 18 * 3 + 4
    assert forward[0].geometry.batch == model_bench._BATCHES["convnext_tiny"]
    assert not forward[0].pixels_last
    # Two gradients a layer, but of the image none.
    assert len(list(model_bench.problems(step))) == 3 * len(forward) - 1
    assert not list(model_bench.problems(replace(step, compiled=True)))


def test_the_host_clock_takes_turns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = model_bench.WallTimer().rounds(calls, 7, warmup=1)
    assert order == ["a", "b"] * 8
    assert all(len(timing.samples) == 7 and min(timing.samples) >= 0 for timing in found.values())
    monkeypatch.setattr(model_bench, "_SECONDS", 0.0)
    found = model_bench.WallTimer().rounds(calls, 20, warmup=1)
    assert len(found["a"].samples) == model_bench._LEAST_ROUNDS


# --------------------------------------------------------------------------------------------- files, figures, the page


@pytest.fixture
def results(tmp_path):
    """One layer, and two models with all that can be told of them."""
    folder = tmp_path / "results" / DEVICE
    write(record("dcnv2", {OURS: 100, "standard": 200}), folder)
    write_models(folder, ["convnext_tiny", "hifi_gan"])
    return tmp_path / "results"


def test_a_model_file_that_does_not_hold_up_is_named_and_the_rest_is_drawn(results, tmp_path, monkeypatch):
    without_counts(monkeypatch)
    folder = results / DEVICE / model_record.FOLDER
    (folder / "half.json").write_text('{"schema": 1, "measu')
    write_models(results / DEVICE, ["x3d"], measured=False)
    write_models(results / DEVICE, ["dcgan"], device="NVIDIA B200")
    path = model_record.path(results / DEVICE, Unit("hifi_gan", False, False, False))
    content = json.loads(path.read_text())
    del content["contestants"][PLAIN]
    path.write_text(json.dumps(content))
    models_alone = results / "b200"
    write_models(models_alone, ["dcgan"])
    paths, complaints = figures.draw_all(results, tmp_path / "out", say=lambda line: None)
    said = "\n".join(complaints)
    for words in ("half.json: not JSON, or cut short", "of a rehearsal among results of NVIDIA H100",
                  "of NVIDIA B200 among",
                  "neither a time of the plain model nor an error", "models alone, without the result"):  # fmt: skip
        assert words in said, words
    assert tmp_path / "out" / DEVICE / "models_forward.svg" in paths
    (device,), _ = load(results)
    assert {each.unit.model for each in device.models} == {"convnext_tiny", "hifi_gan"}


def test_a_rehearsal_of_a_model_is_kept_out_of_the_results():
    made = ModelRecord(model_bench.units(True)[0], False, provenance.provenance(CPU), error="none")
    with pytest.raises(ResultError, match="rehearsal"):
        model_record.write(made, COMMITTED / DEVICE)
    assert not (COMMITTED / DEVICE / model_record.FOLDER / f"{made.unit.title}.json").exists()


def test_figures_and_table_of_models(results, tmp_path, monkeypatch):
    without_counts(monkeypatch)
    (device,), complaints = load(results)
    assert not complaints
    drawn = {d.paths[0].stem: d for d in figures.draw_device(device, tmp_path / "out", lambda line: None)}
    forward = text_of(drawn["models_forward"].paths[0])
    for words in ("32×3×224×224 bf16 channels last", "converted 1.11× vs PyTorch", "LOSS ours everywhere 0.91× vs",
                  "LOSS ours, compiled 0.86× vs torch.compile", "18 of 58 convolutions", "Unsupported: a graph break",
                  "driver 1.2.3", "launches included"):  # fmt: skip
        assert words in forward, words
    assert "CUDA graph" in forward
    assert "CUDA graph" not in text_of(drawn["models_training"].paths[0])
    assert drawn["models_training"].parts == ("forward and backward",)

    usual = [(entry.model, entry.usual) for entry in model_figures.entries(device) if entry.training]
    assert usual == [("convnext_tiny", True), ("convnext_tiny", False), ("hifi_gan", True)]
    rows = model_figures.table(device)
    assert [(row["name"], row["part"]) for row in rows[:3]] == [
        ("convnext_tiny", "forward"), ("convnext_tiny", "forward"), ("hifi_gan", "forward"),
    ]  # fmt: skip
    cells = dict(zip(model_figures.MARKS, rows[0]["cells"], strict=True))
    assert cells[CONVERTED] == {"label": "converted", "text": "9.00 ms", "gain": "1.11×", "loss": False}
    assert cells[FORCED + COMPILED]["loss"]
    assert cells[PLAIN] == {"label": "PyTorch", "text": "10.0 ms", "gain": "", "loss": False}
    assert cells[CONVERTED + COMPILED]["text"] == "absent"
    training = dict(zip(model_figures.MARKS, rows[-1]["cells"], strict=True))
    assert training[PLAIN + GRAPH]["text"] == "–", "not tried"
    assert "1980 to 1755 MHz, 41 to 63 °C, throttled: power cap" in rows[0]["notes"]

    figures.draw_all(results, tmp_path / "page", say=lambda line: None)
    text = (tmp_path / "page" / page.PAGE).read_text()
    assert text.count('data-part="forward and backward"') == 3
    assert "Whole models" in text
    lines = summarise(tmp_path)
    assert any("model convnext_tiny forward" in line and "1.11× converted" in line for line in lines)


def test_without_results_of_models_there_is_nothing_of_them(tmp_path, monkeypatch):
    without_counts(monkeypatch)
    write(record("dcnv2", {OURS: 100, "standard": 200}), tmp_path / "results" / DEVICE)
    paths, complaints = figures.draw_all(tmp_path / "results", tmp_path / "out", say=lambda line: None)
    assert not complaints
    assert not any(path.stem.startswith(("models", "sweep", "separable", "overview_steps")) for path in paths)
    assert "Whole models" not in (tmp_path / "out" / page.PAGE).read_text()


def test_a_model_that_failed_is_in_the_figure(tmp_path):
    folder = tmp_path / "results" / DEVICE
    write(record("dcnv2", {OURS: 100, "standard": 200}), folder)
    unit = Unit("x3d", True, False, True)
    whence = record("dcnv2", {OURS: 100}).provenance
    model_record.write(ModelRecord(unit, True, whence, error="OutOfMemoryError: no memory"), folder)
    eager = ModelRecord(replace(unit, model="dcgan"), True, whence, contestants={PLAIN: contestant(5000)})
    model_record.write(eager, folder)
    contestants = eager.contestants | {FORCED + COMPILED: Contestant(absent="WRONG: error 1")}
    wrong = replace(eager, unit=replace(unit, model="dcgan", compiled=True), contestants=contestants)
    model_record.write(wrong, folder)
    (device,), _ = load(tmp_path / "results")
    figures.draw_device(device, tmp_path / "out", lambda line: None)
    text = text_of(tmp_path / "out" / "models_training.svg")
    assert [line for line in summarise(tmp_path) if line.startswith("FAILED")] == [
        "FAILED model dcgan-nhwc-compiled-training, forced compiled: WRONG: error 1",
        "FAILED model x3d-nhwc-eager-training: OutOfMemoryError: no memory",
    ]
    assert "FAILED, no time" in text
    assert "x3d-nhwc-eager-training: OutOfMemoryError: no memory" in text
    assert "no time of ours" in text
