"""Records of runs: small JSON files, which are the only source of the page of results."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.results.table import LEARNING_RATE, Row, Table, TableError, option_list
from gpd_cli.files import atomic_path

Record = dict[str, Any]

WORK = Path("runs/results")
"""Folder of checkpoints and logs, relative to the folder of the checkout."""

STUDENT = "student.safetensors"
"""Name of the extracted student's file in the folder of its run."""

DATA = "DATA"
"""Placeholder in records for the folder of the data, which differs between machines."""

DATA_OPTION = f"--data.root={DATA}"


@dataclass(frozen=True)
class Run:
    """One training run of a row.

    Args:
        row: key of the row.
        name: name of the run within its row: its seed, or ``lr-RATE`` for a tuning run.
        seed: random seed of the run.
        rate: learning rate; None as long as the tuning runs have not decided it.
        tuning: whether this is a tuning run, which serves to choose the row's learning rate.
    """

    row: str
    name: str
    seed: int
    rate: float | None = None
    tuning: bool = False

    def path(self, folder: Path) -> Path:
        """The path of the file with the run's record.

        Args:
            folder: folder of the table's records.
        """
        return folder / self.row / f"{self.name}.json"


@dataclass(frozen=True)
class Records:
    """The records of a table.

    Args:
        table: the table.
        folder: folder of the records, with a folder for each row and a file for each run.
    """

    table: Table
    folder: Path

    def read(self, run: Run) -> Record | None:
        """Read the record of a run.

        A record is ignored if its command differs from the run's, since then the row or its
        learning rate has been changed after the training. It is also ignored if it lacks the test
        scores that the table needs, since then the table's metric has been changed.

        Args:
            run: a run of this table.

        Returns:
            The record; None if the run has no valid record and so has to be trained.

        Raises:
            TableError: when the file of the record is damaged, for example by a merge conflict.
        """
        path = run.path(self.folder)
        if not path.is_file():
            return None
        record = _load(path)
        command = [part for part in shlex.split(record["command"]) if part != DATA_OPTION]
        lacks_test = self.is_tested(run) and "test" not in record
        return record if command == ["gpd", "fit", *self.options(run)] and not lacks_test else None

    def is_tested(self, run: Run) -> bool:
        """Whether a run is tested; tuning runs and runs of tables of settings are not."""
        return not run.tuning and self.table.metric == "test"

    def write(self, run: Run, record: Mapping[str, Any]) -> None:
        """Write the record of a run atomically.

        Args:
            run: a run of this table.
            record: its record.
        """
        write_text(run.path(self.folder), _dump(record) + "\n")

    def tuning(self, row: Row) -> list[Run]:
        """The tuning runs of a row, one for each learning rate of its grid.

        There are none for a row that takes the learning rate of another row, or has a single rate.
        """
        grid = self.table.grid_of(row)
        if row.tuned_as is not None or len(grid) < 2:
            return []
        seed = self.table.tuning.seed
        return [Run(row.key, f"lr-{rate:g}", seed, rate, tuning=True) for rate in grid]

    def scored(self, row: Row) -> list[Run]:
        """The scored runs of a row, one for each seed; their learning rate may not be known yet."""
        rate = self.rate(row)
        return [Run(row.key, str(seed), seed, rate) for seed in self.table.seeds_of(row)]

    def rate(self, row: Row) -> float | None:
        """The best learning rate of a row's grid by validation.

        None until every rate of the grid has been tried, and if training diverges at every rate.
        """
        row = self.table.tuned(row)
        grid = self.table.grid_of(row)
        if len(grid) == 1:
            return grid[0]
        scores = {run.rate: self.read(run) for run in self.tuning(row)}
        tried = {rate: best_validation(found) for rate, found in scores.items() if found}
        if len(tried) < len(scores) or max(tried.values()) == -math.inf:
            return None
        return max(tried, key=lambda rate: tried[rate])

    def diverges(self, row: Row) -> bool:
        """Whether training has diverged at every learning rate of a row's grid."""
        tried = [self.read(run) for run in self.tuning(row)]
        return bool(tried) and all(record and "diverged" in record for record in tried)

    def finished(self, row: Row) -> list[Record]:
        """The records of those scored runs of a row that have been trained."""
        return [record for run in self.scored(row) if (record := self.read(run)) is not None]

    def source(self, row: Row, seed: int) -> Run:
        """The run that provides an extracted student for a run of another row.

        Args:
            row: the row that provides the student.
            seed: seed of the run that needs the student. The run with the same seed is taken, or,
                if `row` lacks this seed, the one with the row's first seed.
        """
        runs = self.scored(row)
        return next((run for run in runs if run.seed == seed), runs[0])

    def unmade_sources(self, run: Run) -> set[Run]:
        """The runs that are trained before a run, for students that are not on this machine.

        They are those whose extracted students the run needs, and those that these need in turn.

        Args:
            run: a run of this table.
        """
        keys = self.table.rows[run.row].files.values()
        sources = {self.source(self.table.rows[key], run.seed) for key in keys}
        unmade = {source for source in sources if not (self.work(source) / STUDENT).is_file()}
        return unmade.union(*map(self.unmade_sources, unmade))

    def options(self, run: Run) -> list[str]:
        """The options of ``gpd fit`` for a run, without options that depend on the machine.

        Args:
            run: a run of this table.
        """
        row = self.table.rows[run.row]
        settings = {**self.table.settings, **row.settings}
        if run.tuning:
            settings |= {**self.table.tuning.settings, **row.tuning}
        settings |= {LEARNING_RATE: run.rate, "seed_everything": run.seed}
        for option, key in row.files.items():
            source = self.source(self.table.rows[key], run.seed)
            settings[option] = str(self.work(source) / STUDENT)
        return ["-c", self.table.config, *option_list(settings)]

    def work(self, run: Run) -> Path:
        """The folder for a run's checkpoints and logs; its name depends on the run's options.

        Args:
            run: a run of this table.

        Returns:
            A path relative to the checkout.
        """
        options = hashlib.sha256(shlex.join(self.options(run)).encode()).hexdigest()[:8]
        return WORK / self.table.name / run.row / f"{run.name}-{options}"


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, and create its folder if it does not exist."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _load(path: Path) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TableError(
            f"{path} is no JSON ({error}); restore it, or delete it to train the run again."
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("command"), str):
        raise TableError(
            f"{path} has no command of a run; restore it, or delete it to train the run again."
        )
    return record


def _dump(record: Mapping[str, Any]) -> str:
    """A record as JSON with one entry per line, and lists of plain values in a single line."""
    text = json.dumps(record, indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)


def accuracy(record: Record, network: str, metric: str) -> float | None:
    """The accuracy of a network of a run, in percent.

    Args:
        record: the record of the run.
        network: ``student`` or ``teacher``.
        metric: ``test`` for the accuracy on test images; ``validation`` for that on validation
            images, in the epoch with the student's best validation accuracy.

    Returns:
        The accuracy; None if the run has no such network.
    """
    if metric == "test":
        return record["test"].get(f"{network}_top1")
    epochs = record["epochs"]
    student, curve = epochs["val/student_top1"], epochs.get(f"val/{network}_top1")
    return None if curve is None else curve[student.index(max(student))]


def best_validation(record: Record) -> float:
    """The student's best validation accuracy over the epochs of a run, in percent.

    It is minus infinity for a run that has diverged.
    """
    return -math.inf if "diverged" in record else max(record["epochs"]["val/student_top1"])
