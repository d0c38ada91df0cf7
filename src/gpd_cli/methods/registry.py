"""Methods by name and by class path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from copy import deepcopy
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from gpd_cli.errors import MethodError
from gpd_cli.methods.attention import AttentionTransfer
from gpd_cli.methods.base import Method
from gpd_cli.methods.catkd import CATKD
from gpd_cli.methods.cc import CC
from gpd_cli.methods.crd import CRD
from gpd_cli.methods.dist import DIST
from gpd_cli.methods.dkd import DKD
from gpd_cli.methods.fitnets import FitNets
from gpd_cli.methods.kd import KD
from gpd_cli.methods.mlld import MLLD
from gpd_cli.methods.nkd import NKD
from gpd_cli.methods.pkt import PKT
from gpd_cli.methods.reviewkd import ReviewKD
from gpd_cli.methods.rkd import RKD
from gpd_cli.methods.simkd import SimKD
from gpd_cli.methods.srrl import SRRL

METHODS: dict[str, type[Method]] = {
    "at": AttentionTransfer,
    "catkd": CATKD,
    "cc": CC,
    "crd": CRD,
    "dist": DIST,
    "dkd": DKD,
    "fitnets": FitNets,
    "kd": KD,
    "mlld": MLLD,
    "nkd": NKD,
    "pkt": PKT,
    "reviewkd": ReviewKD,
    "rkd": RKD,
    "simkd": SimKD,
    "srrl": SRRL,
}
"""The methods by the name they have on the command line."""


def make_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """Make a static-teacher method.

    Args:
        name: a key of `METHODS`, or the class path of a `Method` of one's own (``mine.MyMethod``).
        settings: arguments of its constructor, such as ``{"temperature": 4.0}``.

    Raises:
        MethodError: when the name or a setting is unknown, or a setting is of the wrong type.
    """
    cls = method_class(name)
    settings = dict(settings or {})
    # A class without a constructor of its own takes nothing, whatever the one of nn.Module says.
    own = cls.__init__ is not Method.__init__
    parameters = list(inspect.signature(cls).parameters.values()) if own else []
    known = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    unknown = [key for key in settings if key not in known]
    if unknown and not any(p.kind == p.VAR_KEYWORD for p in parameters):
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise MethodError(f"Method '{name}' has no setting '{unknown[0]}'; {takes}.")
    try:
        return cls(**_typed(name, cls, settings))
    except (TypeError, ValueError) as error:
        raise MethodError(f"Method '{name}' does not take these settings: {error}.") from error


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Args:
        name: a key of `METHODS`, or a class path.

    Raises:
        MethodError: when there is none of that name.
    """
    return METHODS[name] if name in METHODS else _imported(name)


def _typed(name: str, cls: type[Method], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings in the plain types that the constructor says; all others as they are."""
    try:
        hints = get_type_hints(cls.__init__)
    except (NameError, TypeError):  # names that only a type checker knows
        return settings
    typed = deepcopy(settings)
    for key in settings.keys() & hints.keys():
        if not _is_plain(hints[key]):
            continue
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=hints[key])
        try:
            typed[key] = parser.parse_object({"value": typed[key]})["value"]
        except ArgumentError as error:
            wanted = getattr(hints[key], "__name__", str(hints[key]))
            raise MethodError(
                f"Method '{name}' does not take {settings[key]!r} for its setting {key}: that has "
                f"to be of type {wanted}."
            ) from error
    return typed


def _is_plain(hint: Any) -> bool:
    """Whether a type is a number, a text, a choice of these, or a container of them."""
    origin = get_origin(hint)
    if origin is None:
        return hint in (bool, float, int, str, NoneType)
    parts = (part for part in get_args(hint) if part is not Ellipsis)
    return origin is Literal or all(_is_plain(part) for part in parts)


def _imported(path: str) -> type[Method]:
    module, _, name = path.rpartition(".")
    if not module:
        raise MethodError(
            f"Unknown distillation method '{path}': choose one of {', '.join(sorted(METHODS))}, or "
            "give the class path of your own (package.module.Class)."
        )
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise MethodError(
            f"The method {path} cannot be imported: {error}; its module has to be installed or on "
            "PYTHONPATH."
        ) from error
    if not (inspect.isclass(cls) and issubclass(cls, Method)):
        raise MethodError(f"{path} is no subclass of gpd_cli.methods.Method; make it one.")
    if cls.forward is Method.forward:
        raise MethodError(f"{path} has no forward, which computes the loss; give it one.")
    return cls
