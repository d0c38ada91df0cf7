"""Callbacks that every run has: checkpoints, the gap over epochs, and terminal output."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from gpd_cli.distributed.last_checkpoint import written_checkpoint
from gpd_cli.distributed.world import batches_between, saved_exactly
from gpd_cli.run_folder import BEST, LAST
from gpd_cli.training.epoch_lines import EpochLines
from gpd_cli.training.epoch_scores import SELECTOR
from gpd_cli.training.epoch_state import EpochState
from gpd_cli.training.gap_remarks import GapRemarks
from gpd_cli.training.history import GapHistory
from gpd_cli.training.moved_folder import MovedFolder
from gpd_cli.training.progress import GapProgressBar
from gpd_cli.training.telemetry import Telemetry

_MOST_TIME = (
    0.01  # largest fraction of the run's time for checkpoints written every so many minutes
)


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
        self._took = 0.0  # seconds that writing the latest checkpoint took

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; save the initial weights if the run may have to return to them."""
        super().on_train_start(trainer, pl_module)
        self._written, self._seen = time.monotonic(), trainer.global_step
        may_return = pl_module.hparams.get("on_nan") == "reduce_lr"
        if not may_return or trainer.fast_dev_run:  # type: ignore[attr-defined]
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
        if self._should_skip_saving_checkpoint(trainer) or not saved_exactly(trainer):
            return
        due = self._steps is not None and step % self._steps == 0
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
        self._written = time.monotonic()
        self._took = self._written - start
