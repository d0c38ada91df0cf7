"""Networks of the user's own code, which are named by an import path (``mine.Net``)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from gpd_cli.errors import ModelError, short_text
from gpd_cli.generators import drawn_from

Maker = Callable[..., nn.Module]


def is_path(name: str) -> bool:
    """Whether a name has the form of an import path, such as ``package.module.Class``."""
    return "." in name and all(part.isidentifier() for part in name.split("."))


def find_maker(path: str) -> Maker:
    """Import a class or function that builds networks.

    Since such paths are also read from checkpoints, nothing else may be called: a class has to be
    derived from `torch.nn.Module`, and a function has to be annotated to return such a class.

    Args:
        path: import path, ``module.name``.

    Raises:
        ModelError: when the path cannot be imported, or does not build networks.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"The network {path} cannot be imported: {error}; its module must be installed or on "
            "PYTHONPATH."
        ) from error
    except (Exception, SystemExit) as error:  # the module may be any code, even a whole program
        reason = short_text(error).rstrip(".!")
        raise ModelError(
            f"The network {path} cannot be imported: {reason}; "
            "correct its module, so that Python imports it without an error."
        ) from error
    made = found if inspect.isclass(found) else _returned(found)
    if not (inspect.isclass(made) and issubclass(made, nn.Module)):
        raise ModelError(
            f"{path} is neither a subclass of torch.nn.Module nor a function that is annotated to "
            "return a module (-> nn.Module); name such a class or function."
        )
    maker: Maker = found
    return maker


def takes(maker: Maker, name: str) -> bool:
    """Whether a class or function takes an argument of a certain name."""
    parameters = inspect.signature(maker).parameters
    return name in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def check_repeatable(name: str, build: Callable[[], nn.Module]) -> None:
    """Check that a network can be rebuilt: tensors outside its state dict must not be random.

    To load a checkpoint, the network is built anew. If tensors that are not in the checkpoint were
    drawn at random, the rebuilt network would not be the one that was trained.

    Args:
        name: name of the network, for the error message.
        build: function that builds the network. The states of random generators are restored.

    Raises:
        ModelError: when a tensor that is no parameter and no persistent buffer differs between two
            builds.
    """
    found = []
    for seed in (1, 2):
        with drawn_from(seed):
            found.append(_unsaved(build()))
    first, second = found
    for key in first.keys() & second.keys():
        if not torch.equal(first[key].nan_to_num(), second[key].nan_to_num()):
            raise ModelError(
                f"{name} gets another tensor '{key}' each time it is built, and checkpoints do not "
                "contain this tensor; make it a persistent buffer (self.register_buffer)."
            )


def _unsaved(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network that are not in its state dict, by name."""
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
    except Exception:  # the annotation has names that are not known at run time
        return None
