"""Passing results from a run's first process to the others, so that these need not search again.

The result is the width plan, which is found when the networks are built, before
DistributedDataParallel connects the processes. So the processes use another connection: under
torchrun the key-value store of torchrun's agent, under SLURM a store in the first process. If
Lightning starts the other processes, it does so after the first process has built its networks;
then the result is passed in a file.
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

from gpd_cli.distributed.cluster import slurm_environment, slurm_job, slurm_tasks
from gpd_cli.errors import TrainingError

Values = Mapping[str, Any]
"""Values that JSON can hold: numbers, strings, lists and dictionaries."""

FOUND = "GPD_FOUND"
"""The environment variable that tells processes started by Lightning the path of the file."""
_KEY = "found"
_READ = "read"
_BESIDE = 10_000  # added to Lightning's port under SLURM (15,000 to 24,999) to get our port
_LAST_PORT = 65_535
_PAUSE = 0.05  # seconds between two looks into the store
_MEETING = timedelta(minutes=30)  # longest wait for another process, the same as torch's default
_PARTING = timedelta(minutes=1)  # longest wait for readers when the first process ends by an error


class Exchange(Protocol):
    """Passes values from the first process to the others.

    Attributes:
        is_first: whether this is the first process.
    """

    is_first: bool

    def give(self, values: Values) -> None:
        """Leave values for the other processes; to be called by the first process only.

        Args:
            values: the values to pass on.

        Raises:
            TrainingError: when the store of the exchange cannot be opened.
        """

    def receive(self) -> Values:
        """Wait for the values of the first process, and return them.

        Raises:
            TrainingError: when the first process cannot be reached, or has ended without leaving
                any values.
        """


_exchange: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


def current_exchange() -> Exchange | None:
    """The exchange of this process; None outside of `together`, and for a single process."""
    return _exchange.get()


@contextmanager
def together() -> Iterator[None]:
    """Provide an exchange (`current_exchange`) between the processes of a run in this context."""
    exchange, patience = _found_exchange(), _PARTING
    token = _exchange.set(exchange)
    try:
        yield
        patience = _MEETING
    finally:
        if isinstance(exchange, StoreExchange):
            exchange.wait_for_readers(patience)
        _exchange.reset(token)


def launched_by_another() -> bool:
    """Whether this process was started by torchrun, SLURM or Lightning's first process."""
    return "LOCAL_RANK" in os.environ or slurm_job() is not None


@contextmanager
def left_for_children(values: Values) -> Iterator[None]:
    """Leave values in a temporary file for processes that are started within this context.

    Args:
        values: the values to pass on.
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
    """An exchange through a key-value store of `torch.distributed`.

    The store is opened only when values are given or received, so that processes without values to
    exchange need not wait for each other.

    Args:
        connect: function that opens the store, which all processes can reach.
        rank: rank of this process.
        readers: if the store lives in the first process, the number of the other processes, which
            `wait_for_readers` waits for. 0 if the store lives in another process, such as
            torchrun's agent.
    """

    def __init__(self, connect: Callable[[], Any], rank: int, readers: int) -> None:
        self._connect, self.is_first, self._readers = connect, rank == 0, readers
        self._given = False

    @cached_property
    def store(self) -> Any:
        """The store, opened at first use.

        Raises:
            TrainingError: when the store cannot be opened or reached.
        """
        return self._connect()

    def give(self, values: Values) -> None:
        """Leave values for the other processes; see `Exchange`."""
        self.store.set(_KEY, json.dumps(values))
        self._given = True

    def receive(self) -> Values:
        """Wait for the values of the first process, and return them; see `Exchange`."""
        try:
            while not self.store.check([_KEY]):
                time.sleep(_PAUSE)  # short waits in Python, so that signals are handled
            values: Values = json.loads(self.store.get(_KEY))
            self.store.add(_READ, 1)
        except dist.DistError as error:
            raise TrainingError(
                "The first process ended before it passed on the width plan; see the error message "
                "of the first process."
            ) from error
        return values

    def wait_for_readers(self, patience: timedelta) -> None:
        """Make the first process wait until the other processes have read its values.

        Args:
            patience: the longest time to wait.
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
        """Do nothing: only the first process leaves values, before this process starts."""

    def receive(self) -> Values:
        """Read the values of the first process from the file; see `Exchange`."""
        try:
            values: Values = json.loads(self.path.read_text())
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"The first process has ended, and its file {self.path} with the width plan is "
                "gone; see the error message of the first process."
            ) from error
        return values


def _found_exchange() -> Exchange | None:
    """The exchange that fits the launcher of this process; None for a single process."""
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
    if slurm_job() and (tasks := slurm_tasks()) > 1:
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
