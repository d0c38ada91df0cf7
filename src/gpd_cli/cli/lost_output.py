"""Protection of training from failures of its output, such as a closed pipe or a full disk.

If the terminal or program that reads the output goes away, further output is lost, and training
goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class _Forgiving:
    """A wrapper of an output stream that drops all output from the first failed write on.

    Args:
        stream: standard output or standard error.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._lost = False

    def write(self, text: str) -> int:
        """Write the text, or drop it if the stream has failed."""
        self._do(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, unless it has failed."""
        self._do(self._stream.flush)

    def writelines(self, lines: Any) -> None:
        """Write the lines, or drop them if the stream has failed."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _do(self, action: Any) -> None:
        if self._lost:
            return
        try:
            action()
        except (OSError, ValueError):  # OSError: closed pipe, full disk; ValueError: closed file
            self._lost = True
            # Redirect the file descriptor to the null device: buffered text is written when the
            # program ends, and libraries write to the descriptor directly.
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextmanager
def output_may_be_lost(active: bool) -> Iterator[None]:
    """Within this context, drop output that cannot be written instead of raising an error.

    Args:
        active: whether output may be dropped; with False, the context changes nothing.
    """
    before = sys.stdout, sys.stderr
    if active:
        sys.stdout, sys.stderr = _Forgiving(before[0]), _Forgiving(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
