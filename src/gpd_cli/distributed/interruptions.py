"""Runs that are told to save or to stop: by a signal, between two steps, on all processes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import Sampler

from gpd_cli.distributed.cluster import requeue_path, slurm_job
from gpd_cli.distributed.world import batches_between, gathered, is_lost_process, saved_exactly
from gpd_cli.errors import TrainingError
from gpd_cli.files import short_path

STOPPED = "stopped.ckpt"
"""Where a run that was stopped within an epoch is saved, beside ``last.ckpt``."""
_CONFIGURATION = "config.yaml"
_STOPPING = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
_ONE_KEY = 0.5  # seconds within which two SIGINT are one: a launcher may pass on what all have got


class Stopped(SystemExit):
    """Ends the command; its code is that of the process."""


class Interruptions(Callback):
    """Act on signals.

    - SIGTERM, SIGHUP (a terminal that is closed) and SIGINT (Ctrl-C) save and stop; a second SIGINT
      stops at once.
    - SIGUSR1 saves and goes on. Under SLURM, which sends it before the time is up, it saves, puts
      the job back into the queue and stops.

    A signal may come at any moment and reaches processes at different ones. It is therefore only
    noted, and acted upon after a batch or an epoch, on all processes after the same one. A job that
    SLURM starts again goes on from there, or else from its last checkpoint. A run that goes on from
    within an epoch skips the images that it has seen of it.

    A run whose time is up (``--trainer.max_time``) is saved and stopped in the same way. Lightning
    would end the epoch there, and save it as one that is over.
    """

    def __init__(self) -> None:
        self._asked: set[int] = set()
        self._pressed = 0.0  # when Ctrl-C was
        self._saved: Path | None = None
        self._is_late = False
        self._since, self._steps, self._first = 0, 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from now on; skip what was seen of the epoch."""
        self._since, self._steps = 0, trainer.global_step
        self._first = trainer.current_epoch
        self._asked.clear()
        if threading.current_thread() is threading.main_thread():
            # Lightning puts back what was there before.
            for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
                number = getattr(signal, name, None)
                # nohup has SIGHUP ignored, and shells SIGINT for what runs in their background.
                if number and signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._note)
        if trainer.fit_loop.restarted_mid_epoch:
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
            progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
            skip_once(trainer.train_dataloader, progress.processed)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act on a signal that came during validation, or in an epoch of one step."""
        last = _last(trainer)
        self._remember(trainer)
        # What there is to save is in last.ckpt already.
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
        """Save, and maybe stop here, if that is asked for."""
        self._since += 1
        late = _is_late(trainer)
        if late:
            trainer.should_stop = False  # Lightning's timer sets it again after the next batch
        if trainer.global_step == self._steps:  # gradients are being accumulated
            return
        self._steps = trainer.global_step
        if not saved_exactly(trainer):  # the next batch will do, or the next epoch
            return
        if late:
            self._stop_late(trainer)
        if any(_just_saved(trainer, c) for c in trainer.checkpoint_callbacks):
            self._remember(trainer)
        if self._since >= batches_between(trainer):
            self._decide(trainer)

    def _remember(self, trainer: Trainer) -> None:
        """Let a job that is killed without a signal go on from its last checkpoint."""
        last = _last(trainer)
        path = requeue_path(trainer.default_root_dir)
        if path is not None and trainer.is_global_zero and last is not None and last.is_file():
            before = path.resolve()
            _link(path, last)
            _remove_stopped(before)

    def _decide(self, trainer: Trainer, saved: Path | None = None) -> None:
        """Do what one of the processes was asked for; `saved` is what has been written already."""
        self._since = 0
        if not trainer.strategy.reduce_boolean_decision(bool(self._asked), all=False):
            return
        asked = set().union(*gathered(self._asked))
        self._asked.clear()
        last = _last(trainer)
        requeue = slurm_job() is not None and getattr(signal, "SIGUSR1", None) in asked
        stop = next((number for number in _STOPPING if number in asked), None)
        if not requeue and stop is None:
            if last is not None and saved is None:
                trainer.save_checkpoint(last)
            if trainer.is_global_zero:
                _say(f"gpd: step {trainer.global_step}: saved as {last or 'nothing'}; going on")
            return
        requeued = requeue_path(trainer.default_root_dir)
        # In the run's folder, by which a requeued job finds it.
        path = requeued if last is None else last.with_name(STOPPED)
        if saved is None and path is not None:
            _save(trainer, path)
            if trainer.is_global_zero and requeued not in (None, path):
                _link(requeued, path)
        self._saved = saved or path
        problem = _put_back() if requeue and trainer.is_global_zero else ""
        trainer.strategy.barrier()
        if problem:
            assert self._saved is not None  # by a job, at least as what it is requeued with
            raise TrainingError(
                f"The job cannot be put back into the queue ({problem}); go on with: "
                f"{resume_command(self._saved)}"
            )
        raise Stopped(0 if requeue else _code(trainer, stop or signal.SIGTERM))

    def _stop_late(self, trainer: Trainer) -> None:
        """Save and stop within the epoch. The run has done its work, also for a job of SLURM."""
        last = _last(trainer)
        assert last is not None
        self._saved, self._is_late = last.with_name(STOPPED), True
        _save(trainer, self._saved)
        self.on_fit_end(trainer, trainer.lightning_module)
        trainer.strategy.barrier()
        raise Stopped(0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A job that has done its work leaves nothing to go on from."""
        path = requeue_path(trainer.default_root_dir)
        if path is not None and trainer.is_global_zero:
            if path.resolve() != self._saved:  # whose time is up, and which may go on
                _remove_stopped(path.resolve())
            path.unlink(missing_ok=True)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Heed SIGTERM, which Lightning does between batches of all other loops."""
        progress: Any = trainer.predict_loop.batch_progress
        if trainer.received_sigterm and not progress.is_last_batch:
            raise SIGTERMException

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say in one sentence that the run was stopped, and how it goes on."""
        if is_lost_process(exception):
            last = _last(trainer)
            start_again = "start the run again"
            if last is not None and last.is_file():
                start_again = f"go on with: {resume_command(last)}"
            exception.__cause__ = TrainingError(
                "Another process of the run has ended or does not answer, and this one cannot go "
                f"on alone; the other's message says why; {start_again}"
            )
            return
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + signal.SIGTERM
        elif not isinstance(exception, Stopped | KeyboardInterrupt):
            return
        if trainer.state.fn != TrainerFn.FITTING:
            if trainer.is_global_zero and not isinstance(exception, KeyboardInterrupt):
                _say("gpd: stopped")
            return
        path, job, last = self._saved, slurm_job(), _last(trainer)
        began = trainer.ckpt_path
        if path is not None and self._is_late:
            after = (
                f"the time of --trainer.max_time is up; saved as {short_path(path)}; go on with: "
                f"{resume_command(path)} --trainer.max_time DAYS:HH:MM:SS (in all)"
            )
        elif path is not None and job is not None:
            after = f"saved as {short_path(path)}, and job {job} is in the queue again"
            if isinstance(exception, Stopped) and exception.code:
                after = (
                    f"saved as {short_path(path)}, from which the job goes on when it is requeued"
                )
        elif path is not None:
            after = f"saved as {short_path(path)}; go on with: {resume_command(path)}"
        elif last is not None and last.is_file():  # stopped at once
            after = f"last saved as {short_path(last)}; go on with: {resume_command(last)}"
        elif last is not None and began:
            config = last.parent.parent / _CONFIGURATION
            after = (
                f"nothing new has been saved; go on with: {restart_command(config, Path(began))}"
            )
        else:
            after = "nothing has been saved, and there is nothing to go on from"
        text = f"stopped at step {trainer.global_step}; {after}"
        if not trainer.is_global_zero:
            return
        if isinstance(exception, KeyboardInterrupt):
            exception.add_note(text)  # which the command prints when all is torn down
        else:
            _say(f"gpd: {text}")

    def _note(self, signum: int, frame: Any) -> None:
        self._asked.add(signum)
        if signum == signal.SIGINT:
            now, before = time.monotonic(), self._pressed
            if before and now - before > _ONE_KEY:
                raise KeyboardInterrupt
            self._pressed = before or now
            if not before:
                _say("gpd: saving and stopping after this step; Ctrl-C again stops at once")
        elif signum == getattr(signal, "SIGHUP", None):
            _leave_terminal()


def resume_command(path: Path) -> str:
    """The command that resumes a run from its newest checkpoint.

    Args:
        path: path of this checkpoint, in the run's folder.
    """
    run = path.parent.parent
    if (run / _CONFIGURATION).is_file():
        return f"{_launcher()} fit --resume {shlex.quote(short_path(run))}"
    return restart_command(Path("CONFIG"), path)


def restart_command(config: Path, checkpoint: Path) -> str:
    """The command that starts a new run from a checkpoint.

    Args:
        config: path of the run's configuration.
        checkpoint: path of the checkpoint.
    """
    files = (shlex.quote(short_path(path)) for path in (config, checkpoint))
    return "{} fit -c {} --ckpt_path {}".format(_launcher(), *files)


def _launcher() -> str:
    return "torchrun ... -m gpd_cli" if TorchElasticEnvironment.detect() else "gpd"


def _code(trainer: Trainer, signum: int) -> int:
    """The exit code of a process that has saved.

    Whoever starts several processes takes a code other than 0 for a failure: torchrun prints a
    traceback, or starts them again from the beginning; Lightning kills the others.
    """
    # SLURM itself starts the processes of a job, and waits for all of them.
    launched = trainer.strategy.launcher is not None and slurm_job() is None
    launched = launched and not trainer.is_global_zero
    return 0 if launched or TorchElasticEnvironment.detect() else 128 + signum


def _say(text: str) -> None:
    """Write a line to standard error, from signal handlers too, also when nobody hears it."""
    with suppress(OSError, ValueError):
        try:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
        except RuntimeError:  # the signal came while something else was being written
            os.write(2, f"\n{text}\n".encode())


def _leave_terminal() -> None:
    """Write no more to a terminal that is closed: every attempt would be an error."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        if os.isatty(descriptor):
            os.dup2(nowhere, descriptor)


def _last(trainer: Trainer) -> Path | None:
    """The path of ``last.ckpt``; None where a run writes none, or has not begun."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.filename == "last":
            return Path(callback.dirpath, "last.ckpt").resolve() if callback.dirpath else None
    return None


def _is_late(trainer: Trainer) -> bool:
    """Whether a run is to stop for its time within an epoch, and can be saved there."""
    loop = trainer.fit_loop
    if not (trainer.should_stop and loop._can_stop_early) or loop.epoch_loop._is_training_done:
        return False
    timers = [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined] # set by its connector
        if isinstance(callback, Timer)
    ]
    if not timers or _last(trainer) is None:
        return False
    # The first process's clock has decided.
    late = any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers)
    return bool(trainer.strategy.broadcast(late))


def _save(trainer: Trainer, path: Path) -> None:
    """Save; what is there is good until the new one is whole; of a link, last.ckpt stays."""
    trainer.save_checkpoint(_beside(path))
    if trainer.is_global_zero:
        _beside(path).replace(path)


def _just_saved(trainer: Trainer, callback: Any) -> bool:
    return getattr(callback, "_last_global_step_saved", None) == trainer.global_step


def _beside(path: Path) -> Path:
    """Where to write what is then moved to a path."""
    return path.with_name(f".{path.name}")


def _link(path: Path, target: Path) -> None:
    """Let a path lead to a checkpoint; what it led to before it leads to until then."""
    link = _beside(path)
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    link.replace(path)


def _remove_stopped(path: Path) -> None:
    """Remove what a requeued job has gone on from, which a later checkpoint has replaced."""
    if path.name == STOPPED:
        path.unlink(missing_ok=True)


def _put_back() -> str:
    """Put the job back into the queue; what went wrong, or nothing."""
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
    """A sampler that begins its first pass further on."""

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
    """Let a loader's next pass begin further on; that of a foreign stream begins anew.

    Args:
        loader: a loader of our data, or one with a sampler, its own or its batch sampler's.
        batches: how many to leave out.
    """
    if hasattr(loader, "skip"):
        loader.skip(batches)
        return
    owner, size = getattr(loader, "batch_sampler", None) or loader, batch_size_of(loader)
    if hasattr(owner, "sampler") and size is not None:
        owner.sampler = _SkipOnce(owner.sampler, batches * size)


def batch_size_of(loader: Any) -> int | None:
    """The number of images in a loader's batches; None where it does not tell.

    Args:
        loader: the loader; if it does not know the number, its sampler of batches may.
    """
    for owner in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(owner, "batch_size", None)
        if isinstance(size, int) and size > 0:
            return size
    return None
