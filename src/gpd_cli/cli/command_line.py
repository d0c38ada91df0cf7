"""The command line: LightningCLI with the subcommands of `GpdTrainer`."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from yaml import YAMLError

from gpd_cli.cli.arguments import (
    IMAGE_DATA,
    chosen_checkpoint,
    settings_of_checkpoint,
    with_recipes,
    with_values,
)
from gpd_cli.cli.loggers import csv_logger, settings_to_log, with_csv
from gpd_cli.cli.old_forms import current_arguments, current_settings
from gpd_cli.cli.parser import Parser
from gpd_cli.cli.parser_errors import in_short
from gpd_cli.commands.expand import expand_command
from gpd_cli.commands.extract import extract_command
from gpd_cli.commands.trainer import GpdTrainer
from gpd_cli.data import ImageData
from gpd_cli.data.folders import ALL
from gpd_cli.distill.methods.pairs import for_pair
from gpd_cli.errors import DataError, GpdError
from gpd_cli.models import without_pretrained
from gpd_cli.recipes.names import configuration_path
from gpd_cli.training.callbacks import EpochLines, default_callbacks
from gpd_cli.training.module import GapPreservingDistillation
from gpd_cli.training.subnormals import FlushedSubnormals, flushed_subnormals

EVALUATIONS = ("validate", "test", "predict")
STANDALONE = ("expand", "extract")
COMMANDS = ("fit", *EVALUATIONS, *STANDALONE, "recipes")
# YAML that may have settings in their old forms, and recipes by their names.
_YAML = "gpd"
_PARSER: dict[str, Any] = {"parser_mode": _YAML, "exit_on_error": False}
_CHATTER = (
    "Tip:",
    "Loading `train_dataloader`",
    "Seed set to",
    "TPU available",
    "Restoring states",
    "Loaded model weights",
)


class SaveConfig(SaveConfigCallback):
    """Write ``config.yaml`` and log all settings when training begins.

    A run that is refused before training leaves no file.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing: the configuration is written when training starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the configuration."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the settings to every logger, so that runs can be compared."""
        settings = settings_to_log(self.config.as_dict())
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)
            logger.save()


class GpdCLI(LightningCLI):
    """LightningCLI with the command `expand`, and with the settings of checkpoints as defaults."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._command = next((a for a in arguments if not a.startswith("-")), "")
        self._checkpoint = self._settings = self._images = None
        if self._command in ("fit", *EVALUATIONS):
            self._checkpoint = chosen_checkpoint(arguments)
        if self._checkpoint is not None:
            self._settings, self._images = settings_of_checkpoint(self._checkpoint)
        super().__init__(
            GapPreservingDistillation,
            LightningDataModule,
            subclass_mode_data=True,
            parser_class=Parser,
            trainer_class=GpdTrainer,
            trainer_defaults=_trainer_defaults(self._command, arguments),
            seed_everything_default=0,
            save_config_callback=SaveConfig if self._command == "fit" else None,
            save_config_kwargs={"overwrite": True},
            args=with_values(current_arguments(arguments)),
            auto_configure_optimizers=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that raises errors, since its own messages begin with a page of usage."""
        return super().init_parser(**_PARSER, **{"prog": "gpd", **kwargs})

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Methods of the Trainer, each with the arguments that are no options."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only"},
            "test": {"model", "dataloaders", "datamodule", "weights_only"},
            "predict": {"model", "datamodule"},
            "expand": {"model", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make a checkpoint's settings the defaults, below configuration and command line."""
        parser.set_defaults({"data": {"class_path": IMAGE_DATA}})
        if self._settings and self._command in EVALUATIONS:
            parser.set_defaults(self._settings)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without the checkpoint, whose settings LightningCLI would put above the user's."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        self._checkpoint = config.ckpt_path or self._checkpoint
        config.ckpt_path = None

    def before_instantiate_classes(self) -> None:
        """Last changes to the parsed settings.

        With a checkpoint, the file of initial weights is not read. Evaluation does not need static
        teacher and assistants. A method's tables of values by the pair of networks are replaced by
        the pair's values. A run always has a CSV file, besides or instead of other loggers.

        Raises:
            ArgumentError: when an expansion has no output.
            MethodError: when a table has no entry for the pair of networks.
        """
        config = self.config[self.subcommand]
        model = config.model
        if self.subcommand == "expand":
            if not (config.output or config.dry_run):
                raise ArgumentError(
                    None, "add --output FILE.safetensors, or --dry_run to plan only"
                )
            return
        config.ckpt_path = self._checkpoint
        if config.ckpt_path:
            model.student_weights = None
            if model.student_args:
                model.student_args = without_pretrained(model.student, model.student_args)
        if self.subcommand == "predict" and config.images is not None:
            self._predict_pictures(config)
        if self.subcommand in EVALUATIONS:
            model.static_teacher.name = model.static_teacher.weights = model.assistants = None
            model.ce_weight = 1.0  # without static teacher the labels' weight must not be 0
            return
        if model.static_teacher.name and "init_args" in model.method:
            settings = model.method.init_args.as_dict()
            found = for_pair(settings, model.static_teacher.name, model.student)
            model.method.init_args = Namespace(**found)
        options = config.trainer
        options.logger = with_csv(
            options.logger, self.trainer_defaults["logger"], options.default_root_dir
        )

    def _predict_pictures(self, config: Namespace) -> None:
        """Let the data be images anywhere below a folder, prepared as those of training were.

        Raises:
            DataError: when it is not known how these were prepared.
        """
        spec, data = self._images, config.data
        if data.class_path != IMAGE_DATA and (spec is None or None in (spec.mean, spec.size)):
            raise DataError(
                f"--images needs to know how images are prepared, which {data.class_path} does not "
                "tell (by an image_spec); let its predict_dataloader give the images."
            )
        if data.class_path != IMAGE_DATA:
            assert spec is not None and spec.size is not None
            parameters = inspect.signature(ImageData).parameters.values()
            settings = {parameter.name: parameter.default for parameter in parameters} | {
                "image_size": spec.size[0],
                "in_chans": spec.channels,
                "mean": list(spec.mean or ()),
                "std": list(spec.std or ()),
                "crop_pct": spec.crop_pct,
                "interpolation": spec.interpolation,
            }
            config.data = Namespace(class_path=IMAGE_DATA, init_args=Namespace(**settings))
        for name, value in (("dataset", "folder"), ("root", str(config.images))):
            config.data.init_args[name] = value
        config.data.init_args.test_split = ALL

    def instantiate_classes(self) -> None:
        """Make model, data and trainer, except for an expansion."""
        if self.subcommand == "expand":
            # Configurations of fit are accepted; settings that expansion does not use are dropped.
            wanted = inspect.signature(expand_command).parameters
            settings = self.config.expand.model.as_dict()
            self.config_init, self.datamodule = self.config, None
            self.trainer: Any = GpdTrainer
            self.model = {name: value for name, value in settings.items() if name in wanted}
            return
        super().instantiate_classes()
        # `SaveConfig` logs all settings; the module's own lack the optimizer's.
        self.model.save_hyperparameters([], logger=False)
        # Evaluation needs the data's settings, also where the data's class does not save them.
        data = self.config_dump["data"]
        understood = {k: v for k, v in self.datamodule.hparams.items() if k == "dataset"}
        self.datamodule.hparams.update(
            {"_class_path": data["class_path"], **data["init_args"], **understood}
        )
        follow = getattr(self.datamodule, "follow", None)
        if self._images is not None and self.subcommand in EVALUATIONS and follow is not None:
            follow(self._images)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with the default callbacks, except those that its options replace."""
        options = self.config_init[self.subcommand].trainer
        chosen = options.callbacks or []
        chosen = chosen if isinstance(chosen, list) else [chosen]
        has_bar = any(isinstance(callback, ProgressBar) for callback in chosen)
        shown = options.enable_progress_bar
        if shown is None:
            shown = has_bar or sys.stdout.isatty()
        if self.subcommand == "fit":
            # The default callbacks print a line per epoch if no person watches the terminal.
            unwanted: tuple[type, ...] = (ProgressBar, EpochLines) if has_bar else ()
            if options.enable_checkpointing is False:
                unwanted = (*unwanted, Checkpoint)
            default = default_callbacks(watched=shown)
            self.trainer_defaults["callbacks"] = [c for c in default if not isinstance(c, unwanted)]
        trainer = super().instantiate_trainer(enable_progress_bar=shown, **kwargs)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(FlushedSubnormals())
        return trainer


def _trainer_defaults(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    logger = csv_logger(arguments) if command == "fit" else False
    return {"logger": logger, "enable_model_summary": False}


def run(arguments: Sequence[str]) -> int:
    """Run a command line, and report foreseen errors in one sentence.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The exit code.
    """
    _quieten()
    # The other commands copy weights bit for bit, subnormal numbers included.
    computes = not any(command in arguments[:1] for command in STANDALONE)
    try:
        with flushed_subnormals(computes):
            if arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
                known = ", ".join(COMMANDS)
                raise ArgumentError(None, f"no command '{arguments[0]}': choose from {known}")
            arguments = with_recipes(arguments)
            if arguments[:1] == ["extract"]:
                _extract(arguments[1:])
            else:
                GpdCLI(arguments)
    except SystemExit as stop:  # after --help or --print_config
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning exits after Ctrl-C
            return _interrupted()
        return stop.code if isinstance(stop.code, int) else 2
    except ArgumentError as error:
        if (mendable := _mendable(error)) is not None:
            return _fail(mendable)
        text, remedy = in_short(" ".join(str(error).split()).rstrip("."))
        command = f"gpd {arguments[0]}" if arguments[0] in COMMANDS else "gpd"
        print(f"gpd: error: {text}; see {command} {remedy}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if os.environ.get("GPD_DEBUG"):
            raise
        return _fail(error)
    return 0


def _fail(error: BaseException) -> int:
    print(f"gpd: error: {_sentence(error)}", file=sys.stderr)
    return 1


def _extract(arguments: Sequence[str]) -> None:
    """Run `extract`, which needs no model options: the checkpoint has architecture and plan."""
    parser = ArgumentParser(prog="gpd extract", **_PARSER)
    parser.add_argument("-c", "--config", action="config", help="a file with these options (YAML)")
    parser.add_function_arguments(extract_command)
    config = parser.parse_args(list(arguments)).as_dict()
    del config["config"]
    extract_command(**config)


def _load_yaml(text: str) -> Any:
    content = get_loader("yaml")(text)
    if isinstance(content, dict) and isinstance(base := content.get("config"), str):
        content["config"] = configuration_path(base)
    return current_settings(content)


set_loader(_YAML, _load_yaml, (YAMLError,))


def _interrupted() -> int:
    print("gpd: interrupted; go on with --ckpt_path RUN/checkpoints/last.ckpt", file=sys.stderr)
    return 130


def _sentence(error: BaseException) -> str:
    mendable = _mendable(error)
    text = str(mendable or error).strip()
    if "Original Traceback" in text:  # a loader's worker puts it before the message
        text = text.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    text = " ".join(text.split())
    foreseen = ImportError | MisconfigurationException | OSError | ValueError
    if mendable is not None or isinstance(error, foreseen):
        return text
    return f"{type(error).__name__}: {text[:300]} (not foreseen; GPD_DEBUG=1 shows where)"


def _mendable(error: BaseException | None) -> GpdError | None:
    """The `GpdError` behind an error, also when a library has wrapped it; else None."""
    while error is not None:
        if isinstance(error, GpdError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _quieten() -> None:
    """Drop warnings and messages that users of this tool cannot act on."""
    for message in (
        ".*LightningCLI's args parameter.*",
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*The dirpath has changed.*",
        ".*is smaller than the logging interval.*",
        ".*Couldn't infer the batch indices.*",  # for streams
        ".*Total length of `list` across ranks is zero.*",  # nothing is held out for validation
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
