"""Chance that differs between the processes of a run, and is the same when the run is repeated."""

from __future__ import annotations

import random

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class RankSeeds(Callback):
    """Let each of several processes draw numbers of its own while it trains.

    Networks have to start equal everywhere, so processes are seeded equally. But if they then drew
    equal numbers, all would mix with one share and drop the same paths in a step, which makes large
    batches less varied than they are in one process.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed anew, by what the process was seeded with, its rank and the step it goes on from."""
        if trainer.world_size == 1:
            return
        origin = (torch.initial_seed() % 2**63, trainer.global_rank, trainer.global_step)
        first, second, third = np.random.SeedSequence(origin).generate_state(3).tolist()
        random.seed(first)
        np.random.seed(second)
        torch.manual_seed(third)
