"""The errors of jsonargparse about a class's settings, in one sentence."""

from __future__ import annotations

import inspect
import re
from pydoc import locate

from gpd_cli.cli.suggestions import nearest

_KEY = r'Parser key "(data|model\.method|model\.assistants)": '
_CLASS = r"class_path[ =]'([\w.]+)'"
# What is meant by a value in the place of a file of settings.
_MEANT = {
    "model": "--model.student",
    "model.optimizer": "--model.optimizer.opt",
    "data": "--data.root",
}
# The innermost reason, without the types that jsonargparse tried around it.
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
    """An error of the parser in short, and the option that shows the right settings.

    Args:
        text: text of the error, on one line.

    Returns:
        The reason, for settings of the data's or the method's class; other texts unchanged. Then
        the option.

    Example:
        >>> error = "Type expects a class: Option 'tau' is not accepted. Got value: Namespace("
        >>> in_short('Parser key "data": ' + error + "class_path='mine.Data')")
        ("--data mine.Data: Option 'tau' is not accepted", '--data.help mine.Data')
    """
    key = re.match(_KEY, text)
    reason = next((found for r in _REASONS if (found := re.search(r, text))), None)
    if key is None or reason is None:
        return _of_several(text), "--help"
    said = re.sub(r"<class '([\w.]+)'>", r"\1", reason[0]).removeprefix("Parser key ")
    path = re.search(_CLASS, text)
    if key[1] == "model.assistants":  # all of one class
        return f"--{key[1]}: {said}", f"--{key[1]}.help"
    if path is None:
        return f"--{key[1]}: {said}", "--help"
    said += _suggestion(said, path[1])
    name = path[1].rpartition(".")[2] if path[1].startswith("gpd_cli.") else path[1]
    return f"--{key[1]} {path[1]}: {said}", f"--{key[1]}.help {name}"


def _of_several(text: str) -> str:
    """An error about an option of several types: what it takes, and what was given.

    Example:
        >>> _of_several(
        ...     'Parser key "trainer.x": Does not validate against any of the Union subtypes '
        ...     "Subtypes: [<class 'int'>, typing.Literal['a'], <class 'NoneType'>] Errors: - "
        ...     "Expected a <class 'int'> Given value type: <class 'str'> Given value: b"
        ... )
        "--trainer.x takes a whole number, 'a' or null, not b"
        >>> _of_several('Parser key "model": Unable to load config ' + "'resnet18' - Parser key")
        '--model takes a file of settings, not resnet18 (did you mean --model.student resnet18?)'
    """
    file = re.match(r"Parser key \"([\w.]+)\": Unable to load config '([^']*)' -", text)
    if file is not None:
        return f"--{file[1]} takes a file of settings, not {file[2]}{_meant(file[1], file[2])}"
    found = re.match(
        r'Parser key "([\w.]+)": .*?Subtypes: \[(.*?)\] Errors: .* Given value: (.*)$', text
    )
    if found is None:
        return text
    kinds = re.findall(r"<class '[\w.]+'>|typing\.\w+\[[^\]]*\]|\w+\[[\w.]+\]", found[2])
    names = list(dict.fromkeys(_plainly(kind) for kind in kinds))
    listed = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    if found[1] == "data":
        listed = "a class of data, such as mine.Data"
    return f"--{found[1]} takes {listed}, not {found[3]}{_meant(found[1], found[3])}"


def _meant(key: str, value: str) -> str:
    """The option whose value was probably given to the one above it."""
    is_word = re.fullmatch(r"[\w./~-]+", value)
    return f" (did you mean {_MEANT[key]} {value}?)" if key in _MEANT and is_word else ""


def _plainly(kind: str) -> str:
    """The name of a type, in the words of users."""
    plain = {"int": "a whole number", "float": "a number", "NoneType": "null", "str": "a text"}
    if kind.startswith("typing.Literal"):
        return kind.partition("[")[2].rstrip("]")
    name = re.sub(r"<class '([\w.]+)'>", r"\1", kind)
    if name in plain:
        return plain[name]
    outer, bracket, inner = name.partition("[")
    inner = inner.rstrip("]").rpartition(".")[2]
    return f"a {outer} of {inner}" if bracket else f"a {name.rpartition('.')[2]}"


def _suggestion(said: str, path: str) -> str:
    """The setting of a class that was probably meant."""
    unknown = re.match(r"Option '(\w+)'", said)
    cls = locate(path) if unknown else None
    if unknown is None or not callable(cls):
        return ""
    names = [f"--{name}" for name in inspect.signature(cls).parameters]
    meant = nearest(f"--{unknown[1]}", names)
    return "" if meant is None else f" (did you mean {meant.lstrip('-')}?)"
