"""The layers at the ends of a network: those that take images, and those that give logits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.parameter import is_lazy

from gpd_cli.errors import ModelError
from gpd_cli.models.inputs import input_shape, probe


def stem_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the network's first layers, whose input is the image."""
    traits = getattr(model, "_traits", None) or {}
    config = getattr(model, "pretrained_cfg", None) or {}
    names = traits.get("first_conv", config.get("first_conv"))
    if names is None:
        names = next((n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), ())
    return (names,) if isinstance(names, str) else tuple(names)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers whose outputs are the logits."""
    named = dict(model.named_modules(remove_duplicate=False))
    config = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    # Some networks have a classifier but do not name it, or name one that they were built without.
    names = tuple(name for name in names if isinstance(named.get(name), nn.Linear | nn.Conv2d))
    if names:
        return names
    ends = {name: m for name, m in named.items() if name and isinstance(m, nn.Linear | nn.Conv2d)}
    is_of_torchvision = type(model).__module__.startswith("torchvision.")
    last = () if is_of_torchvision else _last_that_runs(model, ends)
    return last or tuple(ends)[-1:]


def _last_that_runs(model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Name of the layer that runs last; nothing where the network does not run on usual images."""
    ran: list[str] = []
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, layer in layers.items()
    ]
    try:
        if not any(is_lazy(parameter) for parameter in model.parameters()):
            probe(model, input_shape(model, ""))
    except ModelError:
        return ()
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(ran[-1:])
