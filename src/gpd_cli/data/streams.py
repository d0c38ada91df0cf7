"""Data sets that are read in order: WebDataset shards, streamed Hugging Face data, TFDS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from gpd_cli.data.sources import Indices, Source
from gpd_cli.data.transforms import Preprocessing
from gpd_cli.errors import DataError


class StreamSource(Source):
    """A split that is read in order: timm's `IterableImageDataset`.

    Its reader shuffles, shares the images out among processes and workers, and, unlike files,
    skips what it cannot decode, with a warning. In training the reader repeats images so that
    every worker of every process has equally many batches; in evaluation each image comes once.

    Args:
        dataset: the data set of timm.
        training: whether the reader was told to shuffle and repeat.
        shards: names of the files, for WebDataset, whose reader deals whole files out.
    """

    streamed = True

    def __init__(self, dataset: Any, training: bool, shards: tuple[str, ...] | None = None) -> None:
        self.dataset, self.training, self._files = dataset, training, shards
        found = getattr(dataset.reader, "class_to_idx", None) or {}
        self.class_names = [str(name) for name in sorted(found, key=found.__getitem__)]
        self._every = (0, 1)

    def __len__(self) -> int:
        raise DataError(
            "A streamed data set does not number its images, as this method needs; use an image "
            "folder or hfds/ instead."
        )

    def labels(self) -> np.ndarray:
        """Not known in advance.

        Raises:
            DataError: always.
        """
        raise DataError(
            "A streamed data set has no part that could be held out; name a validation split "
            "with --data.val_split."
        )

    def spread(self, rank: int, world: int, workers: int) -> int:
        """Share the stream out among processes, before `images`.

        Args:
            rank: number of this process.
            world: number of processes.
            workers: loader workers wanted per process.

        Returns:
            Loader workers to use: no more than have a shard to read.

        Raises:
            DataError: when there are fewer shards of training images than processes.
        """
        reader, shards = self.dataset.reader, self._shards()
        self._every = (0, 1)
        if self._files is None:
            # Shards that cannot be dealt out evenly are read by all, each keeping other images.
            alone = shards if shards is None or shards % world else shards // world
        elif self.training:
            if len(self._files) < world:
                raise DataError(
                    f"There are {len(self._files)} shards of training images for {world} "
                    "processes; write more shards, or train with fewer --trainer.devices."
                )
            alone = len(self._files) // world
        else:
            # The reader would score some images twice, and others not at all.
            mine = self._files
            if len(mine) >= world:
                mine = mine[rank::world]
                alone = len(mine)
            else:
                self._every, alone = (rank, world), 1
            reader.split_info = replace(reader.split_info, filenames=mine)
            rank, world = 0, 1
        # Readers ask for them when they are opened, which may be before processes have met.
        reader.dist_rank, reader.dist_num_replicas = rank, world
        used = workers if alone is None else min(workers, max(1, alone))
        self.dataset.set_loader_cfg(num_workers=max(1, used))
        return used

    def _shards(self) -> int | None:
        """Shards of streamed Hugging Face data; None for other readers, or when downloaded."""
        reader = self.dataset.reader
        if not hasattr(reader, "builder") or getattr(reader, "download", True):
            return None
        if not hasattr(reader.builder, "as_streaming_dataset"):
            return None
        return int(reader.builder.as_streaming_dataset(split=reader.split).num_shards)

    def images(
        self, preprocessing: Preprocessing, training: bool, indices: Indices | None = None
    ) -> Dataset[Any]:
        """The whole stream, or this process's share of it."""
        self.dataset.transform = preprocessing.transform(training)
        if self.training and self._files is not None:
            return ShardStream(self.dataset, self.training)
        return Stream(self.dataset, self.training, self._every)


class Stream(IterableDataset[tuple[Tensor, int]]):
    """Images in order, shuffled by seed and epoch alone.

    Args:
        dataset: the data set of timm.
        training: whether the reader shuffles and repeats.
        every: first image to keep and number of images to the next one.
    """

    def __init__(self, dataset: Any, training: bool, every: tuple[int, int] = (0, 1)) -> None:
        self.dataset, self.training, self.every = dataset, training, every

    def set_epoch(self, epoch: int) -> None:
        """Tell the reader the epoch; its workers are told as well."""
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        # Workers end on broken batches in evaluation, so that the number of batches is open.
        length = len(self.dataset) if self.training else 0
        if not length:
            raise TypeError("the length of this stream is not known")
        return length

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        first, step = self.every
        yield from islice(self.dataset, first, None, step)


class ShardStream(Stream):
    """Images of WebDataset shards in training."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        _reseed(self.dataset.reader)
        yield from super().__iter__()


def _reseed(reader: Any) -> None:
    """Shuffle the images of WebDataset shards by seed, epoch and worker.

    Left alone the reader seeds each worker once, from a global state that a resumed run lacks.
    """
    info = get_worker_info()
    worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
    # The reader finds these out only once, and takes the worker's seed with them.
    reader.worker_info = info
    reader.worker_id, reader.num_workers = worker, workers
    reader.global_worker_id = reader.dist_rank * workers + worker
    reader.global_num_workers = reader.dist_num_replicas * workers
    key = (reader.common_seed, reader.epoch_count.value, reader.global_worker_id)
    reader.worker_seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    reader.ds = None  # built anew for this pass, with this seed
