"""Checks of the training state in a checkpoint: everything that it holds besides the networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import AdafactorBigVision, NvNovoGrad
from timm.optim.kron import Kron, safe_flatten
from torch import Tensor
from torch.optim import Optimizer

from gpd_cli.distributed.seeds import random_state_form
from gpd_cli.errors import WeightsError
from gpd_cli.forms import FormError, check_form, maybe, within
from gpd_cli.training.epoch_length import ENTRY, check_epoch_length
from gpd_cli.training.optimizers import base_optimizer

_COUNT = within(0, 2**53)
_TURNS = {"ready": _COUNT, "completed": _COUNT, "started": _COUNT, "processed": _COUNT}
_PROGRESS = {"total": _TURNS, "current": _TURNS}
_STATE = {
    "global_step": _COUNT,
    "loops": {
        "fit_loop": {
            "epoch_progress": _PROGRESS,
            "epoch_loop.batch_progress": _PROGRESS,
            "epoch_loop.state_dict": {"_batches_that_stepped": _COUNT},
        }
    },
    "callbacks": {str: {}},
    "optimizer_states": [{"state": {int: {}}, "param_groups": [{"params": [int]}]}],
}
# State tensors with one entry per element of the weight. Some optimizers keep further tensors:
# rows, columns and matrices.
_OF_THE_SHAPE = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg")
# NovoGrad keeps a single number per weight: the mean square of the whole weight's gradient.
_OF_A_WEIGHT: dict[type, tuple[str, ...]] = {NvNovoGrad: ("exp_avg_sq", "max_exp_avg_sq")}
# Means over one axis of a weight; the axis is kept, with length 1.
_MEANS: dict[type, tuple[str, ...]] = {AdafactorBigVision: ("exp_avg_sq_r", "exp_avg_sq_c")}
_SUMS = {str: {"value": Tensor, "options": {}}}
_HITS = {str: {str: Tensor}}
# Forms of the entries that gpd adds to checkpoints; checkpoints of earlier versions may lack them.
_OWN = {
    "epoch_state": maybe(
        {
            "processes": [{"shown": {str: Tensor}}],
            "values": {str: Tensor},
            "row": maybe({"step": _COUNT, "values": {}}),
            "rows": [_COUNT],
            "average_epoch": maybe(int),
        }
    ),
    ENTRY: check_epoch_length,
    "random_states": maybe([random_state_form]),
    "schedule": {"updates": maybe(_COUNT), "updates_per_epoch": maybe(within(1, 2**53))},
    "static_scores": {"of": [str], "values": {str: float}},
}
# Entries of `schedule` that checkpoints of earlier versions lack.
_LATER_IN_SCHEDULE = {"rate_factor": float, "updates_in_epoch": _COUNT}


def check_training_state(checkpoint: Mapping[str, Any]) -> None:
    """Check that a checkpoint has the training state that a run needs to go on from it.

    Args:
        checkpoint: content of the checkpoint file.

    Raises:
        WeightsError: when the checkpoint was saved without the state of the optimizer.
        FormError: when a part is missing, or does not have the expected form.
    """
    if "optimizer_states" not in checkpoint:
        raise WeightsError(
            "No run can go on from the checkpoint, which has no state of the optimizer (as one "
            "saved with save_weights_only); give last.ckpt, or start a new run from its student "
            "(gpd extract, then --model.student_weights)."
        )
    check_form(checkpoint, _STATE, "the checkpoint")
    for name, form in _OWN.items():
        if checkpoint.get(name):
            check_form(checkpoint[name], form, f"the checkpoint, {name}")
    schedule = checkpoint.get("schedule") or {}
    for name, form in _LATER_IN_SCHEDULE.items():
        check_form(schedule.get(name, 0), form, f"the checkpoint, schedule, {name}")
    epoch = checkpoint.get("epoch_state") or {}
    check_form(epoch.get("gradients", {}), {str: Tensor}, "the checkpoint, gradients")
    for own in epoch.get("processes", []):
        check_form(own.get("sums", {}), _SUMS, "the checkpoint, sums of the epoch")
        check_form(own.get("hits", {}), _HITS, "the checkpoint, hits of the epoch")


def check_optimizer_state(optimizer: Optimizer) -> None:
    """Check the state that an optimizer has loaded from a checkpoint.

    Args:
        optimizer: the run's optimizer, after `load_state_dict`.

    Raises:
        FormError: when a tensor does not have the shape of its weight, or is not finite.
    """
    optimizer = base_optimizer(optimizer)
    for group in optimizer.param_groups:
        for weight in group["params"]:
            state = optimizer.state.get(weight, {})
            check_form(state, {}, "the optimizer's state of a weight")
            for name, value in state.items():
                if not isinstance(value, Tensor):
                    continue
                place = f"the optimizer's {name} of a weight of shape {list(weight.shape)}"
                if value.is_complex() or not torch.isfinite(value).all():
                    raise FormError(f"{place} is complex, NaN or infinite")
                if not _fits(value, name, weight, type(optimizer), group):
                    raise FormError(f"{place} has the shape {list(value.shape)}")


def _fits(
    value: Tensor, name: str, weight: Tensor, optimizer: type, group: Mapping[str, Any]
) -> bool:
    """Whether a state tensor has a shape that the optimizer can have given it.

    Args:
        value: the state tensor.
        name: name of the state tensor, such as ``exp_avg``.
        weight: the weight that the state belongs to.
        optimizer: class of the optimizer.
        group: settings of the parameter group that the weight is in.
    """
    shape = weight.shape
    if value.ndim == 0 and name in _OF_A_WEIGHT.get(optimizer, ()):
        return True
    if issubclass(optimizer, Kron) and name == "momentum_buffer" and group["flatten"]:
        shape = safe_flatten(weight, group["flatten_start_dim"], group["flatten_end_dim"]).shape
    elif name in _MEANS.get(optimizer, ()):
        others = [
            length for length, whole in zip(value.shape, shape, strict=False) if length != whole
        ]
        return value.ndim == weight.ndim and others in ([], [1])
    elif name not in _OF_THE_SHAPE and (value.ndim != weight.ndim or value.ndim == 0):
        return True  # a number, a row, a column or a matrix
    return value.shape == shape
