"""Accuracies and gap of every epoch, kept when a run is resumed, and plotted in ``gap.png``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from gpd_cli.errors import GpdError
from gpd_cli.files import is_remote
from gpd_cli.run_folder import GAP
from gpd_cli.training.epoch_scores import EpochScores
from gpd_cli.training.plot import plot_gap

_FROZEN = ("val/static_top1", "val/assistant_")


class GapHistory(EpochScores):
    """Record accuracies and gap of every epoch, and plot them when training ends or is aborted."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: dict[int, dict[str, float]] = {}
        self._folder: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for the log folder in every process, since Lightning broadcasts the answer."""
        self._folder = trainer.log_dir

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the accuracies and the gap of this epoch."""
        self.epochs[trainer.current_epoch] = {
            f"{stage}/{name}": value
            for stage, values in self.scores(trainer).items()
            for name, value in values.items()
        }
        # The accuracies of static teachers are measured once, and repeated in every epoch.
        self.epochs[trainer.current_epoch] |= {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith(_FROZEN) and key.endswith("_top1")
        }

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``gap.png`` beside ``metrics.csv``."""
        self._plot(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write ``gap.png`` for an interrupted or failed run as well, if that is possible."""
        with suppress(GpdError):  # e.g. a full disk, which the run's own error already reports
            self._plot(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The history of all epochs so far, for the checkpoint."""
        return {**super().state_dict(), "epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history of the run that is resumed."""
        super().load_state_dict(state_dict)
        self.epochs = dict(state_dict["epochs"])

    def _plot(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self._folder and self.epochs and not is_remote(self._folder):
            plot_gap(self.epochs, Path(self._folder) / GAP)
