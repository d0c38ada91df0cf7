"""Search for image files in a tree of folders that may also hold other things."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from gpd_cli.errors import DataError

# Suffixes of picture formats that are not read, from cameras, telephones and the web.
_UNREAD = frozenset(
    (".gif", ".heic", ".heif", ".avif", ".jfif", ".jp2", ".jxl", ".ppm", ".pgm", ".tga", ".dng")
)


def image_files(folder: Path, extensions: Collection[str]) -> tuple[list[str], dict[str, int]]:
    """Find all images below a folder.

    Symbolic links are followed, except for links to a folder that contains the link. Hidden folders
    are left out, and so are folders, pipes and devices with the name of an image.

    Args:
        folder: the folder to search.
        extensions: suffixes of image files, in lower case.

    Returns:
        The paths of the images, in natural order (2 before 10), and the number of pictures in other
        formats, by suffix in lower case.

    Raises:
        DataError: when a folder cannot be read, or a link is broken.
    """
    wanted, paths, others = tuple(extensions), list[str](), list[str]()
    for path in _below(str(folder), (), (*wanted, *_UNREAD)):
        (paths if path.lower().endswith(wanted) else others).append(path)
    counts = Counter(path[path.rindex(".") :].lower() for path in others)
    return sorted(paths, key=_natural), dict(sorted(counts.items()))


def _natural(path: str) -> tuple[list[str | int], str]:
    """A key for the natural order of paths, regardless of case.

    The path itself decides between paths that differ in case or leading zeros only, so that the
    order does not depend on the file system.
    """
    parts = re.split(r"(\d+)", path.lower())  # texts and numbers take turns
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path


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
