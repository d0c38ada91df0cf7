"""Resuming a run, partly from its checkpoint and partly from its present settings.

Weights, the optimizer's state (such as momentum) and the position in the schedule come from the
checkpoint. Everything else comes from the present settings, so that a run can be resumed for more
epochs, or with another learning rate, weight decay or schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn
from torch.optim import Optimizer

from gpd_cli.errors import GpdError, TrainingError
from gpd_cli.training.optimizers import OptimizerSettings, base_optimizer, make_optimizer

_COUNTER = "lookahead_step"  # Lookahead keeps this counter of updates among a group's settings


class FinishedError(TrainingError):
    """Raised when the run to resume has been trained to its end already."""


def check_unfinished(checkpoint: Mapping[str, Any], max_epochs: int | None, max_steps: int) -> None:
    """Check that there is something left to train.

    Args:
        checkpoint: the checkpoint to resume from.
        max_epochs: length of the resumed run in epochs; -1 or None for no limit.
        max_steps: length of the resumed run in updates; -1 for no limit.

    Raises:
        FinishedError: when the checkpoint's run has reached one of these limits already.
    """
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    done = {"max_epochs": (epochs, max_epochs), "max_steps": (checkpoint["global_step"], max_steps)}
    for name, (reached, limit) in done.items():
        if limit is not None and 0 <= limit <= reached:
            unit = name.removeprefix("max_")
            raise FinishedError(
                f"The run of the checkpoint is finished: it was trained for {reached} {unit}, and "
                f"--trainer.{name} is {limit}; raise --trainer.{name} to go on."
            )


def reopen_epoch(checkpoint: Mapping[str, Any], batches: int | None) -> None:
    """Reopen the last epoch of a checkpoint, if a limit of updates or an early stop cut it short.

    Lightning counts such an epoch as finished, so that a resumed run would never see its rest.

    Args:
        checkpoint: the checkpoint to resume from, changed in place.
        batches: number of batches in an epoch of the checkpoint's run; None if it is not known.
    """
    loops = checkpoint["loops"]["fit_loop"]
    done, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    is_whole = done["is_last_batch"] or batches is None or done["current"]["processed"] >= batches
    if is_whole or epochs["current"]["processed"] < epochs["current"]["started"]:
        return
    for counts in (epochs["current"], epochs["total"]):
        counts["processed"] -= 1
        counts["completed"] = min(counts["completed"], counts["processed"])


def check_time_left(checkpoint: Mapping[str, Any], callbacks: Sequence[Callback]) -> None:
    """Check that a run with a time limit has time left.

    Lightning's timer continues from the time in the checkpoint, and would otherwise stop the run
    before its first step.

    Args:
        checkpoint: the checkpoint to resume from.
        callbacks: callbacks of the resumed run, its timer among them.

    Raises:
        FinishedError: when the checkpoint's run has used up the time limit already.
    """
    for timer in callbacks:
        if not isinstance(timer, Timer) or timer._duration is None:
            continue
        stored = checkpoint.get("callbacks", {}).get(timer.state_key, {})
        took = float(stored.get("time_elapsed", {}).get("train", 0.0))
        if took >= timer._duration:
            reached, limit = (str(timedelta(seconds=int(x))) for x in (took, timer._duration))
            raise FinishedError(
                f"The run of the checkpoint is finished: it was trained for {reached}, and "
                f"--trainer.max_time is {limit}, in all; raise --trainer.max_time to go on."
            )


def check_same_optimizer(found: Mapping[str, Any], now: OptimizerSettings) -> None:
    """Check that this run's optimizer can load the state of the checkpoint's optimizer.

    Args:
        found: settings of the checkpoint's optimizer.
        now: settings of this run's optimizer.

    Raises:
        TrainingError: when the optimizers' states or parameter groups have different forms.
    """
    known = {field.name for field in fields(OptimizerSettings)}
    before = OptimizerSettings(**{k: v for k, v in found.items() if k in known})
    if before.decay_all != now.decay_all:
        raise TrainingError(
            "The checkpoint's optimizer groups the weights in another way; set "
            f"--model.optimizer.decay_all {str(before.decay_all).lower()}, as when the run was "
            "started."
        )
    if _shaping(before) == _shaping(now):
        return
    names = _remembered(before)
    if names is None or names != _remembered(now):
        raise TrainingError(
            f"The checkpoint's optimizer ({_named(before)}) keeps other state than that "
            f"of this run ({_named(now)}); resume with --model.optimizer.opt {before.opt} and its "
            "settings, or start a new run from the extracted student (--model.student_weights)."
        )


def _shaping(settings: OptimizerSettings) -> tuple[Any, ...]:
    """The settings that the form of an optimizer's state depends on."""
    return settings.opt.lower(), settings.opt_args, settings.momentum == 0


def _named(settings: OptimizerSettings) -> str:
    arguments = "".join(f", {name} {value}" for name, value in settings.opt_args.items())
    return f"{settings.opt}, momentum {settings.momentum}{arguments}"


def _remembered(settings: OptimizerSettings) -> set[tuple[str, tuple[int, ...]]] | None:
    """Names and shapes of the state that an optimizer keeps for a small kernel and its bias.

    Returns:
        Pairs of name and shape; None if the optimizer cannot be made or fails in its step.
    """
    network = nn.Conv2d(2, 2, 3)
    try:
        optimizer = make_optimizer(network, settings, set())
        for parameter in network.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
        states = optimizer.state_dict()["state"].values()
    except (GpdError, RuntimeError):
        return None
    return {
        (name, tuple(getattr(value, "shape", ())))
        for state in states
        for name, value in state.items()
        if value is not None
    }


def group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of each parameter group of a newly made optimizer, such as the learning rate."""
    return [
        {name: value for name, value in group.items() if name not in ("params", _COUNTER)}
        for group in optimizer.param_groups
    ]


def keep_settings(optimizer: Optimizer, settings: Sequence[Mapping[str, Any]]) -> None:
    """Restore an optimizer's own settings after it has loaded a checkpoint.

    Loading overwrites the settings of the parameter groups. Counters of updates among the loaded
    settings are kept. The loaded state is brought into the device and memory format that the
    present settings need, see `arrange_state`.

    Args:
        optimizer: the optimizer, changed in place.
        settings: `group_settings` of the optimizer before the checkpoint was loaded.
    """
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.pop("initial_lr", None)  # set by the schedule of the checkpoint's run
        group.update(own)
        _place_counters(optimizer, group)
    arrange_state(optimizer)


def arrange_state(optimizer: Optimizer) -> None:
    """Bring an optimizer's state tensors into the memory format of their weights.

    Tensors from a checkpoint have the memory format in which they were saved, and the resumed run
    may use another one (channels last). Fused updates on the CPU traverse weight and momentum in
    memory order, so that with different formats the momentum of one element would be added to
    another element.

    Args:
        optimizer: the optimizer, whose state is changed in place.
    """
    for weight, state in base_optimizer(optimizer).state.items():
        for name, value in state.items():
            is_alike = isinstance(value, Tensor) and value.shape == weight.shape
            if is_alike and value.stride() != weight.stride():
                arranged = torch.empty_like(weight, dtype=value.dtype, device=value.device)
                state[name] = arranged.requires_grad_(False).copy_(value)


def _place_counters(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    """Move Adam's counters of updates to the device on which the update reads them.

    A fused update on a GPU reads the counter from the GPU; an update that is neither fused nor
    capturable reads it from the CPU. On loading, torch places the counters according to the
    checkpoint's settings and not according to the present ones.

    Args:
        optimizer: the optimizer, whose state is changed in place.
        group: a parameter group with its present settings.
    """
    if "fused" not in group:
        return  # an optimizer of timm's own, which has only one kind of update
    for weight in group["params"]:
        counter = optimizer.state.get(weight, {}).get("step")
        if isinstance(counter, Tensor):
            if group["fused"]:
                counter = counter.to(weight.device, torch.float32)
            elif not group.get("capturable"):
                counter = counter.cpu()
            optimizer.state[weight]["step"] = counter


class ScheduleClock:
    """The position of a run in its learning-rate schedule, in updates.

    The position is normally the number of updates that were made. But if a run whose length is
    given in epochs is resumed with another number of updates per epoch, the position in epochs is
    kept, and the position in updates changes accordingly.

    Attributes:
        updates_per_epoch: optimizer steps per epoch; None if the run's length is not given in
            epochs.
    """

    def __init__(self) -> None:
        self.updates_per_epoch: int | None = None
        self._ahead = 0  # position in the schedule minus the number of updates made

    def updates(self, global_step: int) -> int:
        """The position in the schedule after ``global_step`` updates."""
        return global_step + self._ahead

    def state(self, global_step: int, in_epoch: int) -> dict[str, int | None]:
        """The position as plain values, for a checkpoint.

        Args:
            global_step: number of updates made in the run.
            in_epoch: number of updates made in the present epoch.
        """
        return {
            "updates": self.updates(global_step),
            "updates_per_epoch": self.updates_per_epoch,
            "updates_in_epoch": in_epoch,
        }

    def resume(self, state: Mapping[str, int | None], global_step: int, in_epoch: int) -> None:
        """Continue from the position of a checkpoint.

        Args:
            state: the output of `state` in the checkpoint; empty in checkpoints of earlier
                versions.
            global_step: number of updates made until the checkpoint.
            in_epoch: number of updates done in the present epoch, as the resumed run divides it.
        """
        updates, before, now = (
            state.get("updates"),
            state.get("updates_per_epoch"),
            self.updates_per_epoch,
        )
        if updates is None or before is None or now is None:
            return
        had = state.get("updates_in_epoch")
        if had is None:  # checkpoints of earlier versions lack this entry
            had = in_epoch = 0
        # Past epochs are converted to the present number of updates per epoch; of the epoch that
        # is under way, `in_epoch` updates are done.
        self._ahead = round((updates - had) * now / before) + in_epoch - global_step
