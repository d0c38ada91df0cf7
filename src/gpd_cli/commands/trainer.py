"""The Trainer whose methods are the commands `fit`, `validate`, `test`, `predict` and `expand`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpd_cli.commands.closing import closing_lines
from gpd_cli.commands.expand import expand_command
from gpd_cli.commands.predictions import TABLES, PredictionTable
from gpd_cli.commands.report import write_short_report
from gpd_cli.commands.trainer_numbers import check_numbers
from gpd_cli.distributed.cluster import check_tasks, launched
from gpd_cli.distributed.first_process import launched_by_another, left_for_children
from gpd_cli.distributed.interruptions import Interruptions
from gpd_cli.distributed.requeue import requeue_path
from gpd_cli.distributed.seeds import RandomStates
from gpd_cli.errors import DataError, TrainingError
from gpd_cli.files import check_writable
from gpd_cli.report.run import ReportError, read_run
from gpd_cli.run_folder import METRICS
from gpd_cli.teacher.found_once import what_was_found
from gpd_cli.teacher.pair import Pair
from gpd_cli.training.callbacks import Best, Last
from gpd_cli.training.checkpoint_io import WholeCheckpoints
from gpd_cli.training.evaluation import no_images
from gpd_cli.training.restoring import Restoring
from gpd_cli.training.resuming import FinishedError

_SHARDING = ("fsdp", "deepspeed", "modelparallel")
"""Beginnings of the names of Lightning's strategies that keep a part of each weight per process."""


class GpdTrainer(Trainer):
    """Lightning's Trainer, with `expand` beside `fit`, `validate`, `test` and `predict`.

    Runs started by torchrun or SLURM need no options for devices and nodes. The callback
    `Interruptions` stops and resumes runs.

    Args:
        save_every_n_steps: number of optimizer steps between checkpoints (last.ckpt) within an
            epoch; by default such checkpoints are written by time only.
        save_every_n_minutes: age of the latest checkpoint, in minutes, at which another one is
            written within an epoch; with null, last.ckpt is written after epochs only.
    """

    def __init__(
        self,
        *args: Any,
        save_every_n_steps: int | None = None,
        save_every_n_minutes: float | None = 15.0,
        **kwargs: Any,
    ) -> None:
        for name, value in (("steps", save_every_n_steps), ("minutes", save_every_n_minutes)):
            if value is not None and not value > 0:
                raise TrainingError(
                    f"--trainer.save_every_n_{name} must be above 0, or null, not {value}."
                )
        if kwargs.get("barebones"):
            raise TrainingError(
                "--trainer.barebones turns off the log and the checkpoints, which every run needs; "
                "leave out --trainer.barebones."
            )
        check_numbers(kwargs)
        _check_strategy(kwargs.get("strategy"))
        kwargs.update(launched(kwargs))
        plugins = kwargs["plugins"] or []
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeCheckpoints()]
        try:
            super().__init__(*args, **kwargs)
        except MisconfigurationException as error:
            if "No supported gpu" not in str(error):
                raise
            raise TrainingError(
                "This machine has no GPU that torch can use; set --trainer.accelerator cpu."
            ) from error
        except TypeError as error:  # raised by Lightning for values of the wrong type
            raise TrainingError(
                f"Lightning's Trainer does not accept its options: {error}"
            ) from error
        check_tasks(self)
        self._checkpoint_connector = Restoring(self)
        # The run's own checkpoints are written first, so that those of users' callbacks, and a run
        # that goes on from them, know which epoch best.ckpt is of.
        self.callbacks.sort(key=_is_users_checkpoint)  # type: ignore[attr-defined]
        # `RandomStates` and `Interruptions` have to follow all callbacks that act on every batch.
        self.callbacks += [RandomStates(), Interruptions()]  # type: ignore[attr-defined]

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train student and dynamic teacher.

        Args:
            model: the LightningModule.
            train_dataloaders: training data, if there is no data module.
            val_dataloaders: validation data, if there is no data module.
            datamodule: the data module.
            ckpt_path: path of a checkpoint of fit from which a new run takes weights, optimizer
                state and position in the schedule; last stands for the newest checkpoint of the run
                of this name that was started last. A requeued SLURM job goes on from its own
                checkpoint.
            weights_only: whether checkpoints may hold tensors and plain values only.
        """
        path = requeue_path(self.default_root_dir)
        requeued = path is not None and path.is_file()
        data = (train_dataloaders, val_dataloaders, datamodule)
        start = time.perf_counter()
        try:
            with self._handed_on(model):
                super().fit(model, *data, path if requeued else ckpt_path, weights_only)
        except FinishedError as finished:
            if path is None or not requeued:
                raise
            # The job was killed after its last epoch, before it could end: the run is finished.
            rank_zero_info(str(finished))
            if self.is_global_zero:
                path.unlink(missing_ok=True)
        else:
            self._close(time.perf_counter() - start)

    def _run_stage(self) -> Any:
        """Run the stage, without repeating an epoch that had ended when the checkpoint was saved.

        Lightning would repeat such an epoch if the run's length is given in steps.
        """
        loop = self.fit_loop
        progress: Any = loop.epoch_progress.current
        if loop.restarting and progress.ready == progress.started == progress.processed:
            _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
        return super()._run_stage()

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Score student and dynamic teacher on the validation images.

        Args:
            model: the LightningModule.
            dataloaders: validation data, if there is no data module.
            ckpt_path: path of a checkpoint of fit; last stands for the newest checkpoint of the
                run of this name that was started last.
            verbose: whether to print the scores.
            datamodule: the data module.
            weights_only: whether checkpoints may hold tensors and plain values only.

        Raises:
            DataError: when there are no validation images.
        """
        data = (dataloaders, ckpt_path, verbose, datamodule, weights_only)
        return self._scored("val", super().validate(model, *data))

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Score student and dynamic teacher on the test images.

        Args:
            model: the LightningModule.
            dataloaders: test data, if there is no data module.
            ckpt_path: path of a checkpoint of fit; last stands for the newest checkpoint of the
                run of this name that was started last.
            verbose: whether to print the scores.
            datamodule: the data module.
            weights_only: whether checkpoints may hold tensors and plain values only.

        Raises:
            DataError: when there are no test images.
        """
        data = (dataloaders, ckpt_path, verbose, datamodule, weights_only)
        return self._scored("test", super().test(model, *data))

    def predict(  # type: ignore[override]
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        output: Path = Path("predictions.csv"),
        images: Path | None = None,
        top: int = 1,
    ) -> None:
        """Write the predictions of student and dynamic teacher for images.

        The images need no labels and no folders of classes. The argument `images` is not used here:
        the command line reads it beforehand, and gives the images to the data module. Several
        processes share the images among themselves; the table has all images in order.

        Args:
            model: the LightningModule.
            datamodule: the data module.
            ckpt_path: path of a checkpoint of fit; last stands for the newest checkpoint of the
                run of this name that was started last.
            output: path of the table to write, .csv or .jsonl (a line of JSON per image); for each
                image the table has the file, the class if it is known, and each network's most
                probable classes with their probabilities.
            images: an image, or a folder with images anywhere below it, to predict in place of the
                images of the data.
            top: number of classes that the table has for each network and image.

        Raises:
            DataError: when several processes would have to read a stream, or there are no images.
        """
        check_writable(output, TABLES)
        if top < 1:
            raise DataError(f"--top must be 1 or more, not {top}.")
        table = PredictionTable(output, top)
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]
        callbacks.append(table)
        try:
            super().predict(
                model, datamodule=datamodule, return_predictions=False, ckpt_path=ckpt_path
            )
        finally:
            callbacks.remove(table)
        if not table.images:
            raise DataError(
                "There were no images to predict; check --trainer.limit_predict_batches and "
                "--data.test_split."
            )

    @staticmethod
    def expand(
        model: Mapping[str, Any],
        output: Path | None = None,
        plan: Path | None = None,
        dry_run: bool = False,
        ckpt_path: str | None = None,
    ) -> None:
        """Inflate a student into a dynamic teacher that computes the same function.

        Args:
            model: the student and the options of its expansion, see `expand_command`.
            output: path of the file to write (.safetensors); required unless dry_run is given.
            plan: path of a file for the width plan as readable text (.yaml); by default none is
                written.
            dry_run: only print the width plan; nothing is built and no output is written.
            ckpt_path: not used; accepted because the config.yaml of a run has this entry.
        """
        expand_command(
            None if dry_run or output is None else Path(output),
            plan=None if plan is None else Path(plan),
            **model,
        )

    def _handed_on(self, model: LightningModule) -> AbstractContextManager[None]:
        """A context in which processes that Lightning starts for other devices get the width plan.

        So these processes need not search for the plan again.
        """
        network = getattr(model, "network", None)
        starts_others = self.num_devices > 1 and not launched_by_another()
        if starts_others and isinstance(network, Pair) and network.certificate is not None:
            return left_for_children(what_was_found(network))
        return nullcontext()

    def _scored(self, stage: str, scores: Any) -> Any:
        """Pass the scores of an evaluation on, and refuse one that had no data to score.

        Args:
            stage: val or test.
            scores: the scores of each data loader; empty if there was none.

        Raises:
            DataError: when there are no scores.
        """
        if not any(scores):
            raise no_images(self, stage)
        return scores

    def _run_folder(self) -> Path | None:
        """Folder of the log; unlike Trainer.log_dir, this needs no communication of processes."""
        found = (logger.log_dir for logger in self.loggers if isinstance(logger, CSVLogger))
        return next((Path(folder) for folder in found), None)

    def _close(self, seconds: float) -> None:
        """Write the report of a run that has ended, and print its summary."""
        folder = self._run_folder()
        if not self.is_global_zero or folder is None or not (folder / METRICS).is_file():
            return
        try:
            run = read_run(folder)
        except ReportError:  # the run ended before the end of its first epoch
            return
        missing = write_short_report(run)
        went_on = any(getattr(logger, "continues", False) for logger in self.loggers)
        print("\n".join(closing_lines(run, seconds, missing, went_on)), flush=True)


def _is_users_checkpoint(callback: Any) -> bool:
    return isinstance(callback, Checkpoint) and not isinstance(callback, Best | Last)


def _check_strategy(strategy: str | Strategy | None) -> None:
    """Refuse strategies under which student and dynamic teacher cannot share their weights.

    Args:
        strategy: the Trainer's argument.

    Raises:
        TrainingError: when the strategy leaves no process with whole weights, out of which the
            student is cut, or pickles the networks, whose kernels are computed from each other.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if "spawn" in name or getattr(strategy, "_start_method", None) == "spawn":
        raise TrainingError(
            f"--trainer.strategy {name} sends the networks to new processes by pickling, which gpd "
            "does not support; use ddp, which starts the whole command in each process."
        )
    if name.lower().replace("_", "").startswith(_SHARDING):
        raise TrainingError(
            f"--trainer.strategy {name} keeps a part of each weight in a process, and the student "
            "is cut out of whole weights; use ddp, and save memory with --model.grad_checkpointing "
            "or --model.recompute_student."
        )
