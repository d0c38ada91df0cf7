"""Random generators of Python and NumPy: networks may draw from them, torch leaves them out."""

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
        python: state of `random`.
        numpy: state of `numpy.random`: the generator's name, its words, its place in these, and the
            normal number that it holds ready.
    """

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]

    @classmethod
    def now(cls) -> RandomStates:
        """The present states."""
        return cls(random.getstate(), cast("tuple[Any, ...]", np.random.get_state()))

    def restore(self) -> None:
        """Let the generators draw again what they drew from these states on."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def plain(self) -> tuple[Any, ...]:
        """The states as values that can be compared."""
        name, words, *rest = self.numpy
        return self.python, name, words.tobytes(), *rest


@contextmanager
def states_kept(begin: RandomStates | None = None) -> Iterator[None]:
    """Give the generators, after this context, the states that they have before.

    Args:
        begin: states within the context; by default the present ones.
    """
    before = RandomStates.now()
    if begin is not None:
        begin.restore()
    try:
        yield
    finally:
        before.restore()
