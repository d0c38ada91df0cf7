"""Random draws of augmentation that depend only on seed, epoch and position in the epoch.

So a run that is resumed within an epoch draws the same values as an uninterrupted run, with any
number of loader workers. And the draws of the network (dropped paths, mixing) do not depend on how
images are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.utils.data import Dataset, DistributedSampler, Sampler

from gpd_cli.generators import drawn_from


class Place(NamedTuple):
    """The place of an image in the order of an epoch.

    Attributes:
        epoch: number of the epoch, counted from 0.
        position: position of the image in the epoch over all processes, counted from 0.
        image: number of the image in its data set.
    """

    epoch: int
    position: int
    image: int


class Places(Sampler[Place]):
    """A sampler that yields the images of another sampler in the same order, as `Place`.

    Args:
        sampler: the sampler that determines the order.

    Attributes:
        skipped: number of images that the next pass leaves out at its beginning.
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
        """Set the epoch of the wrapped sampler."""
        self.sampler.set_epoch(epoch)


class Seeded(Dataset[Any]):
    """A data set whose augmentation is drawn from a seed and the place of a batch in the epoch.

    Args:
        images: the data set, which augments its images.
        seed: seed of the random draws.
    """

    def __init__(self, images: Any, seed: int) -> None:
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Place | int) -> Any:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: list[Any]) -> list[Any]:
        """Fetch all items of a batch at once, as `DataLoader` does where it can."""
        first = places[0]
        if not isinstance(first, Place):  # Lightning has replaced our sampler by one of its own
            return self._fetch(places)
        with drawn_from(self.seed, first.epoch, first.position):
            return self._fetch([place.image for place in places])

    def _fetch(self, indices: list[int]) -> list[Any]:
        if hasattr(self.images, "__getitems__"):
            return list(self.images.__getitems__(indices))
        return [self.images[index] for index in indices]
