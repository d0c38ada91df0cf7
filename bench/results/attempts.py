"""The attempts of a run: each start of ``gpd fit`` has a folder with its log and checkpoints."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from gpd_cli.run_folder import BEST, CHECKPOINTS, CONFIGURATION, LAST, STOPPED

TIME = "seconds.json"
"""Name of the file with an attempt's time."""


def attempts_of(folder: Path) -> list[Path]:
    """The folders of a run's attempts, in the order in which the attempts were begun.

    Args:
        folder: folder of the run.
    """
    return sorted(folder.glob("attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))


def checkpoints(attempt: Path) -> list[Path]:
    """The complete checkpoints of an attempt that training can be resumed from."""
    paths = [attempt / CHECKPOINTS / name for name in (LAST, STOPPED)]
    return [path for path in paths if path.is_file() and zipfile.is_zipfile(path)]


def newest_checkpoint(attempts: Sequence[Path]) -> Path | None:
    """The newest complete checkpoint that training can be resumed from; None without any."""
    whole = [path for attempt in attempts for path in checkpoints(attempt)]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)


def best_checkpoint(attempts: Sequence[Path]) -> Path | None:
    """The best ``best.ckpt`` of all attempts; None if there is no such file.

    The file of each attempt is the best of the attempt's own epochs.
    """
    paths = [attempt / CHECKPOINTS / BEST for attempt in attempts]
    found = [path for path in paths if path.is_file()]
    if not found:
        return None
    scores = _scores(attempts[-1] / CHECKPOINTS / LAST)
    return max(found, key=lambda path: scores[_load(path)["epoch"]]["val/student_top1"])


def has_every_epoch(checkpoint: Path) -> bool:
    """Whether a checkpoint was written after the last epoch of its run."""
    config = yaml.safe_load((checkpoint.parents[1] / CONFIGURATION).read_text())
    return len(_scores(checkpoint)) >= config["trainer"]["max_epochs"]


def curves(attempt: Path) -> dict[str, list[float]]:
    """The accuracies of a run in percent: by name of a value, its list over all epochs.

    Args:
        attempt: folder of the run's last attempt.
    """
    scores = _scores(attempt / CHECKPOINTS / LAST)
    epochs = [scores[epoch] for epoch in sorted(scores)]
    return {name: [round(epoch[name], 4) for epoch in epochs] for name in epochs[-1]}


def seconds(attempts: Sequence[Path], clock: str) -> float | None:
    """The time of all attempts together, in seconds; None if an attempt was killed.

    The time of a killed attempt is not known.

    Args:
        attempts: folders of the attempts that trained a part of the run.
        clock: ``wall`` for wall-clock time, ``processor`` for CPU time.
    """
    paths = [attempt / TIME for attempt in attempts]
    if not all(path.is_file() for path in paths):
        return None
    return round(sum(json.loads(path.read_text())[clock] for path in paths), 1)


def _scores(checkpoint: Path) -> Mapping[int, Mapping[str, float]]:
    """Accuracies in percent, by epoch and name, of all epochs up to that of a checkpoint."""
    scores: Mapping[int, Mapping[str, float]] = _load(checkpoint)["callbacks"]["GapHistory"][
        "epochs"
    ]
    return scores


def _load(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return content
