"""The networks to try: the smallest of each module of timm, and all of torchvision."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
import torchvision
from torchvision.models import list_models

TORCHVISION = "torchvision/"


class UnknownNameError(ValueError):
    """A name that is neither a module of timm nor a network of timm or torchvision."""


@dataclass(frozen=True)
class Target:
    """A network to try.

    Args:
        name: name of the network, see `gpd_cli.models.create_model`.
        family: the module of timm that the network stands for, ``torchvision``, or empty for a
            network that a user named and that stands for no family.
    """

    name: str
    family: str


def count_parameters(name: str) -> int:
    """The number of parameters of a timm network, which is built on the meta device for this."""
    with torch.device("meta"):
        network = timm.create_model(name)
    return sum(parameter.numel() for parameter in network.parameters())


def smallest(module: str) -> str:
    """The network of a timm module with the fewest parameters, the first by name among equals."""
    return min(timm.list_models(module=module), key=lambda name: (count_parameters(name), name))


def smallest_of_each(modules: Sequence[str], cache: Path) -> dict[str, str]:
    """The smallest network of each module.

    Args:
        modules: names out of ``timm.list_modules()``.
        cache: path of a JSON file with earlier results, which is begun anew for another version of
            timm.
    """
    stored = json.loads(cache.read_text()) if cache.exists() else {}
    known: dict[str, str] = stored.get("smallest", {}) if stored.get("timm") == _version() else {}
    for module in (module for module in modules if module not in known):
        logging.info("looking for the smallest network of timm.models.%s", module)
        known[module] = smallest(module)
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps({"timm": _version(), "smallest": known}, indent=1) + "\n")
    return {module: known[module] for module in modules}


def timm_modules() -> list[str]:
    """Names of timm's own modules, without modules registered by other packages such as gpd."""
    return [name for name in timm.list_modules() if find_spec(f"timm.models.{name}")]


def torchvision_names() -> list[str]:
    """Names, in gpd's form, of torchvision's classification networks without quantization."""
    return [TORCHVISION + name for name in list_models(module=torchvision.models)]


def all_targets(cache: Path) -> list[Target]:
    """The smallest network of each of timm's modules, then torchvision's networks."""
    chosen = smallest_of_each(timm_modules(), cache)
    targets = [Target(name, module) for module, name in chosen.items()]
    return targets + [Target(name, "torchvision") for name in torchvision_names()]


def named_targets(names: Iterable[str], cache: Path) -> list[Target]:
    """The networks that names on the command line stand for.

    Args:
        names: names of timm's modules, of timm's networks, or of torchvision's networks (with the
            prefix ``torchvision/``); ``timm`` and ``torchvision`` stand for a whole library.
        cache: path of the JSON file of `smallest_of_each`.

    Raises:
        UnknownNameError: when a name is unknown; the message lists similar names.
    """
    targets: dict[str, Target] = {}
    modules, theirs = timm_modules(), torchvision_names()
    for name in names:
        if name == "timm" or name in modules:
            chosen = smallest_of_each(modules if name == "timm" else [name], cache)
            found = [Target(network, module) for module, network in chosen.items()]
        elif name == "torchvision" or name in theirs:
            found = [
                Target(n, "torchvision") for n in (theirs if name == "torchvision" else [name])
            ]
        elif timm.is_model(name):
            found = [Target(name, _family(name, cache))]
        else:
            close = difflib.get_close_matches(name, [*modules, *theirs, *timm.list_models()])
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            raise UnknownNameError(f"There is no network or module of timm named {name!r}{hint}.")
        targets.update({target.name: target for target in found})
    return list(targets.values())


def _family(name: str, cache: Path) -> str:
    """The module of timm that a network stands for: its own, if it is the smallest there."""
    for module in timm_modules():
        if name in timm.list_models(module=module):
            return module if smallest_of_each([module], cache)[module] == name else ""
    return ""


def _version() -> str:
    return str(timm.__version__)
