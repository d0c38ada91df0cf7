"""Which arguments of a constructor build a network of other widths, if any do."""

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

_NAMES = ("dim", "width", "channels", "heads", "features", "planes", "hidden", "mult", "chs")
_AT_ONCE, _TRIALS = 3, 60
_ROUNDING = 1e-4  # relative, float32


def building_arguments(
    network: nn.Module, narrow: nn.Module, spec: ModelSpec, ratio: float, images: torch.Tensor
) -> dict[str, Any] | None:
    """Find arguments that build a network whose weights another one takes.

    Arguments that name a width are tried at the ratio, up to three together: those given to the
    student, and those whose value a module of the student shows under the argument's name.

    Args:
        network: the wide network, in eval mode.
        narrow: the student.
        spec: the student's architecture.
        ratio: how many times as wide the network is.
        images: images on which outputs are compared.

    Returns:
        All arguments besides the number of classes; None where none were found.
    """
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    options = _options(narrow, spec, ratio)
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
    """Build a network, if it can be; where only sizes count, without memory for its weights."""
    for device in ("meta", "cpu") if meta else ("cpu",):
        try:
            with torch.device(device):
                return spec.build()
        except GpdError:  # also where a constructor needs numbers, which "meta" has none of
            continue
    return None


def _choices(options: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """One argument, two, three."""
    for count in range(1, _AT_ONCE + 1):
        for names in itertools.combinations(options, count):
            for values in itertools.product(*(options[name] for name in names)):
                yield dict(zip(names, values, strict=True))


def _options(narrow: nn.Module, spec: ModelSpec, ratio: float) -> dict[str, list[Any]]:
    """Values to try, by argument."""
    found: dict[str, list[Any]] = {}
    parameters = {
        name: parameter.default
        for name, parameter in inspect.signature(type(narrow)).parameters.items()
    }
    for name in [*spec.model_args, *parameters]:
        if name in found or not any(part in name for part in _NAMES) or name == "in_channels":
            continue
        values = [spec.model_args.get(name)]
        values += [getattr(module, name, None) for module in narrow.modules()]
        values += [_stages(narrow), parameters.get(name)]
        scaled: list[Any] = []
        for value in values:
            if (wide := _scaled(value, ratio)) is not None and wide not in scaled:
                scaled.append(wide)
        found[name] = scaled[:2]
    return {name: values for name, values in found.items() if values and name != "num_classes"}


def _stages(network: nn.Module) -> list[int] | None:
    """Channels of the stages, by timm."""
    info = getattr(network, "feature_info", None)
    if not isinstance(info, list) or not timm.is_model(
        getattr(network, "default_cfg", {}).get("architecture", "")
    ):
        return None
    return [stage["num_chs"] for stage in info]


def _scaled(value: Any, ratio: float) -> Any:
    if isinstance(value, bool) or not value:
        return None
    if isinstance(value, list | tuple) and all(type(part) is int for part in value):
        wide = [part * ratio for part in value]
        return [int(part) for part in wide] if all(part == int(part) for part in wide) else None
    if isinstance(value, int):
        return int(value * ratio) if value * ratio == int(value * ratio) else None
    return value * ratio if isinstance(value, float) else None
