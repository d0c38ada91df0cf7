"""How many guesses a network is worth."""

from __future__ import annotations

_MOST_GUESSES = 400  # for one container where its own code fails, and
_MOST_GUESSES_OUTSIDE = 32  # where something inside of it fails for all that it tried itself
_MOST_RUNS = 40  # of the whole network, or what that comes to in runs of parts of it
_LEAST_GUESSES = 2000  # that small networks get nevertheless


class Budget:
    """Guesses made so far in a whole network."""

    def __init__(self) -> None:
        self._guesses, self._runs = 0, 0.0

    def allows(self, number: int, *, fails_inside: bool) -> bool:
        """Whether a container may try once more.

        Args:
            number: of guesses that it has made already.
            fails_inside: whether one of them failed inside of another container in it.
        """
        limit = _MOST_GUESSES_OUTSIDE if fails_inside else _MOST_GUESSES
        spent = self._runs > _MOST_RUNS and self._guesses > _LEAST_GUESSES
        return number < limit and not spent

    def spend(self, share: float) -> None:
        """Note one guess, for a part of the network of this size."""
        self._guesses += 1
        self._runs += share
