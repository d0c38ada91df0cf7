"""Samplers: the images that a process sees, and their order."""

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
    """The process that loads data, among all that train together.

    Args:
        rank: rank of this process.
        world: world size, the number of processes.
        neighbours: number of processes on this machine, this one included.
        device: device of this process.
        epoch: returns the epoch that is about to begin; None without trainer.
    """

    rank: int = 0
    world: int = 1
    neighbours: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    epoch: Callable[[], int] | None = None

    @classmethod
    def of(cls, trainer: Any) -> Share:
        """The process that a trainer runs in; without trainer, the only process."""
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
    spread over the processes. An epoch is as long as without repetition, so that it sees one in
    `repeats` of the images, which are chosen by seed and epoch only.

    Args:
        images: the data set, or any object of the same length.
        repeats: how often each chosen image comes.
        num_replicas: world size.
        rank: rank of this process.
        seed: seed of the shuffling order.
    """

    def __init__(self, images: Any, repeats: int, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(images, num_replicas=num_replicas, rank=rank, seed=seed)
        # Rounded to a multiple of 256, as in DeiT, if there are that many images.
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
    """The sampler of training, which never draws from the global random state.

    Args:
        images: the data set, or any object of the same length.
        share: rank and world size of this process.
        seed: seed of the shuffling order.
        repeats: number of times that repeated augmentation shows an image; 0 or 1 for none.
    """
    if repeats > 1:
        return RepeatedSampler(images, repeats, share.world, share.rank, seed)
    return DistributedSampler(images, num_replicas=share.world, rank=share.rank, seed=seed)


def evaluation_sampler(images: Any, share: Share) -> DistributedSampler[Any]:
    """The sampler of evaluation: no image twice, so that processes may score different numbers.

    Args:
        images: the data set, or any object of the same length.
        share: rank and world size of this process.

    Returns:
        A sampler in fixed order. With fewer images than processes, every process has all images.
    """
    world, rank = (share.world, share.rank) if len(images) >= share.world else (1, 0)
    return UnrepeatedDistributedSampler(images, num_replicas=world, rank=rank, shuffle=False)
