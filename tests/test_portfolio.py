"""Portfolios: where a problem lies, which tiles are chosen, what they are worth, and when a plan asks them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from triton_conv import configs, dispatch, ops, workloads
from triton_conv.autotune import portfolio as building
from triton_conv.autotune.lab import Trial
from triton_conv.autotune.search import Candidate
from triton_conv.configs import ConfigFile, Entry
from triton_conv.errors import ConfigError, ConfigWarning
from triton_conv.kernels import KERNELS
from triton_conv.kernels.implicit_gemm import ImplicitGemmTile
from triton_conv.portfolio import Place, Portfolio, place
from triton_conv.target import KNOWN

KERNEL, TARGET = "implicit_gemm", KNOWN["sm_90"]
A = ImplicitGemmTile(BLOCK_M=16, BLOCK_N=32, BLOCK_K=64, num_warps=2)
B, C = replace(A, BLOCK_M=32), replace(A, BLOCK_M=64)
FLAGSHIP = workloads.find("dilated_d4")[0]
KEY = FLAGSHIP.problem().describe()
NEAR = replace(FLAGSHIP, input=(9, 512, 65, 65))
FAR = replace(FLAGSHIP, input=(9, 32, 65, 65), weight=(32, 32, 3, 3))


# --------------------------------------------------------------------------------------------------------------- place


@pytest.mark.parametrize("workload", workloads.FLAGSHIPS, ids=lambda w: w.name)
def test_every_problem_has_a_place(workload):
    for part in workload.parts():
        for variant in part.variants(("float16", "float32"), both_formats=True):
            here = place(variant.problem().describe())
            assert here.distance(here) == 0
            assert len(here.numbers) == 10
    kinds = {place(part.problem().describe()).kind for part in workload.parts()}
    # With stride 1 a depthwise input gradient is a forward convolution with its filter flipped.
    assert len(kinds) >= 2


def test_distances_count_doublings():
    here = place(KEY)
    assert here.distance(place(KEY.replace("n8 ", "n16 "))) == pytest.approx(0.25)
    assert here.distance(place(KEY.replace("c512-512", "c512-1024"))) == pytest.approx(1.0)
    assert here.distance(place(KEY.replace("c512-512", "c256-1024"))) == pytest.approx(math.sqrt(2))
    for other in (("bfloat16", "float16"), ("NHWC", "NCHW"), ("g1 ", "g1 t0x0 "), ("NHWC", "NHWC dw")):
        assert here.distance(place(KEY.replace(*other))) == math.inf
    # A tile for aligned channels spills where each has an address of its own; rows of pixels likewise. One that was
    # found where nothing is aligned serves where something is.
    for other in (("c512-512", "c512-511"), ("c512-512", "c508-512")):
        assert here.distance(place(KEY.replace(*other))) == math.inf
        assert place(KEY.replace(*other)).distance(here) < 0.02
    narrow, odd = KEY.replace("NHWC", "NCHW").replace("65x65", "64x64"), KEY.replace("NHWC", "NCHW")
    assert place(narrow).distance(place(odd)) == math.inf
    assert place(odd).distance(place(narrow)) < 0.02
    # An epilogue is no other kind.
    assert here.distance(place(KEY.replace("NHWC", "NHWC+bias+relu"))) == 0


@pytest.mark.parametrize("text", ["", "another problem", KEY.replace("k3x3", "k"), KEY.replace("NHWC", "HWC")])
def test_what_describes_no_problem(text):
    with pytest.raises(ConfigError, match="does not describe a problem"):
        place(text)


# ------------------------------------------------------------------------------------------------------------ building


def key(channels, batch=8):
    return KEY.replace("n8 ", f"n{batch} ").replace("c512-512", f"c{channels}-{channels}")


def table(**times):
    return {Candidate(KERNEL, tile): Trial(times[name], 1e-3) for name, tile in (("a", A), ("b", B), ("c", C))}


def test_costs_are_of_the_fastest_form_alone():
    slow = Candidate("depthwise", KERNELS["depthwise"].safe_tile)
    costs = building.won({KEY: table(a=10.0, b=20.0, c=40.0) | {slow: Trial(15.0, 0.0)}})
    assert set(costs) == {KERNEL}
    assert costs[KERNEL][KEY] == {A: 0.0, B: math.log(2), C: math.log(4)}
    failed = {Candidate(KERNEL, A): Trial(failure="wrong result")}
    assert building.won({KEY: failed}) == {}


def test_the_tile_that_helps_most_is_chosen_first():
    costs = {key(64): {A: 0.0, B: 0.1}, key(128): {B: 0.0, A: 0.5}, key(256): {B: 0.0}, key(512): {B: 0.001, C: 0.0}}
    # C would win a thousandth more than B: not worth a tile.
    assert building.choose(costs) == [B, A]
    made = building.portfolio(costs, 2.0)
    assert {shape: made.tiles[name] for shape, name in made.shapes.items()} == {
        key(64): A, key(128): B, key(256): B, key(512): B,
    }  # fmt: skip


def test_what_is_chosen_already_and_what_rows_weigh_count():
    unknown = math.nan
    table = np.array([[0.0, 0.5, 0.1, unknown], [0.5, 0.0, 0.1, 0.4], [unknown] * 4])
    assert building.together(table, np.ones(3)) == [2, 0, 1]
    assert building.together(table, np.array([0.0, 1.0, 1.0])) == [1]
    # The chosen stay, first, and what they cover speaks for nothing else.
    assert building.together(table, np.ones(3), [0]) == [0, 1]
    assert building.together(table, np.zeros(3), [3]) == [3]
    assert building.together(np.empty((0, 4)), np.empty(0)) == []


def test_there_are_never_more_than_twelve():
    tiles = [replace(A, BLOCK_M=m, BLOCK_N=n) for m in (16, 32, 64, 128) for n in (16, 32, 64, 128)]
    costs = {key(16 * (i + 1)): {tile: 0.0} for i, tile in enumerate(tiles)}
    made = building.portfolio(costs, 2.0)
    assert len(made.tiles) == len(made.shapes) == 12
    Portfolio.read(json.loads(json.dumps(made.asdict())), KERNELS[KERNEL])


def test_what_is_left_out_is_answered_by_the_others():
    costs = {key(64): {A: 0.0, B: 0.2, C: 0.3}, key(128): {A: 0.0, B: 0.4, C: 0.3}, key(1024): {B: 0.0, A: 0.9, C: 0.1}}
    judged = {j.problem: j for j in building.leave_one_out(costs, dict.fromkeys(costs, C), 3.0)}
    assert (judged[key(64)].regret, judged[key(64)].default_regret) == (0.0, 0.3)
    assert judged[key(128)].answered
    # Too far from both: the default answers.
    assert not judged[key(1024)].answered
    assert judged[key(1024)].regret == 0.1
    found = building.summary(list(judged.values()))
    assert (found["asked"], found["answered"], found["judged"], found["judged_answers"]) == (3, 2, 3, 2)
    assert found["geomean"] == pytest.approx(math.expm1(0.1 / 3), abs=1e-4)
    assert found["default_geomean"] == pytest.approx(math.expm1(0.7 / 3), abs=1e-4)


def test_where_a_plan_passes_the_answer_over_the_default_answers():
    """As `dispatch.plan` does with a tile that does not fit, or leaves multiprocessors idle."""
    small, problem = replace(FLAGSHIP, input=(1, 512, 65, 65)).problem(), FLAGSHIP.problem()
    problems = {p.describe(): p for p in (small, problem)}
    huge, wide = (
        replace(A, BLOCK_M=1024, BLOCK_N=1024, num_stages=8),
        replace(A, BLOCK_M=256, BLOCK_N=256, num_warps=16),
    )
    refused = building.passed_over(KERNEL, problems, TARGET)
    assert [refused(small.describe(), tile) for tile in (A, wide, huge)] == [False, True, True]
    assert [refused(problem.describe(), tile) for tile in (A, wide, huge)] == [False, False, True]
    assert not refused(key(64), huge), "of a problem that nobody knows nothing is known"
    costs = {KEY: {wide: 0.0, C: 0.1}, small.describe(): {C: 0.2, wide: 0.7, A: 0.0}}
    plain, guarded = (
        {j.problem: j for j in building.leave_one_out(costs, dict.fromkeys(costs, C), 3.0, *rule)}[small.describe()]
        for rule in ((), (refused,))
    )
    assert (plain.answered, plain.regret) == (True, 0.7)
    assert (guarded.answered, guarded.regret) == (False, 0.2)


def test_an_answer_that_was_not_tried_is_not_counted():
    costs = {key(64): {A: 0.0}, key(128): {B: 0.0}}
    judged = building.leave_one_out(costs, {key(64): A, key(128): B}, 3.0)
    assert [j.regret for j in judged] == [None, None]
    assert building.summary(judged)["judged"] == 0


SAME = {key(c): {A: 0.0, B: 0.3} for c in (64, 128, 256, 512)}


def test_a_portfolio_is_built_where_it_beats_the_default():
    made = building.build(SAME, dict.fromkeys(SAME, B))
    assert list(made.tiles.values()) == [A]
    assert made.regret["geomean"] == 0 < made.regret["default_geomean"]
    assert made.radius >= math.sqrt(2)


def test_no_portfolio_where_the_default_is_as_good_or_little_is_known():
    assert building.build(SAME, dict.fromkeys(SAME, A)) is None
    few = dict(list(SAME.items())[:2])
    assert building.build(few, dict.fromkeys(few, B)) is None


# ---------------------------------------------------------------------------------------------------------------- plan


@pytest.fixture
def folders(tmp_path, monkeypatch):
    user, shipped = tmp_path / "user", tmp_path / "shipped"
    monkeypatch.setattr(configs, "FOLDERS", (("user tuned", lambda: user), ("shipped exact", lambda: shipped)))
    ops.forget_plans()
    yield {"user": user, "shipped": shipped}
    ops.forget_plans()


def written(folder, tile=A, target=TARGET, entries=None, kernel=KERNEL):
    made = Portfolio({"a": tile}, {KEY: "a"}, 2.0, {"geomean": 0.01})
    file = ConfigFile(kernel, target, {}, entries or {}, None if entries else made)
    ops.forget_plans()
    return file.write(folder)


def planned(workload=NEAR, target=TARGET):
    return dispatch.plan(workload.problem(), target)


def test_a_portfolio_answers_for_a_problem_near_enough(folders):
    written(folders["shipped"])
    made = planned()
    assert (made.tile, made.source) == (A, "shipped portfolio")
    assert made.notes[-1] == f"as for {KEY} (H100 80GB HBM3), 0.04 doublings away"
    assert planned(FAR).source == "analytic default"
    assert planned(replace(NEAR, dtype="float16")).source == "analytic default"


def test_the_users_portfolio_comes_first(folders):
    written(folders["shipped"])
    written(folders["user"], B)
    assert (planned().tile, planned().source) == (B, "user portfolio")


def test_an_exact_entry_comes_before_every_portfolio(folders):
    written(folders["user"])
    entry = Entry(C, 1.0, (1.0, 1.0), 1.0, 1e-3, 1)
    written(folders["shipped"], entries={NEAR.problem().describe(): entry})
    assert (planned().tile, planned().source) == (C, "shipped exact")


def test_the_nearest_form_answers(folders):
    workload = workloads.find("mobile_dw5")[0]
    near, far = workload.problem().describe(), replace(workload, input=(128, 240, 112, 112)).problem().describe()
    for kernel, shape in (("depthwise", near), ("depthwise_banded", far)):
        made = Portfolio({"a": KERNELS[kernel].safe_tile}, {shape: "a"}, 9.0, {})
        ConfigFile(kernel, TARGET, {}, {}, made).write(folders["user"])
    ops.forget_plans()
    assert planned(replace(workload, input=(127, 240, 28, 28))).kernel.name == "depthwise"


def test_a_tile_that_does_not_fit_is_passed_over(folders):
    written(folders["shipped"], replace(A, BLOCK_M=1024, BLOCK_N=1024, num_stages=8))
    made = planned()
    assert made.source == "analytic default"
    assert "passed over shipped portfolio" in made.notes[-1]


def test_a_tile_that_leaves_the_machine_idle_is_passed_over(folders):
    written(folders["shipped"], replace(A, BLOCK_M=256, BLOCK_N=256, num_warps=16))
    small = replace(FLAGSHIP, input=(1, 512, 65, 65))
    assert planned().source == "shipped portfolio"
    made = planned(small)
    assert made.source == "analytic default"
    assert "34 programs leave some of 132 multiprocessors idle" in made.notes[-1]


def test_a_sibling_answers_where_the_device_itself_has_nothing(folders):
    sibling = replace(TARGET, name="H200")
    entry = Entry(C, 1.0, (1.0, 1.0), 1.0, 1e-3, 1)
    written(folders["shipped"], entries={NEAR.problem().describe(): entry})
    assert planned().source == "shipped exact"
    made = planned(target=sibling)
    assert (made.tile, made.source) == (C, "sibling device")
    assert planned(target=KNOWN["sm_80"]).source == "analytic default"
    written(folders["shipped"])
    assert (planned(target=sibling).tile, planned(target=sibling).source) == (A, "sibling device")
    # The device's own portfolio comes before another device's.
    written(folders["shipped"], B, sibling)
    assert (planned(target=sibling).tile, planned(target=sibling).source) == (B, "shipped portfolio")


def test_a_simulated_device_is_nobodys_sibling(folders):
    written(folders["user"], target=replace(TARGET, vendor="simulated", name="H100 of dreams"))
    assert planned().source == "analytic default"


def test_a_siblings_broken_file_is_passed_over_in_silence(folders):
    path = written(folders["user"], target=replace(TARGET, name="H200"))
    path.write_text("{")
    ops.forget_plans()
    assert planned().source == "analytic default"


def test_a_portfolio_survives_the_file(folders):
    path = written(folders["user"])
    file = configs.read(path, KERNELS[KERNEL], TARGET)
    assert file.portfolio == Portfolio({"a": A}, {KEY: "a"}, 2.0, {"geomean": 0.01})
    assert configs.portfolio_tiles(KERNEL, TARGET) == [A]


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"shapes": {KEY: "z"}}, "no tile is named z"),
        ({"shapes": {"x": "a"}}, "does not describe a problem"),
        ({"tiles": {"a": {"BLOCK_Q": 1}}}, "malformed"),
        ({"radius": "far"}, "malformed"),
        ({"tiles": []}, "malformed"),
    ],
)
def test_a_spoilt_portfolio_is_reported_and_not_used(change, phrase, folders):
    path = written(folders["user"])
    content = json.loads(path.read_text())
    content["portfolio"] |= change
    path.write_text(json.dumps(content))
    ops.forget_plans()
    with pytest.warns(ConfigWarning, match=phrase):
        assert planned().source == "analytic default"


def test_places_of_other_kinds_are_never_near():
    assert Place("a", (1.0,) * 10).distance(Place("b", (1.0,) * 10)) == math.inf
