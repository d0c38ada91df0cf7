"""The scores of the epoch that ends, for callbacks that show or keep them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

SHOWN = ("student_top1", "teacher_top1", "gap")
"""What is shown of an epoch, as the log names it after ``train/`` and ``val/``."""
SELECTOR = "val/student_top1"
"""What ``best.ckpt`` is chosen by."""


class EpochScores(Callback):
    """Base of callbacks that take an epoch's scores: Lightning keeps those of epochs before.

    Of several validations within an epoch it is the one that was best for the student, as
    ``best.ckpt`` has it.
    """

    def __init__(self) -> None:
        self._validated = False
        self._best: dict[str, float] = {}  # of the epoch's validations

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation has not run in this epoch yet."""
        self._validated, self._best = False, {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation has run in this epoch."""
        if trainer.sanity_checking:
            return
        self._validated = True
        found = _of_validation(trainer)
        if found.get(SELECTOR, -math.inf) > self._best.get(SELECTOR, -math.inf):
            self._best = found

    def state_dict(self) -> dict[str, Any]:
        """How the epoch has been validated, for a run that is resumed after that."""
        return {"validated": self._validated, "validation": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self._validated = state_dict.get("validated", False)
        self._best = dict(state_dict.get("validation", {}))  # not in earlier versions

    def scores(self, trainer: Trainer) -> dict[str, dict[str, float]]:
        """The scores, in percent, of the epoch that ends, by stage and name."""
        found = {}
        # Training is scored with an epoch's last batch, which a run that ends before does not see.
        if trainer.is_last_batch:
            found["train"] = _named("train/", trainer.callback_metrics)
        if self._validated:
            found["val"] = _named("val/", self._validation(trainer))
        return found

    def raw_scores(self, trainer: Trainer) -> dict[str, float]:
        """Scores of the trained weights in this epoch's validation, if it scored an average."""
        return _named("val/raw_", self._validation(trainer)) if self._validated else {}

    def _validation(self, trainer: Trainer) -> dict[str, float]:
        return self._best or _of_validation(trainer)


def _of_validation(trainer: Trainer) -> dict[str, float]:
    """What the latest validation has logged."""
    metrics = trainer.callback_metrics
    return {name: float(value) for name, value in metrics.items() if name.startswith("val/")}


def _named(prefix: str, values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The values that are shown, among those whose names begin so."""
    return {name: float(values[key]) for name in SHOWN if (key := f"{prefix}{name}") in values}
