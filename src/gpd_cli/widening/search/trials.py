"""Count the trials (runs with wrong guesses) of a search, and limit their number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MOST_TRIALS = 12
"""The largest number of trials of one container, including trials of the containers inside it."""

# After so many useless trials inside a container, each container inside it makes one guess only.
_MOST_IN_VAIN = 20


@dataclass
class _Tried:
    """A container that is being tried.

    Args:
        start: the number of trials in the whole search when the trials of this container began.
        useful: the number of trials since then that belong to containers inside this one for which
            a guess was right in the end. Such trials are made only once for each class, since the
            right guess is remembered for other containers of the class.
    """

    start: int
    useful: int = 0


class Trials:
    """Counts the trials of containers, in all runs of the network.

    Attributes:
        count: number of trials so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._tried: list[_Tried] = []  # the outermost container first

    @contextmanager
    def of_container(self) -> Iterator[None]:
        """Mark that a container is tried within this context, inside those being tried already."""
        depth = len(self._tried)
        self._tried.append(_Tried(self.count))
        try:
            yield
        finally:
            del self._tried[depth:]

    def found(self) -> None:
        """Note that a guess was right for the innermost container that is being tried."""
        *around, own = self._tried
        for container in around:
            container.useful += self.count - own.start - own.useful

    def are_spent(self, most: int = MOST_TRIALS) -> bool:
        """Whether the innermost container is to make no further guesses.

        There are two limits: one for the trials of this container, and one for the useless trials
        in any container around it.

        Args:
            most: the largest number of trials of the innermost container.
        """
        *around, own = self._tried
        in_vain = [self.count - container.start - container.useful for container in around]
        return self.count - own.start >= most or max(in_vain, default=0) >= _MOST_IN_VAIN
