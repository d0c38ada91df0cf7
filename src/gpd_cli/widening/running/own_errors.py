"""Keep errors of gpd's own code apart from errors of the network's code.

While a network runs, the code of both takes turns: functions of gpd run as hooks and in the place
of torch functions. Their errors are errors of gpd, and never a reason to refuse a network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gpd_cli.errors import ExpansionError
from gpd_cli.widening.mismatch import Mismatch


class OwnError(BaseException):
    """An error of gpd's own code while a network's forward runs.

    This class is not derived from `Exception`, so that no handler for errors of a network's code
    catches it.

    Args:
        error: the original exception.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class ForwardError(Exception):
    """An error of the network's own code.

    Args:
        error: the original exception.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise exceptions of gpd's own code within this context as an `OwnError`.

    `Mismatch` and `ExpansionError`, which are results of gpd's code, are raised unchanged.
    """
    try:
        yield
    except (Mismatch, ExpansionError):
        raise
    except Exception as error:
        raise OwnError(error) from error


@contextmanager
def forward_errors() -> Iterator[None]:
    """Raise exceptions of the network that runs within this context as a `ForwardError`.

    `Mismatch` and `ExpansionError`, which are results of gpd's code, are raised unchanged.
    """
    try:
        yield
    except (Mismatch, ExpansionError):
        raise
    except Exception as error:
        raise ForwardError(error) from error


@contextmanager
def original_errors() -> Iterator[None]:
    """Raise the original exception in place of an `OwnError` within this context."""
    try:
        yield
    except OwnError as failure:
        # The failure's cause is this error, which would otherwise be in its own chain of causes.
        failure.__cause__ = failure.__context__ = None
        raise failure.error from failure.error.__cause__
