"""The static model: machine code read right, loops counted right, times put together, the command that prints them."""

import json
import math
from dataclasses import replace

import pytest

from triton_conv import aot, cli, configs, dispatch
from triton_conv.errors import WorkloadError
from triton_conv.static_model.demand import CountedJob, Demand, matched, of_row, total
from triton_conv.static_model.machine import MACHINES, TERMS, of_target
from triton_conv.static_model.rows import goal, planned, waiting
from triton_conv.static_model.sass import parse
from triton_conv.static_model.trips import trips
from triton_conv.target import KNOWN
from triton_conv.workloads import FLAGSHIPS, LECTURES, find

H100, MACHINE = KNOWN["sm_90"], MACHINES["sm_90"]

LISTING = """
        .type           some_kernel,@function
some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E.U16 R8, desc[UR4][R2.64] ;
.L_x_0:
        /*0030*/                   FFMA R9, R4, R5, R9 ;
        /*0040*/                   IMAD.WIDE R10, R11, 0x2, R12 ;
        /*0050*/                   ISETP.GE.AND P1, PT, R3, 0x4, PT ;
        /*0060*/                   MUFU.RCP R3, R4 ;
        /*0070*/               @P1 BRA `(.L_x_0) ;
        /*0080*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64], P0 ;
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*00a0*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0 ;
        /*00b0*/                   UTMALDG.3D [UR8], [UR4], desc[UR6] ;
        /*00c0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_5:
        /*00d0*/               @P2 BRA `(.L_x_1) ;
        /*00e0*/                   STG.E.64 desc[UR4][R2.64], R6 ;
        /*00f0*/               @P3 EXIT ;
        /*0100*/                   STL [R1], R6 ;
        /*0110*/                   EXIT ;
.L_x_2:
        /*0120*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R3 ;
        /*0130*/               @P1 BRA `(.L_x_5) ;
        /*0140*/                   BRA `(.L_x_2) ;
.L_x_3:
        /*0150*/                   BRA `(.L_x_3) ;
        /*0160*/                   FFMA R9, R4, R5, R9 ;
"""


def test_loops_and_pipes_of_a_listing():
    whole = parse(LISTING)
    (outer,) = whole.inner
    (inner,) = outer.inner
    assert whole.depth == 2
    assert whole.innermost() is inner
    assert (inner.own.issued, inner.own.fma, inner.own.imad, inner.own.alu, inner.own.xu) == (5, 1, 1, 1, 1)
    assert (outer.own.loaded, outer.own.copied, outer.own.boxes, outer.own.barriers) == (18, 16, 1, 1)
    # What waits behind the last exit is none of the loop's.
    assert (whole.own.issued, whole.own.stored, whole.own.spilled) == (5, 8, 4)
    assert whole.once().fma == 1


def test_a_store_that_a_loop_skips_in_most_trips():
    code = """
.L_x_0:
        /*0000*/                   FFMA R9, R4, R5, R9 ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   IADD3 R2, R2, R3, RZ ;
        /*0030*/                   STG.E.64 desc[UR4][R2.64], R6 ;
.L_x_1:
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
"""
    (loop,) = parse(code).inner
    assert (loop.own.issued, loop.own.stored) == (5, 8)
    assert (loop.storing.issued, loop.storing.stored) == (2, 8)
    assert parse(LISTING).innermost().storing.issued == 0


def test_products_and_clocks_of_a_listing():
    outer = parse(LISTING).inner[0].own
    assert outer.products == 64 * 64 * 16 / 4 + 64 * 16 * 16 / 4
    # Both from shared memory, 32 clocks either way; the left one from registers, 8.
    assert outer.tensor == (32 + 8) / 4


def chained(*code):
    lines = "".join(f"        /*{i:04x}*/                   {line} ;\n" for i, line in enumerate((*code, "EXIT")))
    return parse(lines).own.chain


def test_loads_that_wait_for_each_other():
    load, other = "LDG.E R4, desc[UR4][R2.64]", "LDG.E.64 R6, desc[UR4][R10.64]"
    assert chained("FFMA R1, R2, R3, R4") == 0
    assert chained(load, other) == 1
    follow = "IMAD.WIDE R10, R4, 0x2, R8"
    assert chained(load, follow, other) == 2
    assert chained(load, follow, other, "IADD3 R2, R7, R8, RZ", load) == 3
    assert chained(load, "MOV R4, R9", follow, other) == 1
    assert chained(load, "STS [R20], R4", "LDS R4, [R21]", follow, other) == 2
    assert chained(load, "STG.E desc[UR4][R10.64], R4", other) == 1


def test_totals_go_by_trips():
    whole = parse(LISTING)
    found = total(whole, (10, 3))
    assert found.fma == 30
    assert found.barriers == 10
    assert found.stored == 8


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((7, 3), (7, 3)), ((7, 1, 3), (7, 3)), ((1, 5), (1, 5)), ((9, 4, 2), (9, 4)), ((6,), (6, 1))],
)
def test_loops_that_the_compiler_left(counts, expected):
    assert matched(parse(LISTING), counts) == expected


# What a kernel multiplies may exceed the useful products by this much: bands are mostly zeros, slabs block diagonals.
_WASTE = {"depthwise": 40.0, "grouped": 16.0}
_COUNTED = [
    pytest.param(part, id=part.title, marks=() if part.title in quick else pytest.mark.slow)
    for quick in [{"dilated_d4-bfloat16-nhwc"}]
    for workload in find(
        "dilated_d4,mobile_dw5,convnext_dw7,narrow_groups_8,decoder_t2d,dcnv2,wide_groups_56,large_dw2d,local2d,separable_56"
    )
    for part in workload.parts()
]


def launched(workload):
    made = dispatch.plan(workload.problem(), H100)
    job = CountedJob(made.kernel.name, made.problem, made.tile, H100)
    ((_, row),) = aot.compile_all([job], processes=1)
    assert not row.error
    return made, job, row


@pytest.mark.parametrize("workload", _COUNTED)
def test_trips_agree_with_the_machine_code(workload):
    """As many multiplications as the sum over programs has: loops are counted right, and none is counted twice."""
    made, job, row = launched(workload)
    counts = trips(job.kernel, job.problem, job.tile)
    assert row.loop.depth <= len(counts)
    slots = total(row.loop, matched(row.loop, counts))
    done = made.grid * job.tile.num_warps * (slots.products or 32 * slots.fma)
    useful = job.problem.flops / 2
    # The depthwise half of a separable convolution is no matrix product.
    least = 0.9 if workload.kind == "separable" else 0.99
    assert useful * least <= done <= useful * _WASTE.get(workload.kind, 2.6), (done / useful, made)
    launch = of_row(row, job)
    seconds, binds = MACHINE.predict(launch.demand)
    floor = MACHINE.limits(H100).floor_seconds(job.problem.flops, job.problem.least_bytes, workload.dtype)
    assert binds in TERMS
    assert 0.9 * floor < seconds < 1e3 * floor


# ------------------------------------------------------------------------------------------------------------ the times


def demand(**values):
    return Demand(**(dict.fromkeys(Demand.__dataclass_fields__, 0.0) | values))


@pytest.mark.parametrize(
    ("values", "binds"),
    [
        ({"device_bytes": 3e9, "l2_bytes": 3e9}, "device"),
        ({"device_bytes": 1e9, "l2_bytes": 1e11}, "l2"),
        ({"issued": 1e6, "tensor": 1e5}, "issue"),
        ({"tensor": 1e6, "integer": 1e5}, "tensor"),
        ({"waits": 1e4, "issued": 1e5}, "latency"),
    ],
)
def test_the_largest_term_binds(values, binds):
    seconds, found = MACHINE.predict(demand(**values))
    terms = MACHINE.seconds(demand(**values))
    assert found == binds
    assert max(terms.values()) + MACHINE.launch <= seconds <= sum(terms.values()) + MACHINE.launch


def test_more_work_takes_longer():
    few, more = demand(issued=1e5, l2_bytes=1e8), demand(issued=2e5, l2_bytes=1e8)
    assert MACHINE.predict(few) < MACHINE.predict(more)
    assert replace(MACHINE, l2=2 * MACHINE.l2).predict(few) < MACHINE.predict(few)


def test_no_model_of_what_was_not_measured():
    with pytest.raises(WorkloadError, match=r"'sm_100'.*choose sm_90"):
        of_target("sm_100")


def test_goals():
    named = {part.title: goal(part) for w in FLAGSHIPS + LECTURES for part in w.parts()}
    assert named["causal_dw1d-bfloat16-nchw"] == named["causal_dw1d-bfloat16-nchw-dx"] == 0.9
    assert named["causal_dw1d-bfloat16-nchw-dw"] == 0.7
    assert named["local2d-bfloat16-nhwc"] == 0.85
    assert named["dcnv2-bfloat16-nhwc"] is None


# ---------------------------------------------------------------------------------------------------------- the command


def test_inspect_a_workload(tmp_path, capsys):
    file = tmp_path / "predicted.json"
    assert cli.main(["inspect", "--workload", "narrow_groups_8", "--part", "forward", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    for word in ("narrow_groups_8", "grouped_packed", "floor", "predicted", "computed, not measured", "innermost loop"):
        assert word in printed
    (row,) = json.loads(file.read_text())["predictions"]
    assert row["floor_us"] < row["predicted_us"] < 20 * row["floor_us"]
    assert row["share"] == pytest.approx(row["floor_us"] / row["predicted_us"])
    assert set(row["terms"]) == set(TERMS)
    assert row["slots_per_output"] > 1
    # The tile is one that was measured: the model may be wrong in public.
    assert row["measured_us"] is None or 0.3 < row["predicted_us"] / row["measured_us"] < 3
    assert math.isfinite(row["waves"])


def test_forms_that_wait_for_a_measurement(monkeypatch, capsys):
    device, _ = of_target("sm_90")
    (layer,) = [w for w in FLAGSHIPS if w.title == "dilated_d36-bfloat16-nhwc"]
    (form,) = waiting(layer, device)
    assert form.kernel.name == "implicit_gemm_persistent"
    assert planned(layer, device)[0].kernel.name != form.kernel.name
    # Once a time of it is stored it waits no more.
    entry = configs.Entry(form.tile, 100.0, (99.0, 101.0), 110.0, 0.0, 1)
    file = configs.ConfigFile(form.kernel.name, device, entries={form.problem.describe(): entry})
    monkeypatch.setattr(configs, "files", lambda kernel, target: (("user", file),))
    assert not waiting(layer, device)
    assert cli.main(["inspect", "--workload", "dcnv2", "--waiting"]) == 0
    assert "no form of dcnv2 waits for a measurement on sm_90" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--waiting"], "forms wait for a measurement of a workload"),
        (["--workload", "dcnv2", "--target", "sm_100"], "no static model of 'sm_100'"),
        (["--workload", "dcnv2", "--target", "sm_90", "--target", "sm_80"], "expected one with --workload"),
        (["--workload", "dcnv2", "--all"], "--all, --kernel and --dtype go without one"),
        (["--part", "dx"], "only a workload has parts"),
        (["--workload", "nonsense"], "'nonsense' is not known"),
    ],
)
def test_inspect_refuses(words, message, capsys):
    assert cli.main(["inspect", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
