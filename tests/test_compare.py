"""Two result folders compared, another revision measured, trials, layers, cold start: everything beside the figures."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch
from perf_results import DEVICE, PROVENANCE, contestant, record, without_counts

pytest.importorskip("matplotlib")

from perf_plots import __main__ as command
from perf_plots import base, baselines, cases, cold_start, figures, gpu, layers, trials
from perf_plots.budget import Deadline
from perf_plots.compare import compare
from perf_plots.floors import DATASHEET, Work
from perf_plots.provenance import ROOT
from perf_plots.record import COLD_START, COMMITTED, OURS, Contestant, Record, ResultError, write
from perf_plots.run import Run
from perf_plots.state import TRIALS, save_stage
from perf_plots.store import load
from triton_conv.defaults import default_tile
from triton_conv.dispatch import forms
from triton_conv.workloads import KINDS, LECTURE_KINDS, find


def folders(tmp_path, before, after):
    """Two result folders of {flagship: our time, or None for a failure}."""
    for folder, times in (("before", before), ("after", after)):
        for name, us in times.items():
            made = record(name, {OURS: us, "cudnn": 200} if us else {}, error="" if us else "CheckError: wrong")
            write(made, tmp_path / folder / DEVICE)
    return str(tmp_path / "before"), str(tmp_path / "after")


def test_compare(tmp_path, capsys):
    pair = folders(
        tmp_path,
        {"dcnv2": 100, "causal_dw1d": 100, "dilated_1d": 100, "dilated_d4": 100, "dw3d": None, "dcgan_t2d": 50},
        {"dcnv2": 50, "causal_dw1d": 130, "dilated_1d": 101, "dilated_d4": None, "dw3d": 70, "mobile_dw5": 50},
    )
    assert command.main(["compare", *pair]) == 1
    lines = capsys.readouterr().out.splitlines()
    (slower,) = (line for line in lines if line.endswith("slower"))
    (faster,) = (line for line in lines if line.endswith("faster"))
    assert slower.startswith("causal_dw1d-bfloat16-nchw ")
    assert "0.77×" in slower
    assert faster.startswith("dcnv2-bfloat16-nhwc ")
    assert "1.98×" in faster
    assert "FAILS NOW dilated_d4-bfloat16-nhwc on h100-80gb-hbm3-132sm: CheckError: wrong" in lines
    assert any(line.startswith("works now: dw3d") for line in lines)
    assert "3 cases: 1 slower, 1 faster, 1 within both intervals" in lines
    assert "in the first alone: dcgan_t2d-bfloat16-nchw" in lines
    assert "in the second alone: mobile_dw5-bfloat16-nchw" in lines


def test_compare_with_nothing_lost(tmp_path, capsys):
    before, after = folders(tmp_path, {"dcnv2": 100}, {"dcnv2": 90})
    assert command.main(["compare", before, after]) == 0
    assert command.main(["compare", before, before]) == 0
    assert "1 case: 0 slower, 0 faster, 1 within both intervals" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["compare", before, str(tmp_path / "none")])
    assert "none is no folder of results" in capsys.readouterr().err


def test_compare_says_what_else_differs(tmp_path, capsys):
    before, after = folders(tmp_path, {"dcnv2": 100}, {})
    other = record("dcnv2", {OURS: 80})
    write(replace(other, provenance=PROVENANCE | {"torch": "9.9"}), tmp_path / "after" / DEVICE)
    assert command.main(["compare", before, after]) == 0
    assert "torch differs: 2.11.0 before, 9.9 after" in capsys.readouterr().out
    write(replace(other, measured=False), tmp_path / "after" / DEVICE)
    command.main(["compare", before, after])
    printed = capsys.readouterr().out
    assert "one is a rehearsal" in printed
    assert "no timed case in common" in printed


@pytest.mark.parametrize("tests", [None, {"status": 1, "timed_out": False}, {"status": -9, "timed_out": True}])
def test_no_gain_is_reported_while_tests_are_red(tmp_path, tests):
    folders(tmp_path, {"dcnv2": 100, "dw3d": 100}, {"dcnv2": 50, "dw3d": 130})
    (tmp_path / "after").rename(tmp_path / "results")
    if tests:
        save_stage(tmp_path, "tests", tests)
    lines, well = base.report(tmp_path / "before", tmp_path)
    assert not well
    assert lines[0].startswith("No gain is reported: ")
    assert any("dw3d" in line and "slower" in line for line in lines)
    assert not any("dcnv2" in line for line in lines)
    save_stage(tmp_path, "tests", {"status": 0, "timed_out": False})
    lines, well = base.report(tmp_path / "before", tmp_path)
    assert any("dcnv2" in line and "faster" in line for line in lines)
    assert not well, "another case is slower"


def test_another_revision_is_checked_out_and_gone_afterwards():
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git repository")
    with base.checked_out("HEAD") as tree:
        assert (tree / "triton_conv" / "__init__.py").is_file()
    assert not tree.exists()
    listed = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True).stdout
    assert str(tree) not in listed
    with (
        pytest.raises(base.BaseError, match="'no-such-revision' cannot be checked out"),
        base.checked_out("no-such-revision"),
    ):
        pass


# ------------------------------------------------------------------------------------------- folders that are not whole


def test_a_folder_of_two_devices(tmp_path):
    folder = tmp_path / "results" / DEVICE
    for name in ("dcnv2", "dw3d"):
        write(record(name, {OURS: 100, "cudnn": 200}), folder)
    other = record("causal_dw1d", {OURS: 100})
    write(replace(other, provenance=PROVENANCE | {"device": "NVIDIA B200"}), folder)
    (device,), complaints = load(tmp_path / "results")
    assert [each.workload.name for each in device.records] == ["dcnv2", "dw3d"]
    assert "1 result of NVIDIA B200 among 2 of NVIDIA H100 80GB HBM3; a folder holds one device" in complaints[0]


def test_a_rehearsal_among_measurements_is_left_out(tmp_path):
    folder = tmp_path / "results" / DEVICE
    write(record("dcnv2", {OURS: 100}), folder)
    write(replace(record("dw3d", {OURS: 100}), measured=False), folder)
    (device,), complaints = load(tmp_path / "results")
    assert device.measured
    assert len(device.records) == 1
    assert "a rehearsal among measurements: dw3d-bfloat16-nchw" in complaints[0]


def test_a_file_that_broke_is_no_success(tmp_path):
    for name in ("before", "after"):
        for case in ("dcnv2", "mobile_dw5"):
            write(record(case, {OURS: 100, "standard": 200}), tmp_path / name / DEVICE)
    assert not compare(tmp_path / "before", tmp_path / "after").worse
    (tmp_path / "after" / DEVICE / "dcnv2-bfloat16-nhwc.json").write_text('{"schema": 1, "meas')
    found = compare(tmp_path / "before", tmp_path / "after")
    assert found.worse
    assert "cut short" in found.lines[0]
    assert not compare(tmp_path / "after", tmp_path / "before").worse


def test_whatever_is_broken_is_named_and_the_rest_is_drawn(tmp_path, monkeypatch):
    without_counts(monkeypatch)
    folder = tmp_path / "results" / DEVICE
    write(record("dcnv2", {OURS: 100, "standard": 200}), folder)
    (folder / "ceilings.json").write_text('{"bytes_per_s": -1, "flops_per_s": {}}')
    (folder / COLD_START).write_text('{"measured": true}')
    (folder / TRIALS).write_text('{"workload": "dcnv2", "kern\nnonsense\n')
    (tmp_path / "results" / "empty").mkdir()
    paths, complaints = figures.draw_all(tmp_path / "results", tmp_path / "out", say=lambda line: None)
    text = "\n".join(complaints)
    assert "bytes_per_s: -1 is not positive" in text
    assert "cold_start.json: nothing under 'provenance'" in text
    assert "no trial in 2 lines of" in text
    assert tmp_path / "out" / DEVICE / "deformable.svg" in paths


def test_the_wrong_folder_is_named(tmp_path):
    write(record("dcnv2", {OURS: 100}), tmp_path / "results" / DEVICE)
    devices, complaints = load(tmp_path / "results" / DEVICE)
    assert not devices
    assert "holds results itself: name the folder above it" in complaints[0]
    assert "is no folder of results" in load(tmp_path / "results" / DEVICE / "dcnv2-bfloat16-nhwc.json")[1][0]


# ----------------------------------------------------------------------------------- layers, sweeps, trials, cold start


def test_layers_of_networks_can_be_planned():
    workloads = layers.networks()
    assert len({workload.title for workload in workloads}) == len(workloads) > 90
    assert {workload.kind for workload in workloads} == set(KINDS)
    for workload in workloads:
        g = workload.problem().geometry
        if workload.kind == "depthwise":
            assert g.groups == g.c_in == g.c_out
        if g.stride == (1, 1, 1) and workload.kind in ("grouped", "depthwise", "deformable"):
            assert g.out_size == g.in_size, workload.name


def test_a_layer_in_words():
    layer = layers.parse("256-128 800 k16 s8 p4 t", name="net", batch=16)
    assert (layer.function, layer.input, layer.weight) == ("conv_transpose1d", (16, 256, 800), (256, 128, 16))
    assert layer.arguments == {"padding": 4, "stride": 8}
    causal = layers.parse("1536 2048 k4 p3,0 dw", name="net", batch=8)
    assert causal.problem().geometry.out_size[-1] == 2048
    assert layers.parse("144 56x56 k5 s2 dw", name="net", batch=8).problem().geometry.out_size[1:] == (28, 28)
    for wrong in ("144", "144 56x56", "144 56x56 k5 z9", "144 56x56 k5 !"):
        with pytest.raises(layers.LayerError, match=r"layers.json: net: '144"):
            layers.parse(wrong, name="net", batch=8)


def test_every_case_has_one_stage():
    """But for those of torch.compile, which are flagships."""
    names = [name for name in cases.OF_STAGE if name != "compiled"]
    titles = [workload.title for name in names for workload in cases.OF_STAGE[name]()]
    assert len(set(titles)) == len(titles)
    assert {workload.title for workload in cases.OF_STAGE["compiled"]()} <= set(titles)
    assert set(cases.OF_STAGE) <= set(gpu.STAGE_NAMES)
    assert sum("regnet_y_8gf" in title for title in titles) == 3 * 2, "forward and both gradients"


def test_sweeps_begin_with_their_ends():
    swept = cases.sweeps()
    assert {workload.title for workload in swept} == {w.title for s in layers.sweeps() for w in s.workloads.values()}
    ends = {end for sweep in layers.sweeps() for end in (min(sweep.workloads), max(sweep.workloads))}
    assert {int(workload.name.rpartition("_")[2]) for workload in swept[: 2 * len(layers.sweeps())]} == ends


def test_offsets_are_spread_as_a_sweep_says():
    (sweep,) = (each for each in layers.sweeps() if each.name == "offset_spread")
    for pixels, workload in sweep.workloads.items():
        small = workload.shrunk()
        assert float(small.tensors("cpu")["offset"].float().std()) == pytest.approx(pixels, rel=0.15)


def timed(workload, us):
    contestants = {OURS: contestant(us), "cudnn": contestant(2 * us), "standard": Contestant(absent="no memory")}
    return Record(workload, True, Work.of(workload), PROVENANCE, contestants=contestants, floor_us=10.0)


def test_sweeps_are_drawn_where_there_are_times(tmp_path):
    sweep = next(each for each in layers.sweeps() if each.name == "groups")
    for value, workload in list(sweep.workloads.items())[:4]:
        write(timed(workload, 100 + value), tmp_path / "results" / DEVICE)
    (device,), complaints = load(tmp_path / "results")
    assert not complaints
    drawn = {drawing.paths[0].stem for drawing in figures.draw_device(device, tmp_path / "out", lambda line: None)}
    assert "sweep_groups" in drawn
    assert "sweep_kernel" not in drawn
    assert "grouped_variants" not in drawn
    text = (tmp_path / "out" / "sweep_groups.svg").read_text()
    assert "Scaling: groups" in text
    assert "computed limit" in text


def test_tuning_is_read_from_trials(tmp_path):
    workload = find("convnext_dw7")[0]
    problem = workload.problem()
    kernel = forms(problem, DATASHEET.target)[0][0].name
    default = default_tile(kernel, problem, DATASHEET.target).asdict()
    row = {"workload": workload.title, "kernel": kernel, "kernel_hash": "0"}
    rows = [row | {"tile": default, "time_us": 300.0}, row | {"tile": default | {"num_warps": 99}, "time_us": 100.0}]
    rows += [row | {"tile": {"other": 1}, "failure": "out of resources"}]
    (tmp_path / TRIALS).write_text("".join(json.dumps(each) + "\n" for each in rows))
    times, complaints = trials.read_trials(tmp_path)
    assert not complaints
    found = trials.tuned(workload, times, DATASHEET.target)
    assert (found.best_us, found.default_us, found.gain, found.trials) == (100, 300, 3, 2)
    # A single slow run of a tile that the benchmark ran too.
    again = record("convnext_dw7", {OURS: 120}, plan={"kernel": kernel, "tile": default})
    assert trials.tuned(workload, times, DATASHEET.target, again).gain == pytest.approx(1.21)
    assert trials.tuned(find("dcnv2")[0], times, DATASHEET.target) is None


def test_cold_start(tmp_path, monkeypatch):
    asked = []

    def process(name, what, cache, rehearse, seconds):
        assert seconds > 0
        asked.append((name, what))
        if name == "dcnv2" and what == "torch":
            return {"error": "no torchvision"}
        return {"first": {"empty cache": 2.0, "filled cache": 0.3, "torch": 0.2}[what], "later": 0.001}

    monkeypatch.setattr(cold_start, "_process", process)
    folder = tmp_path / DEVICE
    write(record("dcnv2", {OURS: 100}), folder)
    now = [0.0]
    assert cold_start.measure(folder, PROVENANCE, deadline=Deadline(1.0, lambda: now[0])) == 0
    assert len(asked) == 3 * len(KINDS)
    assert cold_start.measure(folder, PROVENANCE) == 0
    assert len(asked) == 3 * len(KINDS), "what was measured is kept"
    now[0] = 2.0
    # As a clock that passes the deadline while a case runs.
    late = Deadline(1.0, iter([0.0, *[2.0] * 99]).__next__)
    other = PROVENANCE | {"source": "other code"}
    assert cold_start.measure(folder, other, deadline=Deadline(1.0, lambda: now[0])) == len(KINDS)
    monkeypatch.setattr(cold_start, "_process", lambda *arguments: {"error": "no answer within 0 s"})
    assert cold_start.measure(folder, other, deadline=late) == len(KINDS)
    (device,), complaints = load(tmp_path)
    assert not complaints
    drawn = [drawing.title for drawing in figures.draw_device(device, tmp_path / "out", lambda line: None)]
    assert "Cold start" in drawn
    text = (tmp_path / "out" / "cold_start.svg").read_text()
    assert "empty cache 2.00 s, filled cache 300 ms, torch 200 ms, warm 1.00 ms" in text
    assert "absent: no torchvision" in text
    with pytest.raises(ResultError, match="rehearsal"):
        cold_start.measure(COMMITTED / DEVICE, PROVENANCE, rehearse=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
def test_a_first_call_in_a_process_of_its_own(tmp_path, monkeypatch):
    found = cold_start._process("vocoder_t1d_s8", "filled cache", str(tmp_path), True, 60.0)
    assert found["first"] > 0
    assert found["later"] > 0
    monkeypatch.setattr(cold_start.sys, "executable", "false")
    assert cold_start._process("vocoder_t1d_s8", "filled cache", str(tmp_path), True, 60.0) == {"error": "no message"}
    monkeypatch.undo()
    assert "no answer" in cold_start._process("vocoder_t1d_s8", "torch", str(tmp_path), True, 0.001)["error"]


# ------------------------------------------------------------------------------------------------- limits as baselines


def test_limits_win_no_comparison():
    made = record("dcnv2", {OURS: 100, "torchvision": 300, "device copy": 20, "matrix product": 30, "standard": 90})
    assert made.best(False) == ("torchvision", 301)
    assert made.best(True) == ("standard", 91)


def test_limits_have_the_size_of_the_operation():
    workload = cases.rehearsal()[0]
    built = baselines.build(workload, workload.tensors("cpu"))
    work = Work.of(workload)
    assert 2 * built["device copy"].call().numel() == pytest.approx(work.least_bytes, abs=2)
    side = built["matrix product"].call().shape[0]
    assert 2 * (side - 5) ** 3 <= work.flops <= 2 * (side + 5) ** 3
    assert "torch.compile" not in built
    compiled = baselines.build(workload, workload.tensors("cpu"), compiled=True)["torch.compile"]
    assert compiled.absent == "compiled on a GPU alone"


def test_kinds_may_be_chosen(tmp_path):
    assert gpu.KIND_NAMES == KINDS + LECTURE_KINDS
    chosen = Run(tmp_path, torch.device("cpu"), kinds=("dilated", "local"))
    for stage in cases.OF_STAGE:
        assert {workload.kind for workload in chosen.cases(stage)} <= {"dilated", "local"}
    assert {workload.kind for workload in chosen.cases("lectures")} == {"local"}
