"""Checks of the form of plain values from a file, before the values are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Form = Any
"""What a value has to be. A form is one of these:

- a type: the value is of this type;
- ``[form]``: a list or tuple, in which each value has the form;
- ``{key: form}``: a mapping with at least these keys, and values of these forms;
- ``{str: form}`` or ``{int: form}``: a mapping with keys of this type, and values of the form;
- a set: one of the values in the set;
- a function of a value and the text for its place, which raises `FormError`.
"""

_SHOWN = 60  # most characters of a value in a message


class FormError(ValueError):
    """Raised when a value has the wrong form; the message names the value's place."""


def check_form(value: Any, form: Form, place: str) -> None:
    """Check that a value has a form.

    A whole number may stand where a float is expected. ``True`` and ``False`` do not count as
    numbers, and NaN and infinity do not count as floats.

    Args:
        value: a number, string or tensor, or lists and mappings of these.
        form: the `Form` that the value should have.
        place: text that names the value in the message.

    Raises:
        FormError: when the value has another form.

    Example:
        >>> check_form({"size": [1, 2.5]}, {"size": [int]}, "the spec")
        Traceback (most recent call last):
            ...
        gpd_cli.forms.FormError: the spec, size, 1 is 2.5 and not int
    """
    if isinstance(form, list):
        _require(isinstance(value, list | tuple), value, "a list", place)
        for number, entry in enumerate(value):
            check_form(entry, form[0], f"{place}, {number}")
    elif isinstance(form, dict):
        _check_mapping(value, form, place)
    elif isinstance(form, set | frozenset):
        allowed = isinstance(value, str | int | type(None)) and value in form
        _require(allowed, value, f"one of {', '.join(sorted(map(str, form)))}", place)
    elif form is float:
        right = isinstance(value, int | float) and not isinstance(value, bool)
        _require(right and math.isfinite(value), value, "a finite number", place)
    elif isinstance(form, type):
        right = isinstance(value, form) and not (form is int and isinstance(value, bool))
        _require(right, value, form.__name__, place)
    else:
        form(value, place)


def maybe(form: Form) -> Callable[[Any, str], None]:
    """The form of a value that either is None or has another form.

    Args:
        form: the other form.
    """
    return lambda value, place: None if value is None else check_form(value, form, place)


def within(least: int, most: int) -> Callable[[Any, str], None]:
    """The form of a whole number in a range.

    Args:
        least: the smallest number of the range.
        most: the largest number of the range.
    """

    def check(value: Any, place: str) -> None:
        right = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        _require(right, value, f"a whole number from {least} to {most}", place)

    return check


def anything(value: Any, place: str) -> None:
    """The form that every value has."""


def plain(value: Any, place: str) -> None:
    """The form of plain values: numbers, strings, booleans, None, lists, and mappings."""
    if isinstance(value, list | tuple):
        check_form(value, [plain], place)
    elif isinstance(value, Mapping):
        check_form(value, {str: plain}, place)
    else:
        right = isinstance(value, str | int | float | bool | type(None))
        _require(right, value, "a plain value", place)


def shown(value: Any) -> str:
    """The text of a value for a message, shortened if it is long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # a whole number of too many digits
        text = "a number with thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _check_mapping(value: Any, form: Mapping[Any, Form], place: str) -> None:
    _require(isinstance(value, Mapping), value, "a mapping", place)
    for key, entry_form in form.items():
        if isinstance(key, type):
            for name, entry in value.items():
                _require(isinstance(name, key), name, f"a key of type {key.__name__}", place)
                check_form(entry, entry_form, f"{place}, {name}")
            continue
        if key not in value:
            raise FormError(f"{place} lacks {key}")
        check_form(value[key], entry_form, f"{place}, {key}")


def _require(right: bool, value: Any, what: str, place: str) -> None:
    if not right:
        raise FormError(f"{place} is {shown(value)} and not {what}")
