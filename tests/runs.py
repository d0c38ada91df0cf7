"""Runs of `gpd fit` on a tiny student, and what they leave behind."""

import csv
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from gpd_cli.__main__ import main

TINY = {"in_chans": 1, "layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
PAIRED = ["--model.ratio", "2", "--model.branches", "3"]
ALONE = ["--model.ratio", "1", "--model.branches", "1"]
BATCHES = 3
UNVALIDATED = ["--data.val_split", "null", "--data.val_fraction", "0"]


def arguments(*options: str, epochs: int = 1) -> list[str]:
    """Those of `gpd` that train a tiny student."""
    return [
        *("fit", "--model.student", "resnet18", "--model.num_classes", "10"),
        *("--model.student_args", str(TINY)),
        *("--data.image_size", "16", "--data.batch_size", "32"),
        *("--trainer.accelerator", "cpu", "--trainer.max_epochs", str(epochs)),
        *("--trainer.limit_train_batches", str(BATCHES)),
        *("--trainer.limit_val_batches", "1"),
        *options,
    ]


def fit(folder: Path, *options: str, epochs: int = 1) -> int:
    """Run `gpd fit` on a tiny student inside a folder."""
    with chdir(folder):
        return main(arguments(*options, epochs=epochs))


def noise_images(folder: Path, classes: str, count: int, side: int) -> None:
    """Grey images of noise, ``images/train/CLASS/NUMBER.png``, the classes in turn."""
    noise = np.random.default_rng(0)
    for number in range(count):
        path = folder / "images" / "train" / classes[number % len(classes)] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (side, side), dtype=np.uint8)).save(path)


def run_folder(folder: Path, version: int = 0) -> Path:
    return folder / "runs" / "gpd" / f"version_{version}"


def checkpoint(folder: Path, name: str = "last", version: int = 0) -> dict[str, Any]:
    path = run_folder(folder, version) / "checkpoints" / f"{name}.ckpt"
    return torch.load(path, weights_only=True)


def logged(folder: Path, version: int = 0) -> list[dict[str, str]]:
    with (run_folder(folder, version) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def last_logged(folder: Path, name: str, version: int = 0) -> float:
    return [float(row[name]) for row in logged(folder, version) if row.get(name)][-1]


class StopAfterTwoEpochs(Callback):
    """Stands for whoever pulls the plug: the schedule is still that of the whole run."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.should_stop = True


STOP = ["--trainer.callbacks+=runs.StopAfterTwoEpochs"]


def exploding() -> list[str]:
    return [
        *("--model.optimizer.sched", "step"),
        *("--model.optimizer.sched_args", "{decay_epochs: 1, decay_rate: 1.0e+30}"),
    ]
