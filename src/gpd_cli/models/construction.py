"""Call the constructor that the name of a network stands for."""

from __future__ import annotations

import difflib
import sys
from importlib.util import find_spec
from typing import Any

import timm
import torchvision
from torch import nn
from torchvision.models import list_models

from gpd_cli.errors import ModelError, did_you_mean
from gpd_cli.models import (  # noqa: F401 - they register their networks with timm
    cifar_mobilenet,
    cifar_resnet,
    cifar_shufflenet,
    cifar_vgg,
    cifar_wrn,
    mobilenet,
    rvt,
)
from gpd_cli.models.inputs import count_classes, input_shape
from gpd_cli.models.name_prefixes import REUSED, TORCHVISION
from gpd_cli.models.own import find_maker, is_path, takes
from gpd_cli.models.reused import ReusedClassifier

_PROJECTOR_ARGUMENTS = ("features", "relu")
# Auxiliary heads make the output a tuple in training, and their initialization is slow and warns.
_TORCHVISION_ARGS = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}


def build(name: str, args: dict[str, Any]) -> nn.Module:
    """Build a network, with the weights that its constructor gives it.

    Args:
        name: name of the network, see `gpd_cli.models.factory.create_model`.
        args: all arguments of the network's constructor.

    Raises:
        Exception: whatever the constructor raises for wrong arguments.
    """
    if name.startswith(REUSED):
        own = {key: value for key, value in args.items() if key not in _PROJECTOR_ARGUMENTS}
        if "features" not in args:
            raise ModelError(
                "it needs the argument 'features', the width of the static teacher's classifier"
            )
        body_name = name.removeprefix(REUSED)
        body = build(body_name, own)
        classes = count_classes(body, input_shape(body, body_name, own))
        return ReusedClassifier(body, args["features"], classes, args.get("relu", True))
    if not name.startswith(TORCHVISION):
        return timm.create_model(name, **args) if timm.is_model(name) else _build_own(name, args)
    architecture = name.removeprefix(TORCHVISION)
    defaults = {"weights": None, **_TORCHVISION_ARGS.get(architecture, {})}
    network: nn.Module = torchvision.models.get_model(architecture, **{**defaults, **args})
    return network


def _build_own(path: str, args: dict[str, Any]) -> nn.Module:
    """Build a network by the user's class or function, which need not take ``num_classes``.

    Args:
        path: import path of the class or function.
        args: arguments for it.
    """
    maker = find_maker(path)
    own = dict(args)
    if not takes(maker, "num_classes"):
        own.pop("num_classes", None)
    return maker(**own)


def check_name(name: str) -> None:
    """Check that a name is known to a library or can be imported.

    Raises:
        ModelError: when it is neither; the message suggests similar names.
    """
    name = name.removeprefix(REUSED)
    if name in _of_torchvision() or timm.is_model(name):
        return
    if is_path(name):
        # A mistyped name of timm's with a tag, such as resnet180.a1_in1k, has this form as well.
        package = name.partition(".")[0]
        is_there = package in sys.modules or find_spec(package) is not None
        if not is_there and (close := _close_names(package)):
            raise ModelError(
                f"Unknown model '{name}'{did_you_mean(*close)}; if it is a network of your own, "
                f"its module '{package}' must be installed or on PYTHONPATH."
            )
        find_maker(name)
        return
    if ":" in name:
        raise ModelError(
            f"'{name}' is the address of a network and not its name; give a name from "
            "timm.list_models(), and the file as the model's weights."
        )
    raise ModelError(
        f"Unknown model '{name}'{did_you_mean(*_close_names(name))}; timm.list_models() lists "
        "timm's names, and torchvision.models.list_models() those to write after "
        f"'{TORCHVISION}'."
    )


def _of_torchvision() -> list[str]:
    return [TORCHVISION + known for known in list_models(module=torchvision.models)]


def _close_names(name: str) -> list[str]:
    """At most three names of networks that resemble a mistyped one."""
    theirs = _of_torchvision()
    known = theirs if name.startswith(TORCHVISION) else [*timm.list_models(), *theirs]
    # The part after a slash is compared as well: timm/resnet18 means resnet18.
    close = difflib.get_close_matches(name.rpartition("/")[2], known, n=2)
    close += difflib.get_close_matches(name, known, n=3)
    return list(dict.fromkeys(close))[:3]
