"""Checks of combinations of settings, and of a checkpoint against the run that resumes from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from timm.utils.misc import natural_key
from torch import Tensor, nn

from gpd_cli.branches import ALL_LAYERS, BranchInit, branch_names
from gpd_cli.data import ImageSpec
from gpd_cli.errors import DataError, TrainingError, WeightsError, no_effect
from gpd_cli.teacher.networks import layer_patterns
from gpd_cli.training.settings import method_name

OF_STATIC_TEACHERS = (
    "method",
    "stages",
    "static_weight",
    "static_warmup_epochs",
)
"""Settings that have an effect only if there is a static teacher."""


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


def check_start(student_weights: str | Path | bool | None, branch_init: str) -> None:
    """Check that a student with given weights starts from these weights.

    Args:
        student_weights: path of the student's weights, or whether weights are given.
        branch_init: the option ``branch_init``, the initialization of the branches.

    Raises:
        TrainingError: when the student would start from the merged branches instead.
    """
    if student_weights and branch_init == "gpd":
        raise TrainingError(
            "With --model.branch_init gpd both networks start from merged random branches and not "
            "from --model.student_weights or published weights; set --model.branch_init zero for a "
            "trained student."
        )


def settings_in_vain(
    hparams: Mapping[str, Any], defaults: Mapping[str, Any], has_teacher: bool
) -> Iterator[str]:
    """Remark on settings that were changed but have no effect in this run.

    Args:
        hparams: the run's settings, as plain values by name.
        defaults: defaults of all settings that have one, as plain values by name.
        has_teacher: whether there is a dynamic teacher.

    Yields:
        A sentence, with the remedy, about settings that need a static teacher, and one about
        settings that need branches.
    """

    def changed(names: Iterable[str]) -> list[str]:
        return [name for name in names if _settings(hparams[name]) != _settings(defaults[name])]

    if hparams["static_teacher"]["name"] is None and (names := changed(OF_STATIC_TEACHERS)):
        remedy = "add --model.static_teacher.name"
        yield f"{no_effect('model', names)} without a static teacher; {remedy}."
    layers, init = layer_patterns(hparams["branch_layers"]), hparams["branch_init"]
    names = changed_branch_settings(layers, init, hparams["branch_width"])
    branches = branch_names(hparams["branches"], init)
    if has_teacher and names and not branches:
        yield f"{no_effect('model', names)} without branches; add --model.branches 6."
    elif has_teacher and "branch_width" in names and "1x1_kxk" not in branches:
        yield f"{no_effect('model', ['branch_width'])} without the branch 1x1_kxk."


def other_statistics(what: str, network: nn.Module, images: ImageSpec | None) -> str | None:
    """Remark on images that are normalized otherwise than those of published weights.

    Args:
        what: the network in words.
        network: a network of timm with published weights, which states mean and deviation.
        images: description of the run's images; None if it is not known.

    Returns:
        The remark, with the remedy; None if mean and deviation are the same, or not known.
    """
    config = getattr(network, "pretrained_cfg", None) or {}
    theirs = [tuple(config.get(name) or ()) for name in ("mean", "std")]
    ours = [] if images is None else [images.mean or (), images.std or ()]
    if [len(values) for values in theirs] != [len(values) for values in ours] or not all(theirs):
        return None
    if torch.allclose(torch.tensor(theirs), torch.tensor(ours), atol=1e-3):
        return None
    (mean, std), (own_mean, own_std) = (
        [str([round(x, 3) for x in values]) for values in pair] for pair in (theirs, ours)
    )
    return (
        f"The published weights of {what} were trained on images with mean {mean} and standard "
        f"deviation {std}, but those of this run have {own_mean} and {own_std}; add --data.mean "
        f"'{mean}' --data.std '{std}'."
    )


def changed_branch_settings(layers: Sequence[str], init: BranchInit, width: float) -> list[str]:
    """Names of the settings of branches that do not have their defaults.

    Args:
        layers: patterns of the layers that get branches.
        init: initial values of the branches.
        width: inner channels of the ``1x1_kxk`` branch, relative to the paper's.
    """
    changed = {
        "branch_layers": tuple(layers) != ALL_LAYERS,
        "branch_init": init != "zero",
        "branch_width": width != 1,
    }
    return [name for name in changed if changed[name]]


def _settings(value: Any) -> Any:
    """A value in a form that can be compared.

    A method becomes its class name and settings, since its class has several import paths; other
    values are returned as they are.
    """
    if isinstance(value, Mapping):
        return method_name(value), value["init_args"]
    return value


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
