"""Throughput of a whole ``gpd fit``, including loading, augmentation, checks and metrics."""

from __future__ import annotations

import contextlib
import csv
import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from bench.speed.case import Case
from gpd_cli.__main__ import main
from gpd_cli.errors import GpdError

_STEPS = 4  # number of steps that count, after the same number of steps that do not
_CLASSES = ("cat", "dog")


def images_per_second(case: Case, device: str) -> float:
    """Images per second of ``gpd fit``, in wall-clock time, on a folder of JPEG images.

    The run has eight batches, of which the last four count.

    Args:
        case: the networks, the batch and the options of the run.
        device: ``cpu`` or ``cuda``.

    Raises:
        GpdError: when the run fails.
    """
    steps = 2 * _STEPS
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        _photos(Path("images"), steps * case.batch, max(case.size + case.size // 4, 32))
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main([*_options(case, device), "--trainer.max_steps", str(steps)])
        if code:
            raise GpdError(f"gpd fit on {case.student} ended with {code}: {said.getvalue()}")
        with next(Path("runs").rglob("metrics.csv")).open() as file:
            rows = [row["images_per_second"] for row in csv.DictReader(file)]
    return float([row for row in rows if row][-1])


def _options(case: Case, device: str) -> list[str]:
    settings = {
        "model.student": case.student,
        "model.num_classes": len(_CLASSES),
        "model.ratio": case.ratio,
        "model.branches": case.branches,
        "model.branch_width": case.branch_width,
        "model.channels_last": str(case.channels_last).lower(),
        "model.compile": str(case.compile).lower(),
        **({f"model.{case.saving}": "true"} if case.saving else {}),
        "model.optimizer.lr": 0.01,
        "data.dataset": "folder",
        "data.root": "images",
        "data.image_size": case.size,
        "data.batch_size": case.batch,
        "data.val_split": "null",
        "data.val_fraction": 0,
        "trainer.accelerator": "gpu" if device == "cuda" else "cpu",
        "trainer.devices": 1,
        "trainer.precision": "32-true" if case.precision == "32" else "bf16-mixed",
        "trainer.log_every_n_steps": _STEPS,
    }
    options = ["fit"]
    for name, value in settings.items():
        options += [f"--{name}", str(value)]
    return options


def _photos(folder: Path, count: int, side: int) -> None:
    """Write JPEG files of smooth random images, ``folder/train/CLASS/NUMBER.jpg``."""
    noise = np.random.default_rng(0)
    for number in range(count):
        path = folder / "train" / _CLASSES[number % len(_CLASSES)] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(noise.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)
