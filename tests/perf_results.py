"""Made-up result files for the tests of figures and page, and what an SVG says."""

import xml.etree.ElementTree as ElementTree

from perf_plots.floors import Work
from perf_plots.record import OURS, Contestant, Record, write
from triton_conv.workloads import find

DEVICE = "h100-80gb-hbm3-132sm"
PROVENANCE = {
    "device": "NVIDIA H100 80GB HBM3", "arch": "sm_90", "sms": 132, "driver": "1.2.3", "cuda": "13.0", "cudnn": 91900,
    "torch": "2.11.0", "triton": "3.6.0", "commit": "0123456789abcdef", "dirty": False,
    "source": "fedcba", "date": "2026-01-02",
}  # fmt: skip


def contestant(us):
    return Contestant(tuple(us + i % 3 for i in range(20)), (us, us + 2), 0.001)


def record(name, times, absent=None, **changes):
    """A record with these medians less one, in microseconds."""
    (workload,) = find(name)
    contestants = {key: contestant(us) for key, us in times.items()}
    contestants |= {key: Contestant(absent=why) for key, why in (absent or {}).items()}
    fields = {
        "floor_us": 40.0,
        "standard_floor_us": 160.0,
        "floor_basis": "datasheet",
        "plan": {"source": "analytic default"},
    }
    return Record(workload, True, Work.of(workload), PROVENANCE, contestants=contestants, **fields | changes)


def text_of(path):
    """All the text in an SVG, as a viewer would show it."""
    return " ".join(
        " ".join(element.itertext()) for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    )


def write_results(root):
    """A win, a loss, absent baselines, a failed case, one that was not run, and a file that is broken."""
    folder = root / DEVICE
    for made in (
        record("narrow_groups_4", {OURS: 100, "cudnn": 250, "cudnn other format": 300, "standard": 400}),
        record(
            "convnext_dw7", {OURS: 100, "cudnn": 79, "standard": 900}, {"cudnn other format": "RuntimeError: no engine"}
        ),
        record("dcnv2", {OURS: 100, "standard": 90}, {"torchvision": "not importable", "cudnn": "has none"}),
        record("dilated_1d", {}, error="CheckError: relative error 0.5 exceeds 0.004"),
    ):
        write(made, folder)
    (folder / "broken.json").write_text('{"schema": 1, "measu')
    return root
