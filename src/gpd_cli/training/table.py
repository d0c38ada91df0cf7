"""The logger of ``metrics.csv``, which continues the file when a run is resumed in its folder."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from gpd_cli.files import atomic_path


class RunCSVLogger(CSVLogger):
    """Lightning's CSV logger, which can also continue the file of a resumed run.

    When a new column makes it necessary to rewrite the file, the file is replaced atomically.
    """

    continues = False  # whether an existing file is continued; set by `continue_in`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_numbered = self._version is None

    def continue_in(self, folder: Path) -> None:
        """Log into the folder of the run that is resumed, after the rows already in its file.

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
        """The object that writes the file, made at first use."""
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            if self._is_numbered and not self.continues and isinstance(self._fs, LocalFileSystem):
                self._claim_version()
            self._experiment = _Table(self.log_dir, self.continues)
        return self._experiment

    def _claim_version(self) -> None:
        """Make the run's folder, under the first number that no other run takes meanwhile.

        Runs that a cluster starts at the same moment find the same number to be free.
        """
        number = int(self.version)
        while True:
            self._version = number
            try:
                self._fs.mkdir(self.log_dir, create_parents=False)
                return
            except FileExistsError:
                number += 1

    @property
    def rows(self) -> int:
        """The number of rows logged so far, those of earlier parts of a resumed run included."""
        return int(self.experiment.rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the rest of the file; remove the run's folder if a failed run left it empty.

        Lightning makes the folder before it checks networks and data, so that a run that is refused
        would leave a folder behind.
        """
        super().finalize(status)
        if status == "failed" and self._experiment is not None:
            with suppress(OSError):  # the folder has files, or was never made
                Path(self.log_dir).rmdir()

    @rank_zero_only
    def cut_to_checkpoint(self, rows: int, row: Mapping[str, Any] | None) -> None:
        """Remove rows that were logged after a checkpoint, if the file is continued.

        Args:
            rows: number of rows at the time when the checkpoint was written.
            row: the row that belongs directly after the checkpoint, as ``step`` and ``values``; it
                is logged anew. None if there is no such row.
        """
        if not self.continues:
            return
        self.experiment.cut(rows)
        if row is not None:
            self.log_metrics(row["values"], row["step"])
        self.save()


def csv_loggers(trainer: Trainer) -> list[RunCSVLogger]:
    """The loggers of a run that write ``metrics.csv``."""
    return [logger for logger in trainer.loggers if isinstance(logger, RunCSVLogger)]


def row_to_come(trainer: Trainer, ended: bool) -> dict[str, Any] | None:
    """The row that Lightning will log right after this checkpoint; None if there is none.

    Args:
        trainer: trainer of the run.
        ended: whether the checkpoint is written at the end of an epoch.
    """
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    progress: Any = loop.batch_progress.total
    step = loop._batches_that_stepped
    if ended:
        step -= 1  # at the end of an epoch Lightning logs the number of the last step
    elif progress.processed == progress.completed:
        return None  # a checkpoint after validation: the row has been logged already
    elif loop._should_accumulate() or not connector.should_update_logs:
        return None
    values = {name: float(value) for name, value in connector.metrics["log"].items()}
    return {"step": step, "values": {**values, "epoch": trainer.current_epoch}} if values else None


class _Table(ExperimentWriter):
    """Writes ``metrics.csv``, and buffers the rows that are not in the file yet.

    Args:
        log_dir: folder of the file.
        continues: whether to keep the rows of an existing file.
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
        """Keep only the first rows of the file.

        Args:
            rows: number of rows to keep.
        """
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
