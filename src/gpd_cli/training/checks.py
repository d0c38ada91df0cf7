"""Settings that each make sense and together do not."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gpd_cli.errors import TrainingError, WeightsError

OF_STATIC_TEACHERS = (
    "method",
    "method_args",
    "stages",
    "static_teacher_stages",
    "static_weight",
    "static_warmup_epochs",
)
"""Settings that take an effect with a static teacher only."""


def check_taught(ce_weight: float, static_weight: float, distilled: bool) -> None:
    """Check that something teaches every network that is trained.

    What the student learns from the dynamic teacher does not count: it teaches the latter nothing.

    Args:
        ce_weight: weight of the labels.
        static_weight: weight of the static teachers.
        distilled: whether there are any.

    Raises:
        TrainingError: when there is nothing to learn from, or to be learnt away from.
    """
    if not 0 <= static_weight < math.inf:
        raise TrainingError(f"--model.static_weight must be 0 or more, not {static_weight}.")
    if ce_weight or (distilled and static_weight):
        return
    remedy = "set --model.static_weight or --model.ce_weight above 0"
    if not distilled:
        remedy = "name a static teacher (--model.static_teacher), or set --model.ce_weight above 0"
    raise TrainingError(f"There are neither labels nor a static teacher to learn from; {remedy}.")


def ignored_settings(hparams: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Names of settings that take no effect, as there is no static teacher.

    Args:
        hparams: of the run.
        defaults: of all settings, see `default_settings`.
    """
    if hparams["static_teacher"] is not None:
        return []
    return [name for name in OF_STATIC_TEACHERS if hparams[name] != defaults[name]]


def default_settings(cls: type) -> dict[str, Any]:
    """The defaults of a constructor's arguments, by name."""
    return {name: p.default for name, p in inspect.signature(cls).parameters.items()}


def check_same_parts(
    found: Mapping[str, Tensor], expected: nn.Module | None, before: Any, now: Any
) -> None:
    """Check that a run which is resumed trains the same along with its networks.

    Args:
        found: the checkpoint's tensors of these parts, by their names in `expected`.
        expected: those of the run.
        before: the method of the checkpoint.
        now: that of the run.

    Raises:
        WeightsError: when they differ.
    """
    state = {} if expected is None else expected.state_dict()
    if {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in state.items()}:
        return
    raise WeightsError(
        f"The checkpoint has other parts of its distillation method ({before}) than this run "
        f"({now if expected is not None else 'none'}); resume with the configuration and the "
        "version of gpd that the run was started with, or start anew from the extracted student "
        "(--model.student_weights)."
    )
