"""Random seeds that differ between the processes of a run, and are reproducible."""

from __future__ import annotations

import random

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class RankSeeds(Callback):
    """Give each of several processes random numbers of its own during training.

    Networks have to start equal everywhere, so processes are seeded equally. But with equal random
    numbers in training, all processes would mix images in the same proportion and drop the same
    paths in a step, so that large batches would be less varied than in a single process.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed anew from the process's first seed, its rank, and the first step."""
        if trainer.world_size == 1:
            return
        origin = (torch.initial_seed() % 2**63, trainer.global_rank, trainer.global_step)
        first, second, third = np.random.SeedSequence(origin).generate_state(3).tolist()
        random.seed(first)
        np.random.seed(second)
        torch.manual_seed(third)
