"""Training whose output nobody reads any longer goes on: the log is lost, and nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class _Forgiving:
    """A stream that drops what cannot be written, from the first failure on.

    Args:
        stream: standard output or standard error.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._lost = False

    def write(self, text: str) -> int:
        """Write, or drop."""
        self._do(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        self._do(self._stream.flush)

    def writelines(self, lines: Any) -> None:
        """Write lines, or drop them."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _do(self, action: Any) -> None:
        if self._lost:
            return
        try:
            action()
        except (OSError, ValueError):  # a closed pipe, a full disk; a closed file
            self._lost = True
            # What is buffered is written at the program's end, and libraries write as well.
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextmanager
def output_may_be_lost(active: bool) -> Iterator[None]:
    """Drop output that cannot be written, instead of an error.

    Args:
        active: whether to do so.
    """
    before = sys.stdout, sys.stderr
    if active:
        sys.stdout, sys.stderr = _Forgiving(before[0]), _Forgiving(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
