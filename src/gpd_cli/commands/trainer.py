"""The Trainer whose methods are the subcommands."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpd_cli.commands.closing import closing_lines
from gpd_cli.commands.expand import expand_command
from gpd_cli.commands.predictions import TABLES, PredictionTable
from gpd_cli.commands.report import write_short_report
from gpd_cli.commands.trainer_numbers import check_numbers
from gpd_cli.distributed.cluster import launched, requeue_path
from gpd_cli.distributed.first_process import launched_by_another, left_for_children
from gpd_cli.distributed.interruptions import Interruptions
from gpd_cli.distributed.seeds import RandomStates
from gpd_cli.errors import DataError, TrainingError
from gpd_cli.files import check_writable
from gpd_cli.report.run import METRICS, ReportError, read_run
from gpd_cli.teacher.found_once import what_was_found
from gpd_cli.teacher.pair import Pair
from gpd_cli.training.restoring import Restoring
from gpd_cli.training.resuming import FinishedError
from gpd_cli.training.storage import WholeCheckpoints


class GpdTrainer(Trainer):
    """Lightning's Trainer, with `expand` beside `fit`, `validate`, `test` and `predict`.

    Runs that torchrun or SLURM start need no options for devices and nodes. `Interruptions` stops
    and resumes runs.

    Args:
        save_every_n_steps: optimizer steps between checkpoints (last.ckpt) within an epoch; by
            default there are none but those by time.
        save_every_n_minutes: age of the latest checkpoint in minutes at which another one is
            written within an epoch; null writes last.ckpt only after epochs.
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
                "Every run keeps a log and checkpoints, which --trainer.barebones is without; "
                "leave it out."
            )
        check_numbers(kwargs)
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
                "This machine has no GPU that torch can use; take --trainer.accelerator cpu."
            ) from error
        except TypeError as error:  # Lightning's, about values of several types
            raise TrainingError(f"The options of the trainer do not fit: {error}") from error
        self._checkpoint_connector = Restoring(self)
        # Last, after all callbacks that act on every batch.
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
            model: the module.
            train_dataloaders: training data, unless there is a data module.
            val_dataloaders: validation data, unless there is a data module.
            datamodule: the data.
            ckpt_path: a checkpoint of fit that a new run starts from, with its weights, optimizer
                and position in the schedule; last is the newest of the runs of this name. A
                requeued SLURM job goes on from its own.
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
            # The job was killed between its last epoch and its end: the run is finished.
            rank_zero_info(str(finished))
            if self.is_global_zero:
                path.unlink(missing_ok=True)
        else:
            self._close(time.perf_counter() - start)

    def _run_stage(self) -> Any:
        """Run, without going through a finished epoch once more.

        Lightning does so in a run whose length is given in steps, and that was saved when an epoch
        had ended.
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
            model: the module.
            dataloaders: validation data, unless there is a data module.
            ckpt_path: a checkpoint of fit; last is the newest of the runs of this name.
            verbose: whether to print the scores.
            datamodule: the data.
            weights_only: whether checkpoints may hold tensors and plain values only.
        """
        return super().validate(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

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
            model: the module.
            dataloaders: test data, unless there is a data module.
            ckpt_path: a checkpoint of fit; last is the newest of the runs of this name.
            verbose: whether to print the scores.
            datamodule: the data.
            weights_only: whether checkpoints may hold tensors and plain values only.
        """
        return super().test(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

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

        They need no labels and no folders of classes. `images` is read by the command line, which
        gives the data module these images. Several processes divide the images among
        them; the table has all images, in order.

        Args:
            model: the module.
            datamodule: the data.
            ckpt_path: a checkpoint of fit; last is the newest of the runs of this name.
            output: the table to write, .csv or .jsonl (a line of JSON per image): per image its
                file, its class where that is known, and each network's likeliest classes with
                their probabilities.
            images: an image, or a folder with images anywhere below it, to predict instead of the
                data's.
            top: how many classes of each network the table has.

        Raises:
            DataError: when several processes are to read a stream, or there are no images.
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
                "There were no images to predict; look at --trainer.limit_predict_batches and "
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
            model: the student and how to expand it, see `expand_command`.
            output: the file to write (.safetensors); needed unless dry_run.
            plan: file for the width plan as readable text (.yaml); by default none.
            dry_run: print the width plan and stop: nothing is built and no output is written.
            ckpt_path: not used; accepted because the config.yaml of a run has it.
        """
        expand_command(
            None if dry_run or output is None else Path(output),
            plan=None if plan is None else Path(plan),
            **model,
        )

    def _handed_on(self, model: LightningModule) -> AbstractContextManager[None]:
        """Hand the width plan to the processes that Lightning starts for further devices."""
        network = getattr(model, "network", None)
        starts_others = self.num_devices > 1 and not launched_by_another()
        if starts_others and isinstance(network, Pair) and network.certificate is not None:
            return left_for_children(what_was_found(network))
        return nullcontext()

    def _run_folder(self) -> Path | None:
        """Where the log is; asks no other process."""
        found = (logger.log_dir for logger in self.loggers if isinstance(logger, CSVLogger))
        return next((Path(folder) for folder in found), None)

    def _close(self, seconds: float) -> None:
        """Write the report of a run, and say how it went."""
        folder = self._run_folder()
        if not self.is_global_zero or folder is None or not (folder / METRICS).is_file():
            return
        try:
            run = read_run(folder)
        except ReportError:  # it ended before its first epoch did
            return
        missing = write_short_report(run)
        went_on = any(getattr(logger, "continues", False) for logger in self.loggers)
        print("\n".join(closing_lines(run, seconds, missing, went_on)), flush=True)
