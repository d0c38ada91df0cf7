"""Restoring a run from a checkpoint, with a one-sentence error for any damaged content."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpd_cli.errors import GpdError
from gpd_cli.teacher.checkpoint import check_content
from gpd_cli.teacher.checkpoint_checks import damaged
from gpd_cli.training.epoch_length import ENTRY, take_up
from gpd_cli.training.state_checks import check_optimizer_state, check_training_state


class Restoring(_CheckpointConnector):
    """Lightning's checkpoint connector, with checks of the checkpoint's content.

    Lightning itself trusts the content. What our checks do not foresee fails in Lightning, in an
    optimizer or in a callback with errors of any type; these are replaced by one sentence.
    """

    def resume_start(
        self, checkpoint_path: str | Path | None = None, weights_only: bool | None = None
    ) -> None:
        """Read the checkpoint, and check the form of its content."""
        with self._taken_up(checkpoint_path):
            super().resume_start(checkpoint_path, weights_only)
            if self._loaded_checkpoint:
                check_content(Path(str(checkpoint_path)), self._loaded_checkpoint)
                if self.trainer.state.fn == TrainerFn.FITTING:
                    check_training_state(self._loaded_checkpoint)

    def restore_model(self) -> None:
        """Load the weights."""
        with self._taken_up():
            super().restore_model()

    def restore_datamodule(self) -> None:
        """Load the data module's state."""
        with self._taken_up():
            super().restore_datamodule()

    def restore_callbacks(self) -> None:
        """Load the callbacks' states."""
        with self._taken_up():
            super().restore_callbacks()

    def restore_training_state(self) -> None:
        """Load the states of precision, loops and optimizer, and find the position in the epoch."""
        fitting = self._loaded_checkpoint and self.trainer.state.fn == TrainerFn.FITTING
        with self._taken_up():
            super().restore_training_state()
            if fitting:
                for optimizer in self.trainer.optimizers:
                    check_optimizer_state(optimizer)
        if fitting and (length := self._loaded_checkpoint.get(ENTRY)):
            take_up(length, self.trainer)

    @contextmanager
    def _taken_up(self, path: Any = None) -> Iterator[None]:
        try:
            yield
        except (GpdError, MisconfigurationException, OSError):
            raise
        except Exception as error:  # any error of Lightning, torch or a callback
            raise damaged(path or self._ckpt_path, error) from error
