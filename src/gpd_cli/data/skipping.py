"""Skipping the batches of an epoch that a resumed run has seen already."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, Sampler


class _SkipOnce(Sampler[Any]):
    """A sampler whose first pass leaves out images at the beginning.

    Args:
        sampler: the sampler to wrap.
        count: number of images to leave out.
    """

    def __init__(self, sampler: Any, count: int) -> None:
        self._sampler, self._count = sampler, count

    def __iter__(self) -> Iterator[Any]:
        count, self._count = self._count, 0
        for position, index in enumerate(self._sampler):
            if position >= count:
                yield index

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def skip_once(loader: Any, batches: int) -> bool:
    """Leave out batches at the beginning of a loader's next pass.

    Loaders of this package skip by themselves, also in a pass that has begun, and loaders that have
    a state are put back by Lightning. Of other loaders, the sampler leaves out the images, so that
    they are not read; a loader without a usable sampler (a stream, or batches of a user's own
    making) reads the batches, which are then dropped.

    Args:
        loader: the loader.
        batches: number of batches to leave out.

    Returns:
        Whether a pass that has begun already has to begin anew.
    """
    if hasattr(loader, "skip"):
        loader.skip(batches)
        return False
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        return False
    makes_batches = getattr(loader, "batch_sampler", None)
    # Not by its truth value, which may be its length.
    owner, size = loader if makes_batches is None else makes_batches, batch_size_of(loader)
    is_stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
    if hasattr(owner, "sampler") and size is not None and not is_stream:
        owner.sampler = _SkipOnce(owner.sampler, batches * size)
    else:
        _drop_once(loader, batches)
    return True


def _drop_once(loader: Any, batches: int) -> None:
    """Have the next pass of a loader read its first batches without passing them on.

    Args:
        loader: the loader, which gets a subclass of its own class.
        batches: number of batches to drop.
    """
    own = type(loader)

    def iterate(self: Any) -> Iterator[Any]:
        self.__class__ = own
        return islice(iter(self), batches, None)

    loader.__class__ = type(own.__name__, (own,), {"__iter__": iterate})


def batch_size_of(loader: Any) -> int | None:
    """The number of images in a loader's batches; None if neither loader nor batch sampler tells.

    Args:
        loader: the loader.
    """
    for owner in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(owner, "batch_size", None)
        if isinstance(size, int) and size > 0:
            return size
    return None
