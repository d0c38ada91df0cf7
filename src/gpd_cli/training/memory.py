"""Options that save memory by running parts of the networks again in the backward pass."""

from __future__ import annotations

from torch import nn

from gpd_cli.distill.methods.base import FEATURES, Method
from gpd_cli.errors import ModelError
from gpd_cli.teacher.grad_checkpointing import switch_on_grad_checkpointing
from gpd_cli.teacher.networks import Alone
from gpd_cli.teacher.pair import Pair


def apply_grad_checkpointing(
    student: nn.Module, name: str, method: Method | None, compiles: bool
) -> None:
    """Switch on gradient checkpointing of a student's blocks (option grad_checkpointing).

    The dynamic teacher, which is grown out of the student later, inherits the setting.

    Args:
        student: the student, before its dynamic teacher is grown.
        name: the student's name, for error messages.
        method: the method of distillation from a static teacher; None without one.
        compiles: whether the networks will be compiled.

    Raises:
        ModelError: when the student does not support gradient checkpointing, or it cannot be
            combined with the distillation method or with compilation.
    """
    if compiles:
        raise ModelError(
            "--model.grad_checkpointing does not work with --model.compile, which itself decides "
            "which activations to keep; leave out one of the two."
        )
    if method is not None and method.needs & FEATURES:
        raise ModelError(
            f"--model.grad_checkpointing runs blocks twice, but {type(method).__name__} needs "
            "their features from a single run; leave out --model.grad_checkpointing, or choose a "
            "method that compares logits only."
        )
    switch_on_grad_checkpointing(student, name)


def apply_recompute_student(network: Pair | Alone) -> None:
    """Have the whole student run again in the backward pass (option recompute_student).

    To be called after the hooks that read the student's features have been registered.

    Args:
        network: the pair that is trained.

    Raises:
        ModelError: when there is no dynamic teacher, when gradient checkpointing is on, or when
            hooks read the student's features.
    """
    if not isinstance(network, Pair):
        raise ModelError(
            "--model.recompute_student saves nothing without a dynamic teacher (ratio 1, one "
            "branch); leave out --model.recompute_student."
        )
    if network.plan.runs_again:
        raise ModelError(
            "--model.recompute_student runs the student twice, but the student runs parts of "
            "itself twice already (gradient checkpointing); leave out one of the two."
        )
    hooked = [name for name, module in network.narrow.named_modules() if _has_hooks(module)]
    if hooked:
        raise ModelError(
            "--model.recompute_student runs the student twice, but the features of its module "
            f"'{hooked[0]}' are read in a single run; leave out --model.recompute_student, or "
            "choose a method that compares logits only."
        )
    network.recompute_student = True


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks, which read or change its inputs or outputs."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
