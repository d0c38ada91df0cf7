"""Learning-rate schedules from timm's factory, counted in updates."""

from __future__ import annotations

from difflib import get_close_matches

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import SGD, Optimizer

from gpd_cli.errors import GpdError, TrainingError, did_you_mean, no_effect, reason_of
from gpd_cli.training.optimizers import OptimizerSettings

# Schedules that are available with every supported version of timm.
_SCHEDULES = ("cosine", "multistep", "step", "poly", "tanh", "constant", "none")
WITHOUT_END = ("constant", "step", "multistep")
"""Schedules of timm that do not depend on the length of the run."""
# Settings that some schedules do not have, by the name of the schedule.
_WITHOUT_LOWEST: tuple[str, ...] = ("min_lr", "cooldown_epochs")
_UNUSED: dict[str, tuple[str, ...]] = {
    "none": ("warmup_epochs", "warmup_lr", *_WITHOUT_LOWEST, "sched_args")
}
_UNUSED |= dict.fromkeys(WITHOUT_END, _WITHOUT_LOWEST)  # they have no end to reach min_lr at


def make_scheduler(
    optimizer: Optimizer, settings: OptimizerSettings, *, epochs: float, updates_per_epoch: int
) -> Scheduler | None:
    """Make the schedule, counted in updates.

    Args:
        optimizer: the optimizer whose learning rates the schedule sets.
        settings: settings of optimizer and schedule.
        epochs: length of the run in epochs, which may be a fraction.
        updates_per_epoch: number of optimizer steps per epoch.

    Returns:
        The schedule; None if the settings ask for none.

    Raises:
        GpdError: when timm does not know the schedule, or the schedule rejects its arguments.
    """
    # timm does not check all arguments. Some fail only at an update, so a few updates are tried, on
    # an optimizer made for this.
    trial = SGD([nn.Parameter(torch.zeros(1))], lr=settings.lr)
    try:
        scheduler = _made(trial, settings, epochs, updates_per_epoch)
        if scheduler is not None:
            for update in (0, 1, round(epochs * updates_per_epoch)):
                scheduler.step_update(update)
        scheduler = _made(optimizer, settings, epochs, updates_per_epoch)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        if "Unknown scheduler" in str(error):
            raise _unknown_schedule(settings.sched) from error
        arguments = f" with sched_args {settings.sched_args}" if settings.sched_args else ""
        raise GpdError(
            f"Schedule '{settings.sched}' cannot be made{arguments}: {reason_of(error)}; set other "
            "sched_args, or another --model.optimizer.sched."
        ) from error
    if scheduler is None and settings.sched != "none":  # older timm's answer to an unknown name
        raise _unknown_schedule(settings.sched)
    return scheduler


def _made(
    optimizer: Optimizer, settings: OptimizerSettings, epochs: float, updates_per_epoch: int
) -> Scheduler | None:
    """Let timm make the schedule; see `make_scheduler`, which handles its errors."""
    warmup_updates = round(settings.warmup_epochs * updates_per_epoch)
    sched, sched_args = settings.sched, settings.sched_args
    # Older versions of timm have no constant schedule; a step schedule of factor 1 is the same.
    if sched == "constant":
        sched, sched_args = "step", {**sched_args, "decay_rate": 1.0}
    scheduler: Scheduler | None
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=sched,
        # timm multiplies by the updates per epoch, and accepts fractions despite its types.
        num_epochs=max(1 / updates_per_epoch, epochs - settings.cooldown_epochs),  # type: ignore[arg-type]
        warmup_epochs=warmup_updates / updates_per_epoch,  # type: ignore[arg-type]
        warmup_lr=settings.warmup_lr,
        min_lr=settings.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
        **sched_args,
    )
    return scheduler


def check_counted_in_updates(settings: OptimizerSettings) -> None:
    """Check that no setting of a schedule is counted in epochs, for data of unknown length.

    Args:
        settings: settings of optimizer and schedule.

    Raises:
        TrainingError: when a setting is counted in epochs.
    """
    decay_epochs = settings.sched_args.get("decay_epochs", 0)
    counted = {
        "warmup_epochs": settings.warmup_epochs > 0,
        "cooldown_epochs": settings.cooldown_epochs > 0,
        f"sched {settings.sched}": settings.sched in ("step", "multistep"),
        "sched_args.decay_epochs": isinstance(decay_epochs, int | float) and decay_epochs >= 1,
    }
    if found := [name for name, in_epochs in counted.items() if in_epochs]:
        raise TrainingError(
            f"--model.optimizer.{found[0]} counts epochs, but the training data does not state its "
            "length; leave it out, or give the data a length (__len__)."
        )


def check_phases(settings: OptimizerSettings, epochs: float) -> str | None:
    """Check that warm-up and cooldown leave room for the schedule itself.

    A cooldown that is too long is an error. A warm-up that is too long only gives a remark, since
    users try recipes for fewer epochs than the recipes are made for.

    Args:
        settings: settings of optimizer and schedule.
        epochs: length of the run in epochs.

    Returns:
        A remark if the run ends within the warm-up; otherwise None.

    Raises:
        TrainingError: when the cooldown is at least as long as the run, which would then train at
            the schedule's last learning rate from the second update on.

    Example:
        >>> check_phases(OptimizerSettings(warmup_epochs=5, lr=0.1), 2)
        'The run ends within its warm-up, before it reaches the learning rate 0.1: \
--model.optimizer.warmup_epochs is 5 and the run has 2 epochs.'
    """
    if settings.sched == "none":
        return None
    cooldown = 0 if settings.sched in WITHOUT_END else settings.cooldown_epochs
    length = f"the run has {epochs:.4g} {'epoch' if epochs == 1 else 'epochs'}"
    if cooldown >= epochs:
        raise TrainingError(
            f"--model.optimizer.cooldown_epochs is {cooldown} and {length}, so that no epoch is "
            "left for the schedule; lower --model.optimizer.cooldown_epochs, or train for more "
            "epochs."
        )
    if settings.warmup_epochs <= epochs - cooldown:
        return None
    also = f", with {cooldown} of cooldown" if cooldown else ""
    return (
        f"The run ends within its warm-up, before it reaches the learning rate {settings.lr:g}: "
        f"--model.optimizer.warmup_epochs is {settings.warmup_epochs:g} and {length}{also}."
    )


def parts_in_vain(settings: OptimizerSettings) -> str | None:
    """Remark on settings that were changed, but that this schedule does not have.

    Args:
        settings: settings of optimizer and schedule.

    Returns:
        A sentence, with the remedy where there is one; None if all is well.

    Example:
        >>> parts_in_vain(OptimizerSettings(sched="none", warmup_epochs=5))
        '--model.optimizer.warmup_epochs has no effect with the schedule none; take constant, \
which has a warm-up.'
        >>> parts_in_vain(OptimizerSettings(sched="step", min_lr=1e-5))
        '--model.optimizer.min_lr has no effect with the schedule step.'
    """
    usual = OptimizerSettings()
    unused = _UNUSED.get(settings.sched, ())
    names = [name for name in unused if getattr(settings, name) != getattr(usual, name)]
    if settings.sched == "constant":
        names += [f"sched_args.{name}" for name in settings.sched_args if name.startswith("decay_")]
    if not names:
        return None
    remedy = "; take constant, which has a warm-up" if "warmup_epochs" in names else ""
    return f"{no_effect('model.optimizer', names)} with the schedule {settings.sched}{remedy}."


def _unknown_schedule(name: str) -> GpdError:
    close = get_close_matches(name.lower(), _SCHEDULES, n=3)
    return GpdError(
        f"Unknown schedule '{name}'{did_you_mean(*close)}; --model.optimizer.sched takes "
        f"{', '.join(_SCHEDULES)}."
    )
