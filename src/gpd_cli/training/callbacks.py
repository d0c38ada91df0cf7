"""Callbacks that every run has: checkpoints, the gap over epochs, and terminal output."""

from __future__ import annotations

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from gpd_cli.training.epoch_lines import EpochLines
from gpd_cli.training.history import GapHistory
from gpd_cli.training.progress import GapProgressBar
from gpd_cli.training.telemetry import Telemetry


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
