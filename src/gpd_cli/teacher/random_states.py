"""States of Python's and NumPy's random generators.

Networks may draw from these generators, but torch does not save and restore their states.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np


@dataclass(frozen=True)
class RandomStates:
    """States of the global generators of Python and NumPy.

    Args:
        python: the state of `random`, from ``random.getstate``.
        numpy: the state of `numpy.random`, from ``numpy.random.get_state``: the generator's name,
            its array of words, the position in this array, and a normal number held in reserve.
    """

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]

    @classmethod
    def now(cls) -> RandomStates:
        """The present states of both generators."""
        return cls(random.getstate(), cast("tuple[Any, ...]", np.random.get_state()))

    def restore(self) -> None:
        """Set both generators to these states, so that they draw the same numbers again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def plain(self) -> tuple[Any, ...]:
        """The states as values that can be compared by ``==``."""
        name, words, *rest = self.numpy
        return self.python, name, words.tobytes(), *rest


@contextmanager
def states_kept(begin: RandomStates | None = None) -> Iterator[None]:
    """Restore the states of both generators at the end of this context.

    Args:
        begin: states to start from within the context; by default the present ones.
    """
    before = RandomStates.now()
    if begin is not None:
        begin.restore()
    try:
        yield
    finally:
        before.restore()
