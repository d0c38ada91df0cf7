"""Pages of help that are shown without importing torch and Lightning, which takes seconds.

The folder ``help_pages`` has what ``gpd COMMAND --help`` prints, in lines of any length.
``python -m gpd_cli.cli.stored_help`` (``make help``) writes it from the parsers; a test compares.
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
"""Commands that have a page."""
_UNLIMITED = 100_000  # columns
_HELP = 24  # column at which argparse begins what an option does
_MARGIN = 2  # columns that argparse leaves free on the right
_LEAST = 11  # columns that a text has in any terminal


def stored_help(arguments: Sequence[str]) -> str | None:
    """The page that a command line asks for, in lines that fit the terminal.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The page; None where something else is asked for, such as a class's options.
    """
    if len(arguments) != 2 or arguments[0] not in COMMANDS or arguments[1] not in ("-h", "--help"):
        return None
    page = PAGES / f"{arguments[0]}.txt"
    return wrapped(page.read_text(encoding="utf-8"), shutil.get_terminal_size().columns)


def wrapped(page: str, columns: int) -> str:
    """A page as argparse would have wrapped it.

    Args:
        page: text of the page, with lines of any length.
        columns: width of the terminal.

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
            indent, width = _HELP, columns - _MARGIN - _HELP  # what an option beside it does
        elif is_option or line.startswith("usage: ") or (indent == 0 and line.endswith(":")):
            width = len(line)  # argparse wraps none of these, nor titles
        elif indent < _HELP:
            width -= indent  # argparse counts the indent of a section's text twice
        text = textwrap.wrap(line[indent:], max(width, _LEAST)) or [""]
        lines += [line[:indent] + text[0], *(" " * indent + rest for rest in text[1:])]
    return "\n".join(lines) + "\n"


def write_pages(folder: Path = PAGES) -> None:
    """Write all pages from the parsers of the commands.

    Args:
        folder: where to; it is made.
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
