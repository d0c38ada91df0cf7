"""Settings of optimizer and schedule, and creation of the optimizer by timm's factory."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    param_groups_weight_decay,
)
from torch import nn
from torch.optim import Optimizer

from gpd_cli.errors import GpdError, TrainingError, did_you_mean
from gpd_cli.widening.tensors import Storage

FUSED = ("sgd", "nesterov", "momentum", "adam", "adamw")
"""Names in timm of the optimizers that are torch's own and have a fused update."""


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer and schedule.

    Args:
        opt: name of an optimizer of timm (`timm.optim.list_optimizers()`) that needs no second
            derivatives: sgd, adamw, lamb, ...
        lr: learning rate after warm-up.
        weight_decay: weight decay of kernels and matrices.
        momentum: momentum, for optimizers that have one.
        decay_all: apply weight decay to norms, biases and branch gates as well, as in the paper's
            recipe for CNNs.
        opt_args: further keyword arguments of the optimizer.
        sched: name of a schedule of timm, except plateau: cosine, multistep, step, poly, constant,
            ...; or none.
        warmup_epochs: number of epochs of linear warm-up, which may be a fraction.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end of the schedule.
        cooldown_epochs: number of epochs at the end of the run, after the schedule has ended.
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
        no_decay: names of further parameters without weight decay (timm's models list such names).
        fused: use a fused update if torch's optimizer has one.

    Raises:
        GpdError: when timm does not know the optimizer, or the optimizer rejects its arguments.
    """
    decay = settings.weight_decay
    if settings.decay_all:
        trained = [p for p in network.parameters() if p.requires_grad]
        groups: Any = [{"params": trained, "weight_decay": decay}]
    else:
        # timm exempts parameters with at most one axis: norms, biases and gates.
        groups = param_groups_weight_decay(network, decay, no_weight_decay_list=no_decay)
    _check_arguments(settings.opt_args)
    options = dict(settings.opt_args)
    name = settings.opt.lower().rpartition("_")[2]
    if settings.momentum == 0 and ("sgd" in name or name.startswith("nesterov")):
        options.setdefault("nesterov", False)  # timm's default, which needs a momentum
    if name in list_optimizers() and get_optimizer_info(name).second_order:
        raise GpdError(
            f"Optimizer '{settings.opt}' needs second derivatives, which gpd does not compute; "
            "choose another --model.optimizer.opt."
        )
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
            close = get_close_matches(settings.opt.lower(), map(str, list_optimizers()), n=3)
            raise GpdError(
                f"Unknown optimizer '{settings.opt}'{did_you_mean(*close)}; "
                "timm.optim.list_optimizers() lists those that --model.optimizer.opt takes."
            ) from error
        raise GpdError(f"Optimizer '{settings.opt}' cannot be made: {error}") from error


def _check_arguments(given: Mapping[str, Any]) -> None:
    """Check that the entries of ``opt_args`` reach the optimizer.

    timm's factory also has arguments that only say how to group the parameters of a model. Here the
    factory is given ready-made groups, and would ignore these arguments silently.

    Raises:
        GpdError: when an entry has to be set by another option (such as lr), or would be ignored.
    """
    for name in given:
        if name in OptimizerSettings.__dataclass_fields__:
            raise GpdError(
                f"Set '{name}' as --model.optimizer.{name}, and remove it from "
                "--model.optimizer.opt_args."
            )
        if name in inspect.signature(create_optimizer_v2).parameters and name != "foreach":
            raise GpdError(
                f"'{name}' has no effect in --model.optimizer.opt_args, since gpd groups "
                "parameters by weight decay alone (--model.optimizer.decay_all); leave it out."
            )


def base_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that holds the state: the one inside timm's Lookahead, or the optimizer itself.

    Args:
        optimizer: a run's optimizer.
    """
    base: Optimizer = getattr(optimizer, "_base_optimizer", optimizer)
    return base


def suitable_storage(opt: str) -> Storage:
    """The default storage for an optimizer, which measurements with SGD and AdamW favour.

    Args:
        opt: name of an optimizer of timm, alone or within Lookahead (lookahead_sgd).

    Example:
        >>> suitable_storage("sgd"), suitable_storage("csgdw"), suitable_storage("adamw")
        ('mixed', 'mixed', 'student')
    """
    name = opt.lower().rpartition("_")[2]
    # SGD has variants: cautious (csgdw), fused (fusedsgd), with 8 bits (bnbsgd8bit).
    is_sgd = "sgd" in name or name.startswith(("momentum", "nesterov"))
    return "mixed" if is_sgd else "student"
