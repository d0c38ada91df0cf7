"""Updates of the weights: how many batches the last one of an epoch takes, and which ends a run."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer


def scale_of_loss(trainer: Trainer, batch: int) -> float:
    """The factor of a batch's loss with which the last update of an epoch is a mean, like others.

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


def ends_with_batch(trainer: Trainer) -> bool:
    """Whether the epoch ends with the batch that is being trained, which is not counted yet.

    It is the epoch's last one, or the last one of a run with a limit of updates.
    """
    if trainer.is_last_batch:
        return True
    makes_update = not trainer.fit_loop._should_accumulate()
    return is_last_update(trainer, trainer.global_step + makes_update)


def is_last_update(trainer: Trainer, updates: int) -> bool:
    """Whether a number of updates is the whole length of a run with a limit of updates."""
    return 0 <= trainer.max_steps <= updates
