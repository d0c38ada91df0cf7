"""Random numbers: of each process its own, and reproducible, also after a resumption."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gpd_cli.data.draws import start_generators
from gpd_cli.distributed.world import gathered
from gpd_cli.forms import FormError, anything, check_form, maybe


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
    random.setstate(_of_python(state))
    np.random.set_state(_of_numpy(state))
    torch.set_rng_state(state["torch"].cpu())
    if device.type != "cpu" and state["device"] is not None:
        torch.get_device_module(device).set_rng_state(state["device"].cpu(), device)


def random_state_form(value: Any, place: str) -> None:
    """The form of a value of `random_state`, for `gpd_cli.forms.check_form`.

    Generators that nothing draws from take up the state, since only they know which states they
    can have. That of another device than the CPU is left to the device.

    Args:
        value: the value.
        place: words for it.

    Raises:
        FormError: when a generator cannot take it up.
    """
    form = {"python": [anything], "numpy": [anything], "torch": Tensor, "device": maybe(Tensor)}
    check_form(value, form, place)
    takers: dict[str, Callable[[], object]] = {
        "python": lambda: random.Random().setstate(_of_python(value)),
        "numpy": lambda: np.random.RandomState().set_state(_of_numpy(value)),
        "torch": lambda: torch.Generator().set_state(value["torch"].cpu()),
    }
    for name, take in takers.items():
        try:
            take()
        except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise FormError(f"{place}, {name} is no state of a random generator") from error


def _of_python(state: Mapping[str, Any]) -> tuple[Any, ...]:
    version, words, gauss = state["python"]
    return version, tuple(words.tolist()), gauss


def _of_numpy(state: Mapping[str, Any]) -> tuple[Any, ...]:
    keys, position, has_gauss, cached = state["numpy"]
    return "MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached
