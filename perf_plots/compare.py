"""Two folders of results against each other: what became faster or slower beyond its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from triton_conv.amounts import counted

from .record import OURS, Record
from .store import load
from .style import ratio
from .table import aligned

FASTER, SLOWER, SAME = "faster", "slower", "within both intervals"
# Beside the intervals: clocks and memory differ by as much from one run to the next.
_LEAST = 0.02


@dataclass(frozen=True)
class Change:
    """One case in both folders; times in microseconds."""

    device: str
    title: str
    before: Record
    after: Record

    @property
    def gain(self) -> float:
        """How many times faster the second one is."""
        assert self.before.ours_us is not None and self.after.ours_us is not None
        return self.before.ours_us / self.after.ours_us

    @property
    def verdict(self) -> str:
        """Faster or slower only if the intervals are apart, and the medians by two per cent."""
        before, after = (record.contestants[OURS].interval_us for record in (self.before, self.after))
        if before is None or after is None or abs(self.gain - 1) < _LEAST:
            return SAME
        return FASTER if after[1] < before[0] else SLOWER if after[0] > before[1] else SAME


@dataclass(frozen=True)
class Comparison:
    """Everything about two folders; `lines` is what a person reads."""

    changes: tuple[Change, ...]
    broken: tuple[str, ...]
    lines: tuple[str, ...]

    @property
    def worse(self) -> bool:
        """Whether a case became slower, fails now, or has a file that does not hold up."""
        return bool(self.broken) or any(change.verdict == SLOWER for change in self.changes)


def compare(before: Path, after: Path) -> Comparison:
    """Device by device and case by case. Either folder holds one folder a device."""
    (first, complaints), (second, more) = load(before), load(after)
    lines = [*complaints, *more]
    olds = {(d.name, r.workload.title): r for d in first for r in d.records}
    news = {(d.name, r.workload.title): r for d in second for r in d.records}
    changes, broken, mended = [], [], []
    for key in sorted(set(olds) & set(news)):
        old, new = olds[key], news[key]
        if old.measured != new.measured:
            lines.append(f"not compared: {key[1]} on {key[0]}: one is a rehearsal, whose times are made up")
        elif new.ours_us is None and old.ours_us is not None:
            broken.append(f"FAILS NOW {key[1]} on {key[0]}: {new.error}")
        elif old.ours_us is None and new.ours_us is not None:
            mended.append(f"works now: {key[1]} on {key[0]}, before: {old.error}")
        elif old.ours_us is not None:
            changes.append(Change(*key, old, new))
    if any(not change.before.measured for change in changes):
        lines.append("REHEARSAL: made-up times, not a measurement")
    lines += [*broken, *mended, *_versions(changes), *_table(changes)]
    for what, only in (("first", set(olds) - set(news)), ("second", set(news) - set(olds))):
        if only:
            lines.append(f"in the {what} alone: {', '.join(title for _, title in sorted(only))}")
    if not changes:
        lines.append(f"{before} and {after} have no timed case in common")
    # A result that does not hold up any more is no better than one that fails.
    return Comparison(tuple(changes), (*broken, *more), tuple(lines))


def _table(changes: Sequence[Change]) -> list[str]:
    moved = sorted((c for c in changes if c.verdict != SAME), key=lambda change: change.gain)
    counts = {verdict: sum(c.verdict == verdict for c in changes) for verdict in (SLOWER, FASTER, SAME)}
    total = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    rows = [("case", "device", "before us", "after us", "times as fast", "")]
    rows += [
        (c.title, c.device, f"{c.before.ours_us:.1f}", f"{c.after.ours_us:.1f}", ratio(c.gain), c.verdict)
        for c in moved
    ]
    return [*(aligned(rows) if moved else []), f"{counted(len(changes), 'case')}: {total}"] if changes else []


def _versions(changes: Sequence[Change]) -> list[str]:
    """What else differs between the two than our code: it may be the reason."""
    found = []
    for key in ("device", "driver", "cuda", "torch", "triton"):
        values = dict.fromkeys((str(c.before.provenance.get(key)), str(c.after.provenance.get(key))) for c in changes)
        found += [f"{key} differs: {old} before, {new} after" for old, new in values if old != new]
    return found
