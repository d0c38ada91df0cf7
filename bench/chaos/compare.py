"""Whether two runs are the same run, bit for bit."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CLOCK = ("images_per_second", "memory_gib")
# Whether there has been a last.ckpt within the first epoch; where and by whom images are read.
PATHS = ("best_model_path", "root", "num_workers")
# Lightning counts from zero after its check of validation when a run begins or is resumed.
COUNTER = ("epoch_loop.val_loop.batch_progress",)
# What the command line said of saving and of lengths; that of networks is in the hyper-parameters.
TOLD = ("settings",)


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where the contents of two checkpoints differ, other than in the time that things took."""
    if isinstance(one, Mapping):
        if one.keys() != other.keys():
            return [f"{path}: {one.keys() ^ other.keys()}"]
        return [
            found
            for key in one
            if key not in CLOCK + PATHS + COUNTER + TOLD
            for found in differences(one[key], other[key], f"{path}/{key}")
        ]
    if isinstance(one, Tensor):
        return [] if isinstance(other, Tensor) and torch.equal(one, other) else [path]
    if isinstance(one, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for k, (a, b) in pairs for found in differences(a, b, f"{path}/{k}")]
    return [] if one == other else [f"{path}: {one} and {other}"]


def rows(run: Path) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` without the time that things took."""
    with (run / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if v and k not in CLOCK} for row in found]


def differing(one: Path, other: Path, names: tuple[str, ...] = ("last", "best")) -> list[str]:
    """Where checkpoints and metrics of two runs differ.

    Args:
        one: folder of a run.
        other: folder of another one.
        names: of checkpoints.
    """
    found = []
    for name in names:
        contents = [
            torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
            for run in (one, other)
        ]
        found += [f"{name}.ckpt{where}" for where in differences(*contents)]
    return found if rows(one) == rows(other) else [*found, "metrics.csv"]
