"""Callbacks that every run has: checkpoints, the gap over epochs, and terminal output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar

from gpd_cli.training.plot import plot_gap
from gpd_cli.training.telemetry import Telemetry

_SHOWN = ("student_top1", "teacher_top1", "gap")
_FROZEN = ("val/static_top1", "val/assistant_")


def default_callbacks(watched: bool) -> list[Callback]:
    """Checkpoints, gap plot, telemetry and display.

    Args:
        watched: whether a person watches the terminal, so that a live progress bar is shown.
    """
    display = GapProgressBar() if watched else EpochLines()
    return [Best(), Last(), GapHistory(), Telemetry(), display]


class Best(ModelCheckpoint):
    """Keep ``best.ckpt``: the checkpoint with the best validation accuracy of the student."""

    def __init__(self) -> None:
        super().__init__(
            monitor="val/student_top1", mode="max", filename="best", enable_version_counter=False
        )


class Last(ModelCheckpoint):
    """Write ``last.ckpt`` after every epoch, to resume from."""

    def __init__(self) -> None:
        # `save_last` would copy the best checkpoint, and only when there is a new one.
        super().__init__(
            filename="last", save_on_train_epoch_end=True, enable_version_counter=False
        )


class _Fresh(Callback):
    """Base of callbacks that use an epoch's scores: Lightning keeps scores of older epochs, too."""

    def __init__(self) -> None:
        self._validated = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation has not run in this epoch yet."""
        self._validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation has run in this epoch."""
        self._validated = not trainer.sanity_checking

    def scores(self, trainer: Trainer) -> dict[str, dict[str, float]]:
        """The scores, in percent, of the epoch that ends, by stage and name."""
        metrics = trainer.callback_metrics
        # Training scores are logged at an epoch's last batch, which a stopped run does not reach.
        scored = {"train": trainer.is_last_batch, "val": self._validated}
        return {
            stage: {n: float(metrics[k]) for n in _SHOWN if (k := f"{stage}/{n}") in metrics}
            for stage, is_new in scored.items()
            if is_new
        }

    def raw_scores(self, trainer: Trainer) -> dict[str, float]:
        """Scores of the trained weights in this epoch's validation, if that scored an average."""
        metrics = trainer.callback_metrics
        names = _SHOWN if self._validated else ()
        return {n: float(metrics[k]) for n in names if (k := f"val/raw_{n}") in metrics}


class GapHistory(_Fresh):
    """Remember accuracies and gap by epoch, across resumptions, and plot them after `fit`."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: dict[int, dict[str, float]] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take this epoch's values."""
        self.epochs[trainer.current_epoch] = {
            f"{stage}/{name}": value
            for stage, values in self.scores(trainer).items()
            for name, value in values.items()
        }
        # Scores of static teachers are the same in every epoch.
        self.epochs[trainer.current_epoch] |= {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith(_FROZEN) and key.endswith("_top1")
        }

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``gap.png`` beside ``metrics.csv``."""
        folder = trainer.log_dir  # read in every process, since Lightning broadcasts the value
        if trainer.is_global_zero and folder and self.epochs:
            plot_gap(self.epochs, Path(folder) / "gap.png")

    def state_dict(self) -> dict[str, Any]:
        """The history, for the checkpoint."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of the resumed run."""
        self.epochs = dict(state_dict["epochs"])


class GapProgressBar(RichProgressBar):
    """A live bar that shows the running accuracies of student and teacher, and the gap."""

    def __init__(self) -> None:
        super().__init__(leave=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """All metrics but the version number."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items


class EpochLines(_Fresh):
    """A line per epoch, for output that no person watches: in a file, or on a cluster."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's accuracies."""
        if not trainer.is_global_zero:
            return
        length = trainer.max_epochs or -1
        parts = [f"epoch {trainer.current_epoch + 1}" + (f"/{length}" if length > 0 else "")]
        stages = self.scores(trainer) | {"raw": self.raw_scores(trainer)}
        for stage, scores in stages.items():
            values = [f"{name.removesuffix('_top1')} {v:.2f}" for name, v in scores.items()]
            if values:
                parts.append(f"{stage}: {', '.join(values)}")
        print("  ".join(parts), flush=True)
