"""The accuracies and the gap of the epoch that ends, for callbacks that show or store them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gpd_cli.training.updates import is_last_update

SHOWN = ("student_top1", "teacher_top1", "gap")
"""Names of an epoch's scores, which stand after ``train/`` or ``val/`` in the log."""
SELECTOR = "val/student_top1"
"""The logged score by which ``best.ckpt`` is chosen."""


class EpochScores(Callback):
    """Base class of callbacks that need the scores of the epoch that ends.

    Lightning's metrics may still have values of earlier epochs; this class leaves those out. If an
    epoch had several validations, the scores are those of the validation that was best for the
    student, which is also the one that ``best.ckpt`` is chosen by.
    """

    def __init__(self) -> None:
        self._validated = False
        self._best: dict[str, float] = {}  # scores of the epoch's best validation

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that validation has not run in this epoch yet."""
        self._validated, self._best = False, {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that validation has run in this epoch, and keep its scores if they are the best."""
        if trainer.sanity_checking:
            return
        self._validated = True
        found = _validation_values(trainer)
        if found.get(SELECTOR, -math.inf) > self._best.get(SELECTOR, -math.inf):
            self._best = found

    def state_dict(self) -> dict[str, Any]:
        """The epoch's validation scores, for a run that is resumed within or after the epoch."""
        return {"validated": self._validated, "validation": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the epoch's validation scores."""
        self._validated = state_dict.get("validated", False)
        self._best = dict(state_dict.get("validation", {}))  # earlier versions lack this entry

    def scores(self, trainer: Trainer) -> dict[str, dict[str, float]]:
        """The scores of the epoch that ends, in percent, by stage (train, val) and name."""
        found = {}
        # Training scores are logged with the epoch's last batch. A run that stops earlier has none,
        # unless it has made all of its updates.
        if trainer.is_last_batch or is_last_update(trainer, trainer.global_step):
            found["train"] = _named("train/", trainer.callback_metrics)
        if self._validated:
            found["val"] = _named("val/", self._validation(trainer))
        return found

    def raw_scores(self, trainer: Trainer) -> dict[str, float]:
        """Validation scores of the trained weights, if validation scored an average; else empty."""
        return _named("val/raw_", self._validation(trainer)) if self._validated else {}

    def _validation(self, trainer: Trainer) -> dict[str, float]:
        return self._best or _validation_values(trainer)


def _validation_values(trainer: Trainer) -> dict[str, float]:
    """All values that the latest validation has logged, by name."""
    metrics = trainer.callback_metrics
    return {name: float(value) for name, value in metrics.items() if name.startswith("val/")}


def _named(prefix: str, values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The scores named in `SHOWN` from among values whose names begin with a prefix."""
    return {name: float(values[key]) for name in SHOWN if (key := f"{prefix}{name}") in values}
