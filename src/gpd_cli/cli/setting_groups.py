"""The one form in which the parser gets the settings of a configuration: in groups, as YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yaml import SafeDumper, YAMLError, dump

GROUPS = ("model", "data", "trainer")
"""The groups of settings at the top of a configuration."""

# Groups that may be empty, where all of their entries have been commented out.
_OPTIONAL = (*GROUPS, "model.optimizer", "model.static_teacher", "data.init_args")


def in_groups(content: Mapping[str, Any]) -> dict[str, Any]:
    """Write all settings of a configuration in groups, also those whose names have dots.

    A group without settings, all of whose entries have been commented out, is left out.

    Args:
        content: content of a configuration.

    Returns:
        The same settings.

    Raises:
        YAMLError: when an option is set twice, once in a group and once with dots.

    Example:
        >>> in_groups({"model": {"ratio": 2}, "model.optimizer.lr": 0.1, "trainer": None})
        {'model': {'ratio': 2, 'optimizer': {'lr': 0.1}}}
    """
    found: dict[str, Any] = {}
    for name, value in content.items():
        first, *inner = str(name).split(".") if str(name).partition(".")[0] in GROUPS else [name]
        for part in reversed(inner):
            value = {part: value}
        _put(found, first, value, str(first))
    return found


def _put(group: dict[str, Any], name: Any, value: Any, path: str) -> None:
    """Add a setting to a group, or the settings of a group to those that it has already.

    Args:
        group: the group, changed in place.
        name: name of the setting in the group.
        value: value of the setting, or a group of settings.
        path: name of the setting with dots, for the error message.
    """
    if path in _OPTIONAL and (value is None or value == {}):
        return
    if isinstance(value, Mapping) and isinstance(group.get(name, {}), dict):
        inner = group.setdefault(name, {})
        for key, setting in value.items():
            _put(inner, key, setting, f"{path}.{key}")
        return
    if name in group:
        raise YAMLError(f"the option {path} is set a second time; remove one of the two")
    group[name] = value


class _Quoting(SafeDumper):  # type: ignore[misc] # yaml has no types
    """Writes texts in quotes, so that no loader takes them for numbers."""

    def represent_text(self, text: str) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"')


_Quoting.add_representer(str, _Quoting.represent_text)


def inline(content: Mapping[str, Any]) -> str:
    """Write the content of a configuration as text for a command line: YAML in braces.

    Args:
        content: content of a configuration.

    Example:
        >>> inline({"model": {"student": "resnet18", "ratio": 2}})
        '{"model": {"student": "resnet18", "ratio": 2}}'
    """
    text: str = dump(
        dict(content), Dumper=_Quoting, default_flow_style=True, sort_keys=False, width=10**9
    )
    return text.strip()
