"""How long a run has taken, and how long it will still take."""

from __future__ import annotations

import math
import time

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer


class RunClock:
    """Measure the time of an epoch, and estimate the time left in the run.

    The estimate uses the pace since this process began to train; a resumed run does not count the
    time before.
    """

    def __init__(self) -> None:
        self._start = self._epoch = 0.0
        self._done: float | None = None

    def start(self, trainer: Trainer) -> None:
        """Start the clock when training begins, which may be in the middle of a resumed run."""
        self._start = self._epoch = time.perf_counter()
        within = trainer.fit_loop.restarted_mid_epoch
        self._done = _done(trainer, share_of_epoch(trainer) if within else 0.0)

    def start_epoch(self) -> None:
        """Start timing an epoch."""
        self._epoch = time.perf_counter()

    def epoch(self) -> float:
        """Seconds since the epoch began, including validation."""
        return time.perf_counter() - self._epoch

    def left(self, trainer: Trainer, within: float) -> float | None:
        """Estimate the seconds until the run ends; None without any progress or limit.

        Args:
            trainer: trainer of the run.
            within: the fraction of the current epoch that is done, from 0 to 1.
        """
        elapsed = time.perf_counter() - self._start
        limits = [
            rest
            for callback in trainer.callbacks  # type: ignore[attr-defined] # set by its connector
            if isinstance(callback, Timer) and (rest := callback.time_remaining()) is not None
        ]
        done = _done(trainer, within)
        if done is not None and self._done is not None and done > self._done:
            limits.append(elapsed * (1 - done) / (done - self._done))
        return max(0.0, min(limits)) if limits else None


def share_of_epoch(trainer: Trainer) -> float:
    """The fraction of the current epoch that is done; 0 for a stream of unknown length."""
    length = trainer.num_training_batches
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return min(1.0, batches / length) if 0 < length < math.inf else 0.0


def share_done(epochs: float, max_epochs: int | None, steps: int, max_steps: int) -> float | None:
    """The fraction of a run that is done, from 0 to 1; None for a run without an end.

    Args:
        epochs: number of epochs that are done, which may be a fraction.
        max_epochs: the run's limit in epochs; None or -1 for no limit.
        steps: number of optimizer steps that are done.
        max_steps: the run's limit in optimizer steps; -1 for no limit.

    Example:
        >>> share_done(1.5, 10, 30, -1), share_done(1.5, 10, 30, 60), share_done(1.5, -1, 30, -1)
        (0.15, 0.5, None)
    """
    shares = []
    if max_epochs is not None and max_epochs > 0:
        shares.append(epochs / max_epochs)
    if max_steps > 0:
        shares.append(steps / max_steps)
    return min(1.0, max(shares)) if shares else None


def in_digits(seconds: float) -> str:
    """Format a duration as minutes and seconds, with hours if there are any.

    Example:
        >>> in_digits(4.4), in_digits(754), in_digits(3725)
        ('0:04', '12:34', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _done(trainer: Trainer, within: float) -> float | None:
    epochs, steps = trainer.current_epoch + within, trainer.global_step
    return share_done(epochs, trainer.max_epochs, steps, trainer.max_steps)
