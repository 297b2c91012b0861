"""The figures and tables, from no results and from made-up result files, and what a result file must be."""

import json
import sys
from dataclasses import replace

import pytest
from perf_results import DEVICE, PROVENANCE, contestant, record, text_of, write_results

pytest.importorskip("matplotlib")

from perf_plots import __main__ as command
from perf_plots import cases, comparisons, evidence, figures, measured, overview, style
from perf_plots.floors import DATASHEET, Limits, Work
from perf_plots.record import COMMITTED, OURS, Record, ResultError, read, write
from perf_plots.store import load
from perf_plots.summary import LINES, summarise
from perf_plots.table import measured_table
from triton_conv.workloads import FLAGSHIPS, KINDS, find


@pytest.fixture
def results(tmp_path):
    return write_results(tmp_path / "results")


def test_without_results_every_figure_is_computed_and_says_so(tmp_path, capsys):
    assert command.main(["--results", str(tmp_path / "none"), "--out", str(tmp_path / "figures")]) == 0
    drawn = sorted(path.relative_to(tmp_path / "figures") for path in (tmp_path / "figures").rglob("*.*"))
    assert {str(path) for path in drawn} == {"index.html"} | {
        f"computed/{name}.{kind}" for name in ("overview", *KINDS) for kind in ("svg", "png")
    }
    for path in (tmp_path / "figures").rglob("*.svg"):
        text = text_of(path)
        assert "computed, not measured" in text
        assert "datasheet of NVIDIA H100 80GB HBM3" in text.replace("  ", " ")
        for workload in FLAGSHIPS:
            assert (workload.name in text) == (path.stem in ("overview", workload.kind))
    out = capsys.readouterr().out
    assert "computed, not measured" in out
    assert all(workload.title in out for workload in FLAGSHIPS)
    assert "fused_chains: absent" in out


@pytest.mark.parametrize(
    ("main", "arguments", "phrase"),
    [
        (command.main, ["--evidence"], "argument --evidence: {file} is no file"),
        (comparisons.main, ["--results"], "argument --results: {file} holds nothing that was measured"),
        (evidence.main, [], "{file} is not what triton-conv inspect --json writes (FileNotFoundError"),
    ],
)
def test_a_path_that_is_not_there_is_not_passed_over(main, arguments, phrase, tmp_path, capsys):
    file = tmp_path / "absent"
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, str(file)])
    assert stopped.value.code == 2
    assert phrase.format(file=file) in capsys.readouterr().err


def test_what_cannot_be_done_is_said_plainly(results, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        command.main(["--results", str(results), "--out", str(tmp_path / "file")])
    assert stopped.value.code == 2
    assert f"argument --out: {tmp_path / 'file'} cannot be made a folder: File exists" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "perf_plots.figures")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("style", "rows", "measured", "computed", "overview", "cold_start"):
        monkeypatch.delitem(sys.modules, f"perf_plots.{name}", raising=False)
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    assert "matplotlib is not installed: pip install 'triton-conv[plots]'" in capsys.readouterr().err


def test_figures_of_results(results, tmp_path, capsys):
    out = tmp_path / "figures"
    assert command.main(["--results", str(results), "--out", str(out)]) == 1, "a broken file is an error"
    printed = capsys.readouterr()
    assert "broken.json" in printed.err
    assert "FAILED dilated_1d" in printed.out

    grouped = text_of(out / DEVICE / "grouped.svg")
    assert "measured" in grouped
    assert "computed, not measured" not in grouped
    assert "computed limit" in grouped, "the limit shares the axis, and is told apart"
    assert "2.49× vs PyTorch (cuDNN)" in grouped
    assert "not measured" in grouped, "wide_groups_56 has no result"
    for provenance in ("H100 80GB HBM3", "driver 1.2.3", "torch 2.11.0", "0123456789ab", "2026-01-02"):
        assert provenance in grouped

    depthwise = text_of(out / DEVICE / "depthwise.svg")
    assert "LOSS 0.79× vs PyTorch (cuDNN)" in depthwise
    assert "absent: PyTorch, other format (RuntimeError: no engine)" in depthwise

    deformable = text_of(out / DEVICE / "deformable.svg")
    assert "no time of another library" in deformable
    assert "LOSS 0.90× vs standard" in deformable
    assert "FAILED, no time: CheckError" in text_of(out / DEVICE / "dilated.svg")

    transposed = text_of(out / DEVICE / "transposed.svg")
    assert "computed, not measured" in transposed
    assert "No result on NVIDIA H100 80GB HBM3 yet" in transposed

    every = text_of(out / DEVICE / "overview.svg")
    assert every.index("convnext_dw7") < every.index("narrow_groups_4") < every.index("dcnv2"), "worst first"
    assert "0.79×" in every
    assert "FAILED, no time" in every


def test_an_unsteady_time_and_what_was_not_timed_are_said(tmp_path):
    made = record("causal_dw1d", {OURS: 100, "cudnn": 250, "standard": 400})
    steady = made.contestants
    assert not made.unsteady
    wide = replace(steady[OURS], interval_us=(99.0, 440.0))
    made = replace(made, contestants=steady | {OURS: wide})
    assert made.unsteady == [OURS]
    for each in (made, record("mobile_dw5", {OURS: 100, "cudnn": 250, "standard": 400})):
        write(each, tmp_path / DEVICE)
    ((device,), _) = load(tmp_path)
    figures.draw_device(device, tmp_path / "out", say=lambda line: None)
    drawn = text_of(tmp_path / "out" / "depthwise.svg")
    assert "UNSTEADY: 95% of the median 99.0 µs to 440 µs" in drawn
    assert "3.97× vs standard (computed: 4.00×)" in drawn
    assert drawn.count("not timed yet: torch.compile, copy of the same bytes, product of the same FLOPs") == 1, "once"
    assert "In every case" in drawn
    assert "wider than half its median: causal_dw1d" in text_of(tmp_path / "out" / "overview.svg").replace("  ", " ")


def test_a_case_of_an_earlier_program_is_no_variant(tmp_path):
    made = record("causal_dw1d", {OURS: 100, "cudnn": 250})
    write(replace(made, workload=replace(made.workload, name="layer_of_yore")), tmp_path / DEVICE)
    write(replace(made, workload=replace(made.workload, dtype="float16")), tmp_path / DEVICE)
    ((device,), _) = load(tmp_path)
    figures.draw_device(device, tmp_path / "out", say=lambda line: None)
    former, variants = (text_of(tmp_path / "out" / f"depthwise_{name}.svg") for name in ("former", "variants"))
    assert "Cases of an earlier program" in former
    assert "layer_of_yore" in former
    assert "layer_of_yore" not in variants


@pytest.mark.parametrize(("told", "text"), [(91900, "cuDNN 9.19.0"), (8902, "cuDNN 8.9.2"), (None, "cuDNN unknown")])
def test_the_version_of_cudnn_is_told_as_its_maker_does(told, text):
    assert text in measured.origin([PROVENANCE | {"cudnn": told}])


def test_the_same_results_give_the_same_bytes(results, tmp_path):
    drawn = []
    for name in ("once", "again"):
        devices, _ = load(results)
        drawings = figures.draw_device(devices[0], tmp_path / name, say=lambda line: None)
        drawn.append({path.name: path.read_bytes() for drawing in drawings for path in drawing.paths})
    assert drawn[0] == drawn[1]
    assert all(content for content in drawn[0].values())


def test_a_rehearsal_is_labelled_and_kept_out_of_the_results(tmp_path):
    workload = find("dcnv2")[0]
    made = Record(workload, False, Work.of(workload), PROVENANCE, contestants={OURS: contestant(100)})
    with pytest.raises(ResultError, match="rehearsal"):
        write(made, COMMITTED / "rehearsal")
    assert not (COMMITTED / "rehearsal").exists()
    write(made, tmp_path / "results" / "rehearsal")
    devices, complaints = load(tmp_path / "results")
    assert not complaints
    figures.draw_device(devices[0], tmp_path / "figures", say=lambda line: None)
    for name in ("overview", "deformable"):
        assert "REHEARSAL: made-up times, not a measurement" in text_of(tmp_path / "figures" / f"{name}.svg")


def test_a_record_survives_its_file(tmp_path):
    made = record("causal_dw1d", {OURS: 300, "cudnn": 1500, "standard": 20000}, {"cudnn other format": "one format"})
    path = write(made, tmp_path)
    again = read(path)
    assert again.work == made.work
    assert again.contestants == made.contestants
    assert again.workload.problem() == made.workload.problem()
    assert again.best(False) == ("cudnn", 1501)
    assert again.speedup(True) == pytest.approx(20001 / 301)
    content = json.loads(path.read_text())
    assert content["contestants"][OURS]["median_us"] == 301
    assert content["case"]["geometry"].startswith("n1 c12288")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda content: content.update(schema=99), "schema 99"),
        (lambda content: content.update(measured="yes"), "measured"),
        (lambda content: content.pop("provenance"), "provenance"),
        (lambda content: content["contestants"][OURS].update(samples_us=[0.0]), "positive"),
        (lambda content: content["contestants"]["cudnn"].update(samples_us=[]), "neither samples nor a reason"),
        (lambda content: content["contestants"].pop(OURS), "neither a time"),
        (lambda content: content["case"].update(colour="red"), "colour"),
        (lambda content: content.clear(), "schema"),
    ],
)
def test_a_file_that_does_not_hold_up_is_named(tmp_path, change, complaint):
    path = write(record("causal_dw1d", {OURS: 300, "cudnn": 1500}), tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ResultError, match=complaint) as caught:
        read(path)
    assert str(path) in str(caught.value)


# Floors in microseconds, computed by hand from the workloads' sizes at 3.35 TB/s and 989 TFLOP/s.
@pytest.mark.parametrize(
    ("name", "floor", "times"),
    [("causal_dw1d", 240, 83.2), ("large_dw2d", 48.9, 384), ("convnext_dw7", 46, 15.9), ("decoder_t2d", 39.1, 4)],
)
def test_floors(name, floor, times):
    work = Work.of(find(name)[0])
    assert work.floor_us(DATASHEET) == pytest.approx(floor, rel=0.01)
    assert work.standard_floor_us(DATASHEET) / work.floor_us(DATASHEET) == pytest.approx(times, rel=0.01)


def test_measured_ceilings_replace_the_datasheet():
    ceilings = {"bytes_per_s": 1e12, "flops_per_s": {"bfloat16": 1e15}}
    limits = Limits.of(DATASHEET.target, ceilings)
    work = Work.of(find("causal_dw1d")[0])
    assert limits.basis == "measured ceilings"
    assert work.floor_us(limits) == pytest.approx(work.least_bytes / 1e6)


def test_variants_do_not_repeat_the_flagships():
    titles = [workload.title for workload in cases.flagships() + cases.variants()]
    assert len(set(titles)) == len(titles)


def test_table_aligns_and_puts_failures_first(results):
    devices, _ = load(results)
    lines = measured_table(devices[0].records)
    assert lines[0].startswith("FAILED dilated_1d")
    assert len({line.index("us") for line in lines[1:2]}) == 1
    assert any("absent" in line and "dcnv2" in line for line in lines)


@pytest.mark.parametrize(
    ("us", "text"),
    [(0.5, "500 ns"), (14.69, "14.7 µs"), (999.4, "999 µs"), (999.6, "1.00 ms"), (18780, "18.8 ms"), (2e6, "2.00 s")],
)
def test_durations(us, text):
    assert style.duration(us) == text


@pytest.mark.parametrize(("factor", "text"), [(0.994, "0.99×"), (9.998, "10.0×"), (66, "66.0×"), (384.4, "384×")])
def test_factors_have_three_digits(factor, text):
    assert style.ratio(factor) == text


def test_names_fit_beside_the_plot():
    # The overview leaves 29% of six inches, about 27 letters of this size.
    assert max(len(workload.name) for workload in FLAGSHIPS) * 0.062 < overview._NAMES * style.WIDTH


def test_summary_is_short_whatever_fails(tmp_path):
    for workload in cases.flagships() + cases.variants():
        made = Record(workload, True, Work.of(workload), PROVENANCE, error="RuntimeError: " + "x" * 500)
        write(made, tmp_path / "results" / DEVICE)
    lines = summarise(tmp_path)
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= 160
    assert "FAILED" in lines[1]
    assert any(line.startswith("... and ") for line in lines[:12])
