"""Functions that read or rewrite a command line before the parser sees it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

from gpd_cli.recipes.names import configuration_path

CONFIGURATION_OPTIONS = ("-c", "--config")
IMAGE_DATA = "gpd_cli.data.ImageData"
"""Import path of the default data module."""
CHECKPOINT = "--ckpt_path"
_FLAGS = ("--dry_run", "--preprocess", "--fuse_bn", "--half")


def occurrences(arguments: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each occurrence of some options, with its value, in the order of the command line.

    Args:
        arguments: the command line.
        names: names of options, with their hyphens.
    """
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        if name in names:
            yield name, value if equals else following


def is_inline(value: str) -> bool:
    """Whether the value of ``-c`` is itself a configuration, such as ``{model: {ratio: 3}}``."""
    return re.match(r"\s*\{|[^/]*:\s", value) is not None


def options_of(arguments: Sequence[str], group: str) -> list[str]:
    """Keep only the configurations and the options of one group, in the order of the command line.

    Args:
        arguments: the command line, in which every option has a value.
        group: name of the group, such as ``trainer``; ``--trainer FILE`` counts as an option of the
            group as well.
    """
    found: list[str] = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, _ = argument.partition("=")
        if name in CONFIGURATION_OPTIONS or f"{name}.".startswith(f"--{group}."):
            found += [argument] if equals else [argument, following]
    return found


def with_values(arguments: Sequence[str]) -> list[str]:
    """Write ``=true`` after each flag that users may give without a value, such as ``--half``."""
    return [
        f"{argument}=true" if argument in _FLAGS and after.startswith("-") else argument
        for argument, after in zip_longest(arguments, arguments[1:], fillvalue="-")
    ]


def with_recipes(arguments: Sequence[str]) -> list[str]:
    """Replace each ``recipe:NAME`` on a command line by the path of the recipe's file.

    Args:
        arguments: the command line.

    Raises:
        RecipeError: when there is no such recipe.
    """
    # The parser also understands -cFILE.
    arguments = [
        part
        for argument in arguments
        for part in ((argument[:2], argument[2:]) if re.match("-c[^=]", argument) else (argument,))
    ]
    return with_configurations(arguments, lambda value: [configuration_path(value)])


def with_configurations(
    arguments: Sequence[str], replacement: Callable[[str], Sequence[str]]
) -> list[str]:
    """Replace each configuration of a command line by another one, by several, or by none.

    Args:
        arguments: the command line.
        replacement: function that takes the value of ``-c`` or ``--config``, and returns the values
            that replace it. The option is repeated for each of them.

    Example:
        >>> with_configurations(["fit", "-c=a", "--model.ratio=3"], lambda name: ["base", name])
        ['fit', '-c', 'base', '-c', 'a', '--model.ratio=3']
    """
    found: list[str] = []
    without_value: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if without_value:
            name, value = without_value.pop(), argument
        elif name not in CONFIGURATION_OPTIONS:
            found.append(argument)
            continue
        elif not equals:
            without_value.append(name)
            continue
        for new in replacement(value):
            found += [name, new]
    return found + without_value
