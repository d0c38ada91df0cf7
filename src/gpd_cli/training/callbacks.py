"""Callbacks that every run has: checkpoints, the gap over epochs, and what the terminal shows."""

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
        watched: whether a person looks at the terminal, and wants a live bar.
    """
    display = GapProgressBar() if watched else EpochLines()
    return [Best(), Last(), GapHistory(), Telemetry(), display]


class Best(ModelCheckpoint):
    """Keep ``best.ckpt``, by the student's validation accuracy, with the weights it exports."""

    def __init__(self) -> None:
        super().__init__(
            monitor="val/student_top1", mode="max", filename="best", enable_version_counter=False
        )


class Last(ModelCheckpoint):
    """Write ``last.ckpt`` after every epoch, to resume from."""

    def __init__(self) -> None:
        # Not `save_last`: that copies the best checkpoint only when there is a new one.
        super().__init__(
            filename="last", save_on_train_epoch_end=True, enable_version_counter=False
        )


class _Fresh(Callback):
    """Base of callbacks that take an epoch's scores: Lightning keeps those of epochs before."""

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
        # Training is scored with an epoch's last batch, which a run that ends before does not see.
        scored = {"train": trainer.is_last_batch, "val": self._validated}
        return {
            stage: {n: float(metrics[k]) for n in _SHOWN if (k := f"{stage}/{n}") in metrics}
            for stage, is_new in scored.items()
            if is_new
        }

    def raw_scores(self, trainer: Trainer) -> dict[str, float]:
        """Scores of the trained weights in this epoch's validation, if it scored an average."""
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
        # Those of static teachers stay as they are.
        self.epochs[trainer.current_epoch] |= {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith(_FROZEN) and key.endswith("_top1")
        }

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``gap.png`` beside ``metrics.csv``."""
        folder = trainer.log_dir  # every process has to ask: the answer is broadcast
        if trainer.is_global_zero and folder and self.epochs:
            plot_gap(self.epochs, Path(folder) / "gap.png")

    def state_dict(self) -> dict[str, Any]:
        """The history, for the checkpoint."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the history of the run that is resumed."""
        self.epochs = dict(state_dict["epochs"])


class GapProgressBar(RichProgressBar):
    """A live bar that shows the running accuracies of student and teacher, and the gap."""

    def __init__(self) -> None:
        super().__init__(leave=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Everything but the version number."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items


class EpochLines(_Fresh):
    """A line per epoch where nobody watches a bar: in a file, or on a cluster."""

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
