"""The place of the checkpoint from which a run is resumed."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from gpd_cli.run_folder import LAST


def last_checkpoint(trainer: Trainer) -> Path | None:
    """The absolute path of a run's ``last.ckpt``, which may not be written yet.

    Returns None if the run writes no such checkpoint, or has not begun.

    Args:
        trainer: trainer of the run.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and f"{callback.filename}.ckpt" == LAST:
            return Path(callback.dirpath, LAST).resolve() if callback.dirpath else None
    return None


def written_checkpoint(trainer: Trainer) -> Path | None:
    """The absolute path of a run's ``last.ckpt`` if it has been written; otherwise None.

    Args:
        trainer: trainer of the run.
    """
    last = last_checkpoint(trainer)
    return last if last is not None and last.is_file() else None
