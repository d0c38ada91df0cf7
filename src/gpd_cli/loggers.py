"""Loggers of a run: a CSV file always, and whatever the user adds."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from gpd_cli.errors import GpdError

_CSV = "lightning.pytorch.loggers.CSVLogger"
_PACKAGES = {"TensorBoardLogger": "tensorboard", "WandbLogger": "wandb", "MLFlowLogger": "mlflow"}


def csv_logger(arguments: Sequence[str]) -> dict[str, Any]:
    """The logger every run has: ``runs/NAME/version_N``, NAME being that of its configurations.

    Args:
        arguments: the command line.
    """
    files = [
        after.partition("=")[2] or following
        for after, following in zip(arguments, [*arguments[1:], ""], strict=True)
        if after.partition("=")[0] in ("-c", "--config")
    ]
    name = "_".join(Path(file).stem for file in files if file) or "gpd"
    return {"class_path": _CSV, "init_args": {"save_dir": "runs", "name": name}}


def with_csv(chosen: Any, default: dict[str, Any]) -> Any:
    """The chosen loggers with a CSV file in front, which then names the run's folder.

    Args:
        chosen: ``trainer.logger`` as parsed; False for no logger at all.
        default: as `csv_logger` gives it.

    Raises:
        GpdError: when the package behind a logger is not installed.
    """
    if chosen is False:
        return False
    loggers = [] if chosen in (None, True) else chosen if isinstance(chosen, list) else [chosen]
    for logger in loggers:
        name = logger.get("class_path", "").rpartition(".")[2]
        package = _PACKAGES.get(name)
        if package is not None and find_spec(package) is None:
            raise GpdError(
                f"{name} needs the package {package}, which is not installed: pip install "
                f"'gpd-cli[{package}]'."
            )
    if any(logger.get("class_path", "").endswith("CSVLogger") for logger in loggers):
        return chosen
    csv = Namespace(class_path=_CSV, init_args=Namespace(**default["init_args"]))
    return [csv, *loggers]
