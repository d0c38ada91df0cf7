"""Records of runs: small JSON files, from which alone the page of results is made."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.results.table import Row, Table

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training of a row.

    Args:
        row: key of the row.
        name: of the run among those of the row: its seed, or ``lr-RATE`` of a tuning run.
        seed: of everything random in it.
        rate: learning rate; None until the row's tuning has decided it.
        tuning: whether it serves to choose the learning rate.
    """

    row: str
    name: str
    seed: int
    rate: float | None = None
    tuning: bool = False

    def path(self, folder: Path) -> Path:
        """Where its record is.

        Args:
            folder: of the table's records.
        """
        return folder / self.row / f"{self.name}.json"


@dataclass(frozen=True)
class Records:
    """The records of a table.

    Args:
        table: whose records they are.
        folder: where they are: a folder for each row, a file for each run.
    """

    table: Table
    folder: Path

    def read(self, run: Run) -> Record | None:
        """The record of a run; None while it has not been trained."""
        path = run.path(self.folder)
        return json.loads(path.read_text()) if path.is_file() else None

    def write(self, run: Run, record: Mapping[str, Any]) -> None:
        """Write the record of a run, atomically."""
        path = run.path(self.folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(_dump(record) + "\n")
        temporary.replace(path)

    def tuning(self, row: Row) -> list[Run]:
        """The tuning runs of a row that chooses its own learning rate; none with a single rate."""
        grid = self.table.grid_of(row)
        if row.tuned_as is not None or len(grid) < 2:
            return []
        seed = self.table.tuning.seed
        return [Run(row.key, f"lr-{rate:g}", seed, rate, tuning=True) for rate in grid]

    def scored(self, row: Row) -> list[Run]:
        """The runs of a row that count, one for each seed; their learning rate may be unknown."""
        rate = self.rate(row)
        return [Run(row.key, str(seed), seed, rate) for seed in self.table.seeds_of(row)]

    def rate(self, row: Row) -> float | None:
        """The best learning rate of a row's grid, by validation; None until all are tried."""
        row = self.table.tuned(row)
        grid = self.table.grid_of(row)
        if len(grid) == 1:
            return grid[0]
        scores = {run.rate: self.read(run) for run in self.tuning(row)}
        if None in scores.values():
            return None
        return max(scores, key=lambda rate: best_validation(scores[rate]))  # type: ignore[arg-type]

    def finished(self, row: Row) -> list[Record]:
        """The records of a row's runs that count, as far as they have been trained."""
        return [record for run in self.scored(row) if (record := self.read(run)) is not None]


def _dump(record: Mapping[str, Any]) -> str:
    """JSON with an entry in each line, and lists of plain values in one."""
    text = json.dumps(record, indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)


def best_validation(record: Record | None) -> float:
    """The student's best validation accuracy over the epochs of a run, in percent."""
    assert record is not None
    return max(record["epochs"]["val/student_top1"])
