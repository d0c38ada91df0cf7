"""The trials of a search: how many there were, and when there have been enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MOST_TRIALS = 12
"""The largest number of trials of one container, with those of the containers inside it."""

_MOST_IN_VAIN = 20  # trials in vain in a container, after which those inside guess once each


@dataclass
class _Tried:
    """A container that is being tried.

    Args:
        start: the number of trials when it began.
        useful: trials since then of containers inside for which a guess was right in the end. They
            are made once, since the guess is remembered for all containers of the class.
    """

    start: int
    useful: int = 0


class Trials:
    """Counts the runs of containers that failed, in all runs of the network.

    Attributes:
        count: their number.
    """

    def __init__(self) -> None:
        self.count = 0
        self._tried: list[_Tried] = []  # the outermost container first

    @contextmanager
    def of_container(self) -> Iterator[None]:
        """Within this context one more container is tried, inside those that are tried already."""
        depth = len(self._tried)
        self._tried.append(_Tried(self.count))
        try:
            yield
        finally:
            del self._tried[depth:]

    def found(self) -> None:
        """Note that a guess was right for the innermost container."""
        *around, own = self._tried
        for container in around:
            container.useful += self.count - own.start - own.useful

    def are_spent(self, most: int = MOST_TRIALS) -> bool:
        """Whether the innermost container shall make no further guesses.

        Each class of containers inside a container may take its own number of trials. The sum of
        those that lead to nothing is limited as well.

        Args:
            most: the largest number of trials of the innermost container.
        """
        *around, own = self._tried
        in_vain = [self.count - container.start - container.useful for container in around]
        return self.count - own.start >= most or max(in_vain, default=0) >= _MOST_IN_VAIN
