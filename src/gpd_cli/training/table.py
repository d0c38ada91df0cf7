"""``metrics.csv``, which a run that goes on in its own folder continues."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from gpd_cli.files import atomic_path


class RunCSVLogger(CSVLogger):
    """Lightning's CSV file. It is never without the rows that it had, and can be continued."""

    continues = False  # set by `continue_in`

    def continue_in(self, folder: Path) -> None:
        """Log into the folder of a run that goes on, behind the rows that are there.

        Args:
            folder: folder of the run, such as ``runs/digits/version_0``.
        """
        number = folder.name.removeprefix("version_")
        self._save_dir = self._root_dir = str(folder.parent.parent)
        self._name = folder.parent.name
        self._version = int(number) if number.isdigit() else folder.name
        self.continues = True

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes the file."""
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _Table(self.log_dir, self.continues)
        return self._experiment

    @property
    def rows(self) -> int:
        """The number of rows that were logged."""
        return int(self.experiment.rows)

    @rank_zero_only
    def go_on(self, rows: int, row: Mapping[str, Any] | None) -> None:
        """Leave out what was logged after a checkpoint, if the file is continued.

        Args:
            rows: number of rows when the checkpoint was written.
            row: what was logged right after it, ``step`` and ``values``; None for nothing.
        """
        if not self.continues:
            return
        self.experiment.cut(rows)
        if row is not None:
            self.log_metrics(row["values"], row["step"])
        self.save()


class _Table(ExperimentWriter):
    """The file and the rows that are still to be written.

    Args:
        log_dir: its folder.
        continues: whether to keep the rows that are there.
    """

    def __init__(self, log_dir: str, continues: bool) -> None:
        self._continues = continues
        self._written = 0
        super().__init__(log_dir)
        if continues:
            header, found = self._read()
            self.metrics_keys, self._written = header, len(found)

    @property
    def rows(self) -> int:
        return self._written + len(self.metrics)

    def cut(self, rows: int) -> None:
        """Leave out all rows but the first so many."""
        header, found = self._read()
        if len(found) > rows:
            self._write(header, found[:rows])
            self._written = rows

    def save(self) -> None:
        count = len(self.metrics)
        super().save()
        self._written += count

    def _check_log_dir_exists(self) -> None:
        if not self._continues:
            super()._check_log_dir_exists()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        if isinstance(self._fs, LocalFileSystem):
            self._write(fieldnames, self._read()[1])
        else:
            super()._rewrite_with_new_header(fieldnames)

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return [], []
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            return list(reader.fieldnames or ()), rows

    def _write(self, header: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
        with atomic_path(self.metrics_file_path) as temporary, temporary.open("w", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=header)
            writer.writeheader()
            writer.writerows(rows)
