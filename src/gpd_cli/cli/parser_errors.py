"""Translation of jsonargparse's long error messages to one sentence without Python's types."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pydoc import locate

from gpd_cli.cli.suggestions import nearest
from gpd_cli.errors import did_you_mean

_KEY = r'Parser key "(data|model\.method|model\.assistants)": '
_CLASS = r"class_path[ =]'([\w.]+)'"
# For options that take a file: the option probably meant by a user who gave a plain value.
_MEANT = {
    "model": "--model.student",
    "model.optimizer": "--model.optimizer.opt",
    "data": "--data.root",
}
_PLAIN = {
    "bool": ["true", "false"],
    "int": ["a whole number"],
    "float": ["a number"],
    "NoneType": ["null"],
    "str": ["a text"],
    "Sequence": ["a list"],
}
_MANY = {"int": "whole numbers", "float": "numbers", "str": "names"}
_KIND = r"<class '[\w.]+'>|typing\.\w+\[[^\]]*\]|\w+\[[\w., ]+\]"
# Patterns of the innermost reason in a message, without the types that jsonargparse has tried.
_REASONS = (
    r"Option '\w+' is not accepted",
    r'Parser key "(?!data"|model\.)\w+": .*?'
    r"(?=\. Got value: Namespace| - Expected a <class 'NoneType'>|$)",
    r"the following arguments are required: [\w, ]+",
    r"No module named '[\w.]+'",
    r"[Mm]odule '[\w.]+' has no attribute '\w+'",
    r"Expected '[\w.]+' to be a subclass of <class '\w+'>",
)


def in_short(text: str) -> tuple[str, str]:
    """Shorten an error message of the parser, and name the option that shows the right settings.

    Args:
        text: text of the error, on one line.

    Returns:
        The reason in short (the text itself if its form is not known), and the option whose help
        shows the right settings (empty if the reason already names a remedy).

    Example:
        >>> error = "Type expects a class: Option 'tau' is not accepted. Got value: Namespace("
        >>> in_short('Parser key "data": ' + error + "class_path='mine.Data')")
        ("--data mine.Data: Option 'tau' is not accepted", '--data.help mine.Data')
        >>> in_short("the following arguments are required: fit.model.student")[0][:43]
        '--model.student is required; name a network'
        >>> in_short("the following arguments are required: ckpt_path, output")
        ('--ckpt_path and --output are required', '--help')
    """
    if lacking := re.match(r"argument (?:\S+/)?(\S+): expected one argument$", text):
        return f"{lacking[1]} needs a value", "--help"
    if required := re.match(r"the following arguments are required: ([\w., ]+)$", text):
        return _required(required[1].split(", "))
    key = re.match(_KEY, text)
    reason = next((found for r in _REASONS if (found := re.search(r, text))), None)
    if key is None or reason is None:
        return _shorten_type(text) or _shorten_several(text), "--help"
    said = re.sub(r"<class '([\w.]+)'>", r"\1", reason[0]).removeprefix("Parser key ")
    path = re.search(_CLASS, text)
    if key[1] == "model.assistants":  # all assistants are of one class, which need not be named
        return f"--{key[1]}: {said}", f"--{key[1]}.help"
    if path is None:
        return f"--{key[1]}: {said}", "--help"
    name = path[1].rpartition(".")[2] if path[1].startswith("gpd_cli.") else path[1]
    page = f"--{key[1]}.help {name}"
    group = f"{key[1]}."
    if known := _shorten_type(reason[0], group) or _shorten_union(_nested_error(text), group):
        return known, page
    return f"--{key[1]} {path[1]}: {said}{_suggestion(said, path[1])}", page


def setting_of_class(text: str) -> str | None:
    """Extract the unknown setting of a class from a message made by `in_short`.

    Example:
        >>> setting_of_class("--data mine.Data: Option 'tau' is not accepted")
        'data.init_args.tau'
    """
    found = re.match(r"--(data|model\.method) [\w.]+: Option '(\w+)' is not accepted", text)
    return None if found is None else f"{found[1]}.init_args.{found[2]}"


def _required(keys: Sequence[str]) -> tuple[str, str]:
    """The message about missing options, and the option whose help shows them.

    Args:
        keys: names of the missing options, as the parser writes them.
    """
    names = [key.partition(".")[2] if "." in key else key for key in keys]  # without the command
    if names == ["model.student"]:
        remedy = "name a network, or start with -c recipe:digits (gpd recipes lists more)"
        return f"--model.student is required; {remedy}", ""
    if names == ["runs"]:
        return "the folder of a run is required, such as runs/digits/version_0", "--help"
    listed = _listed([f"--{name}" for name in names], "and")
    return f"{listed} {'is' if len(names) == 1 else 'are'} required", "--help"


def _shorten_type(text: str, group: str = "") -> str | None:
    r"""Shorten an error about an option of a single type to what the option takes and what it got.

    Args:
        text: text of the error.
        group: prefix of the option's name, ending in a dot.

    Returns:
        The message; None if the error is of another kind.

    Example:
        >>> _shorten_type('Parser key "top": Expected a typing.Literal[\'a\', \'b\']. Got value: c')
        '--top takes a or b, not c'
        >>> _shorten_type('Parser key "lr": Expected a <class \'float\'>. Got value: c', "model.")
        '--model.lr takes a number, not c'
    """
    found = re.match(r'Parser key "([\w.]+)": Expected an? (.+?)\. Got value: (.*)$', text)
    if found is None:
        return None
    return f"--{group}{found[1]} takes {_listed(_plain_words(found[2]))}, not {found[3]}"


def _shorten_several(text: str) -> str:
    """Shorten an error about an option of several types to what the option takes and what it got.

    An error of another kind is returned unchanged.

    Example:
        >>> _shorten_several(
        ...     'Parser key "trainer.x": Does not validate against any of the Union subtypes '
        ...     "Subtypes: [<class 'int'>, typing.Literal['a'], <class 'NoneType'>] Errors: - "
        ...     "Expected a <class 'int'> Given value type: <class 'str'> Given value: b"
        ... )
        '--trainer.x takes a whole number, a or null, not b'
        >>> _shorten_several('Parser key "model": Unable to load config ' + "'resnet18' - Parser")
        '--model takes a file of settings, not resnet18 (did you mean --model.student resnet18?)'
    """
    file = re.match(r"Parser key \"([\w.]+)\": Unable to load config '([^']*)' -", text)
    if file is not None:
        return f"--{file[1]} takes a file of settings, not {file[2]}{_meant(file[1], file[2])}"
    other = re.match(r'Parser key "(model\.method)": Type .* Got value: (.*)$', text)
    if other is not None:
        return f"--{other[1]} takes the name of a class, not {other[2]}"
    return _shorten_union(text) or text


def _shorten_union(text: str, group: str = "") -> str | None:
    """As `_shorten_type`, for an option of several types; None if the error is of another kind."""
    found = re.match(
        r'Parser key "([\w.]+)": .*?Subtypes: \[(.*?)\] Errors: .* Given value: (.*)$', text
    )
    if found is None:
        return None
    kinds = re.findall(_KIND, found[2])
    listed = _listed(list(dict.fromkeys(name for kind in kinds for name in _plain_words(kind))))
    key = f"{group}{found[1]}"
    if key == "data":
        listed = "a class of data, such as mine.Data"
    return f"--{key} takes {listed}, not {found[3]}{_meant(key, found[3])}"


def _nested_error(text: str) -> str:
    """The part of an error about a class that is about one setting of several types; else empty."""
    found = re.search(
        r'(Parser key "(?!data"|model\.)\w+": Does not .*? Given value: .*?)'
        r"(?=\. Got value: Namespace| - Expected a |$)",
        text,
    )
    return "" if found is None else found[1]


def _meant(key: str, value: str) -> str:
    """A hint at the option that a value was probably meant for, which is below the given option."""
    is_word = re.fullmatch(r"[\w./~-]+", value)
    return f" (did you mean {_MEANT[key]} {value}?)" if key in _MEANT and is_word else ""


def _plain_words(kind: str) -> list[str]:
    """What a Python type allows, in words that users know."""
    if kind.startswith("typing.Literal"):
        return [value.strip("' ") for value in kind.partition("[")[2].rstrip("]").split(",")]
    name = re.sub(r"<class '([\w.]+)'>", r"\1", kind).removeprefix("collections.abc.")
    if name in _PLAIN:
        return _PLAIN[name]
    outer, bracket, inner = name.partition("[")
    outer = "list" if outer == "tuple" else outer
    inner = inner.rstrip("]").rpartition(".")[2]
    inner = _MANY.get(inner, inner)
    if outer == "dict":
        return ["a mapping, such as '{name: value}'"]
    return [f"a {outer} of {inner}" if bracket else f"a {outer.rpartition('.')[2]}"]


def _listed(names: Sequence[str], word: str = "or") -> str:
    return f" {word} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _suggestion(said: str, path: str) -> str:
    """A hint at the setting that was probably meant by an unknown setting of a class; else empty.

    Args:
        said: the reason of the error.
        path: import path of the class.
    """
    unknown = re.match(r"Option '(\w+)'", said)
    cls = locate(path) if unknown else None
    if unknown is None or not callable(cls):
        return ""
    names = [f"--{name}" for name in inspect.signature(cls).parameters]
    meant = nearest(f"--{unknown[1]}", names)
    return did_you_mean(meant and meant.lstrip("-"))
