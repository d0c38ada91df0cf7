"""Random numbers: of each process its own, and reproducible, also after a resumption."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gpd_cli.data.draws import start_generators
from gpd_cli.distributed.world import gathered


class RandomStates(Callback):
    """Give each process random numbers of its own in training, and save the generators' states.

    Networks have to start equal everywhere, so processes are seeded equally. But with equal random
    numbers in training, all processes would mix images in the same proportion and drop the same
    paths in a step, so that large batches would be less varied than in a single process.

    A run that is resumed with the same number of processes draws the same numbers as without the
    interruption.
    """

    def __init__(self) -> None:
        self._resumed: list[dict[str, Any]] | None = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the states of all processes."""
        checkpoint["random_states"] = gathered(random_state(pl_module.device))

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the states until training starts, since the setup draws numbers, too."""
        self._resumed = checkpoint.get("random_states")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore this process's state, or seed anew from first seed, rank and first step."""
        states, self._resumed = self._resumed, None
        if states is not None and len(states) == trainer.world_size:
            set_random_state(states[trainer.global_rank], pl_module.device)
            return
        if trainer.world_size == 1:
            return
        origin = (torch.initial_seed() % 2**63, trainer.global_rank, trainer.global_step)
        start_generators(origin, torch.manual_seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the random generators of Python, NumPy and torch, as plain values and tensors.

    Args:
        device: the device whose generator is saved besides the CPU's.
    """
    version, words, gauss = random.getstate()
    state: Any = np.random.get_state()
    _, keys, position, has_gauss, cached = state
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "device": None
        if device.type == "cpu"
        else torch.get_device_module(device).get_rng_state(device),
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore a state of `random_state`.

    Args:
        state: the state.
        device: the device of this process.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if device.type != "cpu" and state["device"] is not None:
        torch.get_device_module(device).set_rng_state(state["device"].cpu(), device)
