"""`python -m perf_plots.comparisons`: ours against torch's own, from result files, for the modules to decide by.

Writes `<store>/<vendor>-<arch>/<device>-<SMs>sm/comparisons.json` for every device with results: by layer, the median
of ours and of torch's own function in the memory format of the workload (of deformable convolution, torchvision's)
for the forward pass and for each gradient. With `--store autotune_configs` they ship with the package; by default
they go to the user's own folder, like tiles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from triton_conv import comparisons, configs
from triton_conv.amounts import counted
from triton_conv.comparisons import Comparison, Signature, Times
from triton_conv.target import Target, board
from triton_conv.workloads import LECTURE_KINDS

from .record import COMMITTED, Record, write_json
from .store import DeviceResults, load

_PROVENANCE = ("device", "driver", "cuda", "cudnn", "torch", "triton", "commit", "dirty", "source", "date")


def target_of(results: DeviceResults) -> Target:
    """The device that results were measured on, as far as its folder and its file name it."""
    provenance = results.records[0].provenance
    name = str(provenance["device"])
    vendor = "nvidia" if name.startswith("NVIDIA ") else "amd"
    return Target(vendor, str(provenance["arch"]), board(name), int(provenance["sms"]), 0)


def compare(results: DeviceResults) -> tuple[dict[Signature, Comparison], list[Mapping[str, Any]]]:
    """Every layer with a time of ours and either a time of torch's or the knowledge that it has none; and the runs."""
    runs: list[Mapping[str, Any]] = []
    parts: dict[Signature, dict[str, Times]] = {}
    for record in results.records:
        if not record.measured or record.ours_us is None or record.plan is None:
            continue
        # A separable convolution is no depthwise one, though it begins with one; a step is the sum of its parts.
        if record.workload.kind in LECTURE_KINDS or record.workload.part not in comparisons.PARTS:
            continue
        known, torch_us = _torchs(record)
        if not known:
            continue
        run = {name: record.provenance.get(name) for name in _PROVENANCE if name != "date"}
        run["date"] = str(record.provenance.get("date"))[:10]
        if run not in runs:
            runs.append(run)
        signature = Signature.of(record.workload.layer.problem())
        times = Times(record.ours_us, torch_us, record.plan["kernel"], record.plan["kernel_hash"], runs.index(run))
        parts.setdefault(signature, {})[record.workload.part] = times
    return {signature: Comparison(signature, found) for signature, found in parts.items()}, runs


def _torchs(record: Record) -> tuple[bool, float | None]:
    """Whether it is known what torch's own function takes, and its time; None where there is no such function."""
    name = "torchvision" if record.workload.offset_groups else "cudnn"
    other = record.contestants.get(name)
    if other is None:
        return False, None
    if other.samples_us:
        return True, other.median_us
    # A library that was not installed, or ran out of memory, may be the faster one elsewhere.
    return "not implemented for" in other.absent, None


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if a result file had to be left out; the rest is written all the same."""
    parser = argparse.ArgumentParser(prog="python -m perf_plots.comparisons", description=__doc__)
    parser.add_argument("--results", type=Path, default=COMMITTED, help="folder of results, one folder a device in it")
    parser.add_argument("--store", type=Path, default=configs.user_folder(), help="folder of configurations")
    options = parser.parse_args(arguments)
    devices, complaints = load(options.results)
    measured = [results for results in devices if results.measured]
    if not (measured or complaints):
        parser.error(f"argument --results: {options.results} holds nothing that was measured")
    for results in measured:
        found, runs = compare(results)
        target = target_of(results)
        path = comparisons.path(options.store, target)
        write_json(path, comparisons.to_json(target, found, runs))
        totals = [comparison.total(training=False) for comparison in found.values()]
        faster = sum(not isinstance(total, str) and (total[1] is None or total[0] < total[1]) for total in totals)
        print(f"{path}: {counted(len(found), 'layer')}, ours faster in the forward pass of {faster}")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
