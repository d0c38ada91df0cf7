"""Construction of the loaders of one process, for a split or a part of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gpd_cli.data.cached import Cache, CachedLoader, hold
from gpd_cli.data.digits import DigitImages
from gpd_cli.data.draws import Places, Seeded
from gpd_cli.data.loaders import EpochLoader, Indexed, LoaderSettings
from gpd_cli.data.samplers import Share, evaluation_sampler, training_sampler
from gpd_cli.data.sources import FileSource, Indices, Source
from gpd_cli.data.streams import Stream, StreamSource
from gpd_cli.data.transforms import Preprocessing
from gpd_cli.errors import DataError

Batches = EpochLoader | CachedLoader


@dataclass(frozen=True)
class Subset:
    """A part of a split's images, or all of them.

    Args:
        source: the split.
        indices: positions of the images in the split; None for all images.
        unlabelled: whether the images need no label, as for prediction.
    """

    source: Source
    indices: Indices | None = None
    unlabelled: bool = False

    @property
    def count(self) -> int:
        """The number of images.

        Raises:
            DataError: for a stream, whose number of images is not known.
        """
        return len(self.source) if self.indices is None else len(self.indices)


@dataclass(frozen=True)
class Feed:
    """Makes the loaders of one process.

    Args:
        settings: settings of the loaders.
        preprocessing: how images are prepared.
        share: rank, world size and device of this process.
        cache: where decoded images are held, if anywhere.
        seed: seed of shuffling order and augmentation; the same in all processes.
    """

    settings: LoaderSettings
    preprocessing: Preprocessing
    share: Share
    cache: Cache = "none"
    seed: int = 0

    def training(self, subset: Subset, repeats: int, mixing: bool, with_indices: bool) -> Batches:
        """Make a loader of shuffled training batches.

        Args:
            subset: the images.
            repeats: number of times that repeated augmentation shows each image; 0 or 1 for none.
            mixing: whether batches will be mixed (mixup, CutMix).
            with_indices: whether batches end with the positions of images in the subset, ``[B]``.

        Raises:
            DataError: when there are too few images for mixing, or positions of streamed images are
                asked for.
        """
        if subset.source.streamed and not with_indices:
            return self._loader(subset, training=True, drop_last=True)
        sampler = training_sampler(range(subset.count), self.share, self.seed, repeats)
        whole = len(sampler) >= self.settings.batch_size
        if mixing and not whole:
            raise DataError(
                f"There are {len(sampler)} training images per process, fewer than a batch, and "
                "mixing needs full batches; lower --data.batch_size."
            )
        if self.cache != "none":
            return self._cached(
                subset,
                sampler,
                training=True,
                drop_last=whole,
                seed=self.seed,
                with_indices=with_indices,
            )
        return self._loader(
            subset, training=True, with_indices=with_indices, sampler=sampler, drop_last=whole
        )

    def evaluation(self, subset: Subset, in_order: bool = False) -> Batches:
        """Make a loader of batches in fixed order, with each image once over all processes.

        Args:
            subset: the images.
            in_order: whether the order has to be that of the data. A stream is then read by at most
                one worker, since several workers would take turns with its shards.
        """
        if subset.source.streamed:
            return self._loader(subset, most_workers=1 if in_order else None)
        sampler = evaluation_sampler(range(subset.count), self.share)
        if self.cache != "none":
            return self._cached(subset, sampler)
        return self._loader(subset, sampler=sampler)

    def _loader(
        self,
        subset: Subset,
        training: bool = False,
        with_indices: bool = False,
        most_workers: int | None = None,
        **options: Any,
    ) -> EpochLoader:
        workers = self.settings.workers(self.share)
        if most_workers is not None:
            workers = min(workers, most_workers)
        if isinstance(subset.source, StreamSource):
            workers = subset.source.spread(self.share.rank, self.share.world, workers)
        images = subset.source.images(
            self.preprocessing, training, subset.indices, subset.unlabelled
        )
        if isinstance(images, DigitImages):
            workers = 0  # digits are in memory, so that worker processes would only cost time
        if with_indices:
            images = Indexed(images)
        if isinstance(images, Stream):
            images.seed_draws(self.seed, self.share.rank)
        elif training:
            images = Seeded(images, self.seed)
        loader = self.settings.loader(images, self.share, workers, **options)
        if isinstance(images, Seeded):
            # The loader's own attribute `sampler` stays, since Lightning reads it.
            loader.batch_sampler.sampler = Places(options["sampler"])  # type: ignore[union-attr]
        return loader

    def _cached(
        self, subset: Subset, sampler: Any, training: bool = False, **options: Any
    ) -> CachedLoader:
        assert isinstance(subset.source, FileSource)  # check_cacheable refuses all other sources
        size = self.preprocessing.image_size
        held = hold(
            subset.source.pixels(self.preprocessing, training, subset.indices),
            (self.preprocessing.in_chans, size, size),
            self.share.device if self.cache == "device" else torch.device("cpu"),
            self.settings.workers(self.share),
            "training" if training else "validation",
            self.share.neighbours,
        )
        return CachedLoader(
            held,
            self.preprocessing,
            sampler,
            batch_size=self.settings.batch_size,
            training=training,
            **options,
        )
