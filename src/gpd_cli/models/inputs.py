"""The images that a network takes, and the number of its classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gpd_cli.errors import ModelError, reason_of
from gpd_cli.models.name_prefixes import REUSED, TORCHVISION

_TORCHVISION_SIZES = {"inception_v3": 299}
_DEFAULT_SIZE = 224


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
    name = name.removeprefix(REUSED)
    if name.startswith(TORCHVISION):
        side = _TORCHVISION_SIZES.get(name.removeprefix(TORCHVISION), _DEFAULT_SIZE)
        # torchvision's transformers take a size: ViT as image_size, MaxViT as input_size.
        size = args.get("image_size") or args.get("input_size") or side
        return _first_channels(model), *_pair(size)
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, *size = config.get("input_size") or (3, _DEFAULT_SIZE, _DEFAULT_SIZE)
    height_width = _pair(args.get("img_size") or size)
    if args.get("in_chans"):
        return args["in_chans"], *height_width
    # A user's own network may state nothing, and timm then assumes three channels. The channels of
    # the first convolution are a guess, too: a stem may fold pixels into channels.
    first = _first_channels(model, channels)
    is_own = get_pretrained_cfg(config.get("architecture", "")) is None
    if is_own and first != channels and not takes_images(model, (channels, *height_width)):
        channels = first
    return channels, *height_width


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
    logits = probe(model, shape)
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
        probe(model, shape)
    except ModelError as error:
        raise ModelError(
            f"{str(error).removesuffix('.')}; build it for this image size ({option} '{{img_size: "
            f"{shape[1]}}}', for most networks of timm) or set --data.image_size to the size that "
            "it takes."
        ) from error


def takes_images(model: nn.Module, shape: tuple[int, int, int]) -> bool:
    """Whether a network runs on images of a shape; a lazy network is not run and takes none.

    Args:
        model: a network, whose modes and statistics do not change.
        shape: image shape, ``(C, H, W)``.
    """
    if any(is_lazy(parameter) for parameter in model.parameters()):
        return False
    try:
        probe(model, shape)
    except ModelError:
        return False
    return True


def probe(model: nn.Module, shape: tuple[int, int, int]) -> Any:
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
        raise ModelError(
            f"{type(model).__name__} cannot take images of shape {list(shape)}: {reason_of(error)}."
        ) from error
    finally:
        for module, training in modes:
            module.training = training


def _first_channels(model: nn.Module, default: int = 3) -> int:
    """Number of input channels of the first convolution; the default without any convolution."""
    convolutions = (m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    return next(convolutions, default)


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
