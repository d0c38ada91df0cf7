"""Comparison of two runs, whose checkpoints and logs should be equal bit for bit."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Entries that are not compared. First, those that depend on time and memory.
CLOCK = ("images_per_second", "memory_gib")
# Entries that depend on whether a last.ckpt was written within the first epoch, and on where and by
# how many workers images are read.
PATHS = ("best_model_path", "root", "num_workers")
# A counter that Lightning sets to zero after the sanity check, when a run begins or is resumed.
COUNTER = ("epoch_loop.val_loop.batch_progress",)
# Settings of the command line, such as those about saving and run length; the settings of the
# networks are compared as hyper-parameters.
SETTINGS = ("settings",)


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Places at which the contents of two checkpoints differ, except for entries not compared.

    Args:
        one: content of a checkpoint, or a part of it.
        other: the same of the other checkpoint.
        path: the place of these parts in their checkpoints.
    """
    if isinstance(one, Mapping):
        if one.keys() != other.keys():
            return [f"{path}: {one.keys() ^ other.keys()}"]
        return [
            found
            for key in one
            if key not in CLOCK + PATHS + COUNTER + SETTINGS
            for found in differences(one[key], other[key], f"{path}/{key}")
        ]
    if isinstance(one, Tensor):
        return [] if isinstance(other, Tensor) and torch.equal(one, other) else [path]
    if isinstance(one, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for k, (a, b) in pairs for found in differences(a, b, f"{path}/{k}")]
    return [] if one == other else [f"{path}: {one} and {other}"]


def rows(run: Path) -> list[dict[str, str]]:
    """The rows of a run's ``metrics.csv``, without columns that depend on time and memory."""
    with (run / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if v and k not in CLOCK} for row in found]


def differing(one: Path, other: Path, names: tuple[str, ...] = ("last", "best")) -> list[str]:
    """Places at which checkpoints and metrics of two runs differ.

    Args:
        one: folder of one run.
        other: folder of the other run.
        names: names of the checkpoints to compare, without suffix.
    """
    found = []
    for name in names:
        contents = [
            torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
            for run in (one, other)
        ]
        found += [f"{name}.ckpt{where}" for where in differences(*contents)]
    return found if rows(one) == rows(other) else [*found, "metrics.csv"]
