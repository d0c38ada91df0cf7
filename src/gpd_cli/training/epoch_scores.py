"""The scores of the epoch that ends, for callbacks that show or keep them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

SHOWN = ("student_top1", "teacher_top1", "gap")
"""What is shown of an epoch, as the log names it after ``train/`` and ``val/``."""


class EpochScores(Callback):
    """Base of callbacks that take an epoch's scores: Lightning keeps those of epochs before."""

    def __init__(self) -> None:
        self._validated = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation has not run in this epoch yet."""
        self._validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation has run in this epoch."""
        self._validated = not trainer.sanity_checking

    def state_dict(self) -> dict[str, Any]:
        """Whether the epoch has been validated, for a run that is resumed after that."""
        return {"validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self._validated = state_dict.get("validated", False)

    def scores(self, trainer: Trainer) -> dict[str, dict[str, float]]:
        """The scores, in percent, of the epoch that ends, by stage and name."""
        metrics = trainer.callback_metrics
        # Training is scored with an epoch's last batch, which a run that ends before does not see.
        scored = {"train": trainer.is_last_batch, "val": self._validated}
        return {
            stage: {n: float(metrics[k]) for n in SHOWN if (k := f"{stage}/{n}") in metrics}
            for stage, is_new in scored.items()
            if is_new
        }

    def raw_scores(self, trainer: Trainer) -> dict[str, float]:
        """Scores of the trained weights in this epoch's validation, if it scored an average."""
        metrics = trainer.callback_metrics
        names = SHOWN if self._validated else ()
        return {n: float(metrics[k]) for n in names if (k := f"val/raw_{n}") in metrics}
