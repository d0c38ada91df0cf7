"""Callbacks that every run has: checkpoints, the gap over epochs, and terminal output."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from gpd_cli.distributed.last_checkpoint import written_checkpoint
from gpd_cli.distributed.world import batches_between, saved_exactly
from gpd_cli.files import glance, short_path
from gpd_cli.run_folder import BEST, GIVEN_UP, LAST
from gpd_cli.training.epoch_lines import EpochLines
from gpd_cli.training.epoch_scores import SELECTOR
from gpd_cli.training.epoch_state import EpochState
from gpd_cli.training.gap_remarks import GapRemarks
from gpd_cli.training.history import GapHistory
from gpd_cli.training.moved_folder import MovedFolder
from gpd_cli.training.progress import GapProgressBar
from gpd_cli.training.telemetry import Telemetry

# Largest fraction of the run's time for checkpoints written every so many minutes.
_MOST_TIME = 0.01


def default_callbacks(
    watched: bool, save_steps: int | None = None, save_minutes: float | None = None
) -> list[Callback]:
    """Make the callbacks for checkpoints, gap plot, telemetry and terminal output.

    Args:
        watched: whether a person watches the terminal; then a live progress bar is shown, and
            otherwise a line is printed per epoch.
        save_steps: number of optimizer steps between checkpoints within an epoch; None for no such
            checkpoints.
        save_minutes: age of the latest checkpoint, in minutes, at which another one is written
            within an epoch; None for no such checkpoints.
    """
    display = GapProgressBar() if watched else EpochLines()
    last = Last(save_steps, save_minutes)
    logs = [GapHistory(), GapRemarks(), Telemetry(), display]
    return [EpochState(), MovedFolder(), Best(), last, *logs]


class Best(ModelCheckpoint):
    """Keep ``best.ckpt``: the checkpoint with the best validation accuracy of the student."""

    def __init__(self) -> None:
        super().__init__(
            monitor=SELECTOR, mode="max", filename=Path(BEST).stem, enable_version_counter=False
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set ``best.ckpt`` aside if the run was put back to a checkpoint from before it.

        Otherwise ``best.ckpt`` would stay one of the training that was given up, beside a score of
        the training that is kept.
        """
        super().on_fit_start(trainer, pl_module)
        # At this point Lightning has restored this callback, and not yet the number of updates.
        if self.dirpath is None or not trainer.ckpt_path or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = Path(self.dirpath, BEST)
        begin, best = (_updates(file) for file in (trainer.ckpt_path, path))
        is_later = begin is not None and best is not None and best > begin
        if not trainer.strategy.broadcast(is_later):
            return
        kept = path.with_name(GIVEN_UP)
        rank_zero_info(
            f"{short_path(path)} is of a later step than that from which this run goes on, and is "
            f"now called {kept.name}; {path.name} is chosen from the epochs to come."
        )
        if trainer.is_global_zero:
            path.replace(kept)
        self.best_model_path = self.kth_best_model_path = ""
        self.best_k_models, self.best_model_score = {}, None
        self.kth_value = torch.tensor(-torch.inf)


class Last(ModelCheckpoint):
    """Write ``last.ckpt``, to resume from, after every epoch and within long epochs.

    Args:
        steps: number of optimizer steps between checkpoints within an epoch; None for no such
            checkpoints.
        minutes: age of the latest checkpoint, in minutes, at which another one is written within an
            epoch; None for no such checkpoints. If writing a checkpoint takes more than a hundredth
            of this time, the age is increased so that writing takes a hundredth of it.
    """

    def __init__(self, steps: int | None = None, minutes: float | None = None) -> None:
        # `save_last` would copy the best checkpoint, and only when there is a new one.
        super().__init__(
            filename=Path(LAST).stem, save_on_train_epoch_end=True, enable_version_counter=False
        )
        self._steps, self._minutes = steps, minutes
        self._written, self._since, self._seen = 0.0, 0, 0
        self._is_due = False
        self._took = 0.0  # seconds that writing the latest checkpoint took

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._written, self._seen = time.monotonic(), trainer.global_step
        self._is_due = False

    def save_start(self, trainer: Trainer) -> None:
        """Save the state from which a run starts, for a run that may have to return to it.

        To be called when everything has been restored, which callbacks do before the module.

        Args:
            trainer: trainer of the run.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.strategy.broadcast(written_checkpoint(trainer) is None):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save a checkpoint if one is due; all processes decide this together after a batch."""
        self._since += 1
        step = trainer.global_step
        if step == self._seen:  # gradients are accumulated, without a step
            return
        self._seen = step
        # A checkpoint that is due before a validation is saved after the next batch that can be.
        self._is_due |= self._steps is not None and step % self._steps == 0
        if self._should_skip_saving_checkpoint(trainer) or not saved_exactly(trainer):
            return
        due = self._is_due
        if not due and self._minutes is not None and self._since >= batches_between(trainer):
            self._since = 0
            least = max(60 * self._minutes, self._took / _MOST_TIME)
            late = time.monotonic() - self._written >= least
            due = trainer.strategy.reduce_boolean_decision(late, all=False)
        if due:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        start = time.monotonic()
        super()._save_checkpoint(trainer, filepath)
        self._is_due = False
        self._written = time.monotonic()
        self._took = self._written - start


def _updates(path: str | Path) -> int | None:
    """The number of updates made before a checkpoint; None if no file tells it."""
    step = glance(path).get("global_step")
    return step if isinstance(step, int) else None
