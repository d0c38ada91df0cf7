"""Optimizer and learning-rate schedule of a run, for Lightning's `configure_optimizers`."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from gpd_cli.errors import GpdError
from gpd_cli.teacher.networks import Alone
from gpd_cli.teacher.pair import Pair
from gpd_cli.training.optimizers import OptimizerSettings, make_optimizer
from gpd_cli.training.schedules import (
    WITHOUT_END,
    check_counted_in_updates,
    check_phases,
    make_scheduler,
    parts_in_vain,
)
from gpd_cli.training.updates import updates_in_epoch


def configure(
    network: Pair | Alone,
    distillation: nn.Module | None,
    settings: OptimizerSettings,
    trainer: Trainer,
) -> Any:
    """Make optimizer and schedule in the form that `configure_optimizers` has to return.

    Args:
        network: the network or pair to train.
        distillation: the distillation, whose trainable parameters are optimized as well; or None.
        settings: settings of optimizer and schedule.
        trainer: the run's trainer, which knows the length of the run.

    Raises:
        GpdError: when timm does not know optimizer or schedule, or one rejects its arguments; or
            when the schedule does not fit the run's length.
    """
    no_decay = (
        _undecayed(network.teacher, "0.teacher.") | _undecayed(network.narrow, "0.narrow.")
        if isinstance(network, Pair)
        else _undecayed(network.network, "0.network.")
    )
    trained = nn.ModuleList([network] if distillation is None else [network, distillation])
    # With float16, a fused optimizer unscales the gradients itself, and Lightning cannot clip them.
    fused = trainer.precision != "16-mixed"
    if not fused and settings.opt_args.get("fused"):
        raise GpdError(
            "A fused optimizer does not work with --trainer.precision 16-mixed; leave fused out of "
            "--model.optimizer.opt_args."
        )
    optimizer = make_optimizer(trained, settings, no_decay, fused=fused)
    if trainer.precision == "bf16-mixed":
        # bfloat16 has no loss scale, but Lightning reads this attribute all the same.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    updates = trainer.estimated_stepping_batches
    has_end = 0 <= updates < math.inf
    if not has_end and settings.sched not in ("none", *WITHOUT_END):
        given = "--trainer.max_epochs or --trainer.max_steps"
        if trainer.max_epochs != -1:
            given = "--trainer.max_steps, since the training data does not state its length"
        raise GpdError(
            f"Schedule '{settings.sched}' needs the length of the run; set {given}, or set "
            "--model.optimizer.sched none."
        )
    # If the run's length is not given in epochs, Lightning has not set up the data at this point.
    trainer.fit_loop.setup_data()
    in_epoch = updates_in_epoch(trainer)
    if in_epoch is None:
        check_counted_in_updates(settings)
    length = int(updates) if has_end else in_epoch or 1  # any length does for a run without an end
    updates_per_epoch = in_epoch or length
    epochs = length / updates_per_epoch
    if has_end and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        remark = check_phases(settings, epochs)
        if remark:
            rank_zero_info(remark)
    if remark := parts_in_vain(settings):
        rank_zero_info(remark)
    scheduler = make_scheduler(
        optimizer, settings, epochs=epochs, updates_per_epoch=updates_per_epoch
    )
    if scheduler is None:
        return optimizer
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _undecayed(student: nn.Module, prefix: str) -> set[str]:
    """Names, with a prefix, of the parameters that a timm model excludes from weight decay."""
    names = getattr(student, "no_weight_decay", None)
    return {f"{prefix}{name}" for name in names()} if callable(names) else set()
