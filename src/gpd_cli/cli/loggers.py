"""Loggers of a run: always a CSV logger, and beside it those that the user has chosen."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from gpd_cli.cli.arguments import CONFIGURATION_OPTIONS, is_inline, occurrences
from gpd_cli.errors import GpdError
from gpd_cli.files import is_remote
from gpd_cli.run_folder import CONFIGURATION, METRICS

_CSV = "gpd_cli.training.table.RunCSVLogger"
_PACKAGES = {"TensorBoardLogger": "tensorboard", "WandbLogger": "wandb", "MLFlowLogger": "mlflow"}
_RUNS = "runs"
_SHIPPED = "configs"


def csv_logger(arguments: Sequence[str]) -> dict[str, Any]:
    """Settings of the CSV logger that every run has; it logs to ``runs/NAME/version_N``.

    NAME is made of the names of the run's configuration files.

    Args:
        arguments: the command line.
    """
    given = [value for _, value in occurrences(arguments, CONFIGURATION_OPTIONS) if value]
    files = [value for value in given if not (is_inline(value) or Path(value).is_fifo())]
    name = "_".join(run_name(file) for file in files) or "gpd"
    return {"class_path": _CSV, "init_args": {"save_dir": _RUNS, "name": name}}


def run_name(file: str | Path) -> str:
    """The name for runs of a configuration: the file's name without its suffix.

    If the file lies two or more folders below a folder ``configs``, the name of the file's own
    folder is put before it. So ``configs/imagenet/scratch/resnet18.yaml`` and
    ``configs/imagenet/finetune/resnet18.yaml`` give different names: ``scratch_resnet18`` and
    ``finetune_resnet18``.

    Args:
        file: path of the configuration.
    """
    path = Path(file).absolute()
    folders = [folder.name for folder in path.parents]
    if _SHIPPED in folders[2:]:
        return f"{folders[0]}_{path.stem}"
    return path.stem


def with_csv(
    chosen: Any, default: Mapping[str, Any], root: str | Path | None = None
) -> list[Namespace]:
    """Put a CSV logger first among the chosen loggers; its folder is then the run's folder.

    A CSV logger is added even if the user has chosen no logger, since its folder keeps the
    checkpoints of different runs apart.

    Args:
        chosen: the option ``trainer.logger``, as parsed.
        default: the output of `csv_logger`.
        root: the option ``trainer.default_root_dir``; if given, runs are in the folder ``runs``
            below this folder, and otherwise in ``runs`` below the working directory.

    Raises:
        GpdError: when the package behind a logger is not installed.
    """
    loggers = list(chosen) if isinstance(chosen, list) else [chosen]
    loggers = [logger for logger in loggers if not (logger is None or isinstance(logger, bool))]
    for logger in loggers:
        name = logger.get("class_path", "").rpartition(".")[2]
        package = _PACKAGES.get(name)
        if package is not None and find_spec(package) is None:
            raise GpdError(
                f"{name} needs the package {package}, which is not installed: pip install "
                f"'gpd-cli[{package}]'."
            )
    files = [logger for logger in loggers if logger.get("class_path", "").endswith("CSVLogger")]
    if not files:
        files = [Namespace(class_path=_CSV, init_args=Namespace(**default["init_args"]))]
    for logger in files:
        if logger.class_path.startswith("lightning."):
            logger.class_path = _CSV  # takes the same arguments as Lightning's, and can continue
        if root and str(logger.init_args.get("save_dir")) == _RUNS:
            logger.init_args["save_dir"] = os.path.join(root, _RUNS)  # noqa: PTH118 - or a URL
    return files + [logger for logger in loggers if logger not in files]


def taken_folder(table: Mapping[str, Any]) -> Path | None:
    """The folder that a chosen version names, if another run has taken this folder already.

    Args:
        table: arguments of a run's CSV logger; ``version`` is a name or a number.

    Returns:
        The taken folder; None if the folder is free, or if no version was chosen, so that the run
        gets the next free number.
    """
    version = table.get("version")
    if version is None or is_remote(str(table["save_dir"])):
        return None
    last = version if isinstance(version, str) else f"version_{version}"
    folder = Path(table["save_dir"], table.get("name") or "", last)
    is_taken = (folder / METRICS).is_file() or (folder / CONFIGURATION).is_file()
    return folder if is_taken else None
