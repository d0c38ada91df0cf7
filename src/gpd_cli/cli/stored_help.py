"""Help pages stored as text, so that they are shown without importing torch and Lightning.

The imports would take seconds. The folder ``help_pages`` holds the output of ``gpd COMMAND --help``
for each command, in lines of any length. ``python -m gpd_cli.cli.stored_help`` (``make help``)
writes the pages from the parsers, and a test checks that the stored pages are up to date.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

PAGES = Path(__file__).parent / "help_pages"
COMMANDS = ("fit", "validate", "test", "predict", "expand", "extract", "report")
"""Commands with a stored page."""
_UNLIMITED = 100_000  # terminal width, in columns, at which argparse does not wrap lines
_HELP = 24  # column at which argparse begins the description of an option
_MARGIN = 2  # columns that argparse leaves free on the right
_LEAST = 11  # least width of a text in columns, however narrow the terminal is


def stored_help(arguments: Sequence[str]) -> str | None:
    """The stored page that a command line asks for, wrapped to the width of the terminal.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The page; None if the command line asks for anything else, such as help on a class.
    """
    if len(arguments) != 2 or arguments[0] not in COMMANDS or arguments[1] not in ("-h", "--help"):
        return None
    page = PAGES / f"{arguments[0]}.txt"
    return wrapped(page.read_text(encoding="utf-8"), shutil.get_terminal_size().columns)


def wrapped(page: str, columns: int) -> str:
    """Wrap the lines of a page as argparse would.

    Args:
        page: text of the page, with lines of any length.
        columns: width of the terminal, in columns.

    Example:
        >>> print(wrapped("  --lr LR               the learning rate at the start", 50), end="")
          --lr LR               the learning rate at the
                                start
    """
    lines: list[str] = []
    given = page.splitlines()
    for line, following in zip(given, [*given[1:], ""], strict=True):
        indent = len(line) - len(line.lstrip())
        width = columns - _MARGIN - indent
        is_option = 0 < indent < _HELP and following.startswith(" " * _HELP)
        if indent < _HELP and line[:_HELP].endswith("  ") and line[_HELP:].strip():
            indent, width = _HELP, columns - _MARGIN - _HELP  # description beside an option's name
        elif is_option or line.startswith("usage: ") or (indent == 0 and line.endswith(":")):
            width = len(line)  # argparse does not wrap usage, titles and names of options
        elif indent < _HELP:
            width -= indent  # argparse counts the indent of a section's text twice
        text = textwrap.wrap(line[indent:], max(width, _LEAST)) or [""]
        lines += [line[:indent] + text[0], *(" " * indent + rest for rest in text[1:])]
    return "\n".join(lines) + "\n"


def write_pages(folder: Path = PAGES) -> None:
    """Write all help pages anew from the parsers of the commands.

    Args:
        folder: folder of the pages, which is created if it does not exist.
    """
    from gpd_cli.cli.command_line import run

    folder.mkdir(exist_ok=True)
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(_UNLIMITED)
    try:
        for command in COMMANDS:
            with contextlib.redirect_stdout(io.StringIO()) as page:
                run([command, "--help"])
            (folder / f"{command}.txt").write_text(page.getvalue(), encoding="utf-8")
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


if __name__ == "__main__":
    write_pages()
