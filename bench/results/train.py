"""Train one run of a table through the command ``gpd``, from wherever it was stopped."""

from __future__ import annotations

import contextlib
import csv
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from bench.results.records import Record, Run
from bench.results.table import LEARNING_RATE, Row, Table, option_list

_LIBRARIES = ("gpd-cli", "torch", "torchvision", "lightning", "timm")
_DATA = "DATA"  # what stands for the folder of the data in records, which is another one elsewhere


class RunError(Exception):
    """A run that failed; the message names its log."""


@dataclass(frozen=True)
class Trainer:
    """Trains runs of a table.

    Args:
        table: whose runs they are.
        work: folder for checkpoints and logs, kept until all is done.
        data_root: ``--data.root`` on this machine; None where the table's configuration has it.
        extra: options of this machine for every run, such as the accelerator.
        threads: threads of each process.
    """

    table: Table
    work: Path
    data_root: str | None = None
    extra: tuple[str, ...] = ()
    threads: int = 1
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set, init=False)

    def train(self, run: Run) -> Record:
        """Train a run to its end, test it once, and sum it up.

        Args:
            run: with its learning rate.

        Raises:
            RunError: when a command fails.
        """
        row = self.table.rows[run.row]
        folder = self.work / run.row / run.name
        options = self.options(row, run)
        for key in row.files.values():
            self._extract(self.student_file(self.table.rows[key], run.seed))
        seconds = folder / "seconds"
        if not seconds.is_file():
            seconds.write_text(str(self._fit(folder, options)))
        return self._summarize(run, options, _attempts(folder), float(seconds.read_text()))

    def _fit(self, folder: Path, options: Sequence[str]) -> float:
        """Train to the end, from the newest checkpoint of earlier attempts.

        Args:
            folder: of the run; each attempt has one in it.
            options: of ``gpd fit``.

        Returns:
            Seconds of the whole run: those of this attempt, scaled to all epochs, for what a killed
            one took is not known.
        """
        attempts = _attempts(folder)
        checkpoint = _newest_checkpoint(attempts)
        if checkpoint is not None and _is_finished(checkpoint):
            checkpoint = None  # killed before its time was written down: so it has to be done anew
        attempt = folder / f"attempt_{len(attempts)}"
        where = {"save_dir": str(folder.parent), "name": folder.name, "version": attempt.name}
        logger = [f"--trainer.logger.init_args.{name}={value}" for name, value in where.items()]
        resume = [] if checkpoint is None else [f"--ckpt_path={checkpoint}"]
        before = 0 if checkpoint is None else len(_history(checkpoint))
        seconds = self._gpd(["fit", *options, *self._here(), *logger, *resume], attempt)
        after = len(_history(attempt / "checkpoints" / "last.ckpt"))
        return seconds * after / (after - before)

    def stop(self) -> None:
        """Let running processes save what they have and end."""
        for process in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)

    def options(self, row: Row, run: Run) -> list[str]:
        """The options of ``gpd fit`` that make a run, without those of this machine.

        Args:
            row: what is trained.
            run: how: seed, learning rate, whether for tuning.
        """
        settings = {**self.table.settings, **row.settings}
        if run.tuning:
            settings |= self.table.tuning.settings
        settings |= {LEARNING_RATE: run.rate, "seed_everything": run.seed}
        for option, key in row.files.items():
            settings[option] = str(self.student_file(self.table.rows[key], run.seed))
        return ["-c", self.table.config, *option_list(settings)]

    def student_file(self, row: Row, seed: int) -> Path:
        """Where the extracted student of a row is: that of a seed, or of the row's first.

        Args:
            row: whose student.
            seed: wanted.
        """
        seeds = self.table.seeds_of(row)
        run = str(seed if seed in seeds else seeds[0])
        return self.work / row.key / run / "student.safetensors"

    def _extract(self, output: Path) -> None:
        """Extract the student of a run that has been trained into the run's folder.

        Raises:
            RunError: when its checkpoints are not here, or the command fails.
        """
        if not output.is_file():
            best = _best_checkpoint(_attempts(output.parent))
            command = ["extract", f"--ckpt_path={best}", f"--output={output}"]
            self._gpd(command, output.parent / "extract")

    def _summarize(
        self, run: Run, options: Sequence[str], attempts: Sequence[Path], seconds: float
    ) -> Record:
        last = attempts[-1]
        config = yaml.safe_load((last / "config.yaml").read_text())
        record = {
            "command": shlex.join(["gpd", "fit", *options, *self._root(_DATA)]),
            "config": _portable(config, self.data_root),
            "learning_rate": run.rate,
            "seed": run.seed,
            "seconds": round(seconds, 1),
            "epochs": _curves(_history(last / "checkpoints" / "last.ckpt")),
            "versions": {name: version(name).partition("+")[0] for name in _LIBRARIES},
            "hardware": _hardware(self.threads),
        }
        if not run.tuning:
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

    def _root(self, shown: str | None = None) -> list[str]:
        """The option that says where the data is; `shown` stands for it in records."""
        return [] if self.data_root is None else [f"--data.root={shown or self.data_root}"]

    def _here(self) -> list[str]:
        """Options of this machine."""
        return [*self._root(), *self.extra]

    def _gpd(self, arguments: Sequence[str], folder: Path) -> float:
        """Run a command to its end.

        Args:
            arguments: of ``gpd``.
            folder: where its output goes, into ``log.txt``.

        Returns:
            Processor seconds on a CPU, where other work may slow the clock; else wall seconds.

        Raises:
            RunError: when it fails.
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
            )
            self._running.add(process)
            _, status, usage = os.wait4(process.pid, 0)
            self._running.discard(process)
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            lines = log.read_text().strip().splitlines() or [""]
            raise RunError(f"gpd {arguments[0]} ended with {code}: {lines[-1]} (see {log})")
        return _seconds(usage, time.monotonic() - start)


def _seconds(usage: resource.struct_rusage, wall: float) -> float:
    import torch

    return wall if torch.cuda.is_available() else usage.ru_utime + usage.ru_stime


def _hardware(threads: int) -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "clock": "wall"}
    return {"device": _processor(), "threads": threads, "clock": "processor"}


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
    """The newest whole checkpoint to go on from."""
    names = ("last.ckpt", "stopped.ckpt")
    paths = [attempt / "checkpoints" / name for attempt in attempts for name in names]
    whole = [path for path in paths if path.is_file() and zipfile.is_zipfile(path)]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)


def _best_checkpoint(attempts: Sequence[Path]) -> Path:
    """``best.ckpt`` of the attempt that had the best epoch; each has that of its own epochs."""
    paths = [attempt / "checkpoints" / "best.ckpt" for attempt in attempts]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise RunError("There is no best.ckpt to go on from; train the row that it is of first.")
    history = _history(attempts[-1] / "checkpoints" / "last.ckpt")
    return max(found, key=lambda path: history[_load(path)["epoch"]]["val/student_top1"])


def _load(checkpoint: Path) -> dict[str, Any]:
    import torch

    return torch.load(checkpoint, map_location="cpu", weights_only=True)


def _history(checkpoint: Path) -> dict[int, dict[str, float]]:
    """Accuracies of all epochs up to a checkpoint's, in percent, by epoch and name."""
    return _load(checkpoint)["callbacks"]["GapHistory"]["epochs"]


def _is_finished(checkpoint: Path) -> bool:
    config = yaml.safe_load((checkpoint.parents[1] / "config.yaml").read_text())
    return len(_history(checkpoint)) >= config["trainer"]["max_epochs"]


def _curves(history: Mapping[int, Mapping[str, float]]) -> dict[str, list[float]]:
    """A value for each epoch, by name."""
    epochs = [history[epoch] for epoch in sorted(history)]
    return {name: [round(epoch[name], 4) for epoch in epochs] for name in epochs[-1]}


def _rows(folder: Path) -> list[dict[str, str]]:
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def _portable(config: Mapping[str, Any], root: str | None) -> dict[str, Any]:
    """Model, data and trainer of a configuration, without what is another on other machines."""
    kept = {name: dict(config[name]) for name in ("model", "data", "trainer")}
    if root is not None:
        kept["data"]["root"] = _DATA
    for name in ("logger", "callbacks", "default_root_dir"):
        kept["trainer"].pop(name, None)
    return {"seed_everything": config.get("seed_everything"), **_without_nulls(kept)}


def _without_nulls(value: Any) -> Any:
    """Without options that were left at null, which says nothing."""
    if not isinstance(value, Mapping):
        return value
    return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
