"""Which images a process sees, and in which order."""

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
    """Which part of the data is this process's.

    Args:
        rank: number of this process among all that train together.
        world: their number.
        neighbours: how many of them run on this machine, this one included.
        device: where this process computes.
        epoch: tells the epoch that is about to begin; None where nobody counts.
    """

    rank: int = 0
    world: int = 1
    neighbours: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    epoch: Callable[[], int] | None = None

    @classmethod
    def of(cls, trainer: Any) -> Share:
        """The share of the process that a trainer runs in, or everything without trainer."""
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
    """Repeated augmentation (Hoffer et al., 2020), as DeiT does it, through timm's sampler.

    Each chosen image comes `repeats` times in a row, augmented anew each time; over several
    processes the copies are dealt out. An epoch is as long as without repetition, so that it sees
    one in `repeats` of the images, others in each epoch. Seed and epoch alone decide which.

    Args:
        images: the data set, or anything of its length.
        repeats: how often each chosen image comes.
        num_replicas: number of processes.
        rank: number of this process.
        seed: of the order.
    """

    def __init__(self, images: Any, repeats: int, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(images, num_replicas=num_replicas, rank=rank, seed=seed)
        # Rounded to whole batches of 256, as in DeiT, where there are so many images.
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
    """The order of training: of one process too it is drawn from no global state.

    Args:
        images: the data set, or anything of its length.
        share: this process's.
        seed: of the order.
        repeats: of repeated augmentation; 0 or 1 for none.
    """
    if repeats > 1:
        return RepeatedSampler(images, repeats, share.world, share.rank, seed)
    return DistributedSampler(images, num_replicas=share.world, rank=share.rank, seed=seed)


def evaluation_sampler(images: Any, share: Share) -> DistributedSampler[Any]:
    """Every image once: processes may score different numbers of images, but none twice.

    Args:
        images: the data set, or anything of its length.
        share: this process's.

    Returns:
        A sampler in fixed order; of too few images to go round, all, for every process.
    """
    world, rank = (share.world, share.rank) if len(images) >= share.world else (1, 0)
    return UnrepeatedDistributedSampler(images, num_replicas=world, rank=rank, shuffle=False)
