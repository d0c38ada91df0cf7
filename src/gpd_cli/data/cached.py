"""A cache for small data sets: decoded images are held in memory or on the accelerator.

Images are decoded once, and augmented in whole batches on the device that holds them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from gpd_cli.data.batch_transforms import crop_and_flip, draw, normalize
from gpd_cli.data.opening import DataSpec
from gpd_cli.data.transforms import Preprocessing
from gpd_cli.errors import DataError
from gpd_cli.generators import seeded_generator

Cache = Literal["none", "memory", "device"]
_BATCH = 256  # images per batch when decoding


def check_cacheable(spec: DataSpec, preprocessing: Preprocessing) -> None:
    """Check that a data set and its augmentation can be used with the cache.

    Streams cannot be cached, nor can augmentations that work on single images.

    Args:
        spec: the data set.
        preprocessing: how the images are prepared.

    Raises:
        DataError: when the cache does not support the data set or an option; the message names the
            option.
    """
    if spec.is_digits:
        raise DataError("The digits are in memory already; leave out --data.cache.")
    if spec.is_streamed:
        raise DataError(
            f"'{spec.dataset}' is streamed and cannot be cached; leave out --data.cache, or use an "
            "image folder, torch/ or hfds/."
        )
    p = preprocessing
    if p.no_aug:
        return
    unsupported = {"auto_augment": p.auto_augment, "color_jitter": p.color_jitter}
    unsupported["re_prob"] = p.re_prob
    for name, value in unsupported.items():
        if value:
            raise DataError(
                f"--data.{name} works on single images and --data.cache on whole batches; leave "
                "out one of the two."
            )
    if not p.crop_padding:
        raise DataError(
            "--data.cache stores images at one size, so that random resized crops are impossible; "
            "set --data.crop_padding (4 for CIFAR) or --data.no_aug true, or leave out "
            "--data.cache."
        )


@dataclass(frozen=True)
class HeldImages:
    """Decoded images and their labels.

    Args:
        images: images of bytes, ``[N, C, H, W]``.
        labels: class numbers, ``[N]``, on the device of the images.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def hold(
    pixels: Any,
    shape: tuple[int, int, int],
    device: torch.device,
    workers: int,
    what: str,
    neighbours: int = 1,
) -> HeldImages:
    """Decode all images of a data set, and hold them on a device.

    Args:
        pixels: a data set of byte tensors ``[C, H, W]`` and class numbers.
        shape: shape of an image, ``(C, H, W)``.
        device: device that holds the images.
        workers: number of loader workers that decode.
        what: kind of images (training, validation), for messages.
        neighbours: number of processes on this machine, each of which holds its own copy.

    Raises:
        DataError: when the images do not fit into the free memory.
    """
    count, size = len(pixels), len(pixels) * shape[0] * shape[1] * shape[2]
    free = _memory(device) // (1 if device.type == "cuda" else neighbours)
    if size > free:
        raise DataError(
            f"{count} {what} images of {shape[1]} x {shape[2]} pixels take {size / 2**30:.1f} GiB, "
            f"but only {free / 2**30:.1f} GiB of memory are free for each process; leave out "
            "--data.cache."
        )
    rank_zero_info(f"Decoding {count} {what} images once, into {size / 2**20:.0f} MiB ({device}).")
    images = torch.empty(count, *shape, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    # With a generator of its own, the loader does not change the global random state.
    loader = DataLoader(pixels, batch_size=_BATCH, num_workers=workers, generator=torch.Generator())
    start = 0
    for decoded, classes in loader:
        stop = start + len(classes)
        images[start:stop], labels[start:stop] = decoded, classes
        start = stop
    return HeldImages(images.to(device), labels.to(device))


class CachedLoader:
    """A loader of batches of cached images, on the device that holds the images.

    The order of the images is the sampler's, as without cache. Crops and flips depend on seed,
    epoch and rank only, even if a pass does not begin at the first image (`skip`).

    Args:
        held: the decoded images.
        preprocessing: mean and std for normalization, and settings of the augmentation.
        sampler: sampler that gives the order; Lightning sets the sampler's epoch.
        batch_size: number of images per batch.
        training: whether the images are for training, and so may be augmented.
        drop_last: whether to leave out an incomplete last batch.
        seed: seed of the augmentation.
        with_indices: whether batches end with the indices of the images, ``[B]``.
    """

    batch_sampler = None  # Lightning reads this attribute of every loader

    def __init__(
        self,
        held: HeldImages,
        preprocessing: Preprocessing,
        sampler: DistributedSampler[Any],
        *,
        batch_size: int,
        training: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        with_indices: bool = False,
    ) -> None:
        self.held, self.preprocessing, self.sampler = held, preprocessing, sampler
        self.batch_size, self.drop_last, self.seed = batch_size, drop_last, seed
        self.augment = training and not preprocessing.no_aug
        self.with_indices = with_indices
        self._skipped = 0  # number of batches that the next pass leaves out

    def __len__(self) -> int:
        count = len(self.sampler)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def skip(self, batches: int) -> None:
        """Leave out batches at the beginning of the next pass.

        Args:
            batches: number of batches to leave out.
        """
        self._skipped = batches

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        device = self.held.images.device
        skipped, self._skipped = self._skipped, 0
        order = torch.tensor(list(self.sampler), dtype=torch.int64)
        key = (self.seed, self.sampler.epoch, self.sampler.rank)
        padding, hflip = self.preprocessing.crop_padding, self.preprocessing.hflip
        draws = draw(len(order), padding, hflip, seeded_generator(*key)).to(device)
        order = order.to(device)
        mean, std = self.preprocessing.statistics
        for number in range(skipped, len(self)):
            places = slice(number * self.batch_size, (number + 1) * self.batch_size)
            rows = order[places]
            images = self.held.images[rows]
            if self.augment:
                images = crop_and_flip(images, padding, draws.select(places))
            batch = normalize(images, mean, std), self.held.labels[rows]
            yield (*batch, rows) if self.with_indices else batch


def _memory(device: torch.device) -> int:
    """Free memory of a device in bytes; for the CPU, the machine's free memory if it is known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # the file does not exist on every system
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # sysconf does not exist on every system
        return 2**63
