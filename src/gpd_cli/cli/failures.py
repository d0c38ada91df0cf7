"""What the command line prints about an error, in one sentence, and the exit code."""

from __future__ import annotations

import os
import signal
import sys
from argparse import ArgumentError
from collections.abc import Collection, Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from gpd_cli.cli.arguments import occurrences
from gpd_cli.cli.configurations import place_of
from gpd_cli.cli.parser_errors import in_short, setting_of_class
from gpd_cli.errors import DivergenceError, GpdError, StudentArgumentsError

DIVERGED = 3
"""Exit code of a run whose loss or weights became NaN or infinite, by which a script that tries
several learning rates can tell this from other errors."""

_LONGEST = 600  # most characters in an error message
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")


def report_failure(
    error: BaseException, arguments: Sequence[str], commands: Collection[str]
) -> int:
    """Print an error that ends the program in one sentence, and return the exit code.

    Nothing is printed for an exit that has been reported already, as after ``--help``.

    Args:
        error: the error.
        arguments: the command line without the program's name.
        commands: the names of the program's commands.

    Raises:
        BaseException: the error itself, when the environment variable ``GPD_DEBUG`` is set and the
            error is neither a mistake in the command line nor an exit.
    """
    if isinstance(error, SystemExit):  # after --help or --print_config
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning exits after Ctrl-C
            return _interrupted(error.__context__)
        if isinstance(error, SIGTERMException) and error.code is None:  # Lightning sets none
            return 128 + signal.SIGTERM
        return error.code if isinstance(error.code, int) else 2
    if isinstance(error, KeyboardInterrupt):
        return _interrupted(error)
    if isinstance(error, ArgumentError):
        return _refused(error, arguments, commands)
    if os.environ.get("GPD_DEBUG"):
        raise error
    return _fail(error, _remedy_for_arguments(error, arguments))


def _refused(error: ArgumentError, arguments: Sequence[str], commands: Collection[str]) -> int:
    """Report a mistake in the command line, with the help page that shows what is right."""
    if (known := _gpd_error(error)) is not None:
        return _fail(known)
    text, page = in_short(" ".join(str(error).split()).rstrip("."))
    if option := setting_of_class(text):
        place = place_of(option, arguments)
        text = text if place is None else f"{place}: {text}"
    command = f"gpd {arguments[0]}" if arguments[0] in commands else "gpd"
    see = f"; see {command} {page}" if page else ""
    print(f"gpd: error: {_shortened(text)}{see}.", file=sys.stderr)
    return 2


def _fail(error: BaseException, remedy: str = "") -> int:
    text = _sentence(error)
    text = f"{text.removesuffix('.')}; {remedy}." if remedy else text
    print(f"gpd: error: {text}", file=sys.stderr)
    return DIVERGED if isinstance(_gpd_error(error), DivergenceError) else 1


def _remedy_for_arguments(error: BaseException, arguments: Sequence[str]) -> str:
    """The remedy for rejected ``student_args`` that come from a configuration; else empty."""
    given = any(occurrences(arguments, ("--model.student_args",)))
    if given or not isinstance(_gpd_error(error), StudentArgumentsError):
        return ""
    place = place_of("model.student_args", arguments)
    if place is None:
        return ""
    return f"its arguments come from {place}, and --model.student_args null removes them"


def _interrupted(interrupt: KeyboardInterrupt) -> int:
    """Report an interruption by Ctrl-C, with the notes that the command has attached to it."""
    said = "; ".join(["interrupted", *getattr(interrupt, "__notes__", [])])
    print(f"gpd: {said}", file=sys.stderr)
    return 130


def _sentence(error: BaseException) -> str:
    return _shortened(_text(error))


def _shortened(text: str) -> str:
    """Cut the middle out of a long message.

    The beginning says what is wrong, and the end gives the remedy.
    """
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST * 3 // 4]} ... {text[-_LONGEST // 4 :]}"


def _text(error: BaseException) -> str:
    known = _gpd_error(error)
    text = str(known or error).strip()
    if "Original Traceback" in text:  # a loader's worker puts it before the message
        text = text.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    text = " ".join(text.split())
    if isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
        return (
            "There is not enough memory; lower --data.batch_size, --data.image_size or "
            "--model.ratio, or use a machine with more memory."
        )
    foreseen = ImportError | MisconfigurationException | OSError | ValueError
    if known is not None or isinstance(error, foreseen):
        return text
    return f"{type(error).__name__}: {text[:300]} (not foreseen; GPD_DEBUG=1 shows where)"


def _gpd_error(error: BaseException | None) -> GpdError | None:
    """The `GpdError` behind an error, even if a library has wrapped it; None without one."""
    seen: list[BaseException] = []  # since errors can be the cause of each other
    while error is not None and error not in seen:
        if isinstance(error, GpdError):
            return error
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None
