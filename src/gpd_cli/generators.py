"""The global random generators of Python, NumPy and torch: their states, and numbers from a seed.

Networks and augmentation may draw from all three, but torch's own tools save and restore the states
of torch's generators only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch


@dataclass(frozen=True)
class GeneratorStates:
    """States of the global generators of Python and NumPy.

    Args:
        python: the state of `random`, from ``random.getstate``.
        numpy: the state of `numpy.random`, from ``numpy.random.get_state``: the generator's name,
            its array of words, the position in this array, and a normal number held in reserve.
    """

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]

    @classmethod
    def now(cls) -> GeneratorStates:
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
def states_kept(begin: GeneratorStates | None = None) -> Iterator[None]:
    """Restore the states of Python's and NumPy's generators at the end of this context.

    Args:
        begin: states to start from within the context; by default the present ones.
    """
    before = GeneratorStates.now()
    if begin is not None:
        begin.restore()
    try:
        yield
    finally:
        before.restore()


def start_generators(key: Sequence[int], seed_torch: Callable[[int], Any]) -> None:
    """Seed the random generators of Python, NumPy and torch, with different seeds made from a key.

    Args:
        key: integers that are not negative.
        seed_torch: function that seeds torch's generators, or some of them.
    """
    first, second, third = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(first)
    np.random.seed(second)
    seed_torch(third)


@contextmanager
def drawn_from(*key: int) -> Iterator[None]:
    """Within this context, draw random numbers from a key; then restore the generators' states.

    This concerns the global generators of Python and NumPy, and torch's generator on the CPU.

    Args:
        key: integers that are not negative, such as seed, epoch and position.
    """
    with states_kept(), torch.random.fork_rng(devices=[]):
        start_generators(key, torch.default_generator.manual_seed)
        yield


def seeded_generator(*key: int) -> torch.Generator:
    """Make a random generator on the CPU, seeded by several numbers such as seed, epoch and rank.

    Args:
        key: integers that are not negative.
    """
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
