"""The static model in the tuner: what it expects of compiled candidates, the order that follows, forked compilers."""

import math
import os
import subprocess
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from triton_conv import aot, workloads
from triton_conv.autotune import funnel, modelled, race, seeds
from triton_conv.autotune.modelled import Modelled
from triton_conv.autotune.search import Candidate, Search
from triton_conv.dispatch import forms
from triton_conv.kernels import KERNELS
from triton_conv.target import KNOWN

WORKLOAD, H100 = workloads.find("dilated_d4")[0], KNOWN["sm_90"]
CODE = "\t.text\n        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;\n        /*0010*/  EXIT ;\n"


def job(make=modelled.ModelledWarmJob):
    search = Search(WORKLOAD.problem(), H100)
    return make(search.defaults[0].kernel, WORKLOAD.problem(), search.defaults[0].tile, H100)


def test_a_candidate_is_expected_to_take_what_its_code_says():
    row = replace(job().blank(), occupancy=0.125)
    short, long = (modelled._expected(job(), row, CODE + extra) for extra in ("", CODE * 4))
    assert 0 < short < long
    assert modelled._registers(CODE) == 5
    assert modelled.known(H100)
    assert not modelled.known(KNOWN["sm_80"])
    assert not modelled.known(replace(H100, vendor="simulated"))


@pytest.mark.parametrize("error", [FileNotFoundError("nvdisasm"), subprocess.CalledProcessError(1, "nvdisasm")])
def test_without_a_disassembler_nothing_is_expected_and_nothing_fails(monkeypatch, error):
    class Binary:
        asm = {"cubin": b""}  # noqa: RUF012

    def fail(cubin):
        raise error

    monkeypatch.setattr(modelled, "disassemble", fail)
    monkeypatch.setattr(modelled, "compile_binary", lambda job: (job.blank(), Binary))
    made = job(modelled.ModelledJob).run()
    assert made.expected_us is None
    assert made.error == ""


def test_what_compiles_is_ordered_by_expectation_and_the_rest_comes_again():
    search = Search(WORKLOAD.problem(), H100, per_round=6, opening=12)
    given = search.round()
    for place, candidate in enumerate(given):
        search.expect(candidate, 100.0 + len(given) - place)
    chosen = search.pick(given, 4)
    others = [candidate for candidate in given if candidate not in search.defaults]
    assert chosen == [*search.defaults, *others[::-1][:4]]
    for candidate in chosen:
        search.times[candidate] = 100.0
    # Those that were left out look best: half the time of what was tried.
    left = others[::-1][4:]
    for candidate in left:
        search.expect(candidate, 50.0)
    again = search.round()
    assert set(again[:3]) <= set(left)
    assert not set(again) & set(chosen)
    assert search.pick(again, 2) == again[:2]


def test_a_form_that_no_trial_tells_of_is_opened_where_others_are_known():
    search = Search(WORKLOAD.problem(), H100, per_round=6, opening=12)
    search.round()
    assert search.opened == 1, "nothing is known: the preferred form opens, of the others the defaults are tried"
    new, won = "implicit_gemm_persistent", Candidate("implicit_gemm", search._spaces["implicit_gemm"][9])
    search = Search(WORKLOAD.problem(), H100, None, [won], per_round=6, opening=12)
    known = [default for default in search.defaults if default.kernel != new]
    for candidate in known:
        search.known(candidate, 100.0)
    given = search.round()
    assert search.opened == 1
    assert {candidate.kernel for candidate in given} == {new}
    default, *others = given
    assert default in search.defaults and len(others) >= 11
    # Before any of it was tried its machine code speaks for it, against what the others won.
    for place, candidate in enumerate(others):
        search.expect(candidate, 50.0 + place)
    boxed = next(c for c in map(partial(Candidate, known[0].kernel), search._spaces[known[0].kernel]) if c not in known)
    search.expect(boxed, 60.0)
    assert search.pick([boxed, *given[::-1]], 3) == [default, *others[:3]]
    for candidate in search.pick(given, 3):
        search.times[candidate] = 90.0
    assert won in search.round(), "what won elsewhere with forms that are known had to wait"
    assert search.opened == 0


@pytest.mark.parametrize("kernel", seeds.SEEDS)
def test_every_seed_is_for_some_flagship(kernel):
    parts = [part.problem() for workload in (*workloads.FLAGSHIPS, *workloads.LECTURES) for part in workload.parts()]
    problems = [problem for problem in parts if kernel in {form.name for form in forms(problem, H100)[0]}]
    suited = {tile for problem in problems for tile in seeds.seeds(kernel, problem, H100)}
    assert suited == {KERNELS[kernel].tile_type(**values) for values in seeds.SEEDS[kernel]}


class Lab:
    compiles, target = True, H100


class Journal:
    def known(self, problem):
        return []


def opened(monkeypatch, lab):
    class Bench:
        problem = WORKLOAD.problem()

        def spaces(self):
            return None

    monkeypatch.setattr(race, "portfolio_tiles", lambda kernel, target: [])
    lab.open = lambda workload, seconds: Bench()
    nothing_won = SimpleNamespace(of=lambda problem: [], expected=lambda problem: {})
    made = race.Race(WORKLOAD, lab, None, Journal(), nothing_won, math.inf)
    assert made.start()
    return made


def test_a_race_waits_for_its_round_and_tries_the_best_expected(monkeypatch):
    made = opened(monkeypatch, Lab())
    given = made.round()
    assert isinstance(made.job(given[0]), modelled.ModelledWarmJob)
    rows = [Modelled(**job().blank().__dict__, expected_us=float(1000 - place)) for place in range(len(given))]
    rows[-1] = replace(rows[-1], error="OutOfMemoryError: no")
    for candidate, row in zip(given[:-1], rows, strict=False):
        assert made.compiled(candidate, row) == []
    chosen = made.compiled(given[-1], rows[-1])
    assert chosen[0] == (given[-1], "OutOfMemoryError: no"), "a failure is written down too"
    assert chosen[-race.OPENING :] == [(each, "") for each in given[::-1][1 : race.OPENING + 1]]
    assert made.pending == len(chosen) < len(given)


def test_of_another_target_every_candidate_is_tried_as_it_comes(monkeypatch):
    lab = Lab()
    lab.target = KNOWN["sm_80"]
    made = opened(monkeypatch, lab)
    (first, *_) = made.round()
    assert type(made.job(first)) is aot.WarmJob
    assert made.compiled(first, job().blank()) == [(first, "")]


def test_the_funnel_tells_the_order_of_what_it_knows():
    candidates = Search(WORKLOAD.problem(), H100).likely(3)
    rows = [Modelled(**job().blank().__dict__, expected_us=time_us) for time_us in (30.0, None, 20.0)]
    assert list(funnel.expected(candidates, rows).items()) == [(candidates[2], 20.0), (candidates[0], 30.0)]
    assert funnel.expected(candidates, [job().blank()] * 3) == {}


class Work:
    def __init__(self, error=""):
        self.error = error

    def run(self):
        if self.error == "die":
            os._exit(1)
        if self.error == "hang":
            time.sleep(60)
        return self


def test_forked_compilers_say_what_they_did_and_one_that_dies_takes_its_own_job_along():
    compilers = pytest.importorskip("perf_plots.compilers")
    out, channel = os.pipe()
    jobs = [Work(), Work("die"), Work("no\nsuch thing"), Work(), Work("hang"), Work()]
    start = time.monotonic()
    compilers._work_off(jobs, start + 1.5, 3, channel)
    assert time.monotonic() - start < 10
    os.close(channel)
    with os.fdopen(out) as lines:
        found = Counter(lines.read().splitlines())
    assert found == Counter(["0 ", "2 no such thing", "3 ", "5 "])
