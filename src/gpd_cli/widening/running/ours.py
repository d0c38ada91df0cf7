"""Keep errors of this package's own code apart from those of the code that it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gpd_cli.errors import ExpansionError
from gpd_cli.widening.mismatch import Mismatch


class OwnError(BaseException):
    """An error of this package's own code, met while a network's forward runs.

    It is no `Exception`, so that no handler for errors of a network's code takes it for one.

    Args:
        error: what was raised.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def own_errors() -> Iterator[None]:
    """Mark what is raised in here as an error of this package's own code."""
    try:
        yield
    except (Mismatch, ExpansionError):
        raise
    except Exception as error:
        raise OwnError(error) from error


@contextmanager
def unmarked() -> Iterator[None]:
    """Raise errors of this package's own code as what they are."""
    try:
        yield
    except OwnError as failure:
        raise failure.error from failure
