"""Train one run of a table by the command ``gpd``, continuing where it was stopped."""

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
# Of a run that has ended, or was stopped and saved what it had.
_NOTHING_LOST = (0, *(128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)))


class RunError(Exception):
    """A run that failed; the message names its log."""


@dataclass(frozen=True)
class Trainer:
    """Trains runs of a table.

    Args:
        records: the records of the table.
        data_root: ``--data.root`` on this machine; None if the table's configuration has it.
        extra: options of this machine for every run, such as the accelerator.
        threads: number of threads of each process.
    """

    records: Records
    data_root: str | None = None
    extra: tuple[str, ...] = ()
    threads: int = 1
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set, init=False)

    def train(self, run: Run) -> Record:
        """Train a run to its end, test it once if its table compares tests, and make its record.

        Args:
            run: a run whose learning rate is known.

        Raises:
            RunError: when a command fails.
        """
        self._fit(run)
        return self._summarize(run)

    def stop(self) -> None:
        """Let running processes save a checkpoint and end."""
        for process in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)

    def _fit(self, run: Run) -> None:
        """Train to the end, from the newest checkpoint of earlier attempts, if there are any.

        Args:
            run: the run; nothing is done if its checkpoints are on this machine.

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
            # Of the code that trains: the record may be made later, by another one.
            code = {"commit": code_commit(), "versions": _versions()}
            write_text(attempt / _CODE, json.dumps(code))
            self._gpd(["fit", *options, *self._here(), *logger, *resume], attempt)
        write_text(folder / _FINISHED, "")

    def _extract(self, run: Run) -> None:
        """Extract the student of a run; without checkpoints on this machine, train the run first.

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
            "seconds": _seconds(attempts, "wall" if on_gpu else "processor"),
            "attempts": len(attempts),
            "epochs": _curves(_history(last / "checkpoints" / "last.ckpt")),
            **_trained_by(attempts),
            "hardware": hardware,
        }
        if self.records.is_tested(run):
            record["test"] = self._test(_best_checkpoint(attempts), last / "test")
        return record

    def _test(self, checkpoint: Path, folder: Path) -> dict[str, float]:
        """Accuracies on the test images, in percent, by network."""
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
        """Options of this machine."""
        root = [] if self.data_root is None else [f"--data.root={self.data_root}"]
        return [*root, *self.extra]

    def _gpd(self, arguments: Sequence[str], folder: Path) -> None:
        """Run a command to its end, and write how long it took, unless work may have been lost.

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
                close_fds=False,  # the run inherits the lock, see `only_one`
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
    """Lock a table, so that one command at a time trains it.

    Args:
        table: the table to train.

    Raises:
        TableError: when another command trains the table, or a run of a killed command still does.
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
        The commit, with ``+`` if the program or its configurations differ from it; None without git
        or outside a checkout.
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
    """Seconds of all attempts together; None if one was killed, whose time is unknown.

    Attempts that left nothing to resume from do not count: the next one began where they had.
    """
    paths = [attempt / _SECONDS for attempt in attempts if any(_checkpoints(attempt))]
    if not all(path.is_file() for path in paths):
        return None
    return round(sum(json.loads(path.read_text())[clock] for path in paths), 1)


def _trained_by(attempts: Sequence[Path]) -> dict[str, Any]:
    """The code that trained, which may be another than that which makes the record.

    Returns:
        ``versions`` of the latest attempt, and ``commit``: None where it is not known, several in
        order where attempts had different ones.
    """
    paths = [attempt / _CODE for attempt in attempts if any(_checkpoints(attempt))]
    found = [json.loads(path.read_text()) if path.is_file() else {} for path in paths]
    commits = list(dict.fromkeys(code.get("commit") or "unknown" for code in found))
    return {
        "versions": found[-1].get("versions", {}),
        "commit": None if commits == ["unknown"] else ", ".join(commits),
    }


def _versions() -> dict[str, str]:
    return {name: version(name).partition("+")[0] for name in _LIBRARIES}


def _processes(attempt: Path) -> int:
    """How many processes trained together, by what the run has written of its start."""
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
    """The folders of a run's attempts, in the order in which they were begun."""
    return sorted(folder.glob("attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))


def _newest_checkpoint(attempts: Sequence[Path]) -> Path | None:
    """The newest complete checkpoint to resume from."""
    whole = [path for attempt in attempts for path in _checkpoints(attempt)]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)


def _checkpoints(attempt: Path) -> list[Path]:
    """The complete checkpoints of an attempt to resume from."""
    paths = [attempt / "checkpoints" / name for name in _TO_RESUME]
    return [path for path in paths if path.is_file() and zipfile.is_zipfile(path)]


def _best_checkpoint(attempts: Sequence[Path]) -> Path:
    """``best.ckpt`` of the attempt with the best epoch; each attempt has one of its own epochs."""
    paths = [attempt / "checkpoints" / "best.ckpt" for attempt in attempts]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise RunError("There is no best.ckpt to go on from; train the row that it is of first.")
    history = _history(attempts[-1] / "checkpoints" / "last.ckpt")
    return max(found, key=lambda path: history[_load(path)["epoch"]]["val/student_top1"])


def _load(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint, map_location="cpu", weights_only=True)


def _history(checkpoint: Path) -> dict[int, dict[str, float]]:
    """Accuracies of all epochs up to a checkpoint's, in percent, by epoch and name."""
    return _load(checkpoint)["callbacks"]["GapHistory"]["epochs"]


def _is_finished(checkpoint: Path) -> bool:
    config = yaml.safe_load((checkpoint.parents[1] / "config.yaml").read_text())
    return len(_history(checkpoint)) >= config["trainer"]["max_epochs"]


def _curves(history: Mapping[int, Mapping[str, float]]) -> dict[str, list[float]]:
    """Lists with a value for each epoch, by name."""
    epochs = [history[epoch] for epoch in sorted(history)]
    return {name: [round(epoch[name], 4) for epoch in epochs] for name in epochs[-1]}


def _rows(folder: Path) -> list[dict[str, str]]:
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def _portable(config: Mapping[str, Any], root: str | None) -> dict[str, Any]:
    """Model, data and trainer of a configuration, without settings that depend on the machine."""
    kept = {name: dict(config[name]) for name in ("model", "data", "trainer")}
    if root is not None:
        kept["data"]["init_args"]["root"] = DATA
    for name in ("logger", "callbacks", "default_root_dir"):
        kept["trainer"].pop(name, None)
    return {"seed_everything": config.get("seed_everything"), **_without_nulls(kept)}


def _without_nulls(value: Any) -> Any:
    """A configuration without options that are null."""
    if not isinstance(value, Mapping):
        return value
    return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
