"""What the compiler made of every kernel, from the JSON of `triton-conv inspect`: evidence that needs no device.

    triton-conv inspect --all --target sm_90 --dtype bfloat16 --json FILE
    python -m perf_plots.evidence FILE

The second command adds what can be predicted by counting, and writes the file that the page shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from triton_conv import inspection
from triton_conv.aot import Job
from triton_conv.target import KNOWN
from triton_conv.workloads import FLAGSHIPS, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT

from .provenance import output
from .record import write_bytes

EVIDENCE = Path(__file__).parent / "evidence" / "sm_90.json"
_FIELDS = {
    "kernel": str, "label": str, "target": str, "dtype": str, "tile": str, "registers": int, "spill_bytes": int,
    "shared_bytes": int, "occupancy": float, "wgmma": int, "mma": int, "vector_loads": int,
}  # fmt: skip
# Bytes a second that L2 gives at most: 5120 a clock, as NVIDIA states of the A100, at 1.755 GHz. On an H100 the tiles
# of dilated_d12 were measured at 6.4 TB/s.
_L2_BANDWIDTH = 9.0e12
_PIXELS_BY_CHANNELS = ("implicit_gemm", "implicit_gemm_boxed", "strided_boxed", "transposed_phase")
_CHANNELS_BY_CHANNELS = ("weight_gradient", "weight_gradient_boxed")


class EvidenceError(ValueError):
    """The file is not what `triton-conv inspect --json` writes."""


@dataclass(frozen=True)
class Evidence:
    """The rows as the page shows them, and where they come from."""

    rows: tuple[dict[str, Any], ...]
    source: str


def read_evidence(path: Path) -> Evidence | None:
    """The rows of a file, None where there is none; raises `EvidenceError` naming it.

    Beside "kernels", what `triton-conv inspect` writes, the file may say in "source" with what it was compiled.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        rows = tuple(_row(raw) for raw in content["kernels"])
        return Evidence(rows, str(content.get("source", "")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EvidenceError(f"{path}: {type(error).__name__}: {error}") from error


def _row(raw: dict[str, Any]) -> dict[str, Any]:
    row = {name: kind(raw[name]) for name, kind in _FIELDS.items()}
    matrix = f"{row['wgmma']} wgmma" if row["wgmma"] else f"{row['mma']} mma" if row["mma"] else "none"
    moved, share = raw.get("moved_bytes"), raw.get("predicted_share")
    name, *rest = row["label"].split()
    part = INPUT_GRADIENT if "dx" in rest else WEIGHT_GRADIENT if "dw" in rest else FORWARD
    return row | {
        "kind": next((workload.kind for workload in FLAGSHIPS if workload.name == name), ""),
        "part": part,
        "matrix": matrix,
        "occupancy": f"{row['occupancy']:.0%}",
        "moved": f"{float(moved) / 1e6:.0f}" if moved else "–",
        "share": f"{float(share):.0%}" if share else "–",
        "error": str(raw.get("error", "")),
    }


def moved_bytes(job: Job) -> float | None:
    """Bytes that the tiles of a matrix product ask for in all, each operand once a tile; None for other kernels.

    Every multiplication reads both its factors once a tile, which serves as many as the tile has rows or columns.
    """
    g, sizes = job.problem.geometry, job.tile.asdict()
    if job.kernel in _PIXELS_BY_CHANNELS:
        # A transposed convolution computes each phase of its output by itself.
        rows, columns = g.M / g.phases if g.transposed else g.M, g.c_out_group
    elif job.kernel in _CHANNELS_BY_CHANNELS:
        rows, columns = g.c_out_group, g.c_in_group * (g.taps if sizes.get("FLAT_N") else 1)
    else:
        return None
    if not rows or not columns:
        return None
    reads = -(-rows // sizes["BLOCK_M"]) / rows + -(-columns // sizes["BLOCK_N"]) / columns
    return float(g.flops / 2 * reads * job.problem.itemsize)


def predicted_share(job: Job) -> float | None:
    """Share of the roofline limit if nothing but the arithmetic, memory, and L2 for the tiles took time."""
    moved = moved_bytes(job)
    if moved is None:
        return None
    g, dtype = job.problem.geometry, str(job.problem.dtype).removeprefix("torch.")
    floor = job.target.floor_seconds(g.flops, job.problem.least_bytes, dtype, job.problem.precision)
    return float(floor / max(floor, moved / _L2_BANDWIDTH))


def predicted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `triton-conv inspect`, each with `moved_bytes` and `predicted_share` where they can be counted."""
    targets, dtypes = ({str(row[name]) for row in rows} for name in ("target", "dtype"))
    jobs = inspection.jobs(True, targets=[name for name in KNOWN if name in targets], dtypes=sorted(dtypes))
    known = {(job.kernel, job.label, str(job.tile), job.target.arch, str(job.problem.dtype)): job for job in jobs}
    found = []
    for row in rows:
        job = known.get((row["kernel"], row["label"], row["tile"], row["target"], f"torch.{row['dtype']}"))
        found.append(row | {"moved_bytes": job and moved_bytes(job), "predicted_share": job and predicted_share(job)})
    return found


def main(arguments: list[str] | None = None) -> int:
    """Writes the file that the page shows."""
    parser = argparse.ArgumentParser(prog="python -m perf_plots.evidence", description=__doc__.partition("\n\n")[0])
    parser.add_argument("file", type=Path, help="what triton-conv inspect --json wrote")
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    options = parser.parse_args(arguments)
    try:
        rows = predicted(json.loads(options.file.read_text())["kernels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{options.file} is not what triton-conv inspect --json writes ({type(error).__name__}: {error})")
    commit = (output("git", "rev-parse", "--short=12", "HEAD") or "unknown")[:12]
    source = (
        f"{len(rows)} compilations by Triton {triton.__version__} at commit {commit}. Moved MB: what the tiles of a "
        "matrix product ask of L2 in all, by count; predicted: the share of the limit if nothing but the arithmetic, "
        f"memory, and L2 at {_L2_BANDWIDTH / 1e12:.1f} TB/s took time, an upper bound."
    )
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    write_bytes(options.out, f'{{"source": {json.dumps(source)},\n "kernels": [\n{lines}\n ]}}\n'.encode())
    print(
        f"{len(rows)} rows written to {options.out}, {sum(bool(row['moved_bytes']) for row in rows)} with a prediction"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
