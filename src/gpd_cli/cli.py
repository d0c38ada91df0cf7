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

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpd_cli.arguments import chosen_checkpoint, settings_of_checkpoint, with_values
from gpd_cli.commands.expand import expand_command
from gpd_cli.data import ImageData
from gpd_cli.errors import GpdError
from gpd_cli.loggers import csv_logger, settings_to_log, with_csv
from gpd_cli.methods.pairs import for_pair
from gpd_cli.subnormals import FlushedSubnormals, flushed_subnormals
from gpd_cli.trainer import GpdTrainer
from gpd_cli.training.callbacks import EpochLines, default_callbacks
from gpd_cli.training.checks import OF_STATIC_TEACHERS, default_settings
from gpd_cli.training.module import GapPreservingDistillation

EVALUATIONS = ("validate", "test", "predict")
STANDALONE = ("expand", "extract")
# Settings that only training knows a use for.
_OF_TRAINING = (
    "static_teacher",
    "static_teacher_weights",
    "static_teacher_args",
    "assistants",
    "ce_weight",
    *OF_STATIC_TEACHERS,
)
_CHATTER = (
    "Tip:",
    "Loading `train_dataloader`",
    "Seed set to",
    "TPU available",
    "Restoring states",
    "Loaded model weights",
)


class SaveConfig(SaveConfigCallback):
    """Write ``config.yaml`` when training begins, not for a run that is refused before.

    The loggers are told then, too.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let every logger know the settings, for runs to be compared by them."""
        settings = settings_to_log(self.config.as_dict())
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)
            logger.save()


class GpdCLI(LightningCLI):
    """LightningCLI, told what `expand` and `extract` need and what a checkpoint knows."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._command = next((a for a in arguments if not a.startswith("-")), "")
        self._checkpoint = self._settings = None
        if self._command in ("fit", *EVALUATIONS):
            self._checkpoint = chosen_checkpoint(arguments)
        if self._checkpoint is not None:
            self._settings = settings_of_checkpoint(self._checkpoint)
        super().__init__(
            GapPreservingDistillation,
            ImageData,
            trainer_class=GpdTrainer,
            trainer_defaults=_trainer_defaults(self._command, arguments),
            seed_everything_default=0,
            save_config_callback=SaveConfig if self._command == "fit" else None,
            save_config_kwargs={"overwrite": True},
            args=with_values(arguments),
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
        if self._settings and self._command in EVALUATIONS:
            parser.set_defaults(self._settings)

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint's settings never override what the user asked for."""

    def before_instantiate_classes(self) -> None:
        """Last changes to what the user asked for.

        Weights come from the checkpoint, where there is one, and not from the first file. A static
        teacher and what belongs to it take no part in evaluation, and need not be at hand for it.
        Settings that a method has by the pair become those of the pair. A run that logs elsewhere,
        or nowhere, has its CSV file nevertheless.

        Raises:
            ArgumentError: when there is nowhere to write an expansion.
            MethodError: when a setting by the pair has no entry for this one.
        """
        config = self.config.get(self.subcommand)
        if self.subcommand == "expand" and not (config.output or config.dry_run):
            raise ArgumentError(None, "add --output FILE.safetensors, or --dry_run to plan only")
        if self.subcommand in STANDALONE:
            return
        config.ckpt_path = config.ckpt_path or self._checkpoint
        if config.ckpt_path:
            config.model.student_weights = None
        if self.subcommand in EVALUATIONS:
            defaults = default_settings(GapPreservingDistillation)
            for name in _OF_TRAINING:
                config.model[name] = defaults[name]
            return
        model = config.model
        if model.static_teacher and model.method_args:
            model.method_args = for_pair(model.method_args, model.static_teacher, model.student)
        options = config.trainer
        options.logger = with_csv(
            options.logger, self.trainer_defaults["logger"], options.default_root_dir
        )

    def _set_seed(self) -> None:
        if self.subcommand != "extract":  # which draws nothing
            super()._set_seed()

    def instantiate_classes(self) -> None:
        """Make model, data and trainer for the commands that have them."""
        if self.subcommand not in STANDALONE:
            super().instantiate_classes()
            # `SaveConfig` logs all settings; the module's own lack the optimizer's.
            self.model.save_hyperparameters([], logger=False)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with those of the default callbacks that its options leave room for."""
        options = self.config_init[self.subcommand].trainer
        chosen = options.callbacks or []
        chosen = chosen if isinstance(chosen, list) else [chosen]
        has_bar = any(isinstance(callback, ProgressBar) for callback in chosen)
        shown = options.enable_progress_bar
        if shown is None:
            shown = has_bar or sys.stdout.isatty()
        if self.subcommand == "fit":
            # Where nobody watches there is a line per epoch instead of a bar.
            unwanted: tuple[type, ...] = (ProgressBar, EpochLines) if has_bar else ()
            if options.enable_checkpointing is False:
                unwanted = (*unwanted, Checkpoint)
            default = default_callbacks(watched=shown)
            self.trainer_defaults["callbacks"] = [c for c in default if not isinstance(c, unwanted)]
        trainer = super().instantiate_trainer(enable_progress_bar=shown, **kwargs)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(FlushedSubnormals())
        return trainer

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


def _trainer_defaults(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    logger = csv_logger(arguments) if command == "fit" else False
    return {"logger": logger, "enable_model_summary": False}


def run(arguments: Sequence[str]) -> int:
    """Run a command line and turn every foreseeable error into one sentence.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The exit code.
    """
    _quieten()
    # The others move weights bit for bit, subnormal ones included.
    computes = not any(command in arguments[:1] for command in STANDALONE)
    try:
        with flushed_subnormals(computes):
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
    text = str(mendable or error).strip()
    if "Original Traceback" in text:  # which a loader's worker puts before its message
        text = text.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    text = " ".join(text.split())
    foreseen = ImportError | MisconfigurationException | OSError | ValueError
    if mendable is not None or isinstance(error, foreseen):
        return text
    return f"{type(error).__name__}: {text[:300]} (not foreseen; GPD_DEBUG=1 shows where)"


def _mendable(error: BaseException | None) -> GpdError | None:
    """An error of ours, also when a library has wrapped it."""
    while error is not None:
        if isinstance(error, GpdError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _quieten() -> None:
    """Drop warnings that ask for nothing a user of this tool could do."""
    for message in (
        ".*LightningCLI's args parameter.*",
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*The dirpath has changed.*",
        ".*is smaller than the logging interval.*",
        ".*Couldn't infer the batch indices.*",  # of a stream
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
