"""Random numbers that differ between processes, and are reproducible even in a resumed run."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gpd_cli.distributed.world import gathered
from gpd_cli.forms import FormError, anything, check_form, maybe
from gpd_cli.generators import start_generators


class RandomStates(Callback):
    """Give each process its own random numbers in training, and save the generators' states.

    The networks have to be equal in all processes at the start, so all processes have the same
    seed. But with the same random numbers in training, all processes would mix images in the same
    proportion and drop the same paths in a step, so that a large batch would vary less than in a
    single process.

    A run that is resumed with the same number of processes draws the same numbers as an
    uninterrupted run.
    """

    def __init__(self) -> None:
        self._resumed: list[dict[str, Any]] | None = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the states of the random generators of all processes."""
        checkpoint["random_states"] = gathered(random_state(pl_module.device))

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the states until training starts, since the setup draws random numbers as well."""
        self._resumed = checkpoint.get("random_states")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore this process's states, or seed its generators from seed, rank and step."""
        states, self._resumed = self._resumed, None
        if states is not None and len(states) == trainer.world_size:
            set_random_state(states[trainer.global_rank], pl_module.device)
            return
        if trainer.world_size == 1:
            return
        origin = (torch.initial_seed() % 2**63, trainer.global_rank, trainer.global_step)
        start_generators(origin, torch.manual_seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """States of the random generators of Python, NumPy and torch, as plain values and tensors.

    Args:
        device: the training device; if this is not the CPU, the state of torch's generator on this
            device is included.
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
    """Restore the states of the random generators.

    Args:
        state: the output of `random_state`.
        device: the training device of this process.
    """
    random.setstate(_python_state(state))
    np.random.set_state(_numpy_state(state))
    torch.set_rng_state(state["torch"].cpu())
    if device.type != "cpu" and state["device"] is not None:
        torch.get_device_module(device).set_rng_state(state["device"].cpu(), device)


def random_state_form(value: Any, place: str) -> None:
    """Check that a value has the form of an output of `random_state`.

    This is a form for `gpd_cli.forms.check_form`. The states are loaded into new generators, since
    only a generator knows which states are valid. The state for a device other than the CPU is not
    checked.

    Args:
        value: the value to check.
        place: words for the value in error messages.

    Raises:
        FormError: when the value has another form, or a generator refuses its state.
    """
    form = {"python": [anything], "numpy": [anything], "torch": Tensor, "device": maybe(Tensor)}
    check_form(value, form, place)
    takers: dict[str, Callable[[], object]] = {
        "python": lambda: random.Random().setstate(_python_state(value)),
        "numpy": lambda: np.random.RandomState().set_state(_numpy_state(value)),
        "torch": lambda: torch.Generator().set_state(value["torch"].cpu()),
    }
    for name, take in takers.items():
        try:
            take()
        except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise FormError(f"{place}, {name} is no state of a random generator") from error


def _python_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    version, words, gauss = state["python"]
    return version, tuple(words.tolist()), gauss


def _numpy_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    keys, position, has_gauss, cached = state["numpy"]
    return "MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached
