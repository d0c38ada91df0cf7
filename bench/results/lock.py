"""The lock by which only one command at a time trains a table."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from bench.results.records import WORK
from bench.results.table import Table, TableError


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
