"""What a run does with an average of its weights, whichever callback of Lightning's keeps it.

An average begins with its first update, which copies the weights. Until then Lightning takes the
untouched start for the average: it would be validated, saved and exported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from gpd_cli.errors import TrainingError

_TOO_MUCH = 0.05  # of the start, in an average


def find_average(trainer: Trainer) -> WeightAveraging | None:
    """The callback that keeps an average of the weights; None outside of `fit`.

    Raises:
        TrainingError: when there are several, of which a checkpoint holds one.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined] # set by its connector
    found = [c for c in callbacks if isinstance(c, WeightAveraging)]
    if len(found) > 1:
        names = " and ".join(type(callback).__name__ for callback in found)
        raise TrainingError(
            f"A run keeps one average of its weights, and here are {names}; leave one of them out "
            "of --trainer.callbacks."
        )
    return found[0] if found and found[0]._average_model is not None else None


def has_begun(average: WeightAveraging) -> bool:
    """Whether an average has had its first update."""
    return _updates(average) > 0


def settle(average: WeightAveraging, module: LightningModule) -> None:
    """Keep an average that was given no device where training is, and not in the CPU's memory.

    Lightning makes it before it moves the module there, and every update would copy all weights.

    Args:
        average: of the run.
        module: of the run, on its device.
    """
    if average._device is None:
        _model(average).to(module.device)


def keep_up(average: WeightAveraging, module: LightningModule) -> None:
    """Let an average that has not begun be the weights that are trained.

    Args:
        average: which has not begun.
        module: of the run.
    """
    copy = _model(average).module
    with torch.no_grad():
        for ours, theirs in zip(_tensors(copy), _tensors(module), strict=True):
            ours.copy_(theirs)


@contextmanager
def trained_weights(average: WeightAveraging, module: LightningModule) -> Iterator[None]:
    """The weights that are trained, where Lightning has put the average in their place."""
    average._swap_models(module)
    try:
        yield
    finally:
        average._swap_models(module)


def share_of_start(average: WeightAveraging, enough: float = 0.0) -> float:
    """How much an average holds of the weights that it began with, between 0 and 1.

    The average's own function is run on one number that was 1 at first and 0 ever since.

    Args:
        average: which has begun.
        enough: below this share, how small it is does not matter.
    """
    model = _model(average)
    number = nn.ParameterList([torch.ones((), dtype=torch.float64)]).requires_grad_(False)
    mean = AveragedModel(number, avg_fn=model.avg_fn, multi_avg_fn=model.multi_avg_fn)
    share = 1.0
    for _ in range(_updates(average)):
        mean.update_parameters(number)
        number[0].zero_()
        share = float(mean.module[0])  # type: ignore[index]
        if share < enough:
            break
    return share


def closing_remark(average: WeightAveraging) -> str | None:
    """What the user of a run that has ended should know of its average; mostly nothing."""
    updates = _updates(average)
    if not updates:
        return (
            "The average of the weights did not begin before the end of training; validation and "
            "best.ckpt took the trained weights (raw), as gpd extract does."
        )
    # A mean of all updates holds as much of the first as of any other.
    limit = max(_TOO_MUCH, 2 / updates)
    share = share_of_start(average, enough=limit)
    if share <= limit:
        return None
    return (
        f"After {updates:,} updates the averaged weights, which validation, best.ckpt and gpd "
        f"extract take, still hold {share:.0%} of those that they began with; average by "
        "gpd_cli.EMA, whose decay warms up, or with a lower decay, or export the trained weights "
        "(gpd extract --weights raw)."
    )


def _model(average: WeightAveraging) -> AveragedModel:
    model = average._average_model
    assert model is not None
    return model


def _updates(average: WeightAveraging) -> int:
    return int(_model(average).n_averaged)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return chain(module.parameters(), module.buffers())
