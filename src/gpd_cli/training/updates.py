"""Updates of the weights: the loss in the last update of an epoch, and the last update of a run."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer


def scale_of_loss(trainer: Trainer, batch: int) -> float:
    """The factor of a batch's loss that makes the last update of an epoch a mean, as others are.

    Lightning divides every loss by the number of batches per update, even if the last update of an
    epoch has fewer of them.

    Args:
        trainer: trainer of the run.
        batch: number of the batch in its epoch, counted from 0.

    Example:
        With 5 batches in an epoch and 4 per update, the fifth batch is an update of its own: 4.
    """
    per_update, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if per_update == 1 or batches == math.inf:
        return 1.0
    first = batch // per_update * per_update
    return per_update / min(per_update, int(batches) - first)


def scale_of_gradients(trainer: Trainer, batch: int) -> float:
    """The factor that corrects gradients where an epoch ends earlier than `scale_of_loss` expected.

    Only its last batch tells that a stream ends within an update.

    Args:
        trainer: trainer of the run, before an update.
        batch: number of the update's last batch in its epoch, counted from 0.

    Example:
        With 4 batches per update, an epoch that turns out to have 5 batches: 4 for the last update.
    """
    per_update = trainer.accumulate_grad_batches
    return per_update / (batch % per_update + 1) / scale_of_loss(trainer, batch)


def ends_with_batch(trainer: Trainer) -> bool:
    """Whether the epoch ends with the batch that is being trained, which is not counted yet.

    The batch is the last of its epoch, or makes the last update of a run with a limit of updates.
    """
    if trainer.is_last_batch:
        return True
    makes_update = not trainer.fit_loop._should_accumulate()
    return is_last_update(trainer, trainer.global_step + makes_update)


def is_last_update(trainer: Trainer, updates: int) -> bool:
    """Whether a number of updates is the whole length of a run with a limit of updates."""
    return 0 <= trainer.max_steps <= updates


def updates_in_epoch(trainer: Trainer) -> int | None:
    """Optimizer steps per epoch; None if the training data, once set up, has no length."""
    batches = trainer.num_training_batches
    if batches == math.inf:
        return None
    return max(1, math.ceil(batches / trainer.accumulate_grad_batches))


def updates_done(trainer: Trainer) -> int:
    """The number of updates made in the current epoch; right after its end, all of its updates."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    batches: int = progress.processed
    return math.ceil(batches / trainer.accumulate_grad_batches)
