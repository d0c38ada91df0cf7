"""Stopping a run on a signal: between two steps, on all processes at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import Sampler

from gpd_cli.data.cached import CachedLoader
from gpd_cli.distributed.cluster import requeue_path, slurm_job
from gpd_cli.errors import TrainingError

TERMINATED = 128 + signal.SIGTERM
STOPPED = "stopped.ckpt"
"""Name of the checkpoint of a run that was stopped within an epoch, beside ``last.ckpt``."""
_EVERY = 8  # batches between checks, since each check synchronizes the processes


class Stopped(SystemExit):
    """Ends the command with an exit code."""


class Interruptions(Callback):
    """Save and stop on SIGTERM; under SLURM, on SIGUSR1, also requeue the job.

    A signal may come at any moment, and reaches processes at different moments. It is therefore
    only recorded; all processes act on it after the same batch or epoch. A job that SLURM starts
    again resumes from the saved checkpoint, or else from the end of its last epoch. A run that
    resumes within an epoch skips the images that it has already seen in this epoch.
    """

    def __init__(self) -> None:
        self._requeue = self._stop = False
        self._saved: Path | None = None
        self._since, self._steps, self._first = 0, 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers; skip the images already seen in a resumed epoch."""
        self._since, self._steps = 0, trainer.global_step
        self._first = trainer.current_epoch
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)  # Lightning restores the previous handler
            if slurm_job():
                signal.signal(signal.SIGUSR1, self._note)
        if trainer.fit_loop.restarted_mid_epoch:
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
            progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
            skip_once(trainer.train_dataloader, progress.processed)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the last epoch's end for requeueing, in case the job is killed without a signal."""
        folder = _checkpoints(trainer)
        last = None if folder is None else folder / "last.ckpt"
        path = requeue_path(trainer.default_root_dir)
        if path is not None and trainer.is_global_zero and last is not None and last.is_file():
            link = _beside(path)
            link.unlink(missing_ok=True)
            link.symlink_to(last)
            link.replace(path)
        # A signal may have come during validation, or an epoch may have a single step. The state is
        # in last.ckpt already.
        if last is not None and trainer.current_epoch > self._first:
            self._decide(trainer, saved=last)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop after this batch if a signal has come."""
        self._since += 1
        if trainer.global_step == self._steps:  # gradients are accumulated, without a step
            return
        self._steps = trainer.global_step
        # After an epoch's last batch, validation and checkpoints come first.
        if trainer.is_last_batch or (trainer.world_size > 1 and self._since < _EVERY):
            return
        self._decide(trainer)

    def _decide(self, trainer: Trainer, saved: Path | None = None) -> None:
        """If a process has got a signal, save (unless `saved` is given) and stop."""
        self._since = 0
        decide = trainer.strategy.reduce_boolean_decision
        if not decide(self._stop or self._requeue, all=False):
            return
        requeue = decide(self._requeue, all=False)
        folder = _checkpoints(trainer)
        path = requeue_path(trainer.default_root_dir) or (folder and folder / STOPPED)
        if path is None:
            raise Stopped(TERMINATED)
        if saved is None:
            # The old file is kept until the new one is complete; a link's target stays.
            trainer.save_checkpoint(_beside(path))
            if trainer.is_global_zero:
                _beside(path).replace(path)
        self._saved = path = saved or path
        problem = _put_back() if requeue and trainer.is_global_zero else ""
        trainer.strategy.barrier()
        if problem:
            raise TrainingError(
                f"The job cannot be put back into the queue ({problem}); start it again with "
                f"--ckpt_path {path}."
            )
        raise Stopped(0 if requeue else TERMINATED)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the checkpoint for requeueing, since the run is finished."""
        path = requeue_path(trainer.default_root_dir)
        if path is not None and trainer.is_global_zero:
            path.unlink(missing_ok=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Print in one sentence that the run was stopped, and how to resume it."""
        if isinstance(exception, SIGTERMException):
            exception.code = TERMINATED
        elif not isinstance(exception, Stopped):
            return
        if not trainer.is_global_zero:
            return
        path = self._saved
        if path is None:
            after = "go on with --ckpt_path RUN/checkpoints/last.ckpt"
        elif not slurm_job():
            after = f"saved, and goes on with --ckpt_path {path}"
        elif exception.code:
            after = f"saved as {path}, from which the job goes on when it is requeued"
        else:
            after = f"saved as {path}, and job {slurm_job()} is in the queue again"
        print(f"gpd: stopped at step {trainer.global_step}; {after}", file=sys.stderr)

    def _note(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGTERM:
            self._stop = True
        else:
            self._requeue = True


def _checkpoints(trainer: Trainer) -> Path | None:
    """The folder of ``last.ckpt``; None for a run without this checkpoint."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.filename == "last":
            return Path(callback.dirpath or "").resolve()
    return None


def _beside(path: Path) -> Path:
    """Temporary file beside `path`, for an atomic replace."""
    return path.with_name(f".{path.name}")


def _put_back() -> str:
    """Requeue the job; returns the error's text, or an empty one."""
    try:
        result = subprocess.run(
            ["scontrol", "requeue", slurm_job() or ""], capture_output=True, text=True
        )
    except OSError as error:
        return str(error)
    if result.returncode == 0:
        return ""
    return " ".join(result.stderr.split()) or f"scontrol ended with code {result.returncode}"


class _SkipOnce(Sampler[Any]):
    """A sampler that leaves out the beginning of its first pass."""

    def __init__(self, sampler: Any, count: int) -> None:
        self._sampler, self._count = sampler, count

    def __iter__(self) -> Iterator[Any]:
        count, self._count = self._count, 0
        for position, index in enumerate(self._sampler):
            if position >= count:
                yield index

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def skip_once(loader: Any, batches: int) -> None:
    """Leave out the first batches of a loader's next pass; a stream's pass begins anew.

    Args:
        loader: a loader; nothing is left out where neither it nor its batch sampler has a sampler.
        batches: number of batches to leave out.
    """
    if isinstance(loader, CachedLoader):  # it draws the augmentation of the whole epoch
        loader.skipped = batches * loader.batch_size
        return
    owner = getattr(loader, "batch_sampler", None) or loader
    if hasattr(owner, "sampler"):
        owner.sampler = _SkipOnce(owner.sampler, batches * loader.batch_size)
