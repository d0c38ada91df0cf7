"""Checks, before long work, that files and folders can be written at its end."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from gpd_cli.errors import GpdError, WeightsError
from gpd_cli.files.failures import refusal


def check_writable(path: str | Path, suffixes: Collection[str] | None = None) -> None:
    """Check that a file can be written, without creating anything.

    Args:
        path: path of the file; folders on the path need not exist yet.
        suffixes: allowed suffixes, such as `TENSOR_SUFFIXES`; by default any.

    Raises:
        GpdError: when the path is a folder or a device, lies below a file, is write-protected or in
            a write-protected folder, or has a suffix that is not allowed.
    """
    path = Path(path)
    if suffixes is not None and path.suffix.lower() not in suffixes:
        raise WeightsError(
            f"Cannot write '{path}': its suffix must be one of {', '.join(suffixes)}."
        )
    try:
        target = path.resolve()
        if target.is_dir():
            raise GpdError(f"Cannot write '{path}': it is a folder; add a file name.")
        if target.exists() and not target.is_file():
            raise GpdError(f"Cannot write '{path}': it is not a regular file; choose another path.")
        # A write-protected file could be replaced, but was protected on purpose.
        if target.exists() and not os.access(target, os.W_OK):
            raise GpdError(
                f"Cannot write '{path}': the file is write-protected; choose another path."
            )
        folder = next(parent for parent in target.parents if parent.exists())
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
        raise refusal(path, error) from error
    if not folder.is_dir():
        raise GpdError(
            f"Cannot write '{path}': '{folder}' is a file, not a folder; choose another path."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise GpdError(
            f"Cannot write '{path}': no permission to write in '{folder}'; choose another path."
        )


def check_not_input(output: str | Path, given: str | Path, option: str) -> None:
    """Check that a command does not replace the file that it reads.

    Args:
        output: path to write, a file or a folder.
        given: path of the file that is read.
        option: name of the option that gives this file, for the error message.

    Raises:
        GpdError: when the file is the output, or lies in the folder that is the output.
    """
    target, source = Path(output).resolve(), Path(given).resolve()
    if target == source or target in source.parents:
        raise GpdError(
            f"Writing '{output}' would replace {given}, the file of {option}; choose another path."
        )


def check_folder(path: str | Path, belongs: Collection[str]) -> None:
    """Check that a folder can be written or replaced, without creating anything.

    Args:
        path: path of the folder; folders on the path need not exist yet.
        belongs: names of the files that such a folder holds. An existing folder may be replaced if
            it holds no other files.

    Raises:
        GpdError: when the path is a file or the working directory, when the folder holds other
            files, or when it cannot be written.
    """
    path = Path(path)
    try:
        target = path.resolve()
        found = {file.name for file in target.iterdir()} if target.is_dir() else set()
    except (OSError, RuntimeError) as error:
        raise refusal(path, error) from error
    if others := sorted(found - set(belongs)):
        raise GpdError(
            f"Cannot write the folder '{path}': it contains other files, such as '{others[0]}'; "
            "choose a new folder."
        )
    if target.exists() and not target.is_dir():
        raise GpdError(f"Cannot write the folder '{path}': it is a file; choose another path.")
    if target == Path.cwd():  # the shell would stay in the old folder, which is removed
        raise GpdError(
            f"Cannot write the folder '{path}': it is the working directory; give a folder inside "
            "it."
        )
    check_writable(target / "file" if not target.exists() else target.parent / "file")
