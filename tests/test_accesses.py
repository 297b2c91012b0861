"""Addresses followed through PTX, and what accesses at them cost: banks of shared memory, sectors beyond it."""

import numpy as np
import pytest

from triton_conv import dispatch
from triton_conv.aot import compile_all
from triton_conv.static_model.accesses import Cost, costs
from triton_conv.static_model.demand import CountedJob
from triton_conv.static_model.ptx import accesses
from triton_conv.static_model.sass import parse
from triton_conv.target import KNOWN
from triton_conv.workloads import WEIGHT_GRADIENT, find

HEAD = ".reqntid 64\n{\nmov.u32 %r1, %tid.x;\n"


def followed(lines):
    """What the lines leave in %r9, by thread."""
    text = HEAD + "\n".join([*lines, "st.shared.b32 [ %r9 + 4 ], %r1;"])
    addresses = list(accesses(text, (7, 24), 5))[-1].address
    return None if addresses is None else addresses - 4


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["shl.b32 %r9, %r1, 2;"], lambda t: 4 * t),
        (["bfe.u32 %r9, %r1, 3, 2;"], lambda t: t // 8 % 4),
        (["sub.s32 %r2, 3, %r1;", "shr.s32 %r9, %r2, 1;"], lambda t: (3 - t) >> 1),
        (["sub.s32 %r2, 3, %r1;", "shr.u32 %r9, %r2, 1;"], lambda t: ((3 - t) % 2**32) >> 1),
        (["sub.s32 %r2, 3, %r1;", "div.s32 %r9, %r2, 4;"], lambda t: np.trunc((3 - t) / 4)),
        (["sub.s32 %r2, 3, %r1;", "rem.s32 %r9, %r2, 4;"], lambda t: np.fmod(3 - t, 4)),
        (["mul.lo.s32 %r9, %r1, 1073741824;"], lambda t: ((t + 2) % 4 - 2) * 2**30),
        (["mad.wide.s32 %rd1, %r1, 16, 8;", "cvt.u32.u64 %r9, %rd1;"], lambda t: 16 * t + 8),
        (["and.b32 %r2, %r1, 7;", "xor.b32 %r9, %r2, %r1;"], lambda t: t & ~7),
        (["setp.lt.u32 %p1, %r1, 16;", "selp.b32 %r9, 64, %r1, %p1;"], lambda t: np.where(t < 16, 64, t)),
        (["shr.u32 %r2, %r1, 5;", "shfl.sync.idx.b32 %r9, %r2, 0, 31, -1;"], lambda t: t // 32),
        (["mov.b32 %r2, global_smem;", "add.s32 %r9, %r2, %r1;"], lambda t: t),
        (["ld.param.b32 %r2, [some_kernel_param_1];", "mul.lo.s32 %r9, %r1, %r2;"], lambda t: 24 * t),
        (["mov.u32 %r2, %ctaid.x;", "add.s32 %r9, %r1, %r2;"], lambda t: t + 5),
        # A store leaves its address as it was, and a branch is not taken.
        (["mov.b32 %r9, %r1;", "@%p2 bra $L__BB0_1;", "st.shared.b32 [%r9], %r1;"], lambda t: t),
    ],
)
def test_addresses_follow_from_the_thread(lines, expected):
    assert np.array_equal(followed(lines), expected(np.arange(64)))


@pytest.mark.parametrize(
    "line",
    ["ld.global.b32 { %r9 }, [ %rd1 + 0 ];", "ld.shared.v2.b32 {%r8, %r9}, [%r1];", "cvt.rzi.s32.f32 %r9, %f1;"],
)
def test_addresses_that_follow_from_data(line):
    assert followed(["mov.b32 %r9, %r1;", line]) is None


@pytest.mark.parametrize(
    ("line", "kind", "cost"),
    [
        # Neighbours, one word for all, one bank for all, two by two.
        ("st.shared.b32 [ %r4 + 0 ], %r1;", ("STS", 4), Cost(1)),
        ("ld.shared.b32 %r9, [global_smem+128];", ("LDS", 4), Cost(1)),
        ("ld.shared.b32 %r9, [%r128];", ("LDS", 4), Cost(32)),
        ("ld.shared.b32 %r9, [%r8];", ("LDS", 4), Cost(2)),
        ("st.shared.b16 [%r2], %rs1;", ("STS", 2), Cost(1)),
        ("st.shared.v2.b32 [ %r8 + 0 ], { %r1, %r1 };", ("STS", 8), Cost(2)),
        ("ld.shared.v4.b32 {%r9, %r10, %r11, %r12}, [%r16];", ("LDS", 16), Cost(4)),
        ("ld.shared.v4.b32 {%r9, %r10, %r11, %r12}, [%r128+64];", ("LDS", 16), Cost(32)),
        # Threads that do not take part do not wait.
        ("@%p1 ld.shared.b32 %r9, [%r128];", ("LDS", 4), Cost(8)),
        ("@!%p1 ld.shared.b32 %r9, [%r128];", ("LDS", 4), Cost(24)),
        ("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r9, %r9, %r9, %r9}, [%r16];", ("LDSM", 16), Cost(4)),
        ("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r9, %r9}, [%r128+1024];", ("LDSM", 8), Cost(16)),
        ("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r128], {%r9};", ("STSM", 4), Cost(8)),
        # What is stored goes on in sectors of 32 bytes.
        ("st.global.b32 [ %rd16 + 0 ], { %r1 };", ("STG", 4), Cost(1, 16)),
        ("@%p1 st.global.b16 [ %rd128 + 0 ], { %rs1 };", ("STG", 2), Cost(1, 8)),
        ("cp.async.cg.shared.global [ %r16 + 0 ], [ %rd128 + 0 ], 0x10, %r9;", ("LDGSTS", 16), Cost(4)),
        ("cp.async.ca.shared.global [ %r128 + 0 ], [ %rd8 + 0 ], 0x4;", ("LDGSTS", 4), Cost(32)),
        # Where it is not known, nobody waits.
        ("st.global.v2.b32 [ %rd99 + 0 ], { %r1, %r1 };", ("STG", 8), Cost(2, 8)),
        ("ld.shared.b32 %r9, [%r99];", ("LDS", 4), Cost(1)),
    ],
)
def test_what_an_access_costs(line, kind, cost):
    places = "\n".join(f"mul.lo.s32 %r{n}, %r1, {n};\nmul.wide.s32 %rd{n}, %r1, {n};" for n in (2, 4, 8, 16, 128))
    few = "and.b32 %r3, %r1, 31;\nsetp.lt.s32 %p1, %r3, 8;\n"
    assert costs(f"{HEAD}{places}\n{few}{line}", (), 0) == {kind: [cost]}


def test_machine_code_costs_what_its_ptx_says():
    """The assembler may multiply accesses: each of them costs its share of those of its kind."""
    code = "\n".join(
        f"/*{16 * index:04x}*/ {instruction} ;"
        for index, instruction in enumerate(
            ["STS.64 [R2], R4", "LDG.E.U16 R5, desc[UR4][R2.64]", "LDG.E.U16 R6, desc[UR4][R2.64]"]
            + ["LDSM.16.MT88.4 R4, [R2]"] * 4
            + ["STG.E desc[UR4][R2.64], R6", "EXIT"]
        )
    )
    plain = parse(code).own
    asked = {
        ("STS", 8): [Cost(16)],
        ("LDSM", 16): [Cost(4), Cost(8)],
        ("STG", 4): [Cost(9, 32)],
    }
    found = parse(code, asked).own
    assert plain.wavefronts == 2 + 2 * 1 + 4 * 4 + 1
    assert found.wavefronts == 16 + 2 * 1 + 2 * 4 + 2 * 8 + 9
    assert (plain.stored, found.stored, found.loaded) == (4, 32, plain.loaded)
    assert found.issued == plain.issued


def test_conflicts_of_compiled_kernels():
    """The rows of pixels of dcgan_t2d's weight gradient meet in one bank, and the windows were laid out not to."""
    (layer,) = find("dcgan_t2d")
    work = next(part for part in layer.parts() if part.part == WEIGHT_GRADIENT)
    target = KNOWN["sm_90"]
    plans = [
        dispatch.plan(work.problem(), target, kernel=name)
        for name in ("weight_gradient_rows", "weight_gradient_windows")
    ]
    jobs = [CountedJob(plan.kernel.name, plan.problem, plan.tile, target) for plan in plans]
    found = {index: row.loop.innermost().own for index, row in compile_all(jobs)}
    assert found[0].wavefronts > 8 * found[0].memory
    assert found[1].wavefronts < 5 * found[1].memory
