"""Samplers, which choose the images that a process sees, and the order of these images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler


@dataclass(frozen=True)
class Share:
    """The share of one process in the loading of data.

    Args:
        rank: rank of this process.
        world: world size, the number of processes that train together.
        neighbours: number of these processes on this machine, including this one.
        device: device of this process.
        epoch: function that returns the epoch that is about to begin; None without a trainer.
    """

    rank: int = 0
    world: int = 1
    neighbours: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    epoch: Callable[[], int] | None = None

    @classmethod
    def of(cls, trainer: Any) -> Share:
        """The share of the process that a trainer runs in.

        Args:
            trainer: the trainer; None for a single process without one.
        """
        if trainer is None:
            return cls()
        shards = getattr(trainer, "distributed_sampler_kwargs", None)
        strategy = getattr(trainer, "strategy", None)
        return cls(
            rank=shards["rank"] if shards else 0,
            world=shards["num_replicas"] if shards else 1,
            neighbours=getattr(trainer, "num_devices", 1) if shards else 1,
            device=cls.device if strategy is None else strategy.root_device,
            epoch=lambda: int(trainer.current_epoch),
        )


class RepeatedSampler(DistributedSampler[Any]):
    """Repeated augmentation (Hoffer et al., 2020), as in DeiT, by timm's sampler.

    Each chosen image comes `repeats` times in a row, augmented anew each time; the repetitions are
    spread over the processes. An epoch is as long as without repetition, and so uses only one in
    `repeats` of the images. The choice of images depends on seed and epoch only.

    Args:
        images: the data set, or any object of the same length.
        repeats: number of times that each chosen image comes.
        num_replicas: world size.
        rank: rank of this process.
        seed: seed of the shuffling order.
    """

    def __init__(self, images: Any, repeats: int, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(images, num_replicas=num_replicas, rank=rank, seed=seed)
        # The number of images is rounded to a multiple of 256, as in DeiT, if it is at least 256.
        self._repeated = RepeatAugSampler(
            images,
            num_replicas=num_replicas,
            rank=rank,
            num_repeats=repeats,
            selected_round=256 if len(images) >= 256 else 0,
        )

    def __iter__(self) -> Iterator[Any]:
        self._repeated.set_epoch(self.seed + self.epoch)
        return iter(self._repeated)

    def __len__(self) -> int:
        return len(self._repeated)


def training_sampler(
    images: Any, share: Share, seed: int, repeats: int = 0
) -> DistributedSampler[Any]:
    """Make the sampler for training, which never draws from the global random state.

    Args:
        images: the data set, or any object of the same length.
        share: rank and world size of this process.
        seed: seed of the shuffling order.
        repeats: number of times that repeated augmentation shows an image; 0 or 1 for no
            repetition.
    """
    if repeats > 1:
        return RepeatedSampler(images, repeats, share.world, share.rank, seed)
    return DistributedSampler(images, num_replicas=share.world, rank=share.rank, seed=seed)


def evaluation_sampler(images: Any, share: Share) -> DistributedSampler[Any]:
    """Make the sampler for evaluation, which has a fixed order and repeats no image.

    So processes may have different numbers of images. But if there are fewer images than processes,
    every process gets all images.

    Args:
        images: the data set, or any object of the same length.
        share: rank and world size of this process.
    """
    world, rank = (share.world, share.rank) if len(images) >= share.world else (1, 0)
    return UnrepeatedDistributedSampler(images, num_replicas=world, rank=rank, shuffle=False)
