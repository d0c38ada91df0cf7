"""The weights that timm and torchvision publish for their networks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torchvision
from torch import nn

from gpd_cli.errors import ModelError, WeightsError, reason_of
from gpd_cli.models.construction import build
from gpd_cli.models.name_prefixes import REUSED, TORCHVISION, is_of_torchvision
from gpd_cli.models.own import find_maker, is_path, takes
from gpd_cli.models.weights import load_tensors

_PRETRAINED = "pretrained"
# torchvision's own argument for published weights, which takes the name of one of several files.
_ENTRY = "weights"
# Arguments with which torchvision builds networks for its published weights, where they are not the
# defaults. These weights come from TensorFlow or Google, for images of another mean and deviation.
_WITH_PUBLISHED = {
    "googlenet": {"transform_input": True},
    "inception_v3": {"transform_input": True},
}
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")  # keys in published files of these networks


def wants_published(name: str, model_args: Mapping[str, Any] | None) -> bool:
    """Whether the arguments of a network's constructor ask for published weights.

    Args:
        name: name of the network.
        model_args: arguments of the network's constructor.
    """
    return any((model_args or {}).get(key) for key in _asks(name))


def without_pretrained(name: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the arguments of a network's constructor that ask for published weights.

    If there were any, arguments that the library builds the network with for these weights are
    added instead.

    Args:
        name: name of the network.
        model_args: arguments of the network's constructor.
    """
    own = {key: value for key, value in model_args.items() if key not in _asks(name)}
    return {**_built_with(name), **own} if wants_published(name, model_args) else own


def loads_published(name: str, args: Mapping[str, Any], weights: str | Path | None) -> bool:
    """Whether published weights are to be loaded.

    Args:
        name: name of the network.
        args: arguments of the network's constructor.
        weights: a weight file, or None.

    Raises:
        ModelError: when a weight file is given as well, or is given among the constructor's
            arguments.
    """
    theirs = name.startswith(TORCHVISION)
    files = ("checkpoint_path",) if theirs else ("checkpoint_path", _ENTRY)
    given = next((key for key in files if args.get(key)), None)
    if given:
        raise ModelError(
            f"'{given}' cannot be a model argument of {name}; give the file as the model's weights "
            "instead, or 'pretrained: true' for the published weights."
        )
    wanted = wants_published(name, args)
    if wanted and weights is not None:
        raise ModelError(
            f"{name} cannot start from '{weights}' and from published weights (in its model "
            "arguments) at once; leave out one of the two."
        )
    return wanted


def load_published(
    model: nn.Module, args: dict[str, Any], own: dict[str, Any], how: dict[str, Any]
) -> tuple[tuple[str, ...], nn.Module]:
    """Load the published weights of a network, which are downloaded if need be.

    Args:
        model: the network, built without published weights.
        args: arguments of the network's constructor.
        own: these arguments without those that ask for published weights.
        how: arguments of `load_tensors`.

    Returns:
        Notes on what was not loaded as published, and the network with the weights, which may be
        another object.

    Raises:
        ModelError: when there are no such weights, or they cannot be loaded.
        WeightsError: when they are for another number of classes, and no new classifier is allowed.
    """
    name: str = how["name"]
    body = name.removeprefix(REUSED)
    if is_path(body) and not timm.is_model(body) and not takes(find_maker(body), _PRETRAINED):
        raise ModelError(
            f"{name} has no published weights, since its constructor does not take 'pretrained'; "
            "remove 'pretrained' from its arguments, or give a file of weights instead "
            "(--model.student_weights, --model.static_teacher.weights)."
        )
    try:
        if body.startswith(TORCHVISION):
            entries = torchvision.models.get_model_weights(body.removeprefix(TORCHVISION))
            entry = args.get(_ENTRY) or "DEFAULT"
            state = entries[str(entry).rpartition(".")[2]].get_state_dict(progress=False)
        else:
            published = build(name, {**own, _PRETRAINED: True})
    except Exception as error:  # the connection, the hub and the libraries raise many types
        needed = {key: own[key] for key in _built_with(name) if key in own}
        further = f", with {json.dumps(needed)} among the network's arguments" if needed else ""
        raise ModelError(
            f"The published weights of {name} cannot be loaded ({reason_of(error)}); if the hub "
            "cannot be reached, give a copy of the file instead (--model.student_weights, "
            f"--model.static_teacher.weights){further}."
        ) from error
    if body.startswith(TORCHVISION):
        return load_tensors(model, state, f"The published weight file of {name}", **how), model
    config = getattr(published, "pretrained_cfg", None) or {}
    theirs, ours = config.get("num_classes"), own.get("num_classes")
    if theirs is None or ours in (None, theirs) or name != body:
        return (), published
    if not how["new_classifier"]:
        raise WeightsError(
            f"The published weights of {name} are for {theirs} classes and not {ours}; give a file "
            "of weights for these classes."
        )
    note = (
        f"the classifier is initialized anew, since the published weights have {theirs} classes "
        f"and not {ours}"
    )
    return (note,), published


def _built_with(name: str) -> dict[str, Any]:
    """Further arguments with which a library builds a network for its published weights."""
    architecture = name.removeprefix(REUSED).removeprefix(TORCHVISION)
    return dict(_WITH_PUBLISHED.get(architecture, {})) if is_of_torchvision(name) else {}


def _asks(name: str) -> tuple[str, ...]:
    """Names of the arguments that ask for published weights of a network."""
    return (_PRETRAINED, _ENTRY) if name.startswith(TORCHVISION) else (_PRETRAINED,)
