"""Keep errors of this package's own code apart from errors of the network's code.

While a network runs, the code of both takes turns: functions of this package run as hooks and in
the place of torch functions. Their errors are those of this package, and never a reason to refuse
a network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gpd_cli.errors import ExpansionError
from gpd_cli.widening.mismatch import Mismatch


class OwnError(BaseException):
    """An error of this package's own code, met while a network's forward runs.

    Not derived from `Exception`, so that no handler for errors of a network's code catches it.

    Args:
        error: the original exception.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class ForwardError(Exception):
    """A network's own code does not run.

    Args:
        error: the original exception.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise every unexpected exception within this context as an `OwnError`."""
    try:
        yield
    except (Mismatch, ExpansionError):
        raise
    except Exception as error:
        raise OwnError(error) from error


@contextmanager
def forward_errors() -> Iterator[None]:
    """Raise exceptions of the network that runs within this context as a `ForwardError`."""
    try:
        yield
    except (Mismatch, ExpansionError):
        raise
    except Exception as error:
        raise ForwardError(error) from error


@contextmanager
def original_errors() -> Iterator[None]:
    """Raise the original exception instead of an `OwnError`."""
    try:
        yield
    except OwnError as failure:
        raise failure.error from failure
