"""What is printed of a run where nobody watches a bar: in a file, or on a cluster."""

from __future__ import annotations

from datetime import datetime

from lightning.pytorch import LightningModule, Trainer

from gpd_cli.training.clock import RunClock, in_digits
from gpd_cli.training.epoch_scores import EpochScores


class EpochLines(EpochScores):
    """A line per epoch: time of day, accuracies, how long the epoch took and the run will take."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = RunClock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._clock.start(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch begins."""
        super().on_train_epoch_start(trainer, pl_module)
        self._clock.start_epoch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's accuracies."""
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
    """The current epoch, counted from 1, and the number of epochs where the run has one."""
    length = trainer.max_epochs or -1
    return f"{trainer.current_epoch + 1}" + (f"/{length}" if length > 0 else "")
