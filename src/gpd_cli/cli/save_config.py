"""The file ``config.yaml`` of a run, which is written when training begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from gpd_cli.cli.environment import write_environment
from gpd_cli.files import atomic_path, is_remote

# Settings of the trainer that concern the machine and not the training.
_OF_MACHINE = ("logger", "default_root_dir", "profiler", "enable_progress_bar")


class SaveConfig(SaveConfigCallback):
    """Write ``config.yaml`` and log all settings when training begins.

    Nothing is written earlier, so that a run refused before training leaves no file.

    Attributes:
        arguments: the command line as the user typed it, without the program's name.
    """

    arguments: list[str] = []  # noqa: RUF012 - one command line per process
    _kept: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing here, since the configuration is written when training starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the configuration atomically, and beside it a record of how the run was started."""
        folder = trainer.log_dir  # read in every process, since Lightning broadcasts the folder
        text = self.parser.dump(self.config, skip_none=False)
        self._kept = settings_to_keep(yaml.safe_load(text))
        if trainer.is_global_zero and folder and is_remote(folder):
            with fsspec.open(f"{folder}/{self.config_filename}", "w", encoding="utf-8") as file:
                file.write(text)
        elif trainer.is_global_zero and folder:
            with atomic_path(Path(folder) / self.config_filename) as temporary:
                temporary.write_text(text, encoding="utf-8")
            write_environment(Path(folder), self.arguments, trainer.world_size, trainer.global_step)
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the run's settings into the checkpoint, so that they travel with the file."""
        if self._kept is not None:
            checkpoint["settings"] = self._kept

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the settings to every logger, so that runs can be compared."""
        settings = settings_to_log(self.config.as_dict())
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)
            logger.save()


def settings_to_log(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that loggers get, so that runs can be compared: model, data and trainer.

    Args:
        config: the complete configuration of a run.

    Returns:
        A nested dictionary, which each logger flattens in its own way. Of the trainer's settings,
        only numbers, strings and booleans are included.
    """
    trainer = {
        name: value
        for name, value in config["trainer"].items()
        if isinstance(value, bool | int | float | str)
    }
    data = config["data"]
    return {
        "seed_everything": config.get("seed_everything"),
        "model": _plain(config["model"]),
        "data": {"class_path": data["class_path"], **_plain(data["init_args"])},
        "trainer": trainer,
    }


def settings_to_keep(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are stored in checkpoints: how the run is trained, not where it is logged.

    Args:
        config: the complete configuration of a run, as plain values.
    """
    trainer = {name: v for name, v in config["trainer"].items() if name not in _OF_MACHINE}
    return {key: v for key, v in config.items() if key != "ckpt_path"} | {"trainer": trainer}


def _plain(value: Any) -> Any:
    """Replace tuples by lists at all levels, since YAML would write tuples with a Python tag."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
