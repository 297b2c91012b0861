"""The tuner across processes: what a journal tells the next run, what is done first, and a device that is lost."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_tune import home, run, small

from triton_conv import aot, configs, dispatch, inspection
from triton_conv.autotune import lab, race, search
from triton_conv.autotune.measure import DeviceLostError, Timing
from triton_conv.autotune.rounds import NoPool, Rounds
from triton_conv.defaults import default_tile
from triton_conv.kernels import KERNELS
from triton_conv.target import INTERPRETER

assert home  # a fixture, for every test

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="made-up times are for machines without a GPU")

KERNEL = "grouped_packed"


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "trials.jsonl"


@pytest.fixture
def few(monkeypatch):
    """A space of four tiles, all of which a run has the time to try."""
    monkeypatch.setattr(
        search, "candidates", lambda name, *rest: list(dict.fromkeys([default_tile(name, *rest), *tiles()]))
    )
    return tiles()


def tiles():
    safe = KERNELS[KERNEL].safe_tile
    return [replace(safe, BLOCK_M=m, num_warps=w) for m in (64, 128) for w in (1, 2)]


class Favourite:
    """Made-up times: one tile is fastest, whenever it is tried."""

    measured = False

    def __init__(self, tile, seen):
        self._tile, self._seen = tile, seen

    def rounds(self, calls, count, warmup=3):
        timings = {}
        for name, call in calls.items():
            call()
            time = 10.0 if self._seen[-1] == self._tile or str(self._tile) in name else 20.0
            timings[name] = Timing((time,) * count, measured=False)
        return timings


@pytest.fixture
def wrong():
    """Tiles that compute nonsense."""
    return set()


@pytest.fixture
def seen(monkeypatch, wrong):
    """Tiles in the order in which the tuner launched them; nothing is computed, so nothing is compared."""
    launched = []

    def error(self, call):
        call()
        return 1.0 if launched[-1] in wrong else 1e-6

    monkeypatch.setattr(lab.Subject, "error", error)
    monkeypatch.setattr(dispatch, "launch", lambda kernel, grid, tile, values, *tensors: launched.append(tile))
    return launched


def rows(journal):
    return [json.loads(line) for line in journal.read_text().splitlines()]


def tried(journal):
    return [(row["kernel"], tuple(row["tile"].items())) for row in rows(journal)]


def test_a_second_run_goes_on_where_the_first_stopped(journal, few, seen):
    workload = small("narrow_groups_8")
    (first,), _ = run(workload, journal=journal, timer=Favourite(few[3], seen), seconds=60.0)
    assert first.tile == str(few[3])
    given = tried(journal)
    assert len(given) == len(set(given)) == first.trials == len(few) + 1
    assert all(
        row["kernel_hash"] == configs.kernel_hash(KERNEL) and row["relative_error"] < 0.01 for row in rows(journal)
    )
    # All were tried: the second run has only the final left, of the fastest three and the default.
    configs.ConfigFile(KERNEL, INTERPRETER).path(configs.user_folder()).unlink()
    seen.clear()
    (second,), _ = run(workload, journal=journal, timer=Favourite(few[3], seen), seconds=60.0)
    assert tried(journal) == given
    assert (second.tile, second.trials, second.failures) == (first.tile, first.trials, first.failures)
    assert {few[3], default_tile(KERNEL, workload.problem(), INTERPRETER)} <= set(seen)
    assert len(set(seen)) <= race.FINALISTS + 1 < len(given)
    assert str(dispatch.plan(workload.problem(), INTERPRETER).tile) == first.tile


def test_a_run_that_was_cut_off_is_completed(journal, few, seen):
    workload = small("narrow_groups_8")
    run(workload, journal=journal, timer=Favourite(few[3], seen), seconds=60.0)
    whole = tried(journal)
    lines = journal.read_text().splitlines(keepends=True)
    # Killed in the middle of its fourth line.
    journal.write_text("".join(lines[:3]) + lines[3][:40])
    (outcome,), _ = run(workload, journal=journal, timer=Favourite(few[3], seen), seconds=60.0)
    kept = [line for line in journal.read_text().splitlines() if line.endswith("}")]
    again = [(row["kernel"], tuple(row["tile"].items())) for row in map(json.loads, kept)]
    assert len(again) == len(set(again))
    assert set(again) == set(whole)
    assert (outcome.tile, outcome.trials) == (str(few[3]), len(whole))


def test_failures_are_not_tried_again(journal, few, seen, wrong):
    workload = small("narrow_groups_8")
    wrong.update(few)
    (first,), _ = run(workload, journal=journal, timer=Favourite(few[3], seen), seconds=60.0)
    assert first.failures == {"wrong result": len(few)}
    seen.clear()
    (second,), _ = run(workload, journal=journal, timer=Favourite(few[3], seen), seconds=60.0)
    assert second.failures == first.failures
    assert not set(seen) & set(few)


@pytest.mark.parametrize(
    "change", [{"kernel_hash": "old"}, {"problem": "another"}, {"kernel": "gone"}, {"tile": {"BLOCK_Q": 1}}], ids=str
)
def test_trials_of_something_else_do_not_count(change, journal, few, seen):
    workload = small("narrow_groups_8")
    run(workload, journal=journal, timer=Favourite(few[3], seen), seconds=60.0)
    count = len(rows(journal))
    journal.write_text("".join(json.dumps(row | change) + "\n" for row in rows(journal)))
    (outcome,), _ = run(workload, journal=journal, timer=Favourite(few[0], seen), seconds=60.0)
    assert (outcome.tile, outcome.trials, len(rows(journal))) == (str(few[0]), count, 2 * count)


def test_a_new_default_is_compared_with_the_winner_of_before(journal, few, seen, monkeypatch):
    workload = small("narrow_groups_8")
    run(workload, journal=journal, timer=Favourite(few[3], seen), seconds=60.0)
    count = len(rows(journal))
    new = replace(KERNELS[KERNEL].safe_tile, BLOCK_M=256, num_warps=1)
    monkeypatch.setattr(search, "candidates", lambda *_: [new, *tiles()])
    (outcome,), _ = run(workload, journal=journal, timer=Favourite(few[3], seen), seconds=60.0)
    assert [row["tile"] for row in rows(journal)[count:]] == [new.asdict()]
    assert (outcome.error, outcome.tile, outcome.default_time_us) == ("", str(few[3]), 20.0)


# ---------------------------------------------------------------------------------------------------------- priorities

PRIORITIES = [(1, 0, 0), (0, 1, 1), (-1, 0, 1), (0, 0, 1), (0, 1, 0), (-1, 0, 0), (0, 0, 0)]


def job():
    return inspection.jobs(kernels=("depthwise",), targets=("sm_90",))[0]


def test_jobs_without_a_pool_are_done_in_order_of_priority():
    pool = NoPool()
    for priority in PRIORITIES:
        pool.submit((priority[2], None), job(), priority)
    taken = []
    while pool.waiting:
        key, compiled = pool.take(0.0)
        assert compiled == job().blank()
        taken.append(key[0])
    assert taken == [priority[2] for priority in sorted(PRIORITIES)]
    pool.submit((0, None), job(), (0,))
    pool.close()
    assert pool.waiting == 0


class Round:
    """A race that deals two candidates a round, `rounds` times, and tries what is compiled."""

    leader, promise, portfolio, final_seconds, error = None, 0.0, False, 0.0, ""

    def __init__(self, modelled=False, rounds=1, clock=None):
        self.modelled, self.rounds, self.clock = modelled, rounds, clock
        self.started, self.pending, self.tried = False, 0, 0

    def start(self, seconds):
        self.started = True
        return True

    def round(self, others):
        self.rounds -= 1
        self.pending = 2
        return ["a", "b"] if self.rounds >= 0 else []

    def planned_job(self):
        return job()

    def job(self, candidate):
        return job()

    def compiled(self, candidate, made):
        return [(candidate, "")] if self.clock else []

    def trial(self, candidate, error, seconds):
        self.pending -= 1
        self.tried += 1
        self.clock[0] += 1.0


def worked_off(races, device, stop):
    """Workloads and candidates in the order in which they are compiled."""
    taken = []

    class Pool(NoPool):
        def take(self, seconds):
            key, made = super().take(seconds)
            taken.append(f"{key[0]}{key[1] or ''}")
            return key, made

    Rounds(races, device, stop, Pool()).run()
    return taken


@pytest.mark.parametrize(
    ("modelled", "order"), [(True, "0 0a 0b 1 1a 1b"), (False, "0 1 0a 1a 0b 1b")], ids=["one by one", "abreast"]
)
def test_races_whose_rounds_are_ranked_are_compiled_one_by_one(modelled, order):
    """What ranks a round needs all of it: were they compiled abreast, nothing could be tried until the end."""
    device = lab.DeviceLab(torch.device("cpu"), None)
    assert " ".join(worked_off([Round(modelled), Round(modelled)], device, device.now() + 60)) == order


@pytest.mark.parametrize(("restart", "lost", "count"), [(0.0, 0.0, 11), (1e-6, 0.0, 8), (1e-6, 4.0, 4)])
def test_where_a_process_would_be_lost_no_trial_is_begun_that_may_be_cut_off(restart, lost, count):
    """With it all that it has set up would go, which the finals need; what has gone already takes time again."""
    clock = [0.0]
    device = SimpleNamespace(restart_seconds=restart, lost_seconds=lost, now=lambda: clock[0])
    race = Round(rounds=99, clock=clock)
    worked_off([race], device, 10.5)
    assert race.tried == count


def test_a_pool_works_off_the_lowest_priority_first(monkeypatch):
    started = []

    def work(self, job, seconds):
        if job.label == "first":
            # Held until all others are queued.
            queued.wait(10)
        started.append(job.label)
        return job.blank()

    queued = aot.threading.Event()
    monkeypatch.setattr(aot._Worker, "run", work)
    pool = aot.Pool(processes=1)
    try:
        pool.submit("first", replace(job(), label="first"), (-2,))
        for priority in PRIORITIES + PRIORITIES[:1]:
            pool.submit(priority, replace(job(), label=str(priority)), priority)
        assert pool.waiting == len(PRIORITIES) + 2
        queued.set()
        keys = [pool.take(10)[0] for _ in range(pool.waiting)]
    finally:
        queued.set()
        pool.close()
    assert keys == ["first", *sorted(PRIORITIES + PRIORITIES[:1])]
    assert started == [str(key) for key in keys]
    assert pool.waiting == 0


# -------------------------------------------------------------------------------------------------------- a lost device


def test_a_device_that_stops_answering_ends_the_process(journal, few, seen, monkeypatch):
    """As after an illegal access: the trial is a failure in the journal, and the next process does not repeat it."""
    workload = small("narrow_groups_8")
    launch = dispatch.launch

    def broken(kernel, grid, tile, values, *tensors):
        if tile == few[2]:
            raise RuntimeError("an illegal memory access was encountered\nmore of it")
        launch(kernel, grid, tile, values, *tensors)

    monkeypatch.setattr(dispatch, "launch", broken)
    with monkeypatch.context() as lost:
        lost.setattr(lab, "usable", lambda device: False)
        with pytest.raises(DeviceLostError, match=rf"{KERNEL} .*{workload.title}: failed: an illegal memory access"):
            run(workload, journal=journal, timer=Favourite(few[3], seen), seconds=60.0)
    last = rows(journal)[-1]
    assert (last["tile"], last["failure"]) == (few[2].asdict(), "failed: an illegal memory access was encountered")
    (outcome,), _ = run(workload, journal=journal, timer=Favourite(few[3], seen), seconds=60.0)
    given = tried(journal)
    assert len(given) == len(set(given)) == len(few) + 1
    assert (outcome.tile, outcome.failures) == (str(few[3]), {last["failure"]: 1})


def test_an_error_on_a_device_that_answers_is_a_failure_of_the_tile(few, seen, monkeypatch):
    launch = dispatch.launch

    def broken(kernel, grid, tile, values, *tensors):
        if tile in few[1:3]:
            raise RuntimeError("out of something")
        launch(kernel, grid, tile, values, *tensors)

    monkeypatch.setattr(dispatch, "launch", broken)
    (outcome,), _ = run(small("narrow_groups_8"), timer=Favourite(few[3], seen), seconds=60.0)
    assert (outcome.tile, outcome.failures) == (str(few[3]), {"failed: out of something": 2})


@pytest.mark.parametrize("answers", [True, False])
def test_operands_that_cannot_be_set_up(answers, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lab, "Subject", broken)
    monkeypatch.setattr(lab, "usable", lambda device: answers)
    if answers:
        (outcome,), _ = run(small("dw3d"), seconds=60.0)
        assert outcome.error == "cannot be set up here: out of memory"
    else:
        with pytest.raises(DeviceLostError, match=r"setting up .*: out of memory"):
            run(small("dw3d"), seconds=60.0)
