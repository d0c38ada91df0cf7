"""Networks of one's own, by the path of a class or function (``mine.Net``)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from torch import nn

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


def _returned(function: Any) -> Any:
    if not inspect.isfunction(function):
        return None
    try:
        return get_type_hints(function).get("return")
    except Exception:  # names that only a type checker knows, or nobody
        return None
