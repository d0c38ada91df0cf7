"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gpd_cli.errors import GpdError
from gpd_cli.files.failures import has_room, refusal, system_error
from gpd_cli.files.writable import check_folder, check_writable

_LONGEST_TAIL = 100  # characters of the target's name to keep, since names have up to 255 bytes
_TEMPORARY = ".tmp-"


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """A temporary path beside a file, which replaces the file when the context ends without error.

    Other programs see the old file or the whole new one. When the context raises, the temporary
    file is removed and the old file stays. Missing folders are created; a symbolic link is followed
    and kept. The temporary name has the suffix of the target, for writers that check the suffix::

        with atomic_path("out/student.pth") as path, path.open("wb") as file:
            torch.save(tensors, file)

    The file gets the permissions of any new file, whichever the writer has set. ``torch.save``
    should be given an open file, since it writes the name of a path into the archive.

    Args:
        target: path of the file to write.

    Yields:
        The path to write to.

    Raises:
        GpdError: when the target cannot be written (see `check_writable`), or the disk refuses.
    """
    check_writable(target)
    final = Path(target).resolve()
    temporary = _temporary(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # learns the umask without changing it
        mode = temporary.stat().st_mode
        temporary.unlink()
    except OSError as error:
        raise refusal(target, error) from error
    try:
        yield temporary
        temporary.chmod(mode)
        with temporary.open("r+b") as written:
            os.fsync(written.fileno())  # a power cut could otherwise leave an empty new file
        temporary.replace(final)
        _sync_folder(final.parent)
    except GpdError:
        raise
    except Exception as error:
        # Libraries that write archives wrap the error of the system, or lose it.
        reason = system_error(error)
        if reason is not None and reason.filename not in (None, str(temporary)):
            raise  # the error concerns another file, which the context reads
        if reason is None and has_room(final.parent):
            raise
        raise refusal(target, reason or error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | Path, belongs: Collection[str]) -> Iterator[Path]:
    """A temporary folder beside a folder, which it replaces when the context ends without error.

    Args:
        target: path of the folder to write.
        belongs: names of the files that such a folder holds. An existing folder is replaced if it
            holds no other files.

    Yields:
        The path of the temporary folder, to write files into.

    Raises:
        GpdError: when the folder cannot be written (see `check_folder`), or the disk refuses.
    """
    check_folder(target, belongs)
    final = Path(target).resolve()
    temporary, old = _temporary(final), _temporary(final)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise refusal(target, error) from error
    try:
        yield temporary
        if final.exists():
            final.replace(old)  # a folder with files in it cannot be replaced in one step
        try:
            temporary.replace(final)
        except BaseException:  # an interruption, too
            if old.exists():
                old.replace(final)
            raise
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(temporary)):
            raise  # the error concerns another file, which the context reads
        raise refusal(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(target: str | Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote a file.

    Args:
        target: path of the file; no other process may be writing the file at the same time.
    """
    final = Path(target).resolve()
    pattern = f"{_TEMPORARY}{'[0-9a-f]' * 8}-"
    with suppress(OSError):
        for path in final.parent.glob(f"{pattern}*"):
            if path.name[len(_TEMPORARY) + 9 :] == final.name[-_LONGEST_TAIL:]:
                path.unlink(missing_ok=True)


def _temporary(final: Path) -> Path:
    """A path beside a target with a random name, so that no other process has the same one."""
    return final.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{final.name[-_LONGEST_TAIL:]}")


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that a new file name survives a power cut, if the system can do this."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
