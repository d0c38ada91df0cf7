"""The live progress bar of `fit`, and the table of epochs printed above the bar."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from gpd_cli.training.clock import RunClock, in_digits, share_of_epoch
from gpd_cli.training.epoch_lines import epoch_of
from gpd_cli.training.epoch_scores import SELECTOR, EpochScores
from gpd_cli.training.metrics import RunningAccuracy

# Seconds between updates of the running accuracies, since reading them waits for the accelerator.
_EVERY = 0.2
_COLUMNS = {
    "student": "student_top1",
    "teacher": "teacher_top1",
    "static": "static_top1",
    "gap": "gap",
}


class GapProgressBar(EpochScores, ProgressBar):
    """A progress bar with running accuracies and the time left, below a table with a row per epoch.

    A row shows the epoch's validation accuracies, or the training accuracies if nothing was
    validated. The bar takes one line of 80 columns and is removed when training ends; the rows
    stay.
    """

    def __init__(self) -> None:
        EpochScores.__init__(self)
        ProgressBar.__init__(self)
        self._clock = RunClock()
        self._console: Console | None = None
        self._progress: Progress | None = None
        self._training: TaskID | None = None
        self._evaluating: TaskID | None = None
        self._enabled = True
        self._looked = 0.0
        self._highest = -math.inf
        self._titled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._console is None:
            print(*args, **kwargs)
        else:
            self._console.print(*args, **kwargs)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar from the sanity check on."""
        self._begin()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar; in a resumed run, the score of ``best.ckpt`` is the one to beat."""
        self._begin()
        self._clock.start(trainer)
        scores = [
            float(score)
            for callback in trainer.checkpoint_callbacks
            if getattr(callback, "monitor", None) == SELECTOR
            and (score := getattr(callback, "best_model_score", None)) is not None
        ]
        self._highest = max(scores, default=-math.inf)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the bar for a new epoch."""
        super().on_train_epoch_start(trainer, pl_module)
        self._clock.start_epoch()
        if self._progress is None:
            return
        if self._training is not None:
            self._progress.remove_task(self._training)
        self._training = self._task(f"epoch {epoch_of(trainer)}", trainer.num_training_batches)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Advance the bar by a batch, and refresh running accuracies and time left."""
        if self._progress is None or self._training is None:
            return
        self._progress.update(self._training, completed=batch_idx + 1)
        now = time.perf_counter()
        if now - self._looked < _EVERY:
            return
        self._looked = now
        left = self._clock.left(trainer, share_of_epoch(trainer))
        self._progress.update(
            self._training,
            scores=running(_live(pl_module) | trainer.progress_bar_metrics),
            left="" if left is None else f"{in_digits(left)} left",
        )

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show a second bar during validation."""
        if self.has_dataloader_changed(dataloader_idx):
            self._end_evaluation()
            if self._progress is not None:
                what = "checking" if trainer.sanity_checking else "validating"
                self._evaluating = self._task(what, self.total_val_batches_current_dataloader)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance the validation bar by a batch."""
        if self._progress is not None and self._evaluating is not None:
            self._progress.update(self._evaluating, completed=batch_idx + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the validation bar."""
        super().on_validation_end(trainer, pl_module)
        self._end_evaluation()
        self.reset_dataloader_idx_tracker()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's row of the table."""
        scores = self.scores(trainer)
        stage = "val" if scores.get("val") else "train"
        values = dict(scores.get(stage, {}))
        if (static := trainer.callback_metrics.get("val/static_top1")) is not None:
            values["static_top1"] = float(static)
        student = values.get("student_top1", -math.inf)
        is_best = stage == "val" and student > self._highest
        if is_best:
            self._highest = student
        if self._console is None or not values:
            return
        if not self._titled:
            kind = "validation" if stage == "val" else "training"
            self._print(f"{header(values)}  ({kind}, %)", style="bold")
            self._titled = True
        self._print(row(epoch_of(trainer), self._clock.epoch(), values, is_best))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar."""
        self._finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the bar, which leaves the terminal in its normal state."""
        self._finish()

    def _begin(self) -> None:
        if self._progress is not None or not self._enabled:
            return
        self._console = Console(highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[scores]}"),
            TextColumn("{task.fields[left]}", style="cyan"),
            console=self._console,
            transient=True,
            expand=True,
            refresh_per_second=5,
        )
        self._progress.start()

    def _task(self, name: str, batches: int | float) -> TaskID:
        assert self._progress is not None
        total = None if batches == math.inf else int(batches)
        return self._progress.add_task(name, total=total, scores="", left="")

    def _end_evaluation(self) -> None:
        if self._progress is not None and self._evaluating is not None:
            self._progress.remove_task(self._evaluating)
        self._evaluating = None

    def _print(self, text: str, style: str | None = None) -> None:
        assert self._console is not None
        self._console.print(text, style=style, soft_wrap=True, markup=False)

    def _finish(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._training = self._evaluating = None


def _live(module: LightningModule) -> dict[str, float]:
    """The running accuracies in percent of a module that keeps them; otherwise empty."""
    live = getattr(module, "live", None)
    if not isinstance(live, RunningAccuracy):
        return {}
    return {name: float(value) for name, value in live.shown().items()}


def running(metrics: Mapping[str, float | int]) -> str:
    """Format the running accuracies for the bar.

    Example:
        >>> running({"student": 44.09, "teacher": 50.21, "gap": 6.12})
        'student 44.1 teacher 50.2 gap 6.1'
    """
    return " ".join(f"{name} {value:.1f}" for name, value in metrics.items())


def header(values: Mapping[str, float]) -> str:
    """The table's header: titles of the columns that `row` fills."""
    names = [name for name, key in _COLUMNS.items() if key in values]
    return "".join([f"{'epoch':>9}", f"{'time':>9}", *(f"{name:>9}" for name in names)])


def row(epoch: str, seconds: float, values: Mapping[str, float], is_best: bool) -> str:
    """Format the row of an epoch.

    Args:
        epoch: number of the epoch, with the number of epochs after a slash where it is known.
        seconds: duration of the epoch in seconds.
        values: accuracies in percent, and gap in points, by name.
        is_best: whether this epoch has the best validation accuracy so far.

    Example:
        >>> row("3/30", 4.2, {"student_top1": 46.1, "teacher_top1": 64.7, "gap": 18.6}, True)
        '     3/30     0:04    46.10    64.70    18.60  best'
    """
    numbers = [f"{values[key]:9.2f}" for key in _COLUMNS.values() if key in values]
    mark = "  best" if is_best else ""
    return "".join([f"{epoch:>9}", f"{in_digits(seconds):>9}", *numbers, mark])
