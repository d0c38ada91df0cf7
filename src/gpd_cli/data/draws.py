"""Random draws of augmentation: functions of seed, epoch and place, and of nothing else.

So a run that goes on within an epoch draws what it would have drawn, with any number of workers,
and no draw of the network (dropped paths, mixing) depends on how images are loaded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler, Sampler


class Place(NamedTuple):
    """An image's place in an epoch.

    Attributes:
        epoch: counted from 0.
        position: place of the image in the order of all processes together, counted from 0.
        image: number of the image in its data set.
    """

    epoch: int
    position: int
    image: int


class Places(Sampler[Place]):
    """The order of a sampler, each image with its place.

    Args:
        sampler: the order; it is told the epoch.

    Attributes:
        skipped: images of the next pass that are left out at its beginning.
    """

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self.sampler = sampler
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Place]:
        skipped, self.skipped = self.skipped, 0
        sampler = self.sampler
        for number, index in enumerate(sampler):
            if number >= skipped:
                position = number * sampler.num_replicas + sampler.rank
                yield Place(sampler.epoch, position, index)

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler the epoch."""
        self.sampler.set_epoch(epoch)


class Seeded(Dataset[Any]):
    """Images whose augmentation is drawn from a seed and the place of their batch in the epoch.

    Args:
        images: the data set.
        seed: seed of the random draws.
    """

    def __init__(self, images: Any, seed: int) -> None:
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Place | int) -> Any:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: list[Any]) -> list[Any]:
        """The loader's way to fetch a batch at once."""
        first = places[0]
        if not isinstance(first, Place):  # from a sampler that Lightning has put in place of ours
            return self._fetch(places)
        with drawn_from(self.seed, first.epoch, first.position):
            return self._fetch([place.image for place in places])

    def _fetch(self, indices: list[int]) -> list[Any]:
        if hasattr(self.images, "__getitems__"):
            return list(self.images.__getitems__(indices))
        return [self.images[index] for index in indices]


def start_generators(key: Sequence[int], seed_torch: Callable[[int], Any]) -> None:
    """Let Python's, NumPy's and torch's generators start from a key, each in its own way.

    Args:
        key: whole numbers, not negative.
        seed_torch: seeds those of torch's generators that are meant.
    """
    first, second, third = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(first)
    np.random.seed(second)
    seed_torch(third)


@contextmanager
def drawn_from(*key: int) -> Iterator[None]:
    """Let Python's, NumPy's and torch's generators start from a key, and put them back.

    Torch's is that of the CPU.

    Args:
        key: whole numbers, not negative.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    start_generators(key, torch.default_generator.manual_seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
