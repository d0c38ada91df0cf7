"""Training of a run of a table by the command ``gpd``, resuming it if it was stopped."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from bench.results.attempts import (
    TIME,
    attempts_of,
    best_checkpoint,
    checkpoints,
    curves,
    has_every_epoch,
    newest_checkpoint,
    seconds,
)
from bench.results.provenance import hardware, on_gpu, portable, trained_by
from bench.results.records import DATA_OPTION, STUDENT, Record, Records, Run, write_text
from gpd_cli.cli.failures import DIVERGED
from gpd_cli.run_folder import BEST, CONFIGURATION, METRICS

_FINISHED = "finished"  # name of the file that marks a run as trained to its end
# Exit codes of a run that has ended, or has been stopped and has saved a checkpoint.
_NOTHING_LOST = (0, *(128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)))


class RunError(Exception):
    """Raised when a run has failed; the message names the run's log."""


class DivergedRunError(RunError):
    """Raised when a run has ended because its loss or weights became NaN or infinite."""


@dataclass(frozen=True)
class Trainer:
    """Trains runs of a table.

    Args:
        records: the records of the table.
        data_root: value of ``--data.root`` on this machine; None if the table's configuration has
            it.
        extra: options for every run on this machine, such as the accelerator.
        threads: number of threads of each process.
    """

    records: Records
    data_root: str | None = None
    extra: tuple[str, ...] = ()
    threads: int = 1
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set, init=False)

    def train(self, run: Run) -> Record:
        """Train a run to its end, test it if the table's metric is ``test``, and make its record.

        Args:
            run: a run whose learning rate is known.

        Returns:
            The record. A tuning run whose numbers became NaN or infinite has one as well, which
            says so, since this decides against the run's learning rate.

        Raises:
            RunError: when a command fails.
        """
        self._make_sources(run)
        try:
            self._fit(run)
        except DivergedRunError:
            if not run.tuning:
                raise
            return self._origin(run) | {"diverged": True}
        return self._summarize(run)

    def stop(self) -> None:
        """Tell running processes to save a checkpoint and end."""
        for process in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)

    def _fit(self, run: Run) -> None:
        """Train a run to its end, from the newest checkpoint of earlier attempts if there are any.

        Args:
            run: the run, whose sources have been made; nothing is done if it has been trained to
                its end on this machine.

        Raises:
            RunError: when the command fails.
        """
        folder = self.records.work(run)
        if (folder / _FINISHED).is_file():
            return
        attempts = attempts_of(folder)
        checkpoint = newest_checkpoint(attempts)
        if checkpoint is None or not has_every_epoch(checkpoint):
            attempt = folder / f"attempt_{len(attempts)}"
            where = {"save_dir": folder.parent, "name": folder.name, "version": attempt.name}
            logger = [f"--trainer.logger.init_args.{name}={value}" for name, value in where.items()]
            resume = [] if checkpoint is None else [f"--ckpt_path={checkpoint}"]
            self._gpd(["fit", *self.records.options(run), *self._here(), *logger, *resume], attempt)
        write_text(folder / _FINISHED, "")

    def _make_sources(self, run: Run) -> None:
        """Extract the students that a run starts or learns from, where this machine lacks them.

        Raises:
            RunError: when a command fails.
        """
        rows = self.records.table.rows
        for key in rows[run.row].files.values():
            self._extract(self.records.source(rows[key], run.seed))

    def _extract(self, run: Run) -> None:
        """Extract the student of a run, training the run first if it is not on this machine.

        Raises:
            RunError: when a command fails.
        """
        folder = self.records.work(run)
        if not (folder / STUDENT).is_file():
            self._make_sources(run)
            self._fit(run)
            command = ["extract", f"--ckpt_path={_best(folder)}", f"--output={folder / STUDENT}"]
            self._gpd(command, folder / "extract")

    def _summarize(self, run: Run) -> Record:
        folder = self.records.work(run)
        attempts = attempts_of(folder)
        record = {**self._origin(run), "epochs": curves(attempts[-1])}
        if self.records.is_tested(run):
            record["test"] = self._test(_best(folder), attempts[-1] / "test")
        return record

    def _origin(self, run: Run) -> Record:
        """The part of a record that says how the run was made."""
        attempts = attempts_of(self.records.work(run))
        last = attempts[-1]
        # The next attempt began at the same point as one that left no checkpoint.
        kept = [attempt for attempt in attempts if any(checkpoints(attempt))] or [last]
        config = yaml.safe_load((last / CONFIGURATION).read_text())
        found, is_one = hardware(kept, config, self.threads)
        clock = "wall" if on_gpu(config) else "processor"
        root = [] if self.data_root is None else [DATA_OPTION]
        return {
            "command": shlex.join(["gpd", "fit", *self.records.options(run), *root]),
            "config": portable(config, self.data_root),
            "learning_rate": run.rate,
            "seed": run.seed,
            "seconds": seconds(kept, clock) if is_one else None,
            "attempts": len(attempts),
            **trained_by(kept),
            "hardware": found,
        }

    def _test(self, checkpoint: Path, folder: Path) -> dict[str, float]:
        """Test a checkpoint, and return the accuracies in percent by name (``student_top1``).

        Args:
            checkpoint: path of the checkpoint.
            folder: folder for log and scores.
        """
        where = {"save_dir": str(folder.parent), "name": folder.name, "version": "scores"}
        logger = ["--trainer.logger=CSVLogger"]
        logger += [f"--trainer.logger.init_args.{name}={value}" for name, value in where.items()]
        self._gpd(["test", f"--ckpt_path={checkpoint}", *self._here(), *logger], folder)
        scores = _rows(folder / "scores")[-1]
        return {
            name.removeprefix("test/"): round(float(scores[name]), 4)
            for name in ("test/student_top1", "test/teacher_top1")
            if scores.get(name)
        }

    def _here(self) -> list[str]:
        """The options that depend on this machine."""
        root = [] if self.data_root is None else [f"--data.root={self.data_root}"]
        return [*root, *self.extra]

    def _gpd(self, arguments: Sequence[str], folder: Path) -> None:
        """Run a command of ``gpd`` to its end, and write its time to a file.

        The time is not written if the command was killed, since it may then have lost work.

        Args:
            arguments: arguments of ``gpd``.
            folder: folder for the command's output (``log.txt``) and its time.

        Raises:
            RunError: when the command fails.
        """
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        log, start = folder / "log.txt", time.monotonic()
        with log.open("a") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "gpd_cli", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                close_fds=False,  # so that the process inherits the lock of `only_one`
            )
            self._running.add(process)
            _, status, usage = os.wait4(process.pid, 0)
            code = process.returncode = os.waitstatus_to_exitcode(status)
            self._running.discard(process)
        taken = {"processor": usage.ru_utime + usage.ru_stime, "wall": time.monotonic() - start}
        if code in _NOTHING_LOST:
            write_text(folder / TIME, json.dumps(taken))
        if code != 0:
            lines = log.read_text().strip().splitlines() or [""]
            kind = DivergedRunError if code == DIVERGED else RunError
            raise kind(f"gpd {arguments[0]} ended with {code}: {lines[-1]} (see {log})")


def _best(folder: Path) -> Path:
    """The best checkpoint of a run.

    Args:
        folder: folder of the run.

    Raises:
        RunError: when there is none.
    """
    best = best_checkpoint(attempts_of(folder))
    if best is None:
        raise RunError(f"{folder} has no {BEST}; delete the folder to train this run again.")
    return best


def _rows(folder: Path) -> list[dict[str, str]]:
    path = folder / METRICS
    if not path.is_file():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))
