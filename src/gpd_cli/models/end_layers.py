"""The layers at the ends of a network: those that take images, and those that give logits."""

from __future__ import annotations

from torch import nn


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
    ends = [name for name, m in named.items() if name and isinstance(m, nn.Linear | nn.Conv2d)]
    return tuple(ends[-1:])
