"""Data loaders: settings, worker processes, and the start of each pass over the data."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader, Dataset

from gpd_cli.data.draws import Places
from gpd_cli.data.samplers import Share
from gpd_cli.data.streams import Stream
from gpd_cli.errors import DataError

_MOST_WORKERS = 8  # largest default number of loader workers
_LIMIT = 512  # largest number of loader workers that users can set


@dataclass(frozen=True)
class LoaderSettings:
    """How batches are loaded.

    Args:
        batch_size: number of images per batch and process.
        num_workers: number of loader workers per training process; None chooses it by the number of
            cores.
        prefetch_factor: number of batches that each worker loads in advance.
        persistent_workers: whether workers are kept between epochs.
        pin_memory: whether batches are put into page-locked memory; None does so with a GPU only.

    Raises:
        DataError: when a number is out of range.
    """

    batch_size: int = 128
    num_workers: int | None = None
    prefetch_factor: int = 2
    persistent_workers: bool = True
    pin_memory: bool | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"--data.batch_size must be 1 or more, not {self.batch_size}.")
        if not 0 <= (self.num_workers or 0) <= _LIMIT:
            raise DataError(
                f"--data.num_workers must be from 0 to {_LIMIT}, not {self.num_workers}."
            )
        if self.prefetch_factor < 1:
            raise DataError(
                f"--data.prefetch_factor must be 1 or more, not {self.prefetch_factor}; to load "
                "without worker processes set --data.num_workers 0."
            )

    def workers(self, share: Share) -> int:
        """The number of loader workers: the setting, or this process's part of the cores.

        Args:
            share: number of training processes on this machine.
        """
        if self.num_workers is not None:
            return self.num_workers
        return max(1, min(_MOST_WORKERS, usable_cores() // share.neighbours))

    def loader(
        self, images: Dataset[Any], share: Share, workers: int, **options: Any
    ) -> EpochLoader:
        """Make a loader with these settings.

        Args:
            images: the data set.
            share: device, rank and epoch of this process.
            workers: number of loader workers.
            options: further arguments of `DataLoader`.
        """
        pin = self.pin_memory
        loader = EpochLoader(
            images,
            batch_size=self.batch_size,
            num_workers=workers,
            prefetch_factor=self.prefetch_factor if workers else None,
            persistent_workers=self.persistent_workers and workers > 0,
            pin_memory=share.device.type == "cuda" if pin is None else pin,
            worker_init_fn=partial(_begin_worker, rank=share.rank, owner=os.getpid()),
            # With a generator of its own, a pass does not change the global random state.
            generator=torch.Generator(),
            **options,
        )
        loader.epoch = share.epoch
        return loader


class EpochLoader(DataLoader[Any]):
    """A `DataLoader` whose pass begins only when the first batch is requested.

    Lightning creates the first iterator before it sets the sampler's epoch. With a plain
    `DataLoader`, the workers would by then have loaded batches of epoch 0, also in a resumed run.

    Attributes:
        epoch: function that returns the epoch, for streams, which have no sampler; if it is None,
            passes are counted instead.
    """

    epoch: Callable[[], int] | None = None
    _passes = 0
    _skipped = 0  # number of batches that the next pass over a stream leaves out

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if isinstance(self.dataset, Stream):
            self.dataset.set_epoch(self._passes if self.epoch is None else self.epoch())
        self._passes += 1
        skipped, self._skipped = self._skipped, 0
        yield from islice(super().__iter__(), skipped, None)

    def skip(self, batches: int) -> None:
        """Leave out batches at the beginning of the next pass; a stream still has to read them.

        Args:
            batches: number of batches to leave out.
        """
        places = getattr(self.batch_sampler, "sampler", None)
        if isinstance(places, Places):
            places.skipped = batches * (self.batch_size or 1)
        else:
            self._skipped = batches


class Indexed(Dataset[tuple[Any, ...]]):
    """A data set whose items end with their own index.

    Args:
        images: the data set that gives the rest of each item.
    """

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (*self.images[index], index)

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, ...]]:
        """Fetch the items of a batch, at once if the data set supports this."""
        if not hasattr(self.images, "__getitems__"):
            return [self[index] for index in indices]
        items = self.images.__getitems__(indices)
        return [(*item, index) for item, index in zip(items, indices, strict=True)]


def _begin_worker(number: int, rank: int, owner: int) -> None:
    """Initialize a loader worker: seed its generators, and let it ignore signals from outside.

    A launcher sends its signals to all processes of a run. If workers ended on such a signal, the
    run would fail before it is saved. So a worker ends only with its owner, the training process,
    or on a signal from the owner.

    Args:
        number: number of the worker in its training process.
        rank: rank of the training process.
        owner: process id of the training process.
    """
    pl_worker_init_function(number, rank)  # Lightning calls it only if there is no other function
    for name in ("SIGUSR1", "SIGHUP", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(owner,), daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _obey(owner: int) -> None:
    """Wait for SIGTERM from the owner, and then end this worker process.

    The owner ends its workers by this signal, and waits for the workers when it exits.

    Args:
        owner: process id of the training process.
    """
    # The parent process need not be the owner: it may be a server that forks all workers.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != owner:
        pass
    os._exit(0)


def usable_cores() -> int:
    """The number of cores that this process may use: a scheduler's limit, or all of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
