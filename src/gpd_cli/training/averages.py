"""How a run treats an average of its weights, kept by any of Lightning's averaging callbacks.

An average begins with its first update, which copies the trained weights. Before that update
Lightning's average consists of the initial weights, which would be validated, saved and exported.

Buffers of integers and booleans (indices, masks, counters) must not be averaged. Torch averages
them all the same and rounds towards zero, which turns an index into another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from gpd_cli.errors import TrainingError
from gpd_cli.models import with_versions

_Tensors = list[Tensor] | tuple[Tensor, ...]
AveragingFunction = Callable[[_Tensors, _Tensors, Tensor | int], None]
"""A function of averages, weights and number of updates that updates the averages in place.

The tensors of one call all have the same type.
"""

_TOO_MUCH = 0.05  # largest share of the initial weights in an average before a remark is printed


class _LoadableAverage(AveragedModel):
    """Torch's `AveragedModel`, which also loads a state dict without the versions of modules.

    Lightning passes such a state dict when it loads a checkpoint.
    """

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        _widen_types(self.state_dict(keep_vars=True), state_dict)
        return super().load_state_dict(with_versions(state_dict, self), strict, assign)


def prepare_loading(averager: WeightAveraging) -> None:
    """Let an average load its tensors from a checkpoint that lacks the versions of modules.

    Args:
        averager: the run's averaging callback.
    """
    _averaged_model(averager).__class__ = _LoadableAverage


def find_averager(trainer: Trainer) -> WeightAveraging | None:
    """Find the callback that keeps an average of the weights; None without one or outside `fit`.

    Raises:
        TrainingError: when there are several callbacks, since a checkpoint holds one average.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined] # set by its connector
    found = [c for c in callbacks if isinstance(c, WeightAveraging)]
    if len(found) > 1:
        names = " and ".join(type(callback).__name__ for callback in found)
        raise TrainingError(
            f"A run keeps one average of its weights, but --trainer.callbacks has {names}; leave "
            "out one of them."
        )
    return found[0] if found and found[0]._average_model is not None else None


def has_begun(averager: WeightAveraging) -> bool:
    """Whether the average has had its first update."""
    return _updates(averager) > 0


def prepare_training(averager: WeightAveraging, module: LightningModule) -> None:
    """Prepare an average for training: device, number types, and integer buffers to be copied.

    An average without a device setting is moved to the device of the trained module. Lightning
    creates the average on the CPU, before the module is moved to its device and converted to its
    number type, so that every update would copy all weights between the two devices, and an
    average in float32 would round the weights of a run in float64 whenever it is validated.

    Args:
        averager: the run's averaging callback.
        module: the run's module, already on its device.
    """
    model = _averaged_model(averager)
    if averager._device is None:
        model.to(module.device)
    tensors = dict(enumerate(_tensors(module)))
    _widen_types(dict(enumerate(_tensors(model.module))), tensors)
    _keep_average_exact(averager)
    if model.avg_fn is not None:
        model.avg_fn = _copying_an_integer(model.avg_fn)
    else:
        model.multi_avg_fn = copying_integers(model.multi_avg_fn or get_swa_multi_avg_fn())


def _widen_types(averages: Mapping[Any, Any], others: Mapping[Any, Any]) -> None:
    """Convert an average's tensors of floating point to types that hold other tensors exactly.

    Args:
        averages: the average's tensors, by any keys; their data is replaced.
        others: the tensors to hold, by the same keys.
    """
    for key, average in averages.items():
        other = others.get(key)
        if isinstance(other, Tensor) and _has_mean(average) and _has_mean(other):
            average.data = average.data.to(torch.promote_types(average.dtype, other.dtype))


def _keep_average_exact(averager: WeightAveraging) -> None:
    """Keep validation from rounding an average whose weights are trained in a shorter type.

    Lightning swaps average and trained weights before a validation and after it, and would so
    round the average to the type of the weights.

    Args:
        averager: the run's averaging callback, changed in place.
    """
    # The class's own method, since a callback may go through several runs.
    swap, kept = partial(type(averager)._swap_models, averager), list[Tensor]()

    def swapped(pl_module: LightningModule) -> None:
        ours = list(_tensors(_averaged_model(averager).module))
        if kept:
            swap(pl_module)
            for average, exact in zip(ours, kept, strict=True):
                average.data.copy_(exact)
            kept.clear()
            return
        pairs = zip(ours, _tensors(pl_module), strict=True)
        if any(average.dtype != weight.dtype for average, weight in pairs):
            kept.extend(average.data.clone() for average in ours)
        swap(pl_module)

    averager._swap_models = swapped  # type: ignore[method-assign]


def copying_integers(averaging: AveragingFunction) -> AveragingFunction:
    """Wrap an averaging function so that tensors of integers and booleans are copied instead.

    Args:
        averaging: the averaging function, which is still called for all other tensors.
    """

    def update(averages: _Tensors, weights: _Tensors, updates: Tensor | int) -> None:
        if _has_mean(averages[0]):
            averaging(averages, weights, updates)
        else:
            for average, weight in zip(averages, weights, strict=True):
                average.copy_(weight)

    return update


def _copying_an_integer(
    averaging: Callable[[Tensor, Tensor, Tensor | int], Tensor],
) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """As `copying_integers`, for a function that returns the new average of a single tensor."""

    def updated(average: Tensor, weight: Tensor, updates: Tensor | int) -> Tensor:
        return averaging(average, weight, updates) if _has_mean(average) else weight

    return updated


def update_of_epoch(averager: WeightAveraging, trainer: Trainer, module: LightningModule) -> None:
    """Make the average's end-of-epoch update before the validation at the end of the epoch.

    Lightning makes this update after the validation and before ``best.ckpt`` is written, so that
    the checkpoint would hold other weights than were scored. Lightning makes at most one such
    update in each epoch, and skips its own after the one that is made here.

    Args:
        averager: the run's averaging callback.
        trainer: trainer of the run, in ``on_validation_start``.
        module: the run's module.
    """
    loop = trainer.fit_loop
    ends = loop.epoch_loop._is_training_done or (trainer.should_stop and loop._can_stop_early)
    if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and ends:
        averager.on_train_epoch_end(trainer, module)


def leave_out_update(averager: WeightAveraging, trainer: Trainer) -> None:
    """Leave out the average's update after a training step that is left out.

    Args:
        averager: the run's averaging callback.
        trainer: trainer of the run, before it counts the step.
    """
    averager._latest_update_step = max(averager._latest_update_step, trainer.global_step + 1)


def follow_weights(averager: WeightAveraging, module: LightningModule) -> None:
    """Copy the trained weights into an average that has not begun.

    Args:
        averager: the run's averaging callback.
        module: the run's module.
    """
    copy = _averaged_model(averager).module
    with torch.no_grad():
        for ours, theirs in zip(_tensors(copy), _tensors(module), strict=True):
            ours.copy_(theirs)


@contextmanager
def trained_weights(averager: WeightAveraging, module: LightningModule) -> Iterator[None]:
    """Put the trained weights into the module for the duration of this context.

    To be used while Lightning has swapped the averaged weights into the module.

    Args:
        averager: the run's averaging callback.
        module: the run's module.
    """
    averager._swap_models(module)
    try:
        yield
    finally:
        averager._swap_models(module)


def share_of_start(averager: WeightAveraging, enough: float = 0.0) -> float:
    """Compute the share of the initial weights in an average, from 0 to 1.

    The callback's averaging function is run on a single number that is 1 at the first update and 0
    at all later ones; the resulting average is the share.

    Args:
        averager: an averaging callback whose average has begun.
        enough: the computation stops as soon as the share is below this value.
    """
    model = _averaged_model(averager)
    number = nn.ParameterList([torch.ones((), dtype=torch.float64)]).requires_grad_(False)
    mean = AveragedModel(number, avg_fn=model.avg_fn, multi_avg_fn=model.multi_avg_fn)
    share = 1.0
    for _ in range(_updates(averager)):
        mean.update_parameters(number)
        number[0].zero_()
        share = float(mean.module[0])  # type: ignore[index]
        if share < enough:
            break
    return share


def closing_remark(averager: WeightAveraging) -> str | None:
    """Return a remark for the user about the average of a finished run, or None if all is well."""
    updates = _updates(averager)
    if not updates:
        return (
            "The average of the weights did not begin before the end of training; validation and "
            "best.ckpt used the trained weights (raw), as gpd extract does."
        )
    # In a plain mean of all updates, the first has the same weight as any other.
    limit = max(_TOO_MUCH, 2 / updates)
    share = share_of_start(averager, enough=limit)
    if share <= limit:
        return None
    return (
        f"After {updates:,} updates, {share:.0%} of the averaged weights (used by validation, "
        "best.ckpt and gpd extract) still come from the initial weights; average by gpd_cli.EMA, "
        "whose decay warms up, or with a lower decay, or export the trained weights (gpd extract "
        "--weights raw)."
    )


def _averaged_model(averager: WeightAveraging) -> AveragedModel:
    model = averager._average_model
    assert model is not None
    return model


def _updates(averager: WeightAveraging) -> int:
    return int(_averaged_model(averager).n_averaged)


def _has_mean(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
