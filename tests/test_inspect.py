"""What the compiler makes of the kernels, with no GPU: a subset here, `triton-conv inspect --all` for the rest."""

import json
import os
from dataclasses import replace

import pytest

from triton_conv import aot, cli, inspection
from triton_conv.target import KNOWN


def compiled(jobs):
    rows = dict(aot.compile_all(jobs))
    return [rows[index] for index in range(len(jobs))]


def test_every_kernel_compiles_cleanly_for_hopper():
    jobs = inspection.jobs(targets=("sm_90",))
    assert {job.kernel for job in jobs} == set(cli.KERNELS)
    for job, row in zip(jobs, compiled(jobs), strict=True):
        assert inspection.complaints(job, row) == [], row
        assert row.registers > 0
        assert 0 < row.occupancy <= 1
        # A measured tile has shown what smaller products cost.
        few = job.label.startswith("deepface_local") or "grouped_slab" in job.kernel or job.measured
        assert bool(row.wgmma) == row.uses_dot or few, "half precision products of 64 rows use Hopper's matrix unit"
        # Scratch of a layout conversion may take shared memory where the count knows of none; never more than counted.
        assert row.shared_bytes <= job.tile.shared_bytes(job.problem, job.target)


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_100", "gfx90a", "gfx942", "gfx950"])
@pytest.mark.slow
def test_every_kernel_compiles_cleanly_elsewhere(target):
    jobs = inspection.jobs(targets=(target,))
    for job, row in zip(jobs, compiled(jobs), strict=True):
        assert inspection.complaints(job, row) == [], row


@pytest.mark.smoke
def test_json_has_a_row_a_kernel(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert cli.main(["inspect", "--kernel", "depthwise", "--target", "sm_90", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["kernels"]
    # In each memory format a layer, and its input gradient, which is a forward convolution too; of a stride it is none.
    assert [row["label"].removesuffix(" (default)") for row in rows] == [
        "mobile_dw5 NCHW", "mobile_dw5 NCHW dx", "mobile_dw5s2 NCHW", "convnext_dw7 NHWC", "convnext_dw7 NHWC dx",
    ]  # fmt: skip
    row = rows[0]
    wanted = "kernel target dtype tile registers spill_bytes shared_bytes occupancy uses_dot"
    assert {*wanted.split(), "wgmma", "vector_loads", "tma", "warnings", "error"} <= set(row)
    assert (row["kernel"], row["target"], row["error"], row["warnings"]) == ("depthwise", "sm_90", "", [])
    assert "5 compiled, 0 complaints" in capsys.readouterr().out


def test_complaints_name_what_is_wrong():
    measured = inspection.jobs(kernels=("implicit_gemm",), targets=("sm_90",))[0]
    job = replace(measured, measured=False)
    good = aot.Compiled("implicit_gemm", "sm_90", "bfloat16", "", uses_dot=True, wgmma=4, vector_loads=8)
    assert inspection.complaints(job, good) == []
    assert inspection.complaints(replace(job, measured=True), replace(good, spill_bytes=8)) == [], "its time is known"
    for change, phrase in (
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"warnings": ("C7515",)}, "C7515"),
        ({"wgmma": 0}, "no wgmma"),
        ({"vector_loads": 0}, "no 16-byte load"),
        ({"shared_bytes": 10**6}, "shared memory, more than counted"),
        ({"error": "boom"}, "boom"),
    ):
        (complaint,) = inspection.complaints(job, replace(good, **change))
        assert phrase in complaint


def test_an_impossible_tile_is_an_error_not_a_crash():
    job = inspection.jobs(kernels=("implicit_gemm",), targets=("sm_90",))[0]
    # A product of fewer than 16 channels does not exist; the job after it is served all the same.
    bad = replace(job, tile=replace(job.tile, BLOCK_K=8))
    first, second = compiled([bad, job])
    assert first.error
    assert not second.error


def test_a_compiler_that_takes_too_long_is_killed():
    job = inspection.jobs(kernels=("depthwise",), targets=("sm_90",))[0]
    ((_, row),) = aot.compile_all([job], processes=1, seconds=0.01)
    assert "no result within 0.01 s" in row.error


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "expected"),
    [(4, 32, 0, 1.0), (4, 128, 0, 0.25), (8, 255, 0, 0.125), (4, 64, 100 * 1024, 0.125), (8, 64, 227 * 1024, 0.125)],
)
def test_occupancy_of_hopper(warps, registers, shared, expected):
    assert aot.occupancy(KNOWN["sm_90"], warps, registers, shared) == expected


def test_workers_compile_although_this_process_interprets():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("this process does not interpret")
    job = inspection.jobs(kernels=("depthwise",), targets=("sm_90",))[0]
    ((_, row),) = aot.compile_all([job], processes=1)
    assert not row.error
    assert row.registers > 0
