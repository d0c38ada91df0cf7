"""The command line: LightningCLI with the subcommands of `GpdTrainer`."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpd_cli.checkpoint import read_run
from gpd_cli.commands.expand import expand_command
from gpd_cli.data import ImageData
from gpd_cli.errors import GpdError
from gpd_cli.loggers import csv_logger, with_csv
from gpd_cli.trainer import GpdTrainer
from gpd_cli.training.callbacks import default_callbacks
from gpd_cli.training.module import GapPreservingDistillation

EVALUATIONS = ("validate", "test", "predict")
STANDALONE = ("expand", "extract")
_CHATTER = (
    "Tip:",
    "Loading `train_dataloader`",
    "Seed set to",
    "TPU available",
    "Restoring states",
    "Loaded model weights",
)


class SaveConfig(SaveConfigCallback):
    """Write ``config.yaml`` when training begins, not for a run that is refused before."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it."""
        super().setup(trainer, pl_module, "fit")


class GpdCLI(LightningCLI):
    """LightningCLI, told what `expand` and `extract` need and what a checkpoint knows."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._command = next((a for a in arguments if not a.startswith("-")), "")
        self._from_checkpoint = _settings_of_checkpoint(self._command, arguments)
        super().__init__(
            GapPreservingDistillation,
            ImageData,
            trainer_class=GpdTrainer,
            trainer_defaults=_trainer_defaults(self._command, arguments),
            seed_everything_default=0,
            save_config_callback=SaveConfig if self._command == "fit" else None,
            save_config_kwargs={"overwrite": True},
            args=_with_values(arguments),
            auto_configure_optimizers=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that raises: its own messages begin with a page of usage."""
        return super().init_parser(**{"prog": "gpd", **kwargs, "exit_on_error": False})

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Methods of the Trainer, and which of their arguments are no options."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only"},
            "test": {"model", "dataloaders", "datamodule", "weights_only"},
            "predict": {"model", "datamodule"},
            "expand": {"model"},
            "extract": set(),
        }

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        if subcommand != "extract":
            parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
            if subcommand == "expand":
                # So that the config.yaml of a run is welcome.
                parser.add_argument("--ckpt_path", help="not used", type=str | None)
            return parser
        # The architecture and the plan are in the file: no model, data or trainer to describe.
        parser = self.init_parser(**kwargs)
        self._subcommand_method_arguments[subcommand] = parser.add_method_arguments(
            klass, subcommand
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let a checkpoint's settings be the defaults, under configuration and command line."""
        if self._from_checkpoint:
            parser.set_defaults(self._from_checkpoint)

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint's settings never override what the user asked for."""

    def before_instantiate_classes(self) -> None:
        """Last changes to what the user asked for.

        A run that is resumed takes its weights from the checkpoint, not from the first file; a run
        that logs elsewhere has its CSV file nevertheless.

        Raises:
            ArgumentError: when there is nowhere to write an expansion.
        """
        config = self.config.get(self.subcommand)
        if self.subcommand == "expand" and not (config.output or config.dry_run):
            raise ArgumentError(None, "add --output FILE.safetensors, or --dry_run to plan only")
        if self.subcommand != "fit":
            return
        if config.get("ckpt_path"):
            config.model.student_weights = None
        config.trainer.logger = with_csv(config.trainer.logger, self.trainer_defaults["logger"])

    def _set_seed(self) -> None:
        if self.subcommand != "extract":  # which draws nothing
            super()._set_seed()

    def instantiate_classes(self) -> None:
        """Make model, data and trainer for the commands that have them."""
        if self.subcommand not in STANDALONE:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand not in STANDALONE:
            super()._run_subcommand(subcommand)
            return
        config = self.config[subcommand]
        if subcommand == "expand":
            # A configuration of fit is welcome; what expansion does not need of it is left out.
            wanted = inspect.signature(expand_command).parameters
            model = {k: v for k, v in config.model.as_dict().items() if k in wanted}
            plan = config.plan and Path(config.plan)
            GpdTrainer.expand(model, config.output and Path(config.output), plan, config.dry_run)
            return
        names = self._subcommand_method_arguments[subcommand]
        GpdTrainer.extract(**{name: config[name] for name in names})


def _with_values(arguments: Sequence[str]) -> list[str]:
    """The command line with a value for `--dry_run`, which may stand alone."""
    following = [*arguments[1:], "-"]
    return [
        f"{argument}=true" if argument == "--dry_run" and after.startswith("-") else argument
        for argument, after in zip(arguments, following, strict=True)
    ]


def _trainer_defaults(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    watched = sys.stdout.isatty()
    if command != "fit":
        return {"logger": False, "enable_model_summary": False, "enable_progress_bar": watched}
    return {
        "logger": csv_logger(arguments),
        "callbacks": default_callbacks(watched),
        "enable_model_summary": False,
        # Where nobody watches, a line per epoch instead (see `default_callbacks`).
        "enable_progress_bar": watched,
    }


def run(arguments: Sequence[str]) -> int:
    """Run a command line and turn every foreseeable error into one sentence.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The exit code.
    """
    _quieten()
    try:
        GpdCLI(arguments)
    except SystemExit as stop:  # after --help or --print_config
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning exits after Ctrl-C
            return _interrupted()
        return stop.code if isinstance(stop.code, int) else 2
    except ArgumentError as error:
        text = " ".join(str(error).split()).rstrip(".")
        command = f"gpd {arguments[0]}" if arguments[0] in GpdCLI.subcommands() else "gpd"
        print(f"gpd: error: {text}; see {command} --help.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if os.environ.get("GPD_DEBUG"):
            raise
        print(f"gpd: error: {_sentence(error)}", file=sys.stderr)
        return 1
    return 0


def _interrupted() -> int:
    print("gpd: interrupted; go on with --ckpt_path RUN/checkpoints/last.ckpt", file=sys.stderr)
    return 130


def _sentence(error: BaseException) -> str:
    mendable = _mendable(error)
    if mendable is not None:
        return " ".join(str(mendable).split())
    if isinstance(error, ImportError | MisconfigurationException | OSError | ValueError):
        return " ".join(str(error).split())
    return (
        f"{type(error).__name__}: {' '.join(str(error).split())[:300]} (not foreseen; "
        "GPD_DEBUG=1 shows where)"
    )


def _mendable(error: BaseException | None) -> GpdError | None:
    """An error of ours, also when a library has wrapped it."""
    while error is not None:
        if isinstance(error, GpdError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _settings_of_checkpoint(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Model and data of the run that wrote a checkpoint, as defaults for its evaluation."""
    path = _option(arguments, "--ckpt_path") or _configured(arguments, "ckpt_path")
    if path is None or command not in ("fit", *EVALUATIONS):
        return {}
    content = read_run(path)
    if command == "fit":
        return {}
    model = {k: v for k, v in content["hyper_parameters"].items() if not k.startswith("_")}
    # Weights come from the checkpoint; a static teacher takes no part in evaluation.
    for name in ("student_weights", "static_teacher", "static_teacher_weights"):
        model[name] = None
    data = {
        k: v
        for k, v in content.get("datamodule_hyper_parameters", {}).items()
        if not k.startswith("_")
    }
    return {
        f"{group}.{name}": value
        for group, values in (("model", model), ("data", data))
        for name, value in values.items()
    }


def _configured(arguments: Sequence[str], key: str) -> str | None:
    """An entry of the configuration file that the command line names, if it can be read."""
    path = _option(arguments, "-c") or _option(arguments, "--config")
    try:
        content = yaml.safe_load(Path(path).read_text()) if path else None
    except (OSError, ValueError, yaml.YAMLError):
        return None  # the parser will say what is wrong with it
    return content.get(key) if isinstance(content, dict) else None


def _option(arguments: Sequence[str], name: str) -> str | None:
    for position, argument in enumerate(arguments):
        if argument == name and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def _quieten() -> None:
    """Drop warnings that ask for nothing a user of this tool could do."""
    for message in (
        ".*LightningCLI's args parameter.*",
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*The dirpath has changed.*",
        ".*is smaller than the logging interval.*",
        ".*lr_scheduler.step\\(\\)` before.*",
    ):
        warnings.filterwarnings("ignore", message)
    for name in (
        "pytorch.utilities.rank_zero",
        "fabric.utilities.rank_zero",
        "fabric.utilities.seed",
    ):
        logging.getLogger(f"lightning.{name}").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _CHATTER)
