"""Data sets without random access: WebDataset shards, streamed Hugging Face data, TFDS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from gpd_cli.data.pixels import to_mode
from gpd_cli.data.sources import Indices, Source, UnreadableImageError
from gpd_cli.data.transforms import Preprocessing, Transform
from gpd_cli.errors import DataError, GpdError, reason_of
from gpd_cli.generators import drawn_from


class StreamSource(Source):
    """A split that can only be read in order, by timm's `IterableImageDataset`.

    timm's reader shuffles the images, and distributes them over processes and workers. The reader
    leaves out training images that cannot be decoded, with a warning (for files, this package
    raises an error). In training, the reader repeats images so that all workers of all processes
    have the same number of batches; in evaluation, each image comes once, and none is left out.

    Args:
        dataset: timm's data set.
        training: whether the reader shuffles and repeats images.
        shards: for WebDataset, whose reader distributes whole files: names of the files.
    """

    streamed = True

    def __init__(self, dataset: Any, training: bool, shards: tuple[str, ...] | None = None) -> None:
        self.dataset, self.training, self._files = dataset, training, shards
        found = getattr(dataset.reader, "class_to_idx", None) or {}
        self.class_names = [str(name) for name in sorted(found, key=found.__getitem__)]
        self._every = (0, 1)

    def __len__(self) -> int:
        raise DataError(
            "A streamed data set does not number its images, which this method needs; use an image "
            "folder or hfds/ instead."
        )

    def labels(self) -> np.ndarray:
        """Raise an error, since the labels of a stream are not known in advance.

        Raises:
            DataError: always.
        """
        raise DataError(
            "No images of a streamed data set can be held out for validation; name a validation "
            "split with --data.val_split."
        )

    def spread(self, rank: int, world: int, workers: int) -> int:
        """Set up which part of the stream this process reads; to be called before `images`.

        Args:
            rank: rank of this process.
            world: world size.
            workers: desired number of loader workers per process.

        Returns:
            The number of loader workers to use, which is at most the number of this process's
            shards.

        Raises:
            DataError: when there are fewer shards of training images than processes.
        """
        reader, shards = self.dataset.reader, self._shards()
        self._every = (0, 1)
        if self._files is None:
            # If the shards cannot be distributed evenly, every process reads all shards, and keeps
            # only its own part of the images.
            alone = shards if shards is None or shards % world else shards // world
        elif self.training:
            if len(self._files) < world:
                raise DataError(
                    f"There are {len(self._files)} shards of training images for {world} "
                    "processes; write more shards, or lower --trainer.devices."
                )
            alone = len(self._files) // world
        else:
            # The shards are distributed here: the reader would have some images scored twice, and
            # others not at all.
            mine = self._files
            if len(mine) >= world:
                mine = mine[rank::world]
                alone = len(mine)
            else:
                self._every, alone = (rank, world), 1
            reader.split_info = replace(reader.split_info, filenames=mine)
            rank, world = 0, 1
        # Readers determine rank and world size when they are opened, which may be before the
        # processes are connected.
        reader.dist_rank, reader.dist_num_replicas = rank, world
        used = workers if alone is None else min(workers, max(1, alone))
        self.dataset.set_loader_cfg(num_workers=max(1, used))
        return used

    def _shards(self) -> int | None:
        """Number of shards of streamed Hugging Face data; None for other or downloaded data."""
        reader = self.dataset.reader
        if not hasattr(reader, "builder") or getattr(reader, "download", True):
            return None
        if not hasattr(reader.builder, "as_streaming_dataset"):
            return None
        return int(reader.builder.as_streaming_dataset(split=reader.split).num_shards)

    def images(
        self,
        preprocessing: Preprocessing,
        training: bool,
        indices: Indices | None = None,
        unlabelled: bool = False,
    ) -> Dataset[Any]:
        """The images of the whole stream, or of this process's part after `spread`.

        Args:
            preprocessing: how the images are prepared.
            training: whether the images are augmented.
            indices: not used, since a stream has no positions.
            unlabelled: whether the images need no label; the class number of an image without label
                is then `UNKNOWN`.
        """
        self.dataset.transform = partial(
            _prepare, preprocessing.transform(training), preprocessing.mode
        )
        self.dataset.target_transform = partial(self.number, unlabelled=unlabelled)
        self.dataset.reader.unlabelled = unlabelled
        if self.training and self._files is not None:
            return ShardStream(self.dataset, self.training)
        return Stream(self.dataset, self.training, self._every)


def _prepare(transform: Transform, mode: str, image: Any) -> Any:
    # Readers that decode images themselves return arrays, already in the requested mode.
    return transform(to_mode(image, mode) if isinstance(image, Image.Image) else image)


class Stream(IterableDataset[tuple[Tensor, int]]):
    """The images of a stream; the order in training depends on seed and epoch only.

    Args:
        dataset: timm's data set.
        training: whether the reader shuffles and repeats images.
        every: which images to keep: the position of the first one, and the step from one to the
            next.
    """

    def __init__(self, dataset: Any, training: bool, every: tuple[int, int] = (0, 1)) -> None:
        self.dataset, self.training, self.every = dataset, training, every
        self._key = (0, 0)
        # In shared memory, so that workers which persist between epochs see the new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def seed_draws(self, seed: int, rank: int) -> None:
        """Make the random draws of augmentation reproducible.

        They then depend on the seed, the process, the loader worker, the epoch and the image's
        position in the worker's part of the epoch, and on nothing else.

        Args:
            seed: seed of the random draws.
            rank: rank of this process.
        """
        self._key = (seed, rank)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the reader and its workers."""
        self._epoch.fill_(epoch)
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        # In evaluation, every worker may end with an incomplete batch, so that the number of
        # batches is unknown.
        length = len(self.dataset) if self.training else 0
        if not length:
            raise TypeError("the length of this stream is not known")
        return length

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        first, step = self.every
        images = islice(self.dataset, first, None, step)
        if not self.training:
            yield from _every_one(images)
            return
        info = get_worker_info()
        key = (*self._key, 0 if info is None else info.id, int(self._epoch))
        for position in count():
            with drawn_from(*key, position):
                item = next(images, None)
            if item is None:
                return
            yield item


def _every_one(images: Iterator[tuple[Tensor, int]]) -> Iterator[tuple[Tensor, int]]:
    """Pass images on, and name the remedy where one of them cannot be read."""
    while True:
        try:
            item = next(images, None)
        except GpdError:
            raise
        except Exception as error:  # readers and decoders raise errors of any type
            raise UnreadableImageError(
                f"An image of the stream cannot be read ({reason_of(error)}); repair the data, or "
                "name another split."
            ) from error
        if item is None:
            return
        yield item


class ShardStream(Stream):
    """A stream of training images from WebDataset shards, shuffled reproducibly in each epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        _reseed(self.dataset.reader)
        yield from super().__iter__()


def _reseed(reader: Any) -> None:
    """Make the shuffling of WebDataset shards depend on seed, epoch and worker only.

    By itself, the reader seeds each worker once, from the global random state, which a resumed run
    does not have.

    Args:
        reader: timm's reader of WebDataset, changed in place.
    """
    info = get_worker_info()
    worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
    # The reader itself sets these attributes only once, together with the worker's seed.
    reader.worker_info = info
    reader.worker_id, reader.num_workers = worker, workers
    reader.global_worker_id = reader.dist_rank * workers + worker
    reader.global_num_workers = reader.dist_num_replicas * workers
    key = (reader.common_seed, reader.epoch_count.value, reader.global_worker_id)
    reader.worker_seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    reader.ds = None  # makes the reader build its pipeline anew, with this seed
