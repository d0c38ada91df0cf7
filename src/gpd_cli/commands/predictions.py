"""The table of predictions that `gpd predict` writes."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import IterableDataset

from gpd_cli.distributed.world import world_size
from gpd_cli.errors import DataError
from gpd_cli.files import atomic_path, json_text

TABLES = (".csv", ".jsonl")
"""Endings of paths for the formats of the table."""

Top = tuple[int, float]
"""A class number, and the probability that a network gives to this class for an image."""


@dataclass(frozen=True)
class Row:
    """Predictions and label of an image.

    Args:
        tops: by name of the network, its most probable classes in descending order.
        label: class number of the image; None if it is not known.
    """

    tops: Mapping[str, Sequence[Top]] = field(default_factory=dict)
    label: int | None = None


Rows = dict[int, Row]
"""Rows by the number of the image."""


class PredictionTable(BasePredictionWriter):
    """Collect the predictions of all processes, and write them in the order of the images.

    Args:
        path: path of the table to write, with one of the endings in `TABLES`.
        top: number of classes to write for each network; at most all classes are written.

    Attributes:
        images: number of images in the table, once the table has been written.
    """

    def __init__(self, path: Path, top: int = 1) -> None:
        super().__init__("batch")
        self.path = path
        self.top = top
        self.images = 0
        self._rows: Rows = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse data whose predictions could not be put in order.

        Raises:
            DataError: for a stream over several processes, and for several data loaders.
        """
        self._rows = {}
        loaders = trainer.predict_loop._combined_loader.flattened  # type: ignore[union-attr]
        if len(loaders) > 1:
            raise DataError(
                f"The data has {len(loaders)} loaders of images to predict, and a table has the "
                "images of one; return a single loader from predict_dataloader."
            )
        data = getattr(loaders[0], "dataset", None) if loaders else None
        if trainer.world_size > 1 and isinstance(data, IterableDataset):
            raise DataError(
                "A streamed data set does not number its images, so that several processes cannot "
                "put them in order; set --trainer.devices 1."
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
        """Keep each network's most probable classes for the images of a batch.

        `prediction` has class probabilities by network, ``[B, C]`` each.
        """
        tops = {
            name: values.topk(min(self.top, values.shape[1]), dim=1)
            for name, values in prediction.items()
        }
        count = len(next(iter(tops.values())).values)
        told = None if isinstance(batch, Tensor) or len(batch) < 2 else batch[1]
        labels = told.tolist() if isinstance(told, Tensor) else [None] * count
        # A stream does not number its images, but a single process reads them in order.
        numbers = batch_indices or range(len(self._rows), len(self._rows) + count)
        for row, number in zip(range(count), numbers, strict=True):
            found = {
                name: list(zip(top.indices[row].tolist(), top.values[row].tolist(), strict=True))
                for name, top in tops.items()
            }
            label = labels[row]
            known = isinstance(label, int) and label >= 0
            self._rows[int(number)] = Row(found, label if known else None)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the rows of all processes; the first process writes the table."""
        rows = _gathered(self._rows)
        self.images = len(rows)
        if trainer.is_global_zero and rows:
            data = trainer.datamodule  # type: ignore[attr-defined]
            files = getattr(data, "predicted_files", lambda: None)()
            write_rows(self.path, rows, getattr(data, "class_names", None), files)
            print(f"Predictions written to {self.path}")


def write_rows(
    path: Path, rows: Rows, class_names: Sequence[str] | None, files: Sequence[str] | None = None
) -> None:
    """Write the table atomically, with one entry per image in the order of the images' numbers.

    A ``.csv`` file has a row per image; a ``.jsonl`` file has a line of JSON per image, with a list
    of classes for each network. Both are encoded in UTF-8. If the name of an image file is not
    valid UTF-8, a ``.csv`` keeps the bytes of the name (Python reads them with
    ``errors="surrogateescape"``), and a ``.jsonl`` escapes them.

    Args:
        path: path of the file to write.
        rows: rows by number of the image; at least one.
        class_names: names of the classes in the order of class numbers; the number is written for
            a class without a name.
        files: paths of the image files in the order of the images' numbers; if not given, the
            numbers are written.
    """

    def name(label: int) -> str:
        # A user's data module may name fewer classes than the networks have.
        return class_names[label] if class_names and label < len(class_names) else str(label)

    entries = (
        {
            "file": files[number] if files else str(number),
            "label": None if row.label is None else name(row.label),
            **{
                network: [{"class": name(label), "probability": round(p, 6)} for label, p in tops]
                for network, tops in row.tops.items()
            },
        }
        for number, row in sorted(rows.items())
    )
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        if path.suffix.lower() == ".jsonl":
            file.writelines(json_text(entry) + "\n" for entry in entries)
        else:
            _write_csv(file, entries, next(iter(rows.values())))


def _write_csv(file: TextIO, entries: Iterator[dict[str, Any]], first: Row) -> None:
    """Write entries as CSV; the columns of a network's second class end in ``_2``, and so on."""
    columns = ["file", "label"]
    for network, tops in first.tops.items():
        for place in range(1, len(tops) + 1):
            ending = "" if place == 1 else f"_{place}"
            columns += [f"{network}_class{ending}", f"{network}_probability{ending}"]
    writer = csv.writer(file)
    writer.writerow(columns)
    for entry in entries:
        cells = [entry["file"], entry["label"] or ""]
        for network in first.tops:
            for top in entry[network]:
                cells += [top["class"], f"{top['probability']:.6f}"]
        writer.writerow(cells)


def _gathered(rows: Rows) -> Rows:
    """Gather the rows of all processes; an image seen by several processes gets one row."""
    if world_size() == 1:
        return rows
    parts: list[Rows] = [{} for _ in range(world_size())]
    dist.all_gather_object(parts, rows)
    return {number: row for part in parts for number, row in part.items()}
