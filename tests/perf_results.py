"""Made-up result files for the tests of figures and page, and what an SVG says."""

import xml.etree.ElementTree as ElementTree

from perf_plots import model_record
from perf_plots.floors import Work
from perf_plots.model_record import COMPILED, CONVERTED, FORCED, GRAPH, PLAIN, ModelRecord, Unit
from perf_plots.record import OURS, Contestant, Record, write
from triton_conv.workloads import find

DEVICE = "h100-80gb-hbm3-132sm"
PROVENANCE = {
    "device": "NVIDIA H100 80GB HBM3", "arch": "sm_90", "sms": 132, "driver": "1.2.3", "cuda": "13.0", "cudnn": 91900,
    "torch": "2.11.0", "triton": "3.6.0", "commit": "0123456789abcdef", "dirty": False,
    "source": "fedcba", "date": "2026-01-02",
}  # fmt: skip


def without_counts(monkeypatch):
    """Figures of what must be computed are the same in every test: where they do not matter, they are not drawn."""
    monkeypatch.setattr("perf_plots.figures.draw_computed", lambda out, say: [])


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


CLOCKS = {
    "before": {"sm_mhz": 1980, "memory_mhz": 2619, "celsius": 41, "watts": 120.0, "throttled": []},
    "after": {"sm_mhz": 1755, "memory_mhz": 2619, "celsius": 63, "watts": 690.0, "throttled": ["power cap"]},
}


def write_models(folder, names, measured=True, device=PROVENANCE["device"]):
    """Made-up results of whole models: eager and compiled, both passes, in both formats but for one-dimensional."""
    paths = []
    for index, name in enumerate(names):
        for last in (True, False) if name != "hifi_gan" else (False,):
            shape = (80, 32) if name == "hifi_gan" else (3, 224, 224)
            for training in (False, True):
                us = 1e4 * (1 + index) * (2 if training else 1)
                eager = {PLAIN: us, CONVERTED: 0.9 * us, FORCED: 1.1 * us}
                if not training:
                    eager |= {PLAIN + GRAPH: 0.8 * us, FORCED + GRAPH: 0.7 * us}
                compiled = {PLAIN: us, PLAIN + COMPILED: 0.6 * us, FORCED + COMPILED: 0.7 * us}
                for mode, times in ((False, eager), (True, compiled)):
                    contestants = {key: contestant(value) for key, value in times.items()}
                    if mode:
                        contestants[CONVERTED + COMPILED] = model_record.Contestant(absent="Unsupported: a graph break")
                    made = ModelRecord(
                        Unit(name, last, mode, training), measured, PROVENANCE | {"device": device}, 32, shape,
                        contestants=contestants, layers={"convolutions": 58, "ours": 18}, reference="float64",
                        clocks=CLOCKS,
                    )  # fmt: skip
                    paths.append(model_record.write(made, folder))
    return paths
