"""Training of a run of a table by the command ``gpd``, resuming it if it was stopped."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.results.records import DATA, DATA_OPTION, STUDENT, WORK, Record, Records, Run, write_text
from bench.results.table import Table, TableError
from gpd_cli.cli.environment import ENVIRONMENT

_LIBRARIES = ("gpd-cli", "torch", "torchvision", "lightning", "timm")
_FINISHED, _SECONDS, _CODE = "finished", "seconds.json", "code.json"
_TO_RESUME = ("last.ckpt", "stopped.ckpt")
# Exit codes of a run that has ended, or has been stopped and has saved a checkpoint.
_NOTHING_LOST = (0, *(128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)))


class RunError(Exception):
    """Raised when a run has failed; the message names the run's log."""


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
            The record.

        Raises:
            RunError: when a command fails.
        """
        self._fit(run)
        return self._summarize(run)

    def stop(self) -> None:
        """Tell running processes to save a checkpoint and end."""
        for process in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)

    def _fit(self, run: Run) -> None:
        """Train a run to its end, from the newest checkpoint of earlier attempts if there are any.

        Args:
            run: the run; nothing is done if it has been trained to its end on this machine.

        Raises:
            RunError: when the command fails.
        """
        folder = self.records.work(run)
        if (folder / _FINISHED).is_file():
            return
        row = self.records.table.rows[run.row]
        for key in row.files.values():
            self._extract(self.records.source(self.records.table.rows[key], run.seed))
        attempts = _attempts(folder)
        checkpoint = _newest_checkpoint(attempts)
        if checkpoint is None or not _is_finished(checkpoint):
            attempt = folder / f"attempt_{len(attempts)}"
            where = {"save_dir": folder.parent, "name": folder.name, "version": attempt.name}
            logger = [f"--trainer.logger.init_args.{name}={value}" for name, value in where.items()]
            resume = [] if checkpoint is None else [f"--ckpt_path={checkpoint}"]
            options = self.records.options(run)
            # The version of the code that trains, since the record may be made later by another.
            code = {"commit": code_commit(), "versions": _versions()}
            write_text(attempt / _CODE, json.dumps(code))
            self._gpd(["fit", *options, *self._here(), *logger, *resume], attempt)
        write_text(folder / _FINISHED, "")

    def _extract(self, run: Run) -> None:
        """Extract the student of a run, training the run first if it is not on this machine.

        Raises:
            RunError: when a command fails.
        """
        folder = self.records.work(run)
        if not (folder / STUDENT).is_file():
            self._fit(run)
            best = _best_checkpoint(_attempts(folder))
            command = ["extract", f"--ckpt_path={best}", f"--output={folder / STUDENT}"]
            self._gpd(command, folder / "extract")

    def _summarize(self, run: Run) -> Record:
        attempts = _attempts(self.records.work(run))
        last = attempts[-1]
        # The next attempt began at the same point as one that left no checkpoint.
        kept = [attempt for attempt in attempts if any(_checkpoints(attempt))]
        config = yaml.safe_load((last / "config.yaml").read_text())
        on_gpu = config["trainer"]["accelerator"] != "cpu" and torch.cuda.is_available()
        hardware = _gpu() if on_gpu else {"device": _processor(), "threads": self.threads}
        if (processes := _processes(last)) > 1:
            hardware["processes"] = processes
        root = [] if self.data_root is None else [DATA_OPTION]
        record = {
            "command": shlex.join(["gpd", "fit", *self.records.options(run), *root]),
            "config": _portable(config, self.data_root),
            "learning_rate": run.rate,
            "seed": run.seed,
            "seconds": _seconds(kept, "wall" if on_gpu else "processor"),
            "attempts": len(attempts),
            "epochs": _curves(_history(last / "checkpoints" / "last.ckpt")),
            **_trained_by(kept),
            "hardware": hardware,
        }
        if self.records.is_tested(run):
            record["test"] = self._test(_best_checkpoint(attempts), last / "test")
        return record

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
        seconds = {"processor": usage.ru_utime + usage.ru_stime, "wall": time.monotonic() - start}
        if code in _NOTHING_LOST:
            write_text(folder / _SECONDS, json.dumps(seconds))
        if code != 0:
            lines = log.read_text().strip().splitlines() or [""]
            raise RunError(f"gpd {arguments[0]} ended with {code}: {lines[-1]} (see {log})")


@contextlib.contextmanager
def only_one(table: Table) -> Iterator[None]:
    """Lock a table within this context, so that only one command at a time trains the table.

    Args:
        table: the table to train.

    Raises:
        TableError: when the table is being trained by another command, or by a run that a killed
            command has left behind.
    """
    lock = WORK / table.name / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TableError(
                f"{table.name} is being trained by another command, or by a run that a killed one "
                f"left behind (fuser {lock} shows which); wait for it, or end it."
            ) from error
        yield


def code_commit(root: Path = Path()) -> str | None:
    """The commit of the code in a checkout.

    Args:
        root: folder of the checkout.

    Returns:
        The commit, followed by ``+`` if ``src`` or ``configs`` have uncommitted changes; None
        without Git or outside a checkout.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src", "configs")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _seconds(attempts: Sequence[Path], clock: str) -> float | None:
    """The time of all attempts together, in seconds; None if an attempt was killed.

    The time of a killed attempt is not known.

    Args:
        attempts: folders of the attempts that trained a part of the run.
        clock: ``wall`` for wall-clock time, ``processor`` for CPU time.
    """
    paths = [attempt / _SECONDS for attempt in attempts]
    if not all(path.is_file() for path in paths):
        return None
    return round(sum(json.loads(path.read_text())[clock] for path in paths), 1)


def _trained_by(attempts: Sequence[Path]) -> dict[str, Any]:
    """The version of the code that trained, which may differ from the code that makes the record.

    Args:
        attempts: folders of the attempts that trained a part of the run.

    Returns:
        ``versions`` of libraries in the latest attempt, and ``commit``: None if it is not known;
        all commits in order if attempts had different ones.
    """
    paths = [attempt / _CODE for attempt in attempts]
    found = [json.loads(path.read_text()) if path.is_file() else {} for path in paths]
    commits = list(dict.fromkeys(code.get("commit") or "unknown" for code in found))
    return {
        "versions": found[-1].get("versions", {}),
        "commit": None if commits == ["unknown"] else ", ".join(commits),
    }


def _versions() -> dict[str, str]:
    return {name: version(name).partition("+")[0] for name in _LIBRARIES}


def _processes(attempt: Path) -> int:
    """The number of processes that trained together, as the run has recorded at its start."""
    path = attempt / ENVIRONMENT
    return int(json.loads(path.read_text())[-1]["processes"]) if path.is_file() else 1


def _gpu() -> dict[str, Any]:
    return {"device": torch.cuda.get_device_name()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "CPU")


def _attempts(folder: Path) -> list[Path]:
    """The folders of a run's attempts, in the order in which the attempts were begun."""
    return sorted(folder.glob("attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))


def _newest_checkpoint(attempts: Sequence[Path]) -> Path | None:
    """The newest complete checkpoint that training can be resumed from; None without any."""
    whole = [path for attempt in attempts for path in _checkpoints(attempt)]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)


def _checkpoints(attempt: Path) -> list[Path]:
    """The complete checkpoints of an attempt that training can be resumed from."""
    paths = [attempt / "checkpoints" / name for name in _TO_RESUME]
    return [path for path in paths if path.is_file() and zipfile.is_zipfile(path)]


def _best_checkpoint(attempts: Sequence[Path]) -> Path:
    """The best ``best.ckpt`` of all attempts; each attempt's file is the best of its own epochs.

    Raises:
        RunError: when there is no such file.
    """
    paths = [attempt / "checkpoints" / "best.ckpt" for attempt in attempts]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise RunError("There is no best.ckpt to go on from; train the row that it is of first.")
    history = _history(attempts[-1] / "checkpoints" / "last.ckpt")
    return max(found, key=lambda path: history[_load(path)["epoch"]]["val/student_top1"])


def _load(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint, map_location="cpu", weights_only=True)


def _history(checkpoint: Path) -> dict[int, dict[str, float]]:
    """Accuracies in percent, by epoch and name, of all epochs up to that of a checkpoint."""
    return _load(checkpoint)["callbacks"]["GapHistory"]["epochs"]


def _is_finished(checkpoint: Path) -> bool:
    config = yaml.safe_load((checkpoint.parents[1] / "config.yaml").read_text())
    return len(_history(checkpoint)) >= config["trainer"]["max_epochs"]


def _curves(history: Mapping[int, Mapping[str, float]]) -> dict[str, list[float]]:
    """By name of a value, the list of its values in all epochs."""
    epochs = [history[epoch] for epoch in sorted(history)]
    return {name: [round(epoch[name], 4) for epoch in epochs] for name in epochs[-1]}


def _rows(folder: Path) -> list[dict[str, str]]:
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def _portable(config: Mapping[str, Any], root: str | None) -> dict[str, Any]:
    """Settings of model, data and trainer, without those that depend on the machine.

    Args:
        config: configuration of a run.
        root: folder of the data on this machine, which is replaced by `DATA`; None if the table's
            configuration names the folder.
    """
    kept = {name: dict(config[name]) for name in ("model", "data", "trainer")}
    if root is not None:
        kept["data"]["init_args"]["root"] = DATA
    for name in ("logger", "callbacks", "default_root_dir"):
        kept["trainer"].pop(name, None)
    return {"seed_everything": config.get("seed_everything"), **_without_nulls(kept)}


def _without_nulls(value: Any) -> Any:
    """Remove options that are null from a configuration, at all levels."""
    if not isinstance(value, Mapping):
        return value
    return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
