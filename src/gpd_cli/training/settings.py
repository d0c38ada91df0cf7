"""A run's settings as plain values, as checkpoints may hold no others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from functools import partial
from typing import Any

from gpd_cli.distill.methods import Method


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with mappings in place of dataclasses and of the method.

    Args:
        settings: arguments of `GapPreservingDistillation`, by name; plain values are kept.
    """
    plain = {name: _plain(value) for name, value in settings.items()}
    if callable(method := plain["method"]):
        plain["method"] = method_settings(method)
    return plain


def method_settings(method: Callable[[], Method]) -> dict[str, Any]:
    """A method in the form of configurations, with ``class_path`` and ``init_args``.

    Args:
        method: the class, or a `functools.partial` of it with its settings.
    """
    made, given = (method.func, method.keywords) if isinstance(method, partial) else (method, {})
    path = f"{made.__module__}.{made.__qualname__}"
    return {"class_path": path, "init_args": {**default_settings(made), **given}}


def default_settings(made: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of a constructor's arguments, by name; other arguments are left out."""
    parameters = inspect.signature(made).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def method_name(method: Any) -> str | None:
    """The name of a method's class, from a checkpoint's settings.

    Args:
        method: the output of `method_settings`; in checkpoints of earlier versions a string.
    """
    path = method["class_path"] if isinstance(method, Mapping) else method
    return path and str(path).rpartition(".")[2]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
