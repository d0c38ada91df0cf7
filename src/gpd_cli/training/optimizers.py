"""Optimizers and schedules from timm's factories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from gpd_cli.errors import GpdError, TrainingError, did_you_mean
from gpd_cli.teacher.networks import Alone
from gpd_cli.teacher.pair import Pair
from gpd_cli.widening.tensors import Storage

FUSED = ("sgd", "nesterov", "momentum", "adam", "adamw")
"""Optimizers of timm that are torch's own and have a fused update."""
_SCHEDULES = ("cosine", "multistep", "step", "poly", "tanh", "constant", "none")  # of any timm
_WITHOUT_END = ("constant", "step", "multistep")  # schedules that do not depend on the run's length


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer and schedule.

    Args:
        opt: any optimizer of timm (`timm.optim.list_optimizers()`): sgd, adamw, lamb, ...
        lr: learning rate after warm-up.
        weight_decay: weight decay of kernels and matrices.
        momentum: momentum, for optimizers that have one.
        decay_all: decay norms, biases and branch gates as well (the paper's CNN recipe does).
        opt_args: further arguments of the optimizer.
        sched: any schedule of timm: cosine, multistep, step, poly, constant, ...
        warmup_epochs: epochs of linear warm-up, fractions allowed.
        warmup_lr: learning rate that the warm-up starts from.
        min_lr: learning rate that the schedule ends at.
        cooldown_epochs: epochs at the end of the run, after the schedule has ended.
        sched_args: further arguments of the schedule, such as decay_milestones and decay_rate.

    Raises:
        TrainingError: when a number is out of range.
    """

    opt: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    decay_all: bool = False
    opt_args: dict[str, Any] = field(default_factory=dict)
    sched: str = "cosine"
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    cooldown_epochs: int = 0
    sched_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "momentum", "warmup_epochs", "warmup_lr", "min_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise TrainingError(
                    f"--model.optimizer.{name} must be 0 or more, not {getattr(self, name)}."
                )
        if self.momentum >= 1:
            raise TrainingError(f"--model.optimizer.momentum must be below 1, not {self.momentum}.")
        if self.cooldown_epochs < 0:
            raise TrainingError(
                f"--model.optimizer.cooldown_epochs must be 0 or more, not {self.cooldown_epochs}."
            )


def make_optimizer(
    network: nn.Module, settings: OptimizerSettings, no_decay: set[str], *, fused: bool = False
) -> Optimizer:
    """Make the optimizer of a network.

    Args:
        network: the network to train.
        settings: the optimizer's settings.
        no_decay: further names of parameters without weight decay (timm's models list such names).
        fused: update each tensor in one pass, where torch's optimizer can.

    Raises:
        GpdError: when timm does not know the optimizer, or the optimizer rejects its arguments.
    """
    decay = settings.weight_decay
    if settings.decay_all:
        trained = [p for p in network.parameters() if p.requires_grad]
        groups: Any = [{"params": trained, "weight_decay": decay}]
    else:
        # Norms, biases and gates have one axis.
        groups = param_groups_weight_decay(network, decay, no_weight_decay_list=no_decay)
    options = dict(settings.opt_args)
    if fused and settings.opt.lower() in FUSED and not {"fused", "foreach"} & options.keys():
        options["fused"] = True
    try:
        return create_optimizer_v2(
            groups,
            opt=settings.opt,
            lr=settings.lr,
            weight_decay=decay,
            momentum=settings.momentum,
            **options,
        )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if "not found in registry" in str(error):
            known = [str(name) for name in list_optimizers()]
            raise GpdError(
                f"Unknown optimizer '{settings.opt}'{_meant(settings.opt, known)}; "
                "--model.optimizer.opt takes those of timm.optim.list_optimizers()."
            ) from error
        raise GpdError(f"Optimizer '{settings.opt}' cannot be made: {error}") from error


def make_scheduler(
    optimizer: Optimizer, settings: OptimizerSettings, *, epochs: float, updates_per_epoch: int
) -> Scheduler | None:
    """Make the schedule, counted in updates.

    Args:
        optimizer: the optimizer whose learning rate is set.
        settings: the schedule's settings.
        epochs: length of the run.
        updates_per_epoch: optimizer steps per epoch.

    Raises:
        GpdError: when timm does not know the schedule, or the schedule rejects its arguments.
    """
    warmup_updates = round(settings.warmup_epochs * updates_per_epoch)
    scheduler: Scheduler | None
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=settings.sched,
            # timm multiplies by the updates per epoch, and accepts fractions despite its types.
            num_epochs=max(1 / updates_per_epoch, epochs - settings.cooldown_epochs),  # type: ignore[arg-type]
            warmup_epochs=warmup_updates / updates_per_epoch,  # type: ignore[arg-type]
            warmup_lr=settings.warmup_lr,
            min_lr=settings.min_lr,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
            **settings.sched_args,
        )
    except (AssertionError, TypeError, ValueError) as error:
        if "Unknown scheduler" in str(error):
            raise _unknown_schedule(settings.sched) from error
        raise GpdError(f"Schedule '{settings.sched}' cannot be made: {error}") from error
    if scheduler is None and settings.sched != "none":  # for an unknown name, in older timm
        raise _unknown_schedule(settings.sched)
    return scheduler


def _unknown_schedule(name: str) -> GpdError:
    return GpdError(
        f"Unknown schedule '{name}'{_meant(name, _SCHEDULES)}; --model.optimizer.sched takes "
        f"{', '.join(_SCHEDULES)}."
    )


def _meant(name: str, known: Sequence[str]) -> str:
    """The names that were probably meant, in brackets; nothing where none resembles it."""
    return did_you_mean(*get_close_matches(name.lower(), known, n=3))


def configure(
    network: Pair | Alone,
    distillation: nn.Module | None,
    settings: OptimizerSettings,
    trainer: Trainer,
) -> Any:
    """Optimizer and schedule of a run, as Lightning takes them.

    Args:
        network: the network to train.
        distillation: distillation methods with trained parts, if any.
        settings: settings of optimizer and schedule.
        trainer: the run's trainer, which knows the length of the run.

    Raises:
        GpdError: when timm does not know optimizer or schedule, or one rejects its arguments; or
            when the schedule does not fit the run's length.
    """
    no_decay = (
        undecayed(network.teacher, "0.teacher.") | undecayed(network.narrow, "0.narrow.")
        if isinstance(network, Pair)
        else undecayed(network.network, "0.network.")
    )
    trained = nn.ModuleList([network] if distillation is None else [network, distillation])
    # Lightning cannot clip gradients when a fused optimizer takes off the scale of float16 itself.
    fused = trainer.precision != "16-mixed"
    optimizer = make_optimizer(trained, settings, no_decay, fused=fused)
    if trainer.precision == "bf16-mixed":
        # bfloat16 has no scale to take off, but Lightning asks this of the optimizer all the same.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    updates = trainer.estimated_stepping_batches
    if not 0 <= updates < math.inf:
        if settings.sched not in ("none", "constant"):
            length = "--trainer.max_epochs or --trainer.max_steps"
            if trainer.max_epochs != -1:
                length = "--trainer.max_steps, as the training data does not tell its length"
            raise GpdError(
                f"Schedule '{settings.sched}' needs the length of the run; give {length}, or set "
                "--model.optimizer.sched none."
            )
        return optimizer
    # For a run whose length is given in steps, Lightning has not set up the data yet.
    trainer.fit_loop.setup_data()
    in_epoch = updates_in_epoch(trainer)
    if in_epoch is None:
        check_counted_in_updates(settings)
    updates_per_epoch = min(in_epoch or int(updates), int(updates))
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        remark = check_parts(settings, updates / updates_per_epoch)
        if remark:
            rank_zero_info(remark)
    scheduler = make_scheduler(
        optimizer,
        settings,
        epochs=updates / updates_per_epoch,
        updates_per_epoch=updates_per_epoch,
    )
    if scheduler is None:
        return optimizer
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def updates_in_epoch(trainer: Trainer) -> int | None:
    """Optimizer steps in an epoch, once the data has been set up; None where it has no length."""
    batches = trainer.num_training_batches
    if batches == math.inf:
        return None
    return max(1, math.ceil(batches / trainer.accumulate_grad_batches))


def check_counted_in_updates(settings: OptimizerSettings) -> None:
    """Check that a schedule can do without the length of an epoch.

    Args:
        settings: settings of optimizer and schedule.

    Raises:
        TrainingError: when something of it is counted in epochs.
    """
    counted = {
        "warmup_epochs": settings.warmup_epochs > 0,
        "cooldown_epochs": settings.cooldown_epochs > 0,
        f"sched {settings.sched}": settings.sched in ("step", "multistep"),
        "sched_args.decay_epochs": settings.sched_args.get("decay_epochs", 0) >= 1,
    }
    if found := [name for name, in_epochs in counted.items() if in_epochs]:
        raise TrainingError(
            f"--model.optimizer.{found[0]} counts epochs, whose length the training data does not "
            "tell; leave it out, or give the data a length (__len__)."
        )


def check_parts(settings: OptimizerSettings, epochs: float) -> str | None:
    """Check that warm-up and cooldown leave something of a schedule.

    A warm-up that is too long is no error: recipes are tried for fewer epochs than they have.

    Args:
        settings: settings of optimizer and schedule.
        epochs: length of the run.

    Returns:
        A remark where the schedule ends within its warm-up.

    Raises:
        TrainingError: when the cooldown is as long as the run, at the schedule's last learning
            rate from its second update on.

    Example:
        >>> check_parts(OptimizerSettings(warmup_epochs=5, lr=0.1), 2)
        'The run ends within its warm-up, before it reaches the learning rate 0.1: \
--model.optimizer.warmup_epochs is 5, and the run has 2 epochs.'
    """
    if settings.sched == "none":
        return None
    cooldown = 0 if settings.sched in _WITHOUT_END else settings.cooldown_epochs
    length = f"the run has {epochs:.4g} {'epoch' if epochs == 1 else 'epochs'}"
    if cooldown >= epochs:
        raise TrainingError(
            f"--model.optimizer.cooldown_epochs is {cooldown}, and {length}, of which it leaves "
            "nothing to the schedule; set it to fewer, or train for more."
        )
    if settings.warmup_epochs <= epochs - cooldown:
        return None
    also = f", with {cooldown} of cooldown" if cooldown else ""
    return (
        f"The run ends within its warm-up, before it reaches the learning rate {settings.lr:g}: "
        f"--model.optimizer.warmup_epochs is {settings.warmup_epochs:g}, and {length}{also}."
    )


def base_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that holds the state: the one inside timm's Lookahead, or the optimizer itself.

    Args:
        optimizer: optimizer of a run.
    """
    base: Optimizer = getattr(optimizer, "_base_optimizer", optimizer)
    return base


def suitable_storage(opt: str) -> Storage:
    """The best storage for an optimizer (measured with SGD and AdamW).

    Args:
        opt: name of an optimizer of timm.
    """
    return "mixed" if opt.lower().startswith(("sgd", "momentum", "nesterov")) else "student"


def undecayed(student: nn.Module, prefix: str) -> set[str]:
    """Names, with a prefix, of the parameters that a timm model excludes from weight decay."""
    names = getattr(student, "no_weight_decay", None)
    return {f"{prefix}{name}" for name in names()} if callable(names) else set()
