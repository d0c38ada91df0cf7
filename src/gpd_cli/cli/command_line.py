"""The command line: parsing, and assembly of model, data and trainer.

The commands `fit`, `validate`, `test`, `predict` and `expand` run through LightningCLI as methods
of `GpdTrainer`. `extract` and `report` have parsers of their own, see `standalone`.
"""

from __future__ import annotations

import inspect
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from gpd_cli.cli.arguments import (
    CHECKPOINT,
    IMAGE_DATA,
    occurrences,
    options_of,
    with_recipes,
    with_values,
)
from gpd_cli.cli.checkpoint_settings import settings_of_checkpoint, settings_of_weights
from gpd_cli.cli.completion import print_completion
from gpd_cli.cli.configurations import (
    check_configurations,
    chosen_checkpoint,
    chosen_image_size,
    chosen_weights,
    configuration_files,
    configured_value,
    expanded,
    with_pipes_read,
)
from gpd_cli.cli.cpu_memory import keep_freed_memory
from gpd_cli.cli.failures import report_failure
from gpd_cli.cli.help import HELP_GROUPS, group_page, page_of
from gpd_cli.cli.loggers import (
    csv_logger,
    taken_folder,
    with_csv,
)
from gpd_cli.cli.lost_output import output_may_be_lost
from gpd_cli.cli.old_forms import current_arguments
from gpd_cli.cli.parser import Parser
from gpd_cli.cli.pictures import pictures_as_data, with_classes
from gpd_cli.cli.quiet import quieten
from gpd_cli.cli.resume import NEWEST, RESUME, newest_of_all_runs, requeued_run, resumed_run
from gpd_cli.cli.save_config import SaveConfig
from gpd_cli.cli.standalone import PARSING, run_extract, run_report
from gpd_cli.cli.suggestions import data_options, suggesting
from gpd_cli.commands.expand import expand_command
from gpd_cli.commands.trainer import GpdTrainer
from gpd_cli.distill.methods.pairs import for_pair
from gpd_cli.distributed.first_process import together
from gpd_cli.files import check_not_input, check_writable, is_remote
from gpd_cli.models import wants_published, without_pretrained
from gpd_cli.run_folder import CONFIGURATION, METRICS
from gpd_cli.training.callbacks import default_callbacks
from gpd_cli.training.epoch_lines import EpochLines
from gpd_cli.training.module import GapPreservingDistillation
from gpd_cli.training.optimizers import suitable_storage
from gpd_cli.training.subnormals import flushed_subnormals
from gpd_cli.training.table import RunCSVLogger

EVALUATIONS = ("validate", "test", "predict")
EXACT = ("expand", "extract")
COMMANDS = ("fit", *EVALUATIONS, *EXACT, "report", "recipes", "completion")


class GpdCLI(LightningCLI):
    """LightningCLI with the command `expand`, and with a checkpoint's settings as defaults.

    Args:
        arguments: the command line without the program's name; recipes have been replaced by the
            paths of their files.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._command = next((a for a in arguments if not a.startswith("-")), "")
        self._checkpoint = self._settings = self._images = self._run = None
        self._defaults: dict[str, Any] = {}  # defaults of an evaluation without a checkpoint
        if self._command == "fit":
            arguments, self._run = resumed_run(arguments)
        check_configurations(arguments)
        self._arguments = list(arguments)
        if self._command in ("fit", *EVALUATIONS):
            self._checkpoint = chosen_checkpoint(arguments)
        if self._checkpoint not in (None, NEWEST):
            self._settings, self._images = settings_of_checkpoint(self._checkpoint)
        elif self._checkpoint is None and self._command in EVALUATIONS:
            weights = chosen_weights(arguments)
            self._defaults, self._images = settings_of_weights(weights) if weights else ({}, None)
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
            args=expanded(with_values(current_arguments(_asked_for(arguments)))),
            auto_configure_optimizers=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser, which raises its errors, since printed errors begin with usage pages."""
        return super().init_parser(**PARSING, **{"prog": "gpd", **kwargs})

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Set up the parsers of the commands, and choose what their help pages show."""
        super().setup_parser(*args, **kwargs)
        self._parsers = cast("dict[str, Parser]", self._subcommand_parsers)
        expanding = list(inspect.signature(expand_command).parameters)
        for name, parser in self._parsers.items():
            parser.page = (
                page_of(name, expanding) if self._group is None else group_page(name, self._group)
            )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The Trainer's methods that are commands, each with its arguments that are not options.

        If the command line begins with one of them, only this one is returned, since each command
        has a parser with hundreds of options, which takes time to build.
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
        """Make a checkpoint's settings defaults, which configurations and options override."""
        parser.set_defaults({"data": {"class_path": IMAGE_DATA}})
        if self._command in EVALUATIONS:
            parser.set_defaults(self._settings or self._defaults)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line; the checkpoint's path is kept from LightningCLI until later.

        LightningCLI would let the hyper-parameters in the checkpoint override the user's settings.
        """
        if self._command == "completion":
            print_completion(args[1:], self._parsers)
            parser.exit()
        try:
            if self._checkpoint == NEWEST and self._command in EVALUATIONS:
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
                None,
                "--seed_everything true would set the seed 0 every time; give a number, or false",
            )
        if self._checkpoint is None or config.ckpt_path != NEWEST:
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

        The folder of the runs follows from the trainer's options, as for `fit`. So these options
        are parsed first, before the network is known.

        Raises:
            GpdError: when there is no checkpoint.
        """
        command = self._parsers[self._command]
        command.set_defaults({"model.student": "unknown"})  # a placeholder for a required option
        options = parser.parse_args([self._command, *options_of(args, "trainer")])
        trainer = options[self._command].trainer
        root = trainer.default_root_dir
        table, *_ = with_csv(trainer.logger, csv_logger(self._arguments), root)
        self._checkpoint = newest_of_all_runs(table.init_args, needed=True)
        assert self._checkpoint is not None
        self._settings, self._images = settings_of_checkpoint(self._checkpoint)
        command.set_defaults(self._settings)

    def _unparsed(self) -> tuple[str, ...]:
        """Options of the command that the parser does not know, since they are handled before."""
        return (RESUME, *HELP_GROUPS) if self._command == "fit" else tuple(HELP_GROUPS)

    def before_instantiate_classes(self) -> None:
        """Adjust the parsed settings before model, data and trainer are made from them.

        Raises:
            ArgumentError: when an expansion has no output.
            GpdError: when nothing can be written to the run's folder.
            MethodError: when a table has no entry for the pair of networks.
        """
        config = self.config[self.subcommand]
        if self.subcommand == "expand":
            if not (config.output or config.dry_run):
                raise ArgumentError(
                    None, "add --output FILE.safetensors, or --dry_run to plan only"
                )
            # The configuration of a run may have this entry, which means nothing here.
            if any(occurrences(self._arguments, (CHECKPOINT,))):
                raise ArgumentError(
                    None,
                    "gpd expand takes no --ckpt_path; name the student's weights by "
                    "--model.student_weights FILE (gpd extract writes one from a checkpoint)",
                )
            for path in filter(None, (config.output, config.plan)):
                for file in configuration_files(self._arguments):
                    check_not_input(path, file, "--config")
            return
        config.ckpt_path = self._checkpoint
        if self.subcommand == "predict" and config.images is not None:
            pictures_as_data(config, self._images)
        if self.subcommand in EVALUATIONS:
            model = config.model
            model.static_teacher.name = model.static_teacher.weights = model.assistants = None
            model.ce_weight = 1.0  # without static teacher the labels' weight must not be 0
            return
        _settle_method(config.model)
        self._settle_run_folder(config)

    def _settle_run_folder(self, config: Namespace) -> None:
        """Choose the folder of a run of `fit`, and the checkpoint that it goes on from.

        A run always gets a CSV logger, beside any others, and never the folder of another run. A
        requeued job goes on in the folder of its own run.

        Raises:
            GpdError: when nothing can be written to the folder.
        """
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
            rank_zero_info(f"There is a run in {taken} already; this run gets the next version.")
        if self._run is None and not is_remote(str(table["save_dir"])):
            check_writable(Path(table["save_dir"], table.get("name") or "", METRICS))
        if self._checkpoint == NEWEST:
            config.ckpt_path = self._checkpoint = newest_of_all_runs(table)

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; an expansion only gets its settings."""
        if self.subcommand == "expand":
            # Configurations of fit are accepted; settings that expansion does not use are dropped.
            wanted = inspect.signature(expand_command).parameters
            settings = self.config.expand.model.as_dict()
            self.config_init, self.datamodule = self.config, None
            self.trainer: Any = GpdTrainer
            self.model = {name: value for name, value in settings.items() if name in wanted}
            opt = settings["optimizer"]["opt"]
            self.model["storage"] = settings["storage"] or suitable_storage(opt)  # as `fit` has it
            # The parsed value may be the data's default, which has nothing to do with the student.
            self.model["image_size"] = chosen_image_size(self._arguments)
            return
        config = self.config[self.subcommand]
        model = config.model
        start = model.student_weights, model.student_args
        if config.ckpt_path:  # the weights come from the checkpoint, not from the initial files
            model.student_weights = None
            if model.student_args:
                model.student_args = without_pretrained(model.student, model.student_args)
        with together():
            super().instantiate_classes()
        if self._run is not None:
            # The run's config.yaml is written anew, and shall still say how the run first began.
            config.ckpt_path = configured_value(str(self._run / CONFIGURATION), "ckpt_path")
            model.student_weights, model.student_args = start
        # `SaveConfig` logs all settings; those that the module would log lack the optimizer's.
        self.model.save_hyperparameters([], logger=False)
        # Evaluations need the data's settings from the checkpoint, even if the data module does not
        # save its own hyper-parameters.
        data = self.config_dump["data"]
        understood = {k: v for k, v in self.datamodule.hparams.items() if k == "dataset"}
        self.datamodule.hparams.update(
            {"_class_path": data["class_path"], **data["init_args"], **understood}
        )
        follow = getattr(self.datamodule, "follow", None)
        if self.subcommand not in EVALUATIONS or follow is None:
            return
        if self.subcommand == "predict" and config.images is not None:
            follow(with_classes(self._images, self.model.num_classes))
        elif self._images is not None:
            follow(self._images)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with those default callbacks that its options do not replace."""
        options = self.config_init[self.subcommand].trainer
        chosen = options.callbacks or []
        chosen = chosen if isinstance(chosen, list) else [chosen]
        has_bar = any(isinstance(callback, ProgressBar) for callback in chosen)
        shown = options.enable_progress_bar
        if shown is None:
            shown = has_bar or sys.stdout.isatty()
        if self.subcommand == "fit":
            # If no person watches the terminal, a default callback prints a line per epoch; a
            # progress bar that the user has chosen replaces both kinds of output.
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
        if self.subcommand == "fit" and trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()  # of use where the same allocations recur, which is in training
        return trainer


def _lacks_model(error: ArgumentError) -> bool:
    """Whether a parser's error says that ``--model.student`` is missing."""
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
    # `expand` and `extract` copy weights bit for bit, so subnormal numbers must not be flushed.
    computes = not any(command in arguments[:1] for command in EXACT)
    try:
        with flushed_subnormals(computes), output_may_be_lost(arguments[:1] == ["fit"]):
            if arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
                known = ", ".join(COMMANDS)
                raise ArgumentError(
                    None, f"there is no command '{arguments[0]}'; choose from {known}"
                )
            SaveConfig.arguments = list(arguments)
            arguments = with_pipes_read(with_recipes(arguments))
            if arguments[:1] == ["extract"]:
                run_extract(arguments[1:])
            elif arguments[:1] == ["report"]:
                run_report(arguments[1:])
            else:
                GpdCLI(arguments)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return report_failure(error, arguments, COMMANDS)
    return 0


def _settle_method(model: Namespace) -> None:
    """Replace tables among a method's settings by their values for this pair of networks.

    A table has a value for each pair of static teacher and student.

    Raises:
        MethodError: when a table has no entry for the pair of networks.
    """
    if model.static_teacher.name and "init_args" in model.method:
        settings = model.method.init_args.as_dict()
        found = for_pair(settings, model.static_teacher.name, model.student)
        model.method.init_args = Namespace(**found)


def _has_weights(model: Namespace) -> bool:
    """Whether the student's settings name a weights file, or ask for published weights."""
    return bool(model.student_weights) or wants_published(model.student, model.student_args)


def _asked_for(arguments: Sequence[str]) -> list[str]:
    """The command line with ``--help`` in place of options that ask for help on a group."""
    return ["--help" if argument in HELP_GROUPS else argument for argument in arguments]
