"""Translation of old forms of options to their present form.

The old forms are of versions in which methods and static teachers had no settings of their own. An
old form that cannot be translated is refused with a message that names the new form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from yaml import YAMLError

from gpd_cli.cli.arguments import IMAGE_DATA
from gpd_cli.distill.methods import METHODS
from gpd_cli.errors import MethodError

_METHOD, _STATIC = "--model.method", "--model.static_teacher"
_OF_STATIC = ("weights", "args", "stages")
_OF_CLASS = {"class_path", "init_args"}
_NAMES = {cls.__name__.lower(): cls.__name__ for cls in METHODS}


def current_arguments(arguments: Sequence[str]) -> list[str]:
    """Translate old forms of options on a command line to their present form.

    Args:
        arguments: the command line.

    Raises:
        MethodError: when an old form has no equivalent, or a method is unknown.

    Example:
        >>> current_arguments(["fit", "--model.static_teacher", "resnet34", "--model.method=dkd"])
        ['fit', '--model.static_teacher.name', 'resnet34', '--model.method=DKD']
    """
    following = [*arguments[1:], ""]
    current: list[str] = []
    takes_method = False
    for argument, after in zip(arguments, following, strict=True):
        if takes_method:
            current.append(_class_name(argument))
            takes_method = False
            continue
        name, equals, value = argument.partition("=")
        value = value if equals else after
        name = _option(name, value)
        if name in (_METHOD, f"{_METHOD}.class_path", f"{_METHOD}.help"):
            takes_method = not equals
            value = _class_name(value) if equals else value
        current.append(f"{name}={value}" if equals else name)
    return current


def current_settings(content: Any) -> Any:
    """Translate old and short forms of settings in a configuration to their full form.

    If the settings of the data name no class, they are taken as settings of `ImageData`.

    Args:
        content: the content of a configuration. Anything else, such as the value of a single
            option, is returned unchanged.

    Raises:
        MethodError: when an old form has no equivalent, or a method is unknown.
        YAMLError: when YAML reads the name of an option of the model as something other than text.
    """
    if not isinstance(content, Mapping):
        return content
    current: dict[str, Any] = {}
    dotted: dict[str, Any] = {}
    for key, value in content.items():
        group, dot, name = str(key).partition(".")
        if group == "model" and dot:
            dotted[name] = value
        elif key == "model" and isinstance(value, Mapping):
            current[key] = _nested(_current(value))
        elif key == "data" and isinstance(value, Mapping) and not value.keys() & _OF_CLASS:
            current[key] = {"class_path": IMAGE_DATA, "init_args": value}
        elif group == "data" and dot and name.partition(".")[0] not in _OF_CLASS:
            current[f"data.init_args.{name}"] = value
        else:
            current[key] = value
    return {**current, **{f"model.{name}": value for name, value in _current(dotted).items()}}


def _option(name: str, value: str) -> str:
    """The new name of an option, which may depend on the option's value."""
    if name == f"{_METHOD}_args":
        raise _lost_settings()
    if name.startswith(f"{_METHOD}_args."):
        return name.replace("method_args.", "method.", 1)
    if name == _STATIC:
        is_name = not value.startswith("{") and not value.endswith((".yaml", ".yml", ".json"))
        return f"{_STATIC}.name" if is_name else name
    for part in _OF_STATIC:
        old = f"{_STATIC}_{part}"
        if name in (old, f"{old}+") or name.startswith(f"{old}."):
            return name.replace(old, f"{_STATIC}.{part}", 1)
    return name


def _current(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate settings of the model to their present form; groups are written with dots."""
    current: dict[str, Any] = {}
    settings = dict(settings)
    arguments = settings.pop("method_args", None)
    for name, value in settings.items():
        if not isinstance(name, str):
            raise YAMLError(
                f"model has the option {name}, which YAML does not read as text; put its name in "
                "quotes"
            )
        if name == "method" and isinstance(value, str):
            value = _class_name(value)
            if arguments:
                value, arguments = {"class_path": value, "init_args": arguments}, None
        elif name == "method" and isinstance(value, Mapping) and "class_path" in value:
            value = {**value, "class_path": _class_name(str(value["class_path"]))}
        elif name.startswith("method_args."):
            name = name.replace("method_args.", "method.init_args.", 1)
        elif name == "static_teacher" and not isinstance(value, Mapping):
            name = "static_teacher.name"
        elif name.startswith("static_teacher_"):
            name = name.replace("_teacher_", "_teacher.", 1)
        current[name] = value
    if arguments:
        raise _lost_settings()
    return current


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Turn names with dots into nested mappings, one level for each dot."""
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        *groups, last = name.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return nested


def _class_name(method: str) -> str:
    """The class name of a method that may be written in lower case (dkd).

    Import paths and other values that are not plain names are returned unchanged.
    """
    if method in _NAMES.values() or not method.isidentifier():
        return method
    if method.lower() not in _NAMES:
        raise MethodError(
            f"Unknown distillation method '{method}'; choose one of "
            f"{', '.join(sorted(_NAMES.values(), key=str.lower))}, or give the path of a class of "
            "your own (package.module.Class)."
        )
    return _NAMES[method.lower()]


def _lost_settings() -> MethodError:
    return MethodError(
        "The option method_args no longer exists; write --model.method.beta 2 instead of "
        "--model.method_args '{beta: 2}', and in YAML set model.method with class_path and "
        "init_args."
    )
