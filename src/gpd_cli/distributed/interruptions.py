"""Saving and stopping of a run on a signal, or when its time is up.

A run saves and stops between two steps, on all processes after the same step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gpd_cli.data.skipping import skip_once
from gpd_cli.distributed.cluster import slurm_job
from gpd_cli.distributed.last_checkpoint import last_checkpoint, written_checkpoint
from gpd_cli.distributed.requeue import link_to, put_back, remove_stopped, requeue_path
from gpd_cli.distributed.resume_commands import restart_command, resume_command
from gpd_cli.distributed.world import batches_between, gathered, is_lost_process, saved_exactly
from gpd_cli.errors import TrainingError
from gpd_cli.files import short_path
from gpd_cli.generators import states_kept
from gpd_cli.run_folder import CONFIGURATION, STOPPED

_STOPPING = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
# Two SIGINT within this time, in seconds, count as one: a launcher may pass on a signal that all
# processes have received from the terminal already.
_ONE_KEY = 0.5


class Stopped(SystemExit):
    """Raised to end the command; its code becomes the exit code of the process."""


class Interruptions(Callback):
    """Save, stop or requeue a run when it receives a signal.

    - On SIGTERM, SIGHUP (the terminal was closed) and SIGINT (Ctrl-C), the run saves and stops; a
      second SIGINT stops the run at once.
    - On SIGUSR1, the run saves and goes on. But under SLURM, which sends this signal before the
      job's time is up, the run saves, puts the job back into the queue and stops.

    A signal may come at any moment, and does not reach all processes at the same moment. So a
    signal is only noted at first, and handled after a batch or an epoch, in all processes after the
    same one. A requeued SLURM job goes on from the checkpoint saved then, or else from its last
    one. A run resumed within an epoch skips the images of the epoch that it has seen already.

    A run whose time is up (``--trainer.max_time``) is saved and stopped in the same way. Lightning
    by itself would end the epoch there, and save it as a complete one.
    """

    def __init__(self) -> None:
        self._asked: set[int] = set()
        self._pressed = 0.0  # time of the first Ctrl-C; 0 for none
        self._saved: Path | None = None
        self._is_late = False
        # Batches since the last decision, updates at the latest batch, this process's first epoch.
        self._since, self._steps, self._first = 0, 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers; in a resumed run, skip images of the epoch seen already."""
        self._since, self._steps = 0, trainer.global_step
        self._first = trainer.current_epoch
        self._asked.clear()
        if threading.current_thread() is threading.main_thread():
            # Lightning restores the previous handlers at the end.
            for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
                number = getattr(signal, name, None)
                # Signals that are ignored stay so: nohup ignores SIGHUP, and shells ignore SIGINT
                # for processes in the background.
                if number and signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._note)
        if trainer.fit_loop.restarted_mid_epoch:
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
            progress: Any = trainer.fit_loop.epoch_loop.batch_progress
            done = progress.current.processed
            # Of an epoch whose batches are all done, only the end is left: the next pass through
            # the images is that of the next epoch.
            if not progress.is_last_batch and done < trainer.num_training_batches:
                _skip(trainer, done)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle a signal that came during validation, or in an epoch of one step."""
        last = last_checkpoint(trainer)
        self._remember(trainer)
        # After an epoch, last.ckpt has been written already, so that nothing has to be saved.
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
        """Save, and possibly stop, if a signal asks for it or the run's time is up."""
        self._since += 1
        late = _is_late(trainer)
        if late:
            trainer.should_stop = False  # Lightning's timer sets it again after the next batch
        if trainer.global_step == self._steps:  # gradients are being accumulated
            return
        self._steps = trainer.global_step
        if not saved_exactly(trainer):  # decide after the next batch, or at the next epoch's start
            return
        if late:
            self._stop_late(trainer)
        if any(_just_saved(trainer, c) for c in trainer.checkpoint_callbacks):
            self._remember(trainer)
        if self._since >= batches_between(trainer):
            self._decide(trainer)

    def _remember(self, trainer: Trainer) -> None:
        """Link the requeue path to ``last.ckpt``, for a SLURM job that is killed without a signal.

        When SLURM starts the job again, it goes on from this checkpoint.
        """
        last = written_checkpoint(trainer)
        path = requeue_path(trainer.default_root_dir)
        if path is not None and trainer.is_global_zero and last is not None:
            before = path.resolve()
            link_to(path, last)
            remove_stopped(before)

    def _decide(self, trainer: Trainer, saved: Path | None = None) -> None:
        """Handle signals that any of the processes has received.

        Args:
            trainer: trainer of the run.
            saved: path of a checkpoint of this position, if one has been written already.
        """
        self._since = 0
        if not trainer.strategy.reduce_boolean_decision(bool(self._asked), all=False):
            return
        asked = set().union(*gathered(self._asked))
        self._asked.clear()
        last = last_checkpoint(trainer)
        requeue = slurm_job() is not None and getattr(signal, "SIGUSR1", None) in asked
        stop = next((number for number in _STOPPING if number in asked), None)
        if not requeue and stop is None:
            if last is not None and saved is None:
                trainer.save_checkpoint(last)
            if trainer.is_global_zero:
                _say(f"gpd: step {trainer.global_step}: saved as {last or 'nothing'}; going on")
            return
        requeued = requeue_path(trainer.default_root_dir)
        # The checkpoint goes into the run's folder, by which a requeued job finds its run.
        path = requeued if last is None else last.with_name(STOPPED)
        if saved is None and path is not None:
            _save(trainer, path)
            if trainer.is_global_zero and requeued not in (None, path):
                link_to(requeued, path)
        self._saved = saved or path
        problem = put_back() if requeue and trainer.is_global_zero else ""
        trainer.strategy.barrier()
        if problem:
            assert self._saved is not None  # a SLURM job always has a requeue path to save to
            raise TrainingError(
                f"The job cannot be requeued ({problem}); go on with: {resume_command(self._saved)}"
            )
        raise Stopped(0 if requeue else _code(trainer, stop or signal.SIGTERM))

    def _stop_late(self, trainer: Trainer) -> None:
        """Save and stop within the epoch, since the run's time is up; a SLURM job is then done."""
        last = last_checkpoint(trainer)
        assert last is not None
        self._saved, self._is_late = last.with_name(STOPPED), True
        _save(trainer, self._saved)
        self.on_fit_end(trainer, trainer.lightning_module)
        trainer.strategy.barrier()
        raise Stopped(0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the requeue path of a SLURM job whose run has come to its end."""
        path = requeue_path(trainer.default_root_dir)
        if path is not None and trainer.is_global_zero:
            # The checkpoint of a run whose time is up stays, since the user may go on from it.
            if path.resolve() != self._saved:
                remove_stopped(path.resolve())
            path.unlink(missing_ok=True)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop on SIGTERM, as Lightning itself does between the batches of all other loops."""
        progress: Any = trainer.predict_loop.batch_progress
        if trainer.received_sigterm and not progress.is_last_batch:
            raise SIGTERMException

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Report in one sentence that the run was stopped, and the command to go on with.

        If another process was lost, the message refers to the error of that process for the cause.
        """
        if is_lost_process(exception):
            exception.__cause__ = TrainingError(
                "Another process of the run has ended or does not answer, and this process cannot "
                "go on alone; see the error message of the other process; "
                f"{_resume_or_start_again(trainer)}"
            )
            return
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + signal.SIGTERM
        elif not isinstance(exception, Stopped | KeyboardInterrupt):
            return
        if not trainer.is_global_zero:
            return
        is_interrupt = isinstance(exception, KeyboardInterrupt)
        if trainer.state.fn != TrainerFn.FITTING:
            if not is_interrupt:
                _say("gpd: stopped")
            return
        text = f"stopped at step {trainer.global_step}; {self._what_is_left(trainer, exception)}"
        if is_interrupt:
            exception.add_note(text)  # the command line prints this note when the run has ended
        else:
            _say(f"gpd: {text}")

    def _what_is_left(self, trainer: Trainer, exception: BaseException) -> str:
        """What a run that was stopped has saved, and the command that goes on from there.

        Args:
            trainer: trainer of the run.
            exception: the exception that ends the run.
        """
        path, job = self._saved, slurm_job()
        if path is None:
            return _what_was_saved_before(trainer)
        saved = f"saved as {short_path(path)}"
        if self._is_late:
            return (
                f"the time of --trainer.max_time is up; {saved}; go on with: "
                f"{resume_command(path)} --trainer.max_time DAYS:HH:MM:SS (in all)"
            )
        if job is None:
            return f"{saved}; go on with: {resume_command(path)}"
        if isinstance(exception, Stopped) and exception.code:
            return f"{saved}, from which the job goes on when it is requeued"
        return f"{saved}, and job {job} is requeued"

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


def _skip(trainer: Trainer, batches: int) -> None:
    """Leave out the batches of the epoch that a resumed run has seen.

    Args:
        trainer: trainer of the run.
        batches: number of batches.
    """
    loop = trainer.fit_loop
    loaders = loop._combined_loader.flattened  # type: ignore[union-attr]
    # All of them have to skip, so the results are collected first.
    begin_anew = [skip_once(loader, batches) for loader in loaders]
    if any(begin_anew):
        # Lightning has begun to read already, and would go on with what it reads. Workers read as
        # soon as a pass begins, and so have to know the epoch, which Lightning tells samplers
        # later. To begin anew draws from random generators whose states have been restored.
        progress: Any = loop.epoch_progress.current
        for loader in loaders:
            _set_sampler_epoch(loader, progress.processed)
        with states_kept(), torch.random.fork_rng(devices=[]):
            iter(loop._data_fetcher)  # type: ignore[arg-type]


def _resume_or_start_again(trainer: Trainer) -> str:
    """The advice to go on from ``last.ckpt``, or to start again if there is none."""
    last = written_checkpoint(trainer)
    return "start the run again" if last is None else f"go on with: {resume_command(last)}"


def _what_was_saved_before(trainer: Trainer) -> str:
    """What a run has saved that was stopped at once, and the command that goes on from there."""
    if (written := written_checkpoint(trainer)) is not None:
        return f"last saved as {short_path(written)}; go on with: {resume_command(written)}"
    last, began = last_checkpoint(trainer), trainer.ckpt_path
    if last is not None and began:
        config = last.parent.parent / CONFIGURATION
        return f"nothing new has been saved; go on with: {restart_command(config, Path(began))}"
    return "nothing has been saved, and there is nothing to go on from"


def _code(trainer: Trainer, signum: int) -> int:
    """The exit code of a process that has saved and stops on a signal.

    It is 0 in processes started by torchrun or Lightning, which take any other code for a failure:
    torchrun prints a traceback or restarts the processes from the beginning; Lightning kills the
    other processes.
    """
    # SLURM starts the processes of a job itself, and waits for all of them.
    launched = trainer.strategy.launcher is not None and slurm_job() is None
    launched = launched and not trainer.is_global_zero
    return 0 if launched or TorchElasticEnvironment.detect() else 128 + signum


def _say(text: str) -> None:
    """Write a line to standard error, safely in signal handlers and if the stream is closed."""
    with suppress(OSError, ValueError):
        try:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
        except RuntimeError:  # the signal interrupted another write to the same stream
            os.write(2, f"\n{text}\n".encode())


def _leave_terminal() -> None:
    """Redirect output from a closed terminal to the null device, since writing would fail."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        if os.isatty(descriptor):
            os.dup2(nowhere, descriptor)


def _is_late(trainer: Trainer) -> bool:
    """Whether the run has to stop within an epoch because its time is up, and can be saved."""
    loop = trainer.fit_loop
    if not (trainer.should_stop and loop._can_stop_early) or loop.epoch_loop._is_training_done:
        return False
    timers = [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined] # set by its connector
        if isinstance(callback, Timer)
    ]
    if not timers or last_checkpoint(trainer) is None:
        return False
    # All processes follow the clock of the first process.
    late = any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers)
    return bool(trainer.strategy.broadcast(late))


def _save(trainer: Trainer, path: Path) -> None:
    """Write a checkpoint beside the path, and then move it there.

    So the previous checkpoint stays until the new one is complete. If the path is a link to
    ``last.ckpt``, the link is replaced and ``last.ckpt`` stays.
    """
    temporary = path.with_name(f".{path.name}")
    trainer.save_checkpoint(temporary)
    if trainer.is_global_zero:
        temporary.replace(path)


def _just_saved(trainer: Trainer, callback: Any) -> bool:
    return getattr(callback, "_last_global_step_saved", None) == trainer.global_step
