"""What the count of shared memory says of a tile and what the compiler takes: `python -m perf_plots.shared_memory`.

    python -m perf_plots.shared_memory --compiles 300   # compile so many tiles an architecture, add them to the table
    python -m perf_plots.shared_memory                  # fit the constants to the table, and judge those of the code

The compiler runs up to the allocation of shared memory, which is a tenth of a compilation. The table of what it took is
kept, so that the constants (`kernels.staging.STAGING`) are fitted again in seconds, and for another version of Triton
with one more table (`--table`). Ends with status 1 if a tile that does not fit was counted as fitting.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import triton

from triton_conv.amounts import number
from triton_conv.aot import Pool
from triton_conv.autotune.allocation import AllocationJob
from triton_conv.autotune.space import SPACES
from triton_conv.dispatch import forms
from triton_conv.kernels import KERNELS, Tile
from triton_conv.kernels import staging as counting
from triton_conv.problem import Problem
from triton_conv.target import KNOWN
from triton_conv.workloads import FLAGSHIPS, LECTURES, Workload

from .record import write_bytes

TABLE = Path(__file__).parent / "evidence" / "shared_memory.json"
_SECONDS_PER_JOB = 30.0
_NEVER = 1 << 30


@dataclass(frozen=True)
class Row:
    """One tile of one workload: bytes of shared memory that the compiler took for it."""

    arch: str
    kernel: str
    workload: str
    tile: tuple[int | bool, ...]
    taken: int


def workloads() -> dict[str, Workload]:
    """The layers whose tiles are drawn, by title: flagships, lectures, gradients, also in float32 and other formats."""
    found: dict[str, Workload] = {}
    for workload in FLAGSHIPS + LECTURES:
        for part in workload.parts():
            for variant in [part, *part.variants(("float32",), both_formats=True)]:
                found.setdefault(variant.title, variant)
    return found


def draw(arch: str, count: int, seed: int) -> Iterator[tuple[str, AllocationJob]]:
    """Tiles that nothing but shared memory could rule out, at least half of them where it may."""
    target, chance, known = KNOWN[arch], random.Random(seed), workloads()
    titles, problems = sorted(known), dict[str, Problem]()
    own = [title for title in titles if known[title].dtype == "bfloat16"]
    drawn = 0
    while drawn < count:
        # Mostly the layers as they are tuned.
        title = chance.choice(own if chance.random() < _SHARE_OF_OWN else titles)
        problem = problems.setdefault(title, known[title].problem())
        kernel = chance.choice(forms(problem, target)[0])
        tile = kernel.tile_type(**{name: chance.choice(values) for name, values in SPACES[kernel.name].items()})
        share = tile.shared_bytes(problem) / target.shared_bytes if tile.mismatch(problem) is None else 0.0
        roomy = replace(target, shared_bytes=_NEVER)
        if not 0.05 < share < 2.5 or tile.unfit(problem, roomy) or (share < 0.4 and drawn % 2 == 0):
            continue
        drawn += 1
        yield title, AllocationJob(kernel.name, problem, tile, target)


_SHARE_OF_OWN = 0.8


def compiled(arch: str, count: int, seed: int, processes: int) -> list[Row]:
    """Rows of tiles drawn for an architecture; those that do not compile tell nothing."""
    drawn = list(draw(arch, count, seed))
    pool, rows = Pool(processes, _SECONDS_PER_JOB), []
    try:
        for index, (_, job) in enumerate(drawn):
            pool.submit(index, job, (index,))
        while pool.waiting:
            index, result = pool.take()
            title, job = drawn[index]
            if not result.error:
                rows.append(Row(arch, job.kernel, title, tuple(job.tile.asdict().values()), result.shared_bytes))
    finally:
        pool.close()
    return rows


def read_table(path: Path) -> tuple[str, list[Row]]:
    """(version of Triton, rows) of a table."""
    content = json.loads(path.read_text())
    names = content["workloads"]
    return content["triton"], [
        Row(arch, kernel, names[title], tuple(tile), taken) for arch, kernel, title, tile, taken in content["rows"]
    ]


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """One line a row, with titles by number."""
    ordered = sorted(dict.fromkeys(rows), key=str)
    names = sorted({row.workload for row in ordered})
    place = {name: i for i, name in enumerate(names)}
    lines = ",\n".join(
        json.dumps([row.arch, row.kernel, place[row.workload], list(row.tile), row.taken], separators=(",", ":"))
        for row in ordered
    )
    head = f'{{"triton": {json.dumps(triton.__version__)},\n"workloads": {json.dumps(names)},\n"rows": [\n'
    write_bytes(path, (head + lines + "\n]}\n").encode())


Case = tuple[Row, Tile, Problem]


def cases(rows: Sequence[Row]) -> list[Case]:
    """The rows with their tiles and problems, of today's kernels."""
    known, problems, found = workloads(), dict[str, Problem](), []
    for row in rows:
        names = list(KERNELS[row.kernel].safe_tile.asdict())
        if row.workload in known and len(names) == len(row.tile):
            problem = problems.setdefault(row.workload, known[row.workload].problem())
            found.append((row, KERNELS[row.kernel].tile_type(**dict(zip(names, row.tile, strict=True))), problem))
    return found


def judged(found: Sequence[Case], arch: str) -> dict[str, Any]:
    """How often the count was wrong on an architecture: an overflow missed, a tile refused that fits, a low count."""
    target, tally, examples = KNOWN[arch], Counter[str](), []
    for row, tile, problem in found:
        if row.arch != arch:
            continue
        counted = tile.shared_bytes(problem, target)
        fits, counted_fits = row.taken <= target.shared_bytes, counted <= target.shared_bytes
        tally["compiled"] += 1
        tally["exact"] += row.taken <= counted <= row.taken + _SLACK
        tally["missed"] += counted_fits and not fits
        tally["false_alarms"] += fits and not counted_fits
        tally["undercounted"] += row.taken > counted
        if fits != counted_fits:
            examples.append(f"{row.kernel} {row.workload} {tile}: counted {counted}, takes {row.taken}")
    names = ("compiled", "exact", "missed", "false_alarms", "undercounted")
    share = round(tally["false_alarms"] / max(tally["compiled"], 1), 4)
    return {name: tally[name] for name in names} | {"false_alarm_share": share, "examples": examples[:10]}


# Barriers, and what little else a count rounds up.
_SLACK = 2048


def fitted(found: Sequence[Case], arch: str) -> tuple[counting.Staging, int]:
    """The constants with the fewest false alarms among those that miss nothing (else the fewest), and how many fit as
    well: what the code has is preferred to its equals, and then the smallest count."""
    kept, before = dict(counting.STAGING), counting.staging_of(KNOWN[arch])
    mine, best = [case for case in found if case[0].arch == arch], []
    choices = product((_NEVER, 64), (0, 4, 8, 16), (1, 2), (False, True), (2, 4, 8))
    try:
        for rows, copied, passed, turns, turned in choices:
            rule = replace(before, rows=rows, copied=copied, passed=passed, turns=turns, turned=turned)
            counting.STAGING[arch] = rule
            result = judged(mine, arch)
            total = sum(tile.shared_bytes(problem, KNOWN[arch]) for _, tile, problem in mine)
            best.append(((result["missed"], result["false_alarms"], rule != before, total), rule))
    finally:
        counting.STAGING.clear()
        counting.STAGING.update(kept)
    ranked = sorted(best, key=lambda item: item[0])
    return ranked[0][1], sum(item[0][:2] == ranked[0][0][:2] for item in ranked)


def figures(path: Path = TABLE) -> dict[str, Any]:
    """Of each architecture in a table, how the code's count does, and what would do best."""
    version, rows = read_table(path)
    found = cases(rows)
    result: dict[str, Any] = {"triton": version}
    for arch in KNOWN:
        if any(row.arch == arch for row in rows):
            rule, equals = fitted(found, arch)
            result[arch] = judged(found, arch) | {
                "fitted": repr(rule), "as_in_the_code": rule == counting.staging_of(KNOWN[arch]),
                "equally_good": equals,
            }  # fmt: skip
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m perf_plots.shared_memory", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--table", type=Path, default=TABLE, metavar="FILE")
    parser.add_argument("--compiles", type=int, default=0, metavar="N", help="compile so many tiles an architecture")
    parser.add_argument("--seed", type=int, default=0, help="which tiles are drawn")
    parser.add_argument("--processes", type=number, default=1, metavar="N")
    parser.add_argument("--arch", choices=KNOWN, action="append", help="only this architecture (repeatable)")
    options = parser.parse_args(argv)
    for arch in (options.arch or KNOWN) if options.compiles else ():
        version, known = read_table(options.table) if options.table.is_file() else (triton.__version__, [])
        if version != triton.__version__:
            parser.error(f"--table: {options.table} is of Triton {version}, this is {triton.__version__}")
        write_table(options.table, known + compiled(arch, options.compiles, options.seed, options.processes))
    result = figures(options.table)
    print(json.dumps(result, indent=1))
    return 1 if any(row["missed"] for row in result.values() if isinstance(row, dict)) else 0


if __name__ == "__main__":
    sys.exit(main())
