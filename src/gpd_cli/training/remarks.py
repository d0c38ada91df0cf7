"""Remarks on a run before it trains: settings in vain, images unlike those of published weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gpd_cli.branches import ALL_LAYERS, BranchInit, branch_names, layers_in_vain
from gpd_cli.data import ImageSpec
from gpd_cli.distill.distillation import Distillation
from gpd_cli.errors import no_effect
from gpd_cli.models import wants_published
from gpd_cli.teacher.layer_patterns import layer_patterns
from gpd_cli.teacher.networks import Alone
from gpd_cli.teacher.pair import Pair
from gpd_cli.teacher.unshared import Unshared
from gpd_cli.training.settings import method_name

OF_STATIC_TEACHERS = (
    "method",
    "stages",
    "static_weight",
    "static_warmup_epochs",
)
"""Settings that have an effect only if there is a static teacher."""


def remarks(
    hparams: Mapping[str, Any],
    defaults: Mapping[str, Any],
    network: Pair | Alone,
    distillation: Distillation | None,
    images: ImageSpec | None,
) -> Iterator[str]:
    """Yield all remarks on a run, a sentence each.

    Args:
        hparams: the run's settings, as plain values by name.
        defaults: defaults of all settings that have one, as plain values by name.
        network: the networks that are trained.
        distillation: the distillation from static teachers, if there is one.
        images: description of the run's images; None if it is not known.
    """
    yield from settings_in_vain(hparams, defaults, isinstance(network, Pair))
    if isinstance(network, Pair) and not (hparams["shared_norms"] or isinstance(network, Unshared)):
        yield f"{no_effect('model', ['shared_norms'])}, since {hparams['student']} has no norms."
    if distillation is not None and not distillation.takes_stages:
        yield from stages_in_vain(hparams)
    yield from images_unlike_those_of_weights(hparams, network, distillation, images)
    branches = branch_names(hparams["branches"], hparams["branch_init"])
    layers = layer_patterns(hparams["branch_layers"])
    if remark := layers_in_vain(network.outline(), branches, layers):
        yield remark


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

    static = hparams["static_teacher"]
    names = changed(OF_STATIC_TEACHERS)
    names += [f"static_teacher.{name}" for name in ("args", "stages") if static.get(name)]
    if static["name"] is None and names:
        remedy = "add --model.static_teacher.name"
        yield f"{no_effect('model', names)} without a static teacher; {remedy}."
    layers, init = layer_patterns(hparams["branch_layers"]), hparams["branch_init"]
    names = changed_branch_settings(layers, init, hparams["branch_width"])
    branches = branch_names(hparams["branches"], init)
    if has_teacher and names and not branches:
        yield f"{no_effect('model', names)} without branches; add --model.branches 6."
    elif has_teacher and "branch_width" in names and "1x1_kxk" not in branches:
        yield f"{no_effect('model', ['branch_width'])} without the branch 1x1_kxk."


def stages_in_vain(hparams: Mapping[str, Any]) -> Iterator[str]:
    """Remark on stages that were named for a distillation method that compares none.

    Args:
        hparams: the run's settings, as plain values by name.

    Yields:
        A sentence.
    """
    names = ["stages"] if hparams["stages"] else []
    names += ["static_teacher.stages"] if hparams["static_teacher"].get("stages") else []
    if names:
        method = method_name(hparams["method"])
        yield f"{no_effect('model', names)} with the method {method}, which compares no stages."


def images_unlike_those_of_weights(
    hparams: Mapping[str, Any],
    network: Pair | Alone,
    distillation: Distillation | None,
    images: ImageSpec | None,
) -> Iterator[str]:
    """Remark on images that are normalized otherwise than those that weights were trained on.

    Args:
        hparams: the run's settings, as plain values by name.
        network: the networks of the run.
        distillation: the distillation from static teachers, if there is one.
        images: description of the run's images; None if it is not known.

    Yields:
        A sentence, with the remedy, about the student and about each static teacher.
    """
    student, weights = hparams["student"], hparams["student_weights"]
    loaded: list[tuple[str, nn.Module, str | None]] = []
    if weights or wants_published(student, hparams["student_args"]):
        loaded.append((f"the student {student}", network.outline(), weights))
    if distillation is not None:
        loaded += [(t.title, t.network, t.weights) for t in distillation.teachers]
    for what, module, file in loaded:
        trained = None if file is None else ImageSpec.of_export(file)
        if trained is not None:
            yield from _other_statistics(f"The weights of {what} were", trained, images)
            continue
        config = getattr(module, "pretrained_cfg", None) or {}
        published = ImageSpec(mean=config.get("mean"), std=config.get("std"))
        told = f"The published weights of {what} were"
        if file is not None:
            told = f"If '{file}' has the published weights of {what}, these were"
        yield from _other_statistics(told, published, images)


def _other_statistics(told: str, theirs: ImageSpec, images: ImageSpec | None) -> Iterator[str]:
    """Compare the normalization of two kinds of images, as far as both are known.

    Args:
        told: the beginning of the remark, up to the verb.
        theirs: the images that weights were trained on.
        images: the run's images.
    """
    ours = images or ImageSpec()
    known = ((theirs.mean, ours.mean), (theirs.std, ours.std))
    pairs = [(a or (), b or ()) for a, b in known]
    if any(not a or len(a) != len(b) for a, b in pairs):
        return
    if all(torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-3) for a, b in pairs):
        return
    (mean, own_mean), (std, own_std) = (
        [str([round(x, 3) for x in values]) for values in pair] for pair in pairs
    )
    yield (
        f"{told} trained on images with mean {mean} and standard deviation {std}, but those of "
        f"this run have {own_mean} and {own_std}; add --data.mean '{mean}' --data.std '{std}'."
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
