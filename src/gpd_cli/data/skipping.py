"""Skipping the batches of an epoch that a resumed run has seen already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler


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


def skip_once(loader: Any, batches: int) -> None:
    """Leave out batches at the beginning of a loader's next pass.

    This works for loaders of this package, and for others that have a sampler or a batch sampler. A
    user's own stream cannot be skipped, and begins anew.

    Args:
        loader: the loader.
        batches: number of batches to leave out.
    """
    if hasattr(loader, "skip"):
        loader.skip(batches)
        return
    owner, size = getattr(loader, "batch_sampler", None) or loader, batch_size_of(loader)
    if hasattr(owner, "sampler") and size is not None:
        owner.sampler = _SkipOnce(owner.sampler, batches * size)


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
