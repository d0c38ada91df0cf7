"""The table that `predict` writes."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import IterableDataset

from gpd_cli.distributed.world import world_size
from gpd_cli.errors import DataError
from gpd_cli.files import atomic_path

Top = tuple[int, float]
"""A network's class for an image, and its probability."""
Rows = dict[int, dict[str, Top]]
"""Predictions by number of the image and name of the network."""


class PredictionTable(BasePredictionWriter):
    """Collect predictions, from all processes, and write them in the order of the images.

    Args:
        path: the table to write (.csv).
    """

    def __init__(self, path: Path) -> None:
        super().__init__("batch")
        self.path = path
        self.images = 0  # number of images in the table, once it is written
        self._rows: Rows = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse data whose predictions could not be put in order.

        Raises:
            DataError: for a stream over several processes.
        """
        self._rows = {}
        data = getattr(trainer.predict_dataloaders, "dataset", None)
        if trainer.world_size > 1 and isinstance(data, IterableDataset):
            raise DataError(
                "A streamed data set does not number its images, so that several processes cannot "
                "put them in order; predict with one: --trainer.devices 1."
            )

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Mapping[str, Tensor],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep each network's likeliest class; `prediction` has probabilities, ``[B, C]``."""
        tops = {name: values.max(dim=1) for name, values in prediction.items()}
        count = len(next(iter(tops.values())).values)
        # A stream does not number its images; a single process reads them in order.
        numbers = batch_indices or range(len(self._rows), len(self._rows) + count)
        for row, number in zip(range(count), numbers, strict=True):
            self._rows[int(number)] = {
                name: (int(top.indices[row]), float(top.values[row])) for name, top in tops.items()
            }

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the rows of all processes; the first process writes the table."""
        rows = _gathered(self._rows)
        self.images = len(rows)
        if trainer.is_global_zero and rows:
            write_rows(self.path, rows, getattr(trainer.datamodule, "class_names", None))  # type: ignore[attr-defined]
            print(f"Predictions written to {self.path}")


def write_rows(path: Path, rows: Rows, class_names: Sequence[str] | None) -> None:
    """Write a row per image, in the order of their numbers, atomically.

    Args:
        path: the file to write.
        rows: predictions, at least one.
        class_names: names by class number; without names, class numbers are written.
    """
    networks = list(next(iter(rows.values())))
    header = ["image", *(f"{n}_{what}" for n in networks for what in ("class", "probability"))]
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for number in sorted(rows):
            cells: list[object] = [number]
            for network in networks:
                label, probability = rows[number][network]
                cells += [class_names[label] if class_names else label, f"{probability:.6f}"]
            writer.writerow(cells)


def _gathered(rows: Rows) -> Rows:
    """The rows of all processes; one for an image that several processes have seen."""
    if world_size() == 1:
        return rows
    parts: list[Rows] = [{} for _ in range(world_size())]
    dist.all_gather_object(parts, rows)
    return {number: row for part in parts for number, row in part.items()}
