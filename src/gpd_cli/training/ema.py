"""An exponential moving average (EMA) of the weights, with a decay that warms up."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gpd_cli.errors import TrainingError
from gpd_cli.training.averages import AveragingFunction, copying_integers


def warmed_up_decay(updates: int, decay: float, gamma: float = 1.0, power: float = 2 / 3) -> float:
    """The decay of timm's ModelEmaV3 with warm-up: ``1 - (1 + updates / gamma) ** -power``.

    Args:
        updates: number of updates of the average so far, counting the first, which only copies the
            weights.
        decay: largest value of the decay.
        gamma: number of updates that the warm-up is measured in; larger values lengthen it.
        power: exponent of the warm-up; larger values let the decay rise faster.

    Example:
        >>> [round(warmed_up_decay(n, decay=0.9999), 4) for n in (1, 10, 1000, 10_000_000)]
        [0.37, 0.7978, 0.99, 0.9999]
    """
    warmed_up: float = 1 - (1 + updates / gamma) ** -power
    return min(decay, warmed_up)


class EMA(EMAWeightAveraging):
    """Lightning's moving average of weights and buffers, with the warm-up of timm's ModelEmaV3.

    At the k-th update after the first, the decay is ``1 - (1 + k / gamma) ** -power``, but at most
    `decay`. So the average forgets the initial weights within a few updates, and the number of
    updates that it covers grows with the run: with gamma 1 and power 2/3, it covers about the last
    40 updates after 250 of them, and the last 700 after 20,000. With gamma and power 1 the average
    is the plain mean of all weights until the decay reaches `decay`. Buffers of integers and
    booleans (indices, masks, counters) are copied from the trained network.

    Args:
        decay: largest value of the decay.
        gamma: number of updates that the warm-up is measured in; larger values lengthen it.
        power: exponent of the warm-up; larger values let the decay rise faster.
        update_every_n_steps: number of optimizer steps between updates of the average.
        update_starting_at_step: number of optimizer steps before the first update; by default none.
        update_starting_at_epoch: epoch, counted from 0, from which on there is a further update
            at the end of every epoch, before the validation.
        use_buffers: whether running statistics are averaged as well; otherwise they are copied from
            the trained network.
        device: device of the average; by default the training device.

    Raises:
        TrainingError: when gamma or power is not positive.
        ValueError: when `decay` is not in [0, 1].
    """

    def __init__(
        self,
        decay: float = 0.9999,
        gamma: float = 1.0,
        power: float = 2 / 3,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        use_buffers: bool = True,
        device: str | int | None = None,
    ) -> None:
        if not (gamma > 0 and power > 0):
            raise TrainingError(f"The EMA needs gamma and power above 0, not {gamma} and {power}.")
        super().__init__(
            device=device,
            use_buffers=use_buffers,
            decay=decay,
            update_every_n_steps=update_every_n_steps,
            update_starting_at_step=update_starting_at_step,
            update_starting_at_epoch=update_starting_at_epoch,
        )
        # Replaces the constant decay; the base class offers no other way.
        self._kwargs = {"multi_avg_fn": _averaging(decay, gamma, power)}


def _averaging(decay: float, gamma: float, power: float) -> AveragingFunction:
    """The averaging function for `torch.optim.swa_utils.AveragedModel`."""

    def update(
        averages: Sequence[Tensor], weights: Sequence[Tensor], updates: Tensor | int
    ) -> None:
        now = warmed_up_decay(int(updates), decay, gamma, power)
        # Weights may be in half precision while their average is in full precision.
        weights = [w.to(a.dtype) for a, w in zip(averages, weights, strict=True)]
        get_ema_multi_avg_fn(now)(list(averages), weights, updates)

    return copying_integers(update)
