"""Build a network by its name, from timm, torchvision, this package or the user's own code.

`create_model` builds it, and `ModelSpec` is a description from which it can be rebuilt.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torchvision
from lightning.pytorch.utilities import rank_zero_info
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchvision.models import list_models

from gpd_cli.errors import ModelError, StudentArgumentsError, WeightsError, did_you_mean
from gpd_cli.models import (  # noqa: F401 - they register their networks with timm
    cifar_mobilenet,
    cifar_resnet,
    cifar_shufflenet,
    cifar_vgg,
    cifar_wrn,
    mobilenet,
    rvt,
)
from gpd_cli.models.own import check_repeatable, find_maker, is_path, takes
from gpd_cli.models.reused import ReusedClassifier
from gpd_cli.models.weights import load_tensors, load_weights

_TORCHVISION = "torchvision/"
_REUSED = "simkd/"
_OF_PROJECTOR = ("features", "relu")
Role = Literal["student", "teacher"]
_PRETRAINED = "pretrained"
# torchvision's own argument for published weights, which takes the name of one of several files.
_ENTRY = "weights"
# Auxiliary heads make the output a tuple in training, and their initialization is slow and warns.
_TORCHVISION_ARGS = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}
# Arguments with which torchvision builds networks for its published weights, where they are not the
# defaults. These weights come from TensorFlow or Google, for images of another mean and deviation.
_WITH_PUBLISHED = {
    "googlenet": {"transform_input": True},
    "inception_v3": {"transform_input": True},
}
_AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")  # keys in published files of these networks
_TORCHVISION_SIZES = {"inception_v3": 299}
_DEFAULT_SIZE = 224


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
    pretrained = _wants_pretrained(name, args, weights)
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
    _check_name(name)
    own = without_pretrained(name, args)
    model = _built(name, own, role)
    how: dict[str, Any] = {
        "name": name,
        "ignore": _AUXILIARY_HEADS if getattr(model, "aux_logits", None) is False else (),
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
        notes, model = _load_published(model, args, own, how)
    for note in notes:
        rank_zero_info(f"{name}: {note}.")
    return model


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


def _built_with(name: str) -> dict[str, Any]:
    """Further arguments with which a library builds a network for its published weights."""
    architecture = name.removeprefix(_REUSED).removeprefix(_TORCHVISION)
    return dict(_WITH_PUBLISHED.get(architecture, {})) if _is_of_torchvision(name) else {}


def _asks(name: str) -> tuple[str, ...]:
    """Names of the arguments that ask for published weights of a network."""
    return (_PRETRAINED, _ENTRY) if name.startswith(_TORCHVISION) else (_PRETRAINED,)


def _wants_pretrained(name: str, args: Mapping[str, Any], weights: str | Path | None) -> bool:
    """Whether published weights are to be loaded.

    Args:
        name: name of the network.
        args: arguments of the network's constructor.
        weights: a weight file, or None.

    Raises:
        ModelError: when a weight file is given as well, or is given among the constructor's
            arguments.
    """
    theirs = name.startswith(_TORCHVISION)
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


def _built(name: str, args: dict[str, Any], role: Role) -> nn.Module:
    try:
        return _build(name, args)
    except Exception as error:  # constructors raise errors of many types for wrong arguments
        settings = ", ".join(f"{key}={value!r}" for key, value in args.items())
        kind = StudentArgumentsError if role == "student" else ModelError
        raise kind(f"Cannot build {name}({settings}): {_reason(error)}.") from error


def _load_published(
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
    """
    name: str = how["name"]
    body = name.removeprefix(_REUSED)
    try:
        if body.startswith(_TORCHVISION):
            entries = torchvision.models.get_model_weights(body.removeprefix(_TORCHVISION))
            entry = args.get(_ENTRY) or "DEFAULT"
            state = entries[str(entry).rpartition(".")[2]].get_state_dict(progress=False)
        else:
            published = _build(name, {**own, _PRETRAINED: True})
    except Exception as error:  # the connection, the hub and the libraries raise many types
        needed = {key: own[key] for key in _built_with(name) if key in own}
        further = f", with {json.dumps(needed)} among the network's arguments" if needed else ""
        raise ModelError(
            f"The published weights of {name} cannot be loaded ({_reason(error)}); if the hub "
            "cannot be reached, give a copy of the file instead (--model.student_weights, "
            f"--model.static_teacher.weights){further}."
        ) from error
    if body.startswith(_TORCHVISION):
        target = model
        if isinstance(model, ReusedClassifier):
            target = model.body
            how = {**how, "ignore": (f"{model.replaced}.", *_AUXILIARY_HEADS)}
        return load_tensors(target, state, f"The published weight file of {name}", **how), model
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


def _reason(error: Exception) -> str:
    """The message of a library's error, as a part of a sentence."""
    return " ".join(str(error).split())[:300].rstrip(".!") or type(error).__name__


def input_shape(
    model: nn.Module, name: str, model_args: Mapping[str, Any] | None = None
) -> tuple[int, int, int]:
    """Find the shape ``(C, H, W)`` of the images that a network was made for.

    Args:
        model: a network that `create_model` has built.
        name: name of the network.
        model_args: arguments of the network's constructor; an image size or number of channels
            among them takes precedence over the network's own.
    """
    args = model_args or {}
    name = name.removeprefix(_REUSED)
    if name.startswith(_TORCHVISION):
        side = _TORCHVISION_SIZES.get(name.removeprefix(_TORCHVISION), _DEFAULT_SIZE)
        # torchvision's transformers take a size: ViT as image_size, MaxViT as input_size.
        size = args.get("image_size") or args.get("input_size") or side
        return _first_channels(model), *_pair(size)
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, *size = config.get("input_size") or (3, _DEFAULT_SIZE, _DEFAULT_SIZE)
    if get_pretrained_cfg(config.get("architecture", "")) is None:
        # This is a user's own network, registered without a configuration. For other networks the
        # first convolution may have other channels than the images (if the stem folds pixels into
        # channels), or there may be none.
        channels = _first_channels(model, channels)
    return args.get("in_chans") or channels, *_pair(args.get("img_size") or size)


def count_classes(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Find the number of classes of a network.

    Args:
        model: a classifier, whose modes and statistics do not change.
        shape: image shape, ``(C, H, W)``.

    Raises:
        ModelError: when the network has no classifier, or does not return logits ``[B, classes]``.
    """
    known = getattr(model, "num_classes", None)
    if known == 0:
        raise ModelError(f"{type(model).__name__} has no classifier; set num_classes.")
    if isinstance(known, int):
        return known
    logits = _probe(model, shape)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"{type(model).__name__} is not an image classifier: its output must be logits of "
            f"shape [batch, classes], but is {got}."
        )
    return logits.shape[1]


def check_images(model: nn.Module, shape: tuple[int, int, int], option: str) -> None:
    """Check that a network takes images of a shape.

    Args:
        model: a network, whose modes and statistics do not change.
        shape: image shape, ``(C, H, W)``.
        option: name of the option for the arguments of the network's constructor, for the error
            message.

    Raises:
        ModelError: when the network does not take such images.
    """
    try:
        _probe(model, shape)
    except ModelError as error:
        raise ModelError(
            f"{str(error).removesuffix('.')}; build it for this image size ({option} '{{img_size: "
            f"{shape[1]}}}', for most networks of timm) or set --data.image_size to the size that "
            "it takes."
        ) from error


@dataclass(frozen=True)
class ModelSpec:
    """A description of a network, from which the network can be rebuilt. Checkpoints contain it.

    Args:
        name: name of the network, see `create_model`.
        num_classes: number of classes; None for the network's default.
        model_args: further arguments of the network's constructor, as plain JSON values (tuples
            become lists).

    Raises:
        ModelError: when an argument is no plain value.
    """

    name: str
    num_classes: int | None = None
    model_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            # Values are converted now, so that the network is built from the same values now as
            # later from a checkpoint.
            plain = json.loads(json.dumps(dict(self.model_args), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"The model arguments of {self.name} must be numbers, strings, true, false, null, "
                f"lists or mappings of these: {error}."
            ) from error
        object.__setattr__(self, "model_args", plain)

    def build(self, weights: str | Path | None = None, *, role: Role = "student") -> nn.Module:
        """Build the network by `create_model`, which has the same arguments and errors.

        Args:
            weights: a state dict to load.
            role: what the network is for.
        """
        return create_model(
            self.name,
            num_classes=self.num_classes,
            weights=weights,
            model_args=self.model_args,
            role=role,
        )

    def resolve(self, model: nn.Module, shape: tuple[int, int, int] | None = None) -> ModelSpec:
        """Make the description by which checkpoints rebuild this network, before loading weights.

        It states the network's number of classes, and asks for no published weights.

        Args:
            model: a network that was built from this description.
            shape: shape of the images, ``(C, H, W)``; by default that for which the network was
                made.

        Raises:
            ModelError: when the network has another number of classes than the description; when
                the network does not say which images it takes, and does not take usual ones; or
                when a user's own network has random numbers that are not in its state dict.
        """
        if shape is None:
            shape = input_shape(model, self.name, self.model_args)
            self._check_assumed(model, shape)
        classes = count_classes(model, shape)
        if self.num_classes not in (None, classes):
            raise ModelError(
                f"{self.name} has {classes} classes and not {self.num_classes}; let it take the "
                f"argument num_classes, or set --model.num_classes {classes}."
            )
        args = without_pretrained(self.name, self.model_args)
        resolved = replace(self, num_classes=classes, model_args=args)
        if not (_is_of_torchvision(self.name) or timm.is_model(self.name.removeprefix(_REUSED))):
            check_repeatable(self.name, resolved.build)
        return resolved

    def _check_assumed(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        """Check the assumed image shape of a network if neither network nor arguments state any."""
        config = getattr(model, "pretrained_cfg", None) or {}
        stated = config.get("input_size") or self.model_args.get("img_size")
        # A lazy network would take its widths from the images of this check. It is left out, since
        # its expansion is refused anyway.
        if stated or _is_of_torchvision(self.name) or any(is_lazy(p) for p in model.parameters()):
            return
        try:
            _probe(model, shape)
        except ModelError as error:
            raise ModelError(
                f"{str(error).removesuffix('.')}; if it takes images of another shape, state the "
                "shape in its class, such as by pretrained_cfg = {'input_size': (1, 16, 16)}."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """The description as plain JSON values."""
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "model_args": json.loads(json.dumps(self.model_args)),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Rebuild a description from the output of `to_dict`.

        Args:
            values: the description as plain values.

        Raises:
            ModelError: when a value is missing, unknown or has a wrong type.
        """
        try:
            spec = cls(**values)
        except TypeError as error:
            raise ModelError(
                f"The description of a model is not valid ({error}): {values!r}."
            ) from error
        classes = spec.num_classes
        if not isinstance(spec.name, str) or not isinstance(classes, int | None):
            raise ModelError(f"The description of a model is not valid: {values!r}.")
        return spec


def _build(name: str, args: dict[str, Any]) -> nn.Module:
    if name.startswith(_REUSED):
        own = {key: value for key, value in args.items() if key not in _OF_PROJECTOR}
        if "features" not in args:
            raise ModelError(
                "it needs the argument 'features', the width of the static teacher's classifier"
            )
        body_name = name.removeprefix(_REUSED)
        body = _build(body_name, own)
        classes = count_classes(body, input_shape(body, body_name, own))
        return ReusedClassifier(body, args["features"], classes, args.get("relu", True))
    if not name.startswith(_TORCHVISION):
        return timm.create_model(name, **args) if timm.is_model(name) else _build_own(name, args)
    architecture = name.removeprefix(_TORCHVISION)
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


def _check_name(name: str) -> None:
    """Check that a name is known to a library or can be imported.

    Raises:
        ModelError: when it is neither; the message suggests similar names.
    """
    name = name.removeprefix(_REUSED)
    theirs = [_TORCHVISION + known for known in list_models(module=torchvision.models)]
    if name in theirs or timm.is_model(name):
        return
    if is_path(name):
        find_maker(name)
        return
    if ":" in name:
        raise ModelError(
            f"'{name}' is the address of a network and not its name; give a name from "
            "timm.list_models(), and the file as the model's weights."
        )
    # The part after a slash is compared as well: timm/resnet18 means resnet18.
    known = theirs if name.startswith(_TORCHVISION) else [*timm.list_models(), *theirs]
    close = difflib.get_close_matches(name.rpartition("/")[2], known, n=2)
    close += difflib.get_close_matches(name, known, n=3)
    hint = did_you_mean(*list(dict.fromkeys(close))[:3])
    raise ModelError(
        f"Unknown model '{name}'{hint}; timm.list_models() lists timm's names, and "
        f"torchvision.models.list_models() those to write after '{_TORCHVISION}'."
    )


def _is_of_torchvision(name: str) -> bool:
    return name.removeprefix(_REUSED).startswith(_TORCHVISION)


def _first_channels(model: nn.Module, default: int = 3) -> int:
    """Number of input channels of the first convolution; the default without any convolution."""
    convolutions = (m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    return next(convolutions, default)


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _probe(model: nn.Module, shape: tuple[int, int, int]) -> Any:
    """Run a network in eval mode on two black images, and restore the modes of its modules.

    Returns:
        The network's output.

    Raises:
        ModelError: when the network does not run on such images.
    """
    modes = [(module, module.training) for module in model.modules()]
    like = next(model.parameters(), torch.zeros(0))
    try:
        with torch.no_grad():
            return model.eval()(torch.zeros(2, *shape, device=like.device, dtype=like.dtype))
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".!")
        raise ModelError(
            f"{type(model).__name__} cannot take images of shape {list(shape)}: {reason}."
        ) from error
    finally:
        for module, training in modes:
            module.training = training
