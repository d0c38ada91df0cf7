"""Output of a run that has no progress bar, since it goes to a file or the log of a cluster job."""

from __future__ import annotations

from datetime import datetime

from lightning.pytorch import LightningModule, Trainer

from gpd_cli.training.clock import RunClock, in_digits
from gpd_cli.training.epoch_scores import EpochScores


class EpochLines(EpochScores):
    """Print a line per epoch: time of day, accuracies, duration of the epoch, time left."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = RunClock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._clock.start(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start timing the epoch."""
        super().on_train_epoch_start(trainer, pl_module)
        self._clock.start_epoch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's line."""
        if not trainer.is_global_zero:
            return
        parts = [f"{datetime.now():%H:%M:%S} epoch {epoch_of(trainer)}"]
        stages = self.scores(trainer) | {"raw": self.raw_scores(trainer)}
        for stage, scores in stages.items():
            values = [f"{name.removesuffix('_top1')} {v:.2f}" for name, v in scores.items()]
            if values:
                parts.append(f"{stage}: {', '.join(values)}")
        times = f"took {in_digits(self._clock.epoch())}"
        left = self._clock.left(trainer, within=1.0)
        if left is not None:
            times += f", {in_digits(left)} left"
        print("  ".join([*parts, times]), flush=True)


def epoch_of(trainer: Trainer) -> str:
    """The current epoch, counted from 1, followed by the number of epochs if the run has a limit.

    For example ``3/30``.
    """
    length = trainer.max_epochs or -1
    return f"{trainer.current_epoch + 1}" + (f"/{length}" if length > 0 else "")
