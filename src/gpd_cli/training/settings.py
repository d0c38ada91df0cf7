"""Conversion of a run's settings to plain values, the only ones that checkpoints may hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from functools import partial
from typing import Any

from gpd_cli.distill.methods import Method


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replace dataclasses and the distillation method among settings by mappings of plain values.

    Args:
        settings: arguments of `GapPreservingDistillation`, by name; plain values are kept.
    """
    plain = {name: _plain(value) for name, value in settings.items()}
    if callable(method := plain["method"]):
        plain["method"] = method_settings(method)
    return plain


def method_settings(method: Callable[[], Method]) -> dict[str, Any]:
    """A method in the form that configurations have: ``class_path`` and ``init_args``.

    Args:
        method: the method's class, or a `functools.partial` of the class with some arguments.
    """
    made, given = (method.func, method.keywords) if isinstance(method, partial) else (method, {})
    path = f"{made.__module__}.{made.__qualname__}"
    return {"class_path": path, "init_args": {**default_settings(made), **given}}


def default_settings(made: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of a constructor's arguments by name, for those arguments that have one."""
    parameters = inspect.signature(made).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def method_name(method: Any) -> str | None:
    """The class name of a method, from the settings in a checkpoint.

    Args:
        method: the output of `method_settings`; a string in checkpoints of earlier versions.
    """
    path = method["class_path"] if isinstance(method, Mapping) else method
    return path and str(path).rpartition(".")[2]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
