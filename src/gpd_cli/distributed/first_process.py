"""What the first process of a run finds out, and the others receive instead of finding it again.

The networks are built before DistributedDataParallel connects the processes, so that they meet
elsewhere: under torchrun in the store of its agent, under SLURM in a store of the first process.
Lightning starts its processes when the first one has built its networks; they read a file.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment

from gpd_cli.distributed.cluster import slurm_environment, slurm_job
from gpd_cli.errors import TrainingError

Values = Mapping[str, Any]
"""Numbers, strings, lists and dictionaries (JSON)."""

FOUND = "GPD_FOUND"
"""The environment variable with the path of a file, for processes that Lightning starts."""
_KEY = "found"
_READ = "read"
_BESIDE = 10_000  # from Lightning's port under SLURM, 15,000 to 24,999, to ours
_LAST_PORT = 65_535
_PAUSE = 0.05  # seconds between two looks
_MEETING = timedelta(minutes=30)  # as long as torch lets processes wait for each other
_PARTING = timedelta(minutes=1)  # to hand out an error


class Exchange(Protocol):
    """Where the first process leaves something for the others."""

    is_first: bool

    def give(self, values: Values) -> None:
        """Leave values for the others; for the first process.

        Raises:
            TrainingError: when the place where the processes meet cannot be opened.
        """

    def receive(self) -> Values:
        """The values of the first process, as soon as they are there.

        Raises:
            TrainingError: when the first process cannot be reached, or has ended without any.
        """


_exchange: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


def current_exchange() -> Exchange | None:
    """Where this process meets the others; None outside of `together`, and for a single process."""
    return _exchange.get()


@contextmanager
def together() -> Iterator[None]:
    """Let the processes of a run exchange what they find within this context."""
    exchange, patience = _found_exchange(), _PARTING
    token = _exchange.set(exchange)
    try:
        yield
        patience = _MEETING
    finally:
        if isinstance(exchange, StoreExchange):
            exchange.part(patience)
        _exchange.reset(token)


def launched_by_another() -> bool:
    """Whether torchrun, SLURM or Lightning's first process has started this process."""
    return "LOCAL_RANK" in os.environ or slurm_job() is not None


@contextmanager
def left_for_children(values: Values) -> Iterator[None]:
    """Leave values in a file for processes that are started within this context.

    Args:
        values: what they receive.
    """
    with tempfile.TemporaryDirectory(prefix="gpd-") as folder:
        path = Path(folder, "found.json")
        path.write_text(json.dumps(values))
        os.environ[FOUND] = str(path)
        try:
            yield
        finally:
            os.environ.pop(FOUND, None)


class StoreExchange:
    """An exchange through a store of torch.

    The store is opened when something is given or received: processes that have nothing to tell
    each other need not wait for each other.

    Args:
        connect: opens the store of `torch.distributed` that all processes reach.
        rank: rank of this process.
        readers: number of the other processes, where the store ends with the first process; it
            then stays until all of them have read. 0 where another process keeps the store.
    """

    def __init__(self, connect: Callable[[], Any], rank: int, readers: int) -> None:
        self._connect, self.is_first, self._readers = connect, rank == 0, readers
        self._given = False

    @cached_property
    def store(self) -> Any:
        """The store.

        Raises:
            TrainingError: when it cannot be opened or reached.
        """
        return self._connect()

    def give(self, values: Values) -> None:
        """Leave values for the others."""
        self.store.set(_KEY, json.dumps(values))
        self._given = True

    def receive(self) -> Values:
        """The values of the first process; see `Exchange`."""
        try:
            while not self.store.check([_KEY]):
                time.sleep(_PAUSE)  # short, so that signals are heard
            values: Values = json.loads(self.store.get(_KEY))
            self.store.add(_READ, 1)
        except dist.DistError as error:
            raise TrainingError(
                "The first process has ended before it handed on the width plan; its own message "
                "says why."
            ) from error
        return values

    def part(self, patience: timedelta) -> None:
        """Let the first process wait until the others have read what it gave.

        Args:
            patience: how long at most.
        """
        end = time.monotonic() + patience.total_seconds()
        while self.is_first and self._given and time.monotonic() < end:
            if self.store.add(_READ, 0) >= self._readers:
                return
            time.sleep(_PAUSE)


class FileExchange:
    """An exchange through a file that the first process has written.

    Args:
        path: path of the file.
    """

    is_first = False

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def give(self, values: Values) -> None:
        """Nothing: only the first process gives, before this one starts."""

    def receive(self) -> Values:
        """The values of the first process; see `Exchange`."""
        try:
            values: Values = json.loads(self.path.read_text())
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"The width plan that the first process left in {self.path} is gone; it has ended."
            ) from error
        return values


def _found_exchange() -> Exchange | None:
    """The exchange of the processes that a launcher has started together."""
    if path := os.environ.get(FOUND):
        return FileExchange(path)
    environment = os.environ
    if TorchElasticEnvironment.detect():
        if environment.get("WORLD_SIZE") == "1" or not _agent_keeps_store():
            return None
        host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")

        def apart() -> Any:
            return dist.PrefixStore(f"gpd/{attempt}", _connected(host, port))  # type: ignore[attr-defined]

        return StoreExchange(apart, _rank("RANK"), 0)
    # srun tells the number of tasks of its step; a batch script without srun is a single process.
    if slurm_job() and (tasks := int(environment.get("SLURM_STEP_NUM_TASKS", "1"))) > 1:
        slurm, rank = slurm_environment(), _rank("SLURM_PROCID")
        port = slurm.main_port + _BESIDE
        port = port if port <= _LAST_PORT else slurm.main_port - _BESIDE
        meet = partial(_connected, slurm.main_address, port, rank == 0)
        return StoreExchange(meet, rank, tasks - 1)
    return None


def _agent_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _rank(variable: str) -> int:
    return int(os.environ[variable])


def _connected(host: str, port: int, keeps: bool = False) -> Any:
    try:
        options: dict[str, Any] = {
            "is_master": keeps,
            "timeout": _MEETING,
            "wait_for_workers": False,
        }
        return dist.TCPStore(host, port, **options)  # type: ignore[attr-defined]
    except (dist.DistError, RuntimeError, ValueError) as error:
        what = "open" if keeps else "reach"
        raise TrainingError(
            f"Process {os.environ.get('RANK', os.environ.get('SLURM_PROCID'))} cannot {what} port "
            f"{port} of {host}, where the processes of the run meet; set MASTER_PORT to another "
            "number."
        ) from error
