"""The command line: LightningCLI with the subcommands of `GpdTrainer`."""

from __future__ import annotations

import inspect
import os
import signal
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from gpd_cli.cli.arguments import (
    CHECKPOINT,
    IMAGE_DATA,
    configured,
    occurrences,
    options_of,
    settings_of_checkpoint,
    with_recipes,
    with_values,
)
from gpd_cli.cli.completion import print_completion
from gpd_cli.cli.configurations import (
    check_configurations,
    chosen_checkpoint,
    chosen_image_size,
    place_of,
)
from gpd_cli.cli.cpu_memory import keep_freed_memory
from gpd_cli.cli.environment import write_environment
from gpd_cli.cli.help import HELP_GROUPS, group_page, page_of
from gpd_cli.cli.loggers import (
    csv_logger,
    settings_to_keep,
    settings_to_log,
    taken_folder,
    with_csv,
)
from gpd_cli.cli.lost_output import output_may_be_lost
from gpd_cli.cli.old_forms import current_arguments
from gpd_cli.cli.parser import Parser
from gpd_cli.cli.parser_errors import in_short, setting_of_class
from gpd_cli.cli.quiet import quieten
from gpd_cli.cli.resume import LAST, RESUME, last_checkpoint, requeued_run, resumed_run
from gpd_cli.cli.standalone import PARSING, run_extract, run_report
from gpd_cli.cli.suggestions import data_options, suggesting
from gpd_cli.commands.expand import expand_command
from gpd_cli.commands.trainer import GpdTrainer
from gpd_cli.data import ImageData
from gpd_cli.data.folders import ALL
from gpd_cli.distill.methods.pairs import for_pair
from gpd_cli.distributed.first_process import together
from gpd_cli.errors import DataError, GpdError, StudentArgumentsError
from gpd_cli.files import atomic_path, check_writable
from gpd_cli.models import wants_published, without_pretrained
from gpd_cli.report.run import METRICS
from gpd_cli.training.callbacks import default_callbacks
from gpd_cli.training.epoch_lines import EpochLines
from gpd_cli.training.module import GapPreservingDistillation
from gpd_cli.training.optimizers import suitable_storage
from gpd_cli.training.subnormals import FlushedSubnormals, flushed_subnormals
from gpd_cli.training.table import RunCSVLogger

EVALUATIONS = ("validate", "test", "predict")
_LONGEST = 600  # characters of a message
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")
EXACT = ("expand", "extract")
COMMANDS = ("fit", *EVALUATIONS, *EXACT, "report", "recipes", "completion")


class SaveConfig(SaveConfigCallback):
    """Write ``config.yaml`` and log all settings when training begins.

    A run that is refused before training leaves no file.

    Attributes:
        arguments: the command line, as it was typed.
    """

    arguments: list[str] = []  # noqa: RUF012 - of the process
    _kept: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing: the configuration is written when training starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the configuration atomically, and how the run was started."""
        folder = trainer.log_dir  # every process has to ask: the answer is broadcast
        text = self.parser.dump(self.config, skip_none=False)
        self._kept = settings_to_keep(yaml.safe_load(text))
        if trainer.is_global_zero and folder:
            with atomic_path(Path(folder) / self.config_filename) as temporary:
                temporary.write_text(text, encoding="utf-8")
            write_environment(Path(folder), self.arguments, trainer.world_size, trainer.global_step)
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a checkpoint know how its run was set up, wherever it is taken to."""
        if self._kept is not None:
            checkpoint["settings"] = self._kept

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
        self._checkpoint = self._settings = self._images = self._run = None
        if self._command == "fit":
            arguments, self._run = resumed_run(arguments)
        check_configurations(arguments)
        self._arguments = list(arguments)
        if self._command in ("fit", *EVALUATIONS):
            self._checkpoint = chosen_checkpoint(arguments)
        if self._checkpoint not in (None, LAST):
            self._settings, self._images = settings_of_checkpoint(self._checkpoint)
        self._group = next((option for option in arguments if option in HELP_GROUPS), None)
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
            args=with_values(current_arguments(self._asked_for(arguments))),
            auto_configure_optimizers=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that raises errors, since its own messages begin with a page of usage."""
        return super().init_parser(**PARSING, **{"prog": "gpd", **kwargs})

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Say what the help of each command shows."""
        super().setup_parser(*args, **kwargs)
        self._parsers = cast("dict[str, Parser]", self._subcommand_parsers)
        expanding = list(inspect.signature(expand_command).parameters)
        for name, parser in self._parsers.items():
            parser.page = (
                page_of(name, expanding) if self._group is None else group_page(name, self._group)
            )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Methods of the Trainer, each with the arguments that are no options.

        Only the one that the command line begins with, where it does: each has a parser with
        hundreds of options.
        """
        known = {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only"},
            "test": {"model", "dataloaders", "datamodule", "weights_only"},
            "predict": {"model", "datamodule"},
            "expand": {"model", "datamodule"},
        }
        return {self._command: known[self._command]} if self._command in known else known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make a checkpoint's settings the defaults, below configuration and command line."""
        parser.set_defaults({"data": {"class_path": IMAGE_DATA}})
        if self._settings and self._command in EVALUATIONS:
            parser.set_defaults(self._settings)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without the checkpoint, whose settings LightningCLI would put above the user's."""
        if self._command == "completion":
            print_completion(args[1:], self._parsers)
            parser.exit()
        try:
            if self._checkpoint == LAST and self._command in EVALUATIONS:
                self._take_last(parser, args)
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            if self._command in EVALUATIONS and self._settings is None and _lacks_model(error):
                raise ArgumentError(
                    None, f"add {CHECKPOINT} FILE, a checkpoint of fit, to {self._command}"
                ) from error
            chosen = self._parsers.get(self._command, parser)
            others = [*data_options(), *self._unparsed()]
            raise suggesting(error, chosen, self._arguments, others) from error
        config = self.config[self.config.subcommand]
        if config.get("seed_everything") is True:
            raise ArgumentError(
                None, "--seed_everything true has the seed 0 each time; give a number, or false"
            )
        if self._checkpoint is None or config.ckpt_path != LAST:
            self._checkpoint = config.ckpt_path or self._checkpoint
        config.ckpt_path = None
        if self._command in EVALUATIONS and not (self._checkpoint or _has_weights(config.model)):
            raise ArgumentError(
                None,
                f"add {CHECKPOINT} FILE, a checkpoint of fit, to {self._command}, or "
                "--model.student_weights FILE for a network that was trained elsewhere",
            )

    def _take_last(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:
        """Find the newest checkpoint, and make its settings the defaults of an evaluation.

        Where runs are is asked of the parser, as `fit` does. The network is known only afterwards.

        Raises:
            GpdError: when there is none.
        """
        command = self._parsers[self._command]
        command.set_defaults({"model.student": "unknown"})  # which the parser would require
        options = parser.parse_args([self._command, *options_of(args, "trainer")])
        trainer = options[self._command].trainer
        root = trainer.default_root_dir
        table, *_ = with_csv(trainer.logger, csv_logger(self._arguments), root)
        self._checkpoint = last_checkpoint(table.init_args, needed=True)
        assert self._checkpoint is not None
        self._settings, self._images = settings_of_checkpoint(self._checkpoint)
        command.set_defaults(self._settings)

    def _unparsed(self) -> tuple[str, ...]:
        """Options of the command that are taken from the command line before it is parsed."""
        return (RESUME, *HELP_GROUPS) if self._command == "fit" else tuple(HELP_GROUPS)

    def _asked_for(self, arguments: Sequence[str]) -> list[str]:
        """Help on a group of options is help with another page."""
        return ["--help" if argument in HELP_GROUPS else argument for argument in arguments]

    def before_instantiate_classes(self) -> None:
        """Last changes to the parsed settings.

        Evaluation does not need static teacher and assistants. A method's tables of values by the
        pair of networks are replaced by the pair's values. A run always has a CSV file, besides or
        instead of other loggers, in no other run's folder. A requeued job goes on in its run's.

        Raises:
            ArgumentError: when an expansion has no output.
            GpdError: when the run's folder cannot be written.
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
        table = options.logger[0].init_args
        continued = options.logger[0].class_path.rpartition(".")[2] == RunCSVLogger.__name__
        if self._run is None and continued:
            requeued = requeued_run(options.default_root_dir or Path.cwd())
            if requeued is not None:
                self._checkpoint, self._run = requeued
                config.ckpt_path = self._checkpoint
        if self._run is None and (taken := taken_folder(table)) is not None:
            table["version"] = None
            rank_zero_info(f"There is a run in {taken} already; this one gets the next version.")
        if self._run is None and "://" not in str(table["save_dir"]):
            check_writable(Path(table["save_dir"], table.get("name") or "", METRICS))
        if self._checkpoint == LAST:
            config.ckpt_path = self._checkpoint = last_checkpoint(table)

    def _predict_pictures(self, config: Namespace) -> None:
        """Let the data be images anywhere below a folder, prepared as those of training were.

        Raises:
            DataError: when there are none, or it is not known how those of training were prepared.
        """
        if not config.images.exists():
            raise DataError(f"--images {config.images}: there is no such image or folder.")
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
                "crop_pct": spec.crop_pct or 1.0,  # what is not told is as in exports
                "interpolation": spec.interpolation or "bilinear",
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
            opt = settings["optimizer"]["opt"]
            self.model["storage"] = settings["storage"] or suitable_storage(opt)  # as `fit` has it
            # The parser's own value may be the data's default, which is not of the student.
            self.model["image_size"] = chosen_image_size(self._arguments)
            return
        config = self.config[self.subcommand]
        model = config.model
        start = model.student_weights, model.student_args
        if config.ckpt_path:  # the file of initial weights is not read
            model.student_weights = None
            if model.student_args:
                model.student_args = without_pretrained(model.student, model.student_args)
        with together():
            super().instantiate_classes()
        if self._run is not None:
            # The run's configuration still says how the run began.
            config.ckpt_path = configured(str(self._run / "config.yaml"), "ckpt_path")
            model.student_weights, model.student_args = start
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
            default = default_callbacks(
                shown, options.save_every_n_steps, options.save_every_n_minutes
            )
            self.trainer_defaults["callbacks"] = [c for c in default if not isinstance(c, unwanted)]
        trainer = super().instantiate_trainer(enable_progress_bar=shown, **kwargs)
        if self._run is not None and isinstance(trainer.logger, RunCSVLogger):
            trainer.logger.continue_in(self._run)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(FlushedSubnormals())
        if self.subcommand == "fit" and trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()  # other commands, and expanding, do few things twice
        return trainer


def _lacks_model(error: ArgumentError) -> bool:
    """Whether a parser says that it was not told the network."""
    return "required" in str(error) and "model.student" in str(error)


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
    quieten()
    # These commands copy weights bit for bit, subnormal numbers included.
    computes = not any(command in arguments[:1] for command in EXACT)
    try:
        with flushed_subnormals(computes), output_may_be_lost(arguments[:1] == ["fit"]):
            if arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
                known = ", ".join(COMMANDS)
                raise ArgumentError(None, f"no command '{arguments[0]}': choose from {known}")
            SaveConfig.arguments = list(arguments)
            arguments = with_recipes(arguments)
            if arguments[:1] == ["extract"]:
                run_extract(arguments[1:])
            elif arguments[:1] == ["report"]:
                run_report(arguments[1:])
            else:
                GpdCLI(arguments)
    except SystemExit as stop:  # after --help or --print_config
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning exits after Ctrl-C
            return _interrupted(stop.__context__)
        if isinstance(stop, SIGTERMException) and stop.code is None:  # Lightning's has none
            return 128 + signal.SIGTERM
        return stop.code if isinstance(stop.code, int) else 2
    except ArgumentError as error:
        if (mendable := _mendable(error)) is not None:
            return _fail(mendable)
        text, page = in_short(" ".join(str(error).split()).rstrip("."))
        if option := setting_of_class(text):
            place = place_of(option, arguments)
            text = text if place is None else f"{place}: {text}"
        command = f"gpd {arguments[0]}" if arguments[0] in COMMANDS else "gpd"
        see = f"; see {command} {page}" if page else ""
        print(f"gpd: error: {_shortened(text)}{see}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        return _interrupted(interrupt)
    except Exception as error:
        if os.environ.get("GPD_DEBUG"):
            raise
        return _fail(error, _origin(error, arguments))
    return 0


def _fail(error: BaseException, remedy: str = "") -> int:
    text = _sentence(error)
    text = f"{text.removesuffix('.')}; {remedy}." if remedy else text
    print(f"gpd: error: {text}", file=sys.stderr)
    return 1


def _origin(error: BaseException, arguments: Sequence[str]) -> str:
    """Where the arguments that a student does not take come from, if not from the command line."""
    given = any(occurrences(arguments, ("--model.student_args",)))
    if given or not isinstance(_mendable(error), StudentArgumentsError):
        return ""
    place = place_of("model.student_args", arguments)
    if place is None:
        return ""
    return f"its arguments come from {place}, and --model.student_args null drops them"


def _interrupted(interrupt: KeyboardInterrupt) -> int:
    """Say that Ctrl-C was heard, and what the command has to add to that."""
    said = "; ".join(["interrupted", *getattr(interrupt, "__notes__", [])])
    print(f"gpd: {said}", file=sys.stderr)
    return 130


def _has_weights(model: Namespace) -> bool:
    """Whether a student comes with weights, its own or published ones."""
    return bool(model.student_weights) or wants_published(model.student, model.student_args)


def _sentence(error: BaseException) -> str:
    return _shortened(_text(error))


def _shortened(text: str) -> str:
    """A text without its middle, if it is long: what is wrong comes first, and the remedy last."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST * 3 // 4]} ... {text[-_LONGEST // 4 :]}"


def _text(error: BaseException) -> str:
    mendable = _mendable(error)
    text = str(mendable or error).strip()
    if "Original Traceback" in text:  # a loader's worker puts it before the message
        text = text.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    text = " ".join(text.split())
    if isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
        return (
            "There is not enough memory for this; lower --data.batch_size, --data.image_size or "
            "--model.ratio, or take another machine."
        )
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
