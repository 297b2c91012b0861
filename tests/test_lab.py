"""Judging candidates behind one interface: simulated devices, recorded tables, and processes that may die."""

import math
import os
import signal

import pytest
import torch

from triton_conv import dispatch, workloads
from triton_conv.autotune import lab as labs
from triton_conv.autotune import worker
from triton_conv.autotune.journal import candidate_of, read_trials, tables
from triton_conv.autotune.lab import DeviceBench, OutOfTimeError, Trial, screen
from triton_conv.autotune.measure import DeviceLostError, RehearsalTimer, Timing
from triton_conv.autotune.replay import ReplayLab
from triton_conv.autotune.search import ROUND, Candidate, Search
from triton_conv.autotune.simulated import FAULTS, SimulatedLab, Simulation, table
from triton_conv.autotune.surrogate import Surrogate
from triton_conv.autotune.worker import WorkerLab, open_lab
from triton_conv.errors import DeviceError, TrialsError, WorkloadError
from triton_conv.kernels import KERNELS
from triton_conv.target import KNOWN

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of devices that are not there")

WORKLOAD = workloads.find("narrow_groups_8")[0]
SIMULATION = Simulation(seed=1)


@pytest.fixture(scope="module")
def every():
    """The exhaustive table of a workload on a simulated device."""
    return table(WORKLOAD.problem(), SIMULATION)


# ------------------------------------------------------------------------------------------------------------- screen


class Samples:
    def __init__(self, *times):
        self.times, self.rounds = list(times), 0

    def once(self):
        return self.times.pop(0)

    def more(self, count):
        self.rounds += count
        return Timing((self.once(),) * count)


@pytest.mark.parametrize(
    ("times", "best", "found", "left"),
    [
        ((30.0, 31.0), math.inf, 31.0, 0),
        ((30.0, 31.0), 25.0, 31.0, 0),
        # Slow twice: not run again.
        ((60.0, 61.0, 1.0), 25.0, 60.0, 1),
        # The host's hiccup, once.
        ((3861.0, 31.0, 30.0), 28.0, 30.0, 0),
        # So slow that no hiccup explains it: one run is enough.
        ((50e3, 1.0), 28.0, 50e3, 1),
    ],
)
def test_screening(times, best, found, left):
    samples = Samples(*times)
    assert screen(samples.once, samples.more, best) == found
    assert len(samples.times) == left


# ------------------------------------------------------------------------------------------------------ out of bounds


@pytest.fixture
def small():
    return DeviceBench(workloads.find("mobile_dw5")[0].shrunk(), torch.device("cpu"), RehearsalTimer())


def test_a_write_outside_the_output_is_a_failure(small, monkeypatch):
    launch = dispatch.launch
    default = Search(small.problem, KNOWN["sm_90"]).defaults[-1]
    assert small.judge(default, math.inf).failure == ""

    def sabotaged(kernel, grid, tile, values, *tensors):
        launch(kernel, grid, tile, values, *tensors)
        output = tensors[-1]
        output.as_strided((1,), (1,), output.storage_offset() + output.numel()).fill_(0.0)

    monkeypatch.setattr(dispatch, "launch", sabotaged)
    assert small.judge(default, math.inf) == Trial(failure="out-of-bounds write")


def test_a_nan_is_a_wrong_result(small, monkeypatch):
    launch = dispatch.launch

    def sabotaged(kernel, grid, tile, values, *tensors):
        launch(kernel, grid, tile, values, *tensors)
        tensors[-1].flatten()[:1].fill_(math.nan)

    monkeypatch.setattr(dispatch, "launch", sabotaged)
    assert small.judge(Search(small.problem, KNOWN["sm_90"]).defaults[-1], math.inf).failure == "wrong result"


# --------------------------------------------------------------------------------------------------------- simulation


def test_a_simulation_is_the_same_every_time(every):
    assert table(WORKLOAD.problem(), Simulation(seed=1)) == every
    other = table(WORKLOAD.problem(), Simulation(seed=2))
    assert set(other) == set(every)
    assert min(other, key=other.get) != min(every, key=every.get) or other != every
    assert all(time > 5.0 for time in every.values())


def test_a_simulated_clock_runs_only_while_something_is_done(every):
    lab = SimulatedLab(Simulation(seed=1, drift=3600.0, noise=0.0))
    bench = lab.open(WORKLOAD)
    before = lab.now()
    candidate = next(iter(every))
    trial = bench.judge(candidate, math.inf)
    assert lab.now() > before
    # Drift only slows.
    assert every[candidate] < trial.time_us < bench.rounds([candidate], 3)[candidate].median


def test_settings_of_a_simulation():
    made = Simulation.parse("simulated:a100,seed=7,noise=0.5,hang=0.25")
    assert (made.board, made.seed, made.noise, made.faults) == ("a100", 7, 0.5, {"hang": 0.25})
    assert (made.target.vendor, made.target.arch) == ("simulated", "sm_80")


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("simulated:h101", "'h101' cannot be simulated"),
        ("simulated:h100,colour=1", "'colour' is no setting"),
        ("simulated:h100,noise=loud", "noise: expected a number"),
        ("tpu", "'tpu' is not known"),
    ],
)
def test_a_device_that_is_not_known(text, phrase):
    with pytest.raises(DeviceError, match=phrase):
        open_lab(text)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_befall_the_same_share_of_candidates_every_time(fault, every):
    simulation = Simulation(seed=3, faults={fault: 0.3})
    hit = [candidate for candidate in every if simulation.fault(candidate)]
    assert 0.15 < len(hit) / len(every) < 0.45
    assert {simulation.fault(candidate) for candidate in hit} == {fault}


# -------------------------------------------------------------------------------------------------------------- replay


def row(candidate, time_us, **changes):
    known = {"problem": WORKLOAD.problem().describe(), "kernel": candidate.kernel, "kernel_hash": "any"}
    return known | {"tile": candidate.tile.asdict(), "time_us": time_us, "relative_error": 1e-3} | changes


def test_a_record_answers_with_what_was_recorded(every):
    first, second, third = list(every)[:3]
    rows = [row(first, 9.0), row(second, 8.0), row(second, 3861.0), row(third, 1.0, failure="wrong result")]
    bench = ReplayLab(tables(rows), KNOWN["sm_90"]).open(WORKLOAD)
    assert bench.spaces() == {first.kernel: [first.tile, second.tile, third.tile]}
    # Of two times of one candidate the shorter: noise only adds.
    assert bench.judge(second, math.inf).time_us == 8.0
    assert bench.judge(third, math.inf).failure == "wrong result"
    assert bench.rounds([first], 5)[first] == Timing((9.0,) * 5, measured=False)
    with pytest.raises(WorkloadError, match="dw3d-bfloat16-nchw is not in the record"):
        ReplayLab(tables(rows), KNOWN["sm_90"]).open(workloads.find("dw3d")[0])


def test_rows_of_other_kernels_and_tiles_are_passed_over(every):
    known = next(iter(every))
    assert candidate_of(row(known, 1.0)) == known
    assert candidate_of(row(known, 1.0, kernel="gone")) is None
    assert candidate_of(row(known, 1.0, tile={"BLOCK_Q": 1})) is None


@pytest.mark.parametrize(("text", "rows"), [("", 0), ('{"problem', 0)])
def test_a_cut_off_journal_is_read_to_where_it_was_cut(text, rows, tmp_path):
    file = tmp_path / "trials.jsonl"
    file.write_text(text)
    assert len(read_trials(file)) == rows


@pytest.mark.parametrize("text", ["{\n{}\n", "[]\n{}\n", '{"problem": 1}\n{}'])
def test_what_is_no_journal(text, tmp_path):
    file = tmp_path / "trials.jsonl"
    file.write_text(text)
    with pytest.raises(TrialsError, match="line 1 is not a trial"):
        read_trials(file)
    with pytest.raises(TrialsError, match="no readable file"):
        read_trials(tmp_path / "absent")


# -------------------------------------------------------------------------------------------------------------- search


def test_a_surrogate_learns_where_the_fast_tiles_are():
    tiles = [c.tile for c in table(WORKLOAD.problem(), SIMULATION) if c.kernel == "grouped_packed"]
    time = {tile: abs(math.log2(tile.BLOCK_M) - 5) + 0.5 * abs(tile.num_warps - 4) for tile in tiles}
    known = {tile: time[tile] for tile in tiles[::9]}
    order = [tile for _, tile in Surrogate(tiles, [0.0] * len(tiles)).promising(known, set(known))]
    assert set(order) == set(tiles) - set(known)
    first, last = order[:10], order[-10:]
    assert sum(time[tile] for tile in first) < 0.5 * sum(time[tile] for tile in last)


def test_a_search_gives_every_candidate_once(every):
    search = Search(WORKLOAD.problem(), SIMULATION.target)
    given = []
    while found := search.round():
        given += found
        search.times |= {candidate: every[candidate] for candidate in found}
    assert sorted(map(str, given)) == sorted(map(str, every))
    assert given[: len(search.defaults)] == search.defaults


def test_what_won_elsewhere_comes_right_after_the_defaults(every):
    seeds = list(every)[40:42]
    search = Search(WORKLOAD.problem(), SIMULATION.target, seeds=[*seeds, Candidate("gone", seeds[0].tile)])
    assert search.round()[len(search.defaults) :][:2] == seeds


def test_what_other_problems_let_expect_goes_on_where_the_first_trials_end(every):
    def begun(**told):
        search = Search(WORKLOAD.problem(), SIMULATION.target, **told)
        first = search.round()
        # Whatever was tried took as long as expected.
        search.times |= {candidate: 100.0 * math.exp(elsewhere[candidate]) for candidate in first}
        return search, first

    slab, packed = ([c for c in every if c.kernel == name] for name in ("grouped_slab", "grouped_packed"))
    elsewhere = dict.fromkeys(every, 1.0) | {slab[-1]: 0.0, slab[-3]: 0.1}
    search, first = begun(elsewhere=elsewhere, seeds=[slab[-5]], later=[packed[5], packed[9]])
    assert first == [*search.defaults, slab[-5]] and len(first) == ROUND
    second, third = search.round(), search.round()
    assert second[:2] == [slab[-1], slab[-3]]
    assert second[2].kernel == "grouped_packed", "another form than the one that leads"
    assert third[2] == packed[5], "what other problems speak for"
    assert len({*first, *second, *third}) == 3 * ROUND


# ------------------------------------------------------------------------------------------------- processes that die


ALL = "simulated:h100,seed=1,noise=0," + ",".join(f"{fault}=0.1" for fault in FAULTS)
FAULTY = Simulation.parse(ALL)
FAILURES = {
    "nan": "wrong result",
    "oob": "out-of-bounds write",
    "illegal": "failed: CUDA error: an illegal memory access was encountered",
    "crash": "killed: the process died of SIGSEGV",
    "hang": "killed: no result within 2 s",
}


@pytest.fixture(scope="module")
def process():
    """A device on which everything goes wrong, in a process of its own; starting one takes seconds."""
    lab = WorkerLab(ALL, seconds=2.0)
    yield lab
    lab.close()


def struck(every, fault):
    return next(candidate for candidate in every if FAULTY.fault(candidate) == fault)


def test_a_process_answers_as_the_lab_itself_does(process, every):
    assert process.target == SIMULATION.target
    bench = process.open(WORKLOAD)
    candidate = struck(every, "")
    assert bench.judge(candidate, math.inf) == Trial(every[candidate], 1e-3)
    assert bench.rounds([candidate], 4)[candidate].samples == (every[candidate],) * 4
    assert process.generation == 0


@pytest.mark.parametrize("fault", FAILURES)
def test_a_fault_takes_only_its_own_process_along(fault, process, every):
    bench, before = process.open(WORKLOAD), process.generation
    assert bench.judge(struck(every, fault), math.inf).failure == FAILURES[fault]
    assert process.generation - before == (fault in ("crash", "hang", "illegal"))
    # The next one finds a process that works.
    assert bench.judge(struck(every, ""), math.inf) == Trial(every[struck(every, "")], 1e-3)


def test_a_compiler_that_aborts_is_told_before_the_trial(process, every):
    assert "Aborted" in process.compilation_failure(WORKLOAD, struck(every, "abort"))
    assert process.compilation_failure(WORKLOAD, struck(every, "")) == ""


def test_a_trial_that_the_budget_cuts_short_is_no_failure(process, every):
    with pytest.raises(OutOfTimeError):
        process.open(WORKLOAD).judge(struck(every, "hang"), math.inf, 0.3)


def test_no_process_is_started_when_the_time_is_up(process, every):
    bench = process.open(WORKLOAD)
    process.close()
    with pytest.raises(OutOfTimeError):
        bench.rounds([struck(every, "")], 3, 0.0)
    assert process._process is None


def test_errors_come_through_the_pipe(process):
    broken = workloads.Workload("x", "grouped", "conv2d", (1, 4, 8, 8), (4, 3, 3, 3))
    with pytest.raises(RuntimeError, match="expected input"):
        process.open(broken)


def test_a_process_that_is_killed_is_replaced(process, every):
    bench, candidate = process.open(WORKLOAD), struck(every, "")
    os.kill(process._process.pid, signal.SIGKILL)
    assert "SIGKILL" in bench.judge(candidate, math.inf).failure
    assert bench.judge(candidate, math.inf).failure == ""
    with pytest.raises(DeviceLostError, match="no result within"):
        process.ask(("rounds", WORKLOAD, [candidate], 10**9), 0.2)


def test_real_kernels_run_in_a_process():
    lab = WorkerLab("cpu")
    try:
        trial = lab.open(workloads.find("mobile_dw5")[0].shrunk()).judge(
            Candidate("depthwise", KERNELS["depthwise"].safe_tile), math.inf
        )
    finally:
        lab.close()
    assert trial.failure == ""
    assert trial.relative_error < 0.01


def test_the_labs_are_of_one_kind():
    assert labs.DeviceLab(torch.device("cpu"), RehearsalTimer()).compiles is False
    assert worker.WorkerLab("cuda:1").compiles
    assert not worker.WorkerLab("cpu").compiles
