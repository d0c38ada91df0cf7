"""Loggers of a run: always a CSV file, and the user's loggers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from gpd_cli.cli.arguments import CONFIGURATION, is_inline, occurrences
from gpd_cli.errors import GpdError
from gpd_cli.report.run import CONFIG, METRICS

_CSV = "gpd_cli.training.table.RunCSVLogger"
_PACKAGES = {"TensorBoardLogger": "tensorboard", "WandbLogger": "wandb", "MLFlowLogger": "mlflow"}
_RUNS = "runs"
_SHIPPED = "configs"
_OF_MACHINE = ("logger", "default_root_dir", "profiler", "enable_progress_bar")


def csv_logger(arguments: Sequence[str]) -> dict[str, Any]:
    """The logger of every run: ``runs/NAME/version_N``, with NAME from its configurations' files.

    Args:
        arguments: the command line.
    """
    given = [value for _, value in occurrences(arguments, CONFIGURATION) if value]
    files = [value for value in given if not (is_inline(value) or Path(value).is_fifo())]
    name = "_".join(run_name(file) for file in files) or "gpd"
    return {"class_path": _CSV, "init_args": {"save_dir": _RUNS, "name": name}}


def run_name(file: str | Path) -> str:
    """The name of a configuration's runs: the file's name without suffix.

    A file two or more folders below a folder ``configs`` gets its folder's name as a prefix, so
    that ``configs/imagenet/scratch/resnet18.yaml`` and ``.../finetune/resnet18.yaml`` have
    different names: ``scratch_resnet18`` and ``finetune_resnet18``.

    Args:
        file: the configuration.
    """
    path = Path(file).absolute()
    folders = [folder.name for folder in path.parents]
    if _SHIPPED in folders[2:]:
        return f"{folders[0]}_{path.stem}"
    return path.stem


def with_csv(
    chosen: Any, default: Mapping[str, Any], root: str | Path | None = None
) -> list[Namespace]:
    """The chosen loggers with a CSV logger first, whose folder is then the run's folder.

    Without any chosen logger there is a CSV logger as well, since its folder separates the
    checkpoints of different runs.

    Args:
        chosen: ``trainer.logger`` as parsed.
        default: the output of `csv_logger`.
        root: ``trainer.default_root_dir``; if given, runs are in its folder ``runs`` instead of
            the working directory's.

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
            logger.class_path = _CSV  # which takes the same arguments, and can be continued
        if root and str(logger.init_args.get("save_dir")) == _RUNS:
            logger.init_args["save_dir"] = os.path.join(root, _RUNS)  # noqa: PTH118 - or a URL
    return files + [logger for logger in loggers if logger not in files]


def taken_folder(table: Mapping[str, Any]) -> Path | None:
    """The folder of another run that a version leads to, by its name or number.

    Args:
        table: arguments of a run's CSV logger.

    Returns:
        The folder; None for a version that is free, and without one, as the next number is.
    """
    version = table.get("version")
    if version is None or "://" in str(table["save_dir"]):
        return None
    last = version if isinstance(version, str) else f"version_{version}"
    folder = Path(table["save_dir"], table.get("name") or "", last)
    return folder if any((folder / file).is_file() for file in (METRICS, CONFIG)) else None


def settings_to_log(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that runs are compared by: model, optimizer, data and trainer.

    Args:
        config: the configuration of a run, resolved.

    Returns:
        A nested dictionary, which each logger flattens in its own way; the trainer's settings are
        included if they are numbers or strings.
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
    """The settings that a checkpoint has: how its run was trained, and not where it was logged.

    Args:
        config: the configuration of a run, as plain values.
    """
    trainer = {name: v for name, v in config["trainer"].items() if name not in _OF_MACHINE}
    return {key: v for key, v in config.items() if key != "ckpt_path"} | {"trainer": trainer}


def _plain(value: Any) -> Any:
    """The value with lists for tuples, which YAML would write with a Python tag."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
