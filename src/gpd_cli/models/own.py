"""Networks of one's own, by the path of a class or function (``mine.Net``)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from gpd_cli.data.draws import drawn_from
from gpd_cli.errors import ModelError

Maker = Callable[..., nn.Module]


def is_path(name: str) -> bool:
    """Whether a name has the form of an import path, such as ``package.module.Class``."""
    return "." in name and all(part.isidentifier() for part in name.split("."))


def find_maker(path: str) -> Maker:
    """Import a class or function that builds networks.

    Checkpoints have such paths as well, so that nothing else may be called: a class has to be
    derived from `torch.nn.Module`, and a function has to be annotated to return such a class.

    Args:
        path: ``module.name``.

    Raises:
        ModelError: when the path cannot be imported, or does not build networks.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"The network {path} cannot be imported: {error}; its module has to be installed or "
            "on PYTHONPATH."
        ) from error
    except (Exception, SystemExit) as error:  # the module is code of others, and may be a program
        reason = " ".join(str(error).split())
        raise ModelError(
            f"The network {path} cannot be imported: {type(error).__name__}: {reason}; its module "
            "has to be one that Python imports without an error."
        ) from error
    made = found if inspect.isclass(found) else _returned(found)
    if not (inspect.isclass(made) and issubclass(made, nn.Module)):
        raise ModelError(
            f"{path} is no class of torch.nn.Module, and no function that is annotated to return "
            "one (-> nn.Module); name one that is."
        )
    maker: Maker = found
    return maker


def takes(maker: Maker, name: str) -> bool:
    """Whether a class or function takes an argument of this name."""
    parameters = inspect.signature(maker).parameters
    return name in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def check_repeatable(name: str, build: Callable[[], nn.Module]) -> None:
    """Check that a network's numbers that no state dict has are the same each time it is built.

    A checkpoint is read into a network that is built anew: with numbers drawn at random it would be
    another one than was trained.

    Args:
        name: name of the network, for the message.
        build: builds it. State of random generators is put back.

    Raises:
        ModelError: when a tensor that is no parameter and no persistent buffer differs.
    """
    found = []
    for seed in (1, 2):
        with drawn_from(seed):
            found.append(_unsaved(build()))
    first, second = found
    for key in first.keys() & second.keys():
        if not torch.equal(first[key].nan_to_num(), second[key].nan_to_num()):
            raise ModelError(
                f"{name} makes another tensor '{key}' each time it is built, and no checkpoint has "
                "it; make it a persistent buffer (self.register_buffer)."
            )


def _unsaved(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network that its state dict lacks, by their names."""
    return {
        f"{path}.{leaf}" if path else leaf: value
        for path, module in network.named_modules()
        for leaf, value in [
            *((leaf, module._buffers.get(leaf)) for leaf in module._non_persistent_buffers_set),
            *vars(module).items(),
        ]
        if isinstance(value, Tensor)
    }


def _returned(function: Any) -> Any:
    if not inspect.isfunction(function):
        return None
    try:
        return get_type_hints(function).get("return")
    except Exception:  # names that only a type checker knows, or nobody
        return None
