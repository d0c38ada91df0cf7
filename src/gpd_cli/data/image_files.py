"""Search for image files in a tree of folders that may also hold other things."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from timm.utils.misc import natural_key

from gpd_cli.errors import DataError


def image_files(folder: Path, extensions: Collection[str]) -> list[str]:
    """The paths of all images below a folder, in natural order (2 before 10).

    Symbolic links are followed, except for links to a folder that contains the link. Hidden folders
    are left out, and so are folders, pipes and devices with the name of an image.

    Args:
        folder: the folder to search.
        extensions: suffixes of image files, in lower case.

    Raises:
        DataError: when a folder cannot be read, or a link is broken.
    """
    found = _below(str(folder), (), tuple(extensions))
    return sorted(found, key=natural_key)


def _below(
    folder: str, above: tuple[tuple[int, int], ...], extensions: tuple[str, ...]
) -> Iterator[str]:
    """Yield the paths of the images below a folder, in any order.

    Args:
        folder: path of the folder.
        above: device and inode numbers of the folders that contain this one, up to the first.
        extensions: suffixes of image files, in lower case.
    """
    try:
        status = os.stat(folder)  # noqa: PTH116 - trees have millions of entries
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        with os.scandir(folder) as entries:
            listed = list(entries)
    except OSError as error:
        raise _unreadable(folder, error) from error
    for entry in listed:
        try:
            if entry.is_dir():
                if not entry.name.startswith("."):
                    yield from _below(entry.path, (*above, here), extensions)
            elif entry.name.lower().endswith(extensions):
                if entry.is_symlink():
                    os.stat(entry.path)  # noqa: PTH116 - an error where the link leads nowhere
                if entry.is_file():
                    yield entry.path
        except OSError as error:
            raise _unreadable(entry.path, error) from error


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(
        f"'{path}' cannot be read ({error.strerror}); correct its permissions or the link, or "
        "remove it from the data."
    )
