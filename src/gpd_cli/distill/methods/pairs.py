"""Settings of methods that have a value for each pair of teacher and student.

The literature chooses some weights in this way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpd_cli.errors import MethodError

ByPair = dict[str, float]
"""A table in place of a number: a value for each pair, ``TEACHER -> STUDENT``."""

_ARROW = "->"
_OTHERWISE = "otherwise"


def for_pair(settings: Mapping[str, Any], teacher: str, student: str) -> dict[str, Any]:
    """Choose the settings of a method for one pair of teacher and student.

    A setting may be a table with a value for each pair (``TEACHER -> STUDENT``), and a value under
    ``otherwise`` for all other pairs.

    Args:
        settings: settings of the method by name, some of which may be tables.
        teacher: name of the static teacher.
        student: name of the student.

    Returns:
        The settings by name, with the pair's entry in place of each table.

    Raises:
        MethodError: when a table has no entry for the pair.

    Example:
        >>> table = {"resnet34 -> resnet18": 0.5, "otherwise": 8.0}
        >>> for_pair({"alpha": 1.0, "beta": table}, "resnet34", "resnet18")
        {'alpha': 1.0, 'beta': 0.5}
    """
    return {
        name: _entry(name, value, teacher, student) if _is_table(value) else value
        for name, value in settings.items()
    }


def one_value(name: str, value: float | ByPair) -> float:
    """Check that a setting is a number, since `for_pair` has replaced any table.

    Args:
        name: name of the setting.
        value: the argument of the method's constructor.

    Returns:
        The number.

    Raises:
        MethodError: when the value is still a table.
    """
    if isinstance(value, Mapping):
        raise MethodError(
            f"The setting {name} must be a number, or in a configuration a table of TEACHER -> "
            f"STUDENT: VALUE, not {value!r}."
        )
    return value


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and any(_ARROW in str(key) for key in value)


def _entry(name: str, table: Mapping[str, Any], teacher: str, student: str) -> Any:
    for pair, value in table.items():
        if [part.strip() for part in pair.split(_ARROW)] == [teacher, student]:
            return value
    if _OTHERWISE in table:
        return table[_OTHERWISE]
    raise MethodError(
        f"The table of {name} has no entry for '{teacher} -> {student}' and none for "
        f"'{_OTHERWISE}'; set --model.method.{name} to a number."
    )
