"""The command `gpd recipes`, which lists all recipes or prints the text of one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby, takewhile

from gpd_cli.errors import GpdError
from gpd_cli.recipes.names import PREFIX, recipe_names, recipe_path

HEADING = "Train by one of these: gpd fit -c recipe:FOLDER/NAME (see gpd recipes --help)"
HELP = """\
usage: gpd recipes [-h] [NAME]

List the configurations that come with gpd, or print the one with this name.

  gpd fit -c recipe:NAME            train by a recipe, in any folder
  gpd fit -c recipe:A -c recipe:B   by both; B's value where both set an option

In a configuration of your own, the entry `config: recipe:NAME` builds on one.
"""


def recipes_command(arguments: Sequence[str]) -> None:
    """Run `gpd recipes`.

    Args:
        arguments: the command line after ``recipes``.

    Raises:
        GpdError: when the recipe is unknown, or more than one name is given.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(HELP, end="")
    elif len(arguments) > 1:
        raise GpdError("gpd recipes takes one name, or none to list all; see gpd recipes --help.")
    elif arguments:
        print(_text(arguments[0].removeprefix(PREFIX)), end="")
    else:
        print(listing())


def listing() -> str:
    """A list of all recipes with a line for each, grouped by folder, within 80 columns."""
    blocks = [HEADING]
    for folder, group in groupby(sorted(recipe_names(), key=_place), key=_folder):
        names = list(group)
        width = max(len(_stem(name)) for name in names)
        heading = f"{PREFIX}{folder}/" if folder else PREFIX
        lines = [f"  {_stem(name):{width}}  {description(_text(name))}" for name in names]
        blocks.append("\n".join([heading, *lines]))
    return "\n\n".join(blocks)


def description(text: str) -> str:
    r"""The first sentence of the comment at the top of a recipe.

    Args:
        text: text of the recipe.

    Example:
        >>> description("# KD (Hinton et al.,\n# 2015). The temperature is 4.\nmodel: {}\n")
        'KD (Hinton et al., 2015)'
    """
    comment = takewhile(lambda line: line.startswith("#"), text.splitlines())
    words = " ".join(line.removeprefix("#").strip() for line in comment)
    return re.split(r"\.(?: |$)", words, maxsplit=1)[0]


def _text(name: str) -> str:
    return recipe_path(name).read_text(encoding="utf-8")


def _place(name: str) -> tuple[str, str]:
    return _folder(name), name


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _stem(name: str) -> str:
    return name.rpartition("/")[2]
