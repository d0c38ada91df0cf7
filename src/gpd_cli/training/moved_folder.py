"""Correction of paths in a resumed checkpoint whose run's folder was moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from gpd_cli.training.table import csv_loggers


class MovedFolder(Callback):
    """Correct the paths in the states of `ModelCheckpoint` callbacks, if the run's folder moved.

    The paths are replaced if the run is resumed in its own folder, and this folder has another path
    than when the checkpoint was written.
    """

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Correct the paths, if the run is resumed in its own folder."""
        if any(logger.continues for logger in csv_loggers(trainer)):
            for callback in trainer.checkpoint_callbacks:
                state = checkpoint.get("callbacks", {}).get(callback.state_key)
                if state and isinstance(callback, ModelCheckpoint) and callback.dirpath:
                    _move(state, str(callback.dirpath))
                    callback.current_score = state["current_score"]  # Lightning does not restore it


def _move(state: dict[str, Any], folder: str) -> None:
    """Replace the folder in all paths of a `ModelCheckpoint` state, in place."""
    before = str(state.get("dirpath"))

    def moved(path: str) -> str:
        return str(Path(folder) / Path(path).relative_to(before)) if path else path

    if before == folder:
        return
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        if Path(state[name]).is_relative_to(before):
            state[name] = moved(state[name])
    state["best_k_models"] = {moved(p): score for p, score in state["best_k_models"].items()}
    state["dirpath"] = folder
