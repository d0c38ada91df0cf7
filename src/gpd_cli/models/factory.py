"""Build a network by its name, from timm, torchvision, this package or the user's own code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from gpd_cli.errors import ModelError, StudentArgumentsError, reason_of
from gpd_cli.models.construction import build, check_name
from gpd_cli.models.published import (
    AUXILIARY_HEADS,
    load_published,
    loads_published,
    without_pretrained,
)
from gpd_cli.models.reused import ReusedClassifier
from gpd_cli.models.weights import load_weights

Role = Literal["student", "teacher"]


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    model_args: Mapping[str, Any] | None = None,
    role: Role = "student",
) -> nn.Module:
    """Build a network. Nothing is downloaded unless the model arguments say ``pretrained: true``.

    If weights were not loaded exactly as they are in the file, a line is printed about it.

    Args:
        name: a model of timm (``resnet18``) or of this package (``cifar_resnet20``), a
            classification model of torchvision (``torchvision/resnet18``), or the path of a class
            or function that builds a network (``mine.Net``). With the prefix ``simkd/``, the
            network ends in its static teacher's classifier (see `ReusedClassifier`).
        num_classes: number of classes; by default the network's own.
        weights: a state dict to load; see `gpd_cli.models.weights`.
        model_args: further arguments of the constructor; with ``pretrained: true`` the weights are
            those that timm or torchvision publishes for the network.
        role: what the network is for. If the weights have another number of classes than
            ``num_classes``, a student gets a new classifier; for a static teacher this is an error,
            since a new classifier would teach noise. If a file has both networks, the role decides
            which of them is taken.

    Raises:
        ModelError: when the name is unknown, the arguments do not suit the network, or published
            weights cannot be had.
        WeightsError: when the weights cannot be read or do not fit.
    """
    args = dict(model_args or {})
    pretrained = loads_published(name, args, weights)
    if num_classes is not None:
        if args.get("num_classes", num_classes) != num_classes:
            raise ModelError(
                f"num_classes of {name} is {num_classes}, but its model arguments say "
                f"{args['num_classes']}; leave out one of the two."
            )
        args["num_classes"] = num_classes
    classes = args.get("num_classes", 1)
    if not isinstance(classes, int) or classes < 1:
        raise ModelError(
            f"num_classes of {name} must be a whole number of 1 or more, not {classes!r}."
        )
    check_name(name)
    own = without_pretrained(name, args)
    model = _built(name, own, role)
    body = model.body if isinstance(model, ReusedClassifier) else model
    how: dict[str, Any] = {
        "name": name,
        "ignore": AUXILIARY_HEADS if getattr(body, "aux_logits", None) is False else (),
        "new_classifier": role == "student" and "num_classes" in args,
        "prefer": f"{role}.",
        # A static teacher's logits are checked instead, in an error that names the teacher.
        "finite": role == "student",
    }
    if "num_classes" not in args:
        how["hint"] = (
            "set --model.num_classes to {classes} for its classifier, or to the number of your "
            "classes for a new one."
        )
    notes: tuple[str, ...] = ()
    if weights is not None:
        notes = load_weights(model, weights, **how)
    elif pretrained:
        notes, model = load_published(model, args, own, how)
    for note in notes:
        rank_zero_info(f"{name}: {note}.")
    return model


def _built(name: str, args: dict[str, Any], role: Role) -> nn.Module:
    try:
        return build(name, args)
    except Exception as error:  # constructors raise errors of many types for wrong arguments
        settings = ", ".join(f"{key}={value!r}" for key, value in args.items())
        kind = StudentArgumentsError if role == "student" else ModelError
        raise kind(f"Cannot build {name}({settings}): {reason_of(error)}.") from error
