"""The journal: one line for each trial, appended when it is done, and read by the next run and by what judges runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..configs import kernel_hash
from ..errors import ConfigError, TrialsError
from ..kernels import KERNELS
from ..problem import Problem
from ..target import Target
from .lab import Trial
from .search import Candidate
from .store import naming, write_text

NAME, PARTS = "trials.jsonl", "trials-*.jsonl"

Table = dict[Candidate, Trial]
"""What became of each candidate of one problem."""


def _is_trial(row: object) -> bool:
    return isinstance(row, dict) and {"problem", "kernel", "kernel_hash", "tile"} <= set(row)


def read_trials(path: Path) -> list[dict[str, object]]:
    """The rows of a journal; a last line that was cut off is left out. Raises `TrialsError` for anything else."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise TrialsError(f"{path}: no readable file of trials ({error})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not _is_trial(row):
                raise TypeError("not a trial")
        except (ValueError, TypeError) as error:
            if number == len(lines):  # of a process that was killed
                continue
            raise TrialsError(f"{path}: line {number} is not a trial ({error})") from error
        rows.append(row)
    return rows


def candidate_of(row: Mapping[str, object]) -> Candidate | None:
    """The candidate of a row; None if the kernel or its tile's parameters are others by now."""
    name, tile = str(row["kernel"]), row["tile"]
    if name not in KERNELS or not isinstance(tile, dict):
        return None
    try:
        return Candidate(name, KERNELS[name].tile_type(**tile))
    except (TypeError, ConfigError):
        return None


def trial_of(row: Mapping[str, object]) -> Trial:
    """What a row says became of its candidate."""
    if "failure" in row:
        return Trial(failure=str(row["failure"]))
    return Trial(float(str(row["time_us"])), float(str(row["relative_error"])))


def tables(rows: Sequence[Mapping[str, object]]) -> dict[str, Table]:
    """The table of each problem by its description; of several trials of one candidate the fastest counts."""
    found: dict[str, Table] = {}
    for row in rows:
        if (candidate := candidate_of(row)) is None:
            continue
        table, trial = found.setdefault(str(row["problem"]), {}), trial_of(row)
        known = table.get(candidate)
        # Noise only adds: the host interrupts a run, and never hurries it.
        if known is None or known.failure or trial.time_us < known.time_us:
            table[candidate] = trial
    return found


class Journal:
    """The trials of one device; `path` None keeps none. Those in the files `known` are known too."""

    def __init__(self, path: Path | None, target: Target, known: Sequence[Path] = ()) -> None:
        self._path, self._device = path, target.config_folder
        self._known = [file for file in (*known, path) if file is not None]
        self._rows: list[dict[str, object]] | None = None

    @property
    def count(self) -> int:
        """How many trials are known, those written by now among them."""
        return len(self._good())

    def known(self, problem: Problem) -> Iterator[tuple[Candidate, Trial]]:
        """Earlier trials of a problem, by the kernels' code of today on this device."""
        for row in self._good():
            if row["problem"] == problem.describe() and (candidate := candidate_of(row)) is not None:
                yield candidate, trial_of(row)

    def tables(self) -> dict[str, Table]:
        """All of them by problem, those written by now among them."""
        return tables(self._good())

    def _good(self) -> list[dict[str, object]]:
        if self._rows is None:
            self._rows = [row for path in self._known for row in _read(path) if self._is_ours(row)]
        return self._rows

    def _is_ours(self, row: dict[str, object]) -> bool:
        if row.get("device", self._device) != self._device or row["kernel"] not in KERNELS:
            return False
        return row["kernel_hash"] == kernel_hash(str(row["kernel"]))

    def write(self, workload: str, problem: Problem, candidate: Candidate, trial: Trial) -> None:
        """Appends one trial, in one write: of a process that is killed at most this line is lost."""
        row: dict[str, object] = {
            "workload": workload,
            "problem": problem.describe(),
            "device": self._device,
            "kernel": candidate.kernel,
            "kernel_hash": kernel_hash(candidate.kernel),
            "tile": candidate.tile.asdict(),
        }
        if trial.failure:
            row |= {"failure": trial.failure}
        else:
            row |= {"time_us": trial.time_us, "relative_error": trial.relative_error}
        self._good().append(row)
        if self._path is None:
            return
        line = json.dumps(row).encode() + b"\n"
        with naming(self._path), self._path.open("ab+") as file:
            if file.tell() and self._cut_off():
                line = b"\n" + line
            file.write(line)

    def _cut_off(self) -> bool:
        """Whether the last line lacks its end: the process that wrote it was killed, or the disk was full."""
        assert self._path is not None
        with self._path.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) != b"\n"


def _read(path: Path) -> Iterator[dict[str, object]]:
    if not path.is_file():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a line that a process was killed over
            continue
        if _is_trial(row):
            yield row


def append(source: Path, goal: Path) -> int:
    """Adds the trials of a journal that another one lacks, all or none of them; how many they were."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    known = goal.read_text(errors="replace").splitlines() if goal.is_file() else []
    before = set(known)
    lines = [line for line in dict.fromkeys(map(json.dumps, _read(source))) if line not in before]
    write_text(goal, "".join(line + "\n" for line in (*known, *lines)))
    return len(lines)
