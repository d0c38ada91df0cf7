"""Checks of combinations of settings, and of a checkpoint against the run that resumes from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from timm.utils.misc import natural_key
from torch import Tensor, nn

from gpd_cli.errors import DataError, TrainingError, WeightsError


def check_taught(ce_weight: float, static_weight: float, distilled: bool) -> None:
    """Check that every trained network has a loss.

    The gap loss does not count: it does not train the dynamic teacher.

    Args:
        ce_weight: weight of the cross-entropy with the labels.
        static_weight: weight of the losses from static teachers.
        distilled: whether there are static teachers.

    Raises:
        TrainingError: when a network would have no loss, or static_weight is negative or infinite.
    """
    if not 0 <= static_weight < math.inf:
        raise TrainingError(f"--model.static_weight must be 0 or more, not {static_weight}.")
    if ce_weight or (distilled and static_weight):
        return
    remedy = "set --model.static_weight or --model.ce_weight above 0"
    if not distilled:
        remedy = (
            "name a static teacher (--model.static_teacher.name), or set --model.ce_weight above 0"
        )
    raise TrainingError(
        f"The networks have neither labels nor a static teacher to learn from; {remedy}."
    )


def check_counts(**counts: int) -> None:
    """Check that options that count epochs or steps are not negative.

    Args:
        counts: the values, by the names of the options.

    Raises:
        TrainingError: when a value is negative.
    """
    for name, count in counts.items():
        if count < 0:
            raise TrainingError(f"--model.{name} must be 0 or more, not {count}.")


_REFUSED: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "The schedule needs updates of the same number of batches, "
    "which the callback GradientAccumulationScheduler changes between epochs; leave out the "
    "callback, and set --trainer.accumulate_grad_batches for the whole run.",
    StochasticWeightAveraging: "The callback StochasticWeightAveraging replaces the schedule of "
    "the learning rate, by which a run is resumed, and its average would be neither scored nor "
    "saved; use gpd_cli.EMA or Lightning's WeightAveraging instead.",
    LearningRateFinder: "The callback LearningRateFinder makes trial steps that the schedule and "
    "the log would count; leave out the callback, and compare learning rates by short runs "
    "(--model.optimizer.lr).",
    BatchSizeFinder: "The callback BatchSizeFinder does not reach the loaders, which keep their "
    "batch size; leave out the callback, and set --data.batch_size.",
}


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Refuse callbacks of Lightning that do not work with the training of this package.

    Schedules, resuming and the averaging of gradients over processes rely on a number of batches
    per update, and on a schedule, that are the same throughout the run.

    Args:
        callbacks: callbacks of the run's trainer.

    Raises:
        TrainingError: when there is such a callback.
    """
    for callback in callbacks:
        for refused, text in _REFUSED.items():
            if isinstance(callback, refused):
                raise TrainingError(text)


def check_start(
    student_weights: str | Path | bool | None, branches: Sequence[str], branch_init: str
) -> None:
    """Check that a student with given weights starts from these weights.

    Args:
        student_weights: path of the student's weights, or whether weights are given.
        branches: names of the extra branches.
        branch_init: the option ``branch_init``, the initialization of the branches.

    Raises:
        TrainingError: when the student would start from the merged branches instead.
    """
    if student_weights and branches and branch_init == "gpd":
        raise TrainingError(
            "With --model.branch_init gpd both networks start from merged random branches and not "
            "from --model.student_weights or published weights; set --model.branch_init zero for a "
            "trained student."
        )


def check_same_parts(
    found: Mapping[str, Tensor], expected: nn.Module | None, before: Any, now: Any
) -> None:
    """Check that the trained parts of the distillation method are the same as in the checkpoint.

    Args:
        found: the checkpoint's tensors of the distillation, by their names in `expected`.
        expected: the resumed run's distillation; None without one.
        before: name of the method in the checkpoint.
        now: name of the method in the resumed run.

    Raises:
        WeightsError: when names or shapes of the tensors differ.
    """
    state = {} if expected is None else expected.state_dict()
    if {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in state.items()}:
        return
    raise WeightsError(
        f"The distillation method of the checkpoint has other trained parts ({before}) than that "
        f"of this run ({now if expected is not None else 'none'}); resume with the configuration "
        "and the version of gpd that the run was started with, or start a new run from the "
        "extracted student (--model.student_weights)."
    )


def check_same_classes(found: Sequence[str] | None, names: Sequence[str], is_folder: bool) -> None:
    """Check that the classes of the data have the names and numbers that they had in training.

    A differing name is refused even though the class may only have been renamed: renaming a folder
    changes the order of the folders, so that it is unknown which class is which.

    Args:
        found: the checkpoint's class names in the order of class numbers; None in checkpoints of
            early versions, which stored no names, and sorted image folders as 1, 2, 10.
        names: the data's class names in the order of class numbers.
        is_folder: whether the names are names of image folders.

    Raises:
        DataError: when the names, or their order, differ.
    """
    if found is None:
        before = sorted(names, key=natural_key)
        if is_folder and before != list(names):
            raise DataError(
                "The checkpoint is of a version of gpd that sorted class folders as "
                f"{_listed(before)}, but they are now sorted as {_listed(names)}; rename them so "
                "that both orders agree (01, 02, 10), or train anew."
            )
        return
    if list(found) == list(names):
        return
    first = next(((k, a, b) for k, (a, b) in enumerate(zip(found, names)) if a != b), None)  # noqa: B905
    if first is None:
        raise DataError(
            f"The checkpoint was trained on {len(found)} classes, but the data has {len(names)}; "
            "give data with the classes of the checkpoint."
        )
    text = f"class {first[0]} is '{first[1]}' in the checkpoint and '{first[2]}' in the data"
    kind = "other classes than the checkpoint"
    if sorted(found) == sorted(names):
        kind = "the classes of the checkpoint in another order"
    raise DataError(
        f"The data has {kind}: {text}; name the folders or classes as in the data "
        "that the checkpoint was trained on."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
