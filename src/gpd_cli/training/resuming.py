"""What a run that goes on takes from its checkpoint, and what from its own settings.

From the checkpoint: weights, the optimizer's memory (momentum and the like) and how far the
schedule has come. From the settings: everything else, so that a run can go on for longer, with
another learning rate, weight decay or schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gpd_cli.errors import GpdError, TrainingError
from gpd_cli.training.optimizers import OptimizerSettings, make_optimizer

_COUNTER = "lookahead_step"  # counts updates, but is there from the start like a setting


class FinishedError(TrainingError):
    """The run that is to go on has been trained to its end."""


def check_unfinished(checkpoint: Mapping[str, Any], max_epochs: int | None, max_steps: int) -> None:
    """Check that there is something left to train.

    Args:
        checkpoint: the one to go on from.
        max_epochs: length of the run that goes on; -1 or None for no limit.
        max_steps: likewise, in updates.

    Raises:
        FinishedError: when it is as long already.
    """
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    done = {"max_epochs": (epochs, max_epochs), "max_steps": (checkpoint["global_step"], max_steps)}
    for name, (reached, limit) in done.items():
        if limit is not None and 0 <= limit <= reached:
            unit = name.removeprefix("max_")
            raise FinishedError(
                f"The run of the checkpoint is finished: it was trained for {reached} {unit}, and "
                f"--trainer.{name} is {limit}; to go on, set --trainer.{name} to more."
            )


def check_same_optimizer(found: Mapping[str, Any], now: OptimizerSettings) -> None:
    """Check that an optimizer can take up what that of a checkpoint remembers.

    Args:
        found: settings of the checkpoint's optimizer.
        now: those of the run.

    Raises:
        TrainingError: when it cannot.
    """
    known = {field.name for field in fields(OptimizerSettings)}
    before = OptimizerSettings(**{k: v for k, v in found.items() if k in known})
    if before.decay_all != now.decay_all:
        raise TrainingError(
            "The checkpoint's optimizer has its weights in other groups; set "
            f"--model.optimizer.decay_all {str(before.decay_all).lower()}, as it was."
        )
    if _shaping(before) == _shaping(now):
        return
    names = _remembered(before)
    if names is None or names != _remembered(now):
        raise TrainingError(
            f"The checkpoint's optimizer ({_named(before)}) remembers other things than this run's "
            f"({_named(now)}); resume with --model.optimizer.opt {before.opt} and its settings, or "
            "start anew from the extracted student (--model.student_weights)."
        )


def _shaping(settings: OptimizerSettings) -> tuple[Any, ...]:
    """The settings that an optimizer's memory depends on."""
    return settings.opt.lower(), settings.opt_args, settings.momentum == 0


def _named(settings: OptimizerSettings) -> str:
    arguments = "".join(f", {name} {value}" for name, value in settings.opt_args.items())
    return f"{settings.opt}, momentum {settings.momentum}{arguments}"


def _remembered(settings: OptimizerSettings) -> set[str] | None:
    """Names of what an optimizer remembers of each weight; None where that cannot be told."""
    network = nn.Linear(2, 2)
    try:
        optimizer = make_optimizer(network, settings, set())
        for parameter in network.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
        states = optimizer.state_dict()["state"].values()
    except (GpdError, RuntimeError):
        return None
    return {name for state in states for name, value in state.items() if value is not None}


def group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of an optimizer that has just been made, per group of parameters."""
    return [
        {name: value for name, value in group.items() if name not in ("params", _COUNTER)}
        for group in optimizer.param_groups
    ]


def keep_settings(optimizer: Optimizer, settings: Sequence[Mapping[str, Any]]) -> None:
    """Give an optimizer its settings back, once it has read a checkpoint.

    What the groups of the checkpoint have besides, counters of updates, stays.

    Args:
        optimizer: changed in place.
        settings: see `group_settings`.
    """
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.pop("initial_lr", None)  # left by a schedule, where there is none any more
        group.update(own)


class ScheduleClock:
    """How many updates of the schedule are behind a run.

    They are the updates that were made. A run whose length is given in epochs keeps its place in
    epochs, however, when it goes on with another number of updates in each.

    Attributes:
        updates_per_epoch: None for a run whose length is not given in epochs.
    """

    def __init__(self) -> None:
        self.updates_per_epoch: int | None = None
        self._ahead = 0  # of the updates that were made

    def updates(self, global_step: int) -> int:
        """The place in the schedule after so many updates."""
        return global_step + self._ahead

    def state(self, global_step: int) -> dict[str, int | None]:
        """What a checkpoint has to know of it."""
        return {"updates": self.updates(global_step), "updates_per_epoch": self.updates_per_epoch}

    def resume(self, state: Mapping[str, int | None], global_step: int) -> None:
        """Take up the place in the schedule that a checkpoint was written at.

        Args:
            state: of the checkpoint; empty for one that does not know.
            global_step: updates that were made by then.
        """
        updates, before, now = (
            state.get("updates"),
            state.get("updates_per_epoch"),
            self.updates_per_epoch,
        )
        if updates is None or before is None or now is None:
            return
        if before != now:
            updates = round(updates * now / before)
        self._ahead = updates - global_step
