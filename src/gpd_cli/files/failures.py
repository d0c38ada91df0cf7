"""What an error message says about a file that cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from gpd_cli.errors import GpdError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_ROOM = 1 << 16  # bytes; with fewer bytes free, lack of room is the cause of any failure


def refusal(path: str | Path, error: Exception) -> GpdError:
    """The error, in a sentence with the remedy, for a file or folder that cannot be written.

    Args:
        path: path of the file or folder.
        error: the error of the system, or of the library that was writing.
    """
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")
    folder = next((f for f in Path(path).absolute().parents if f.is_dir()), Path())
    if _is_full(folder, error):
        return GpdError(
            f"Cannot write '{path}': the disk that holds '{folder}' is full, or its quota is used "
            "up; make room or choose another path."
        )
    return GpdError(f"Cannot write '{path}': {reason}; choose another path.")


def system_error(error: BaseException | None) -> OSError | None:
    """The error of the system that caused another error; None if it is not known."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def has_room(folder: Path) -> bool:
    """Whether the disk that holds a folder has room left; True if this is not known."""
    try:
        return shutil.disk_usage(folder).free >= _NO_ROOM
    except OSError:
        return True


def _is_full(folder: Path, error: Exception) -> bool:
    """Whether an error was caused by a full disk or an exhausted quota."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    # Errors of libraries may have lost the error of the system.
    return any(os.strerror(code) in str(error) for code in _FULL) or not has_room(folder)
