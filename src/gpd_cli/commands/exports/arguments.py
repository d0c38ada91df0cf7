"""Search for constructor arguments that build a network of the wide teacher's widths."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from torch import nn

from gpd_cli.errors import GpdError
from gpd_cli.models import ModelSpec
from gpd_cli.teacher.compare import relative_difference

# Parts of the names of arguments that may give a width.
_NAMES = ("dim", "width", "channels", "heads", "features", "planes", "hidden", "mult", "chs")
_AT_ONCE, _TRIALS = 3, 60  # most arguments that are changed together; most combinations tried
_ROUNDING = 1e-4  # tolerated relative difference of logits in float32


def building_arguments(
    network: nn.Module, student: nn.Module, spec: ModelSpec, ratio: float, images: torch.Tensor
) -> dict[str, Any] | None:
    """Find constructor arguments that build a wide network, so that its weights can be loaded.

    Arguments whose names suggest a width are multiplied by the ratio, up to three of them at once.
    Their values for the student are those that were given to the constructor, the constructor's
    defaults, or attributes of the same name in the student's modules.

    Args:
        network: the wide network, in eval mode.
        student: the student.
        spec: the student's architecture.
        ratio: how many times as wide as the student the network is.
        images: images on which outputs are compared, ``[B, C, H, W]``.

    Returns:
        All constructor arguments except the number of classes; None if no suitable ones were found.
    """
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    options = _options(student, spec, ratio)
    for changed in itertools.islice(_choices(options), _TRIALS):
        arguments = {**spec.model_args, **changed}
        wide = ModelSpec(spec.name, spec.num_classes, arguments)
        built = _build(wide, meta=True)
        if built is None or {k: v.shape for k, v in built.state_dict().items()} != shapes:
            continue
        built = _build(wide, meta=False)
        assert built is not None
        built.load_state_dict(network.state_dict())
        with torch.no_grad():
            difference = relative_difference(built.eval()(images), network(images))
        if difference <= _ROUNDING:
            return wide.model_args
    return None


def _build(spec: ModelSpec, *, meta: bool) -> nn.Module | None:
    """Build a network; None if its constructor refuses the arguments.

    Args:
        spec: the architecture, with arguments.
        meta: whether only shapes are needed, so that the network may be built on the device "meta".
    """
    for device in ("meta", "cpu") if meta else ("cpu",):
        try:
            with torch.device(device):
                return spec.build()
        except GpdError:  # includes constructors that read values, which "meta" does not have
            continue
    return None


def _choices(options: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Yield combinations of changed arguments: first one argument, then two, then three.

    Args:
        options: for each argument, the values to try.
    """
    for count in range(1, _AT_ONCE + 1):
        for names in itertools.combinations(options, count):
            for values in itertools.product(*(options[name] for name in names)):
                yield dict(zip(names, values, strict=True))


def _options(student: nn.Module, spec: ModelSpec, ratio: float) -> dict[str, list[Any]]:
    """For each argument that may give a width, the wide values to try (at most two)."""
    found: dict[str, list[Any]] = {}
    parameters = {
        name: parameter.default
        for name, parameter in inspect.signature(type(student)).parameters.items()
    }
    for name in [*spec.model_args, *parameters]:
        if name in found or not any(part in name for part in _NAMES) or name == "in_channels":
            continue
        values = [spec.model_args.get(name)]
        values += [getattr(module, name, None) for module in student.modules()]
        values += [_stages(student), parameters.get(name)]
        scaled: list[Any] = []
        for value in values:
            if (wide := _scaled(value, ratio)) is not None and wide not in scaled:
                scaled.append(wide)
        found[name] = scaled[:2]
    return {name: values for name, values in found.items() if values and name != "num_classes"}


def _stages(network: nn.Module) -> list[int] | None:
    """Numbers of channels of the stages of a timm model; None for other networks."""
    info = getattr(network, "feature_info", None)
    if not isinstance(info, list) or not timm.is_model(
        getattr(network, "default_cfg", {}).get("architecture", "")
    ):
        return None
    return [stage["num_chs"] for stage in info]


def _scaled(value: Any, ratio: float) -> Any:
    if isinstance(value, bool) or not value:
        return None
    if isinstance(value, list | tuple) and all(type(width) is int for width in value):
        wide = [width * ratio for width in value]
        return (
            [int(width) for width in wide] if all(width == int(width) for width in wide) else None
        )
    if isinstance(value, int):
        return int(value * ratio) if value * ratio == int(value * ratio) else None
    return value * ratio if isinstance(value, float) else None
