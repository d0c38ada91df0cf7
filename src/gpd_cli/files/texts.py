"""Texts about files: paths as one types them, and JSON of their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def json_text(value: Any, indent: int | None = None) -> str:
    r"""A value as JSON that can be written in UTF-8, in which letters outside ASCII stay readable.

    File names are bytes. If these are not valid UTF-8, Python represents each invalid byte by half
    a surrogate pair, which a UTF-8 file cannot hold. Such characters are escaped here, and are
    restored when the JSON is read.

    Args:
        value: plain values.
        indent: number of spaces by which each level is indented; None for a single line.

    Example:
        >>> import os
        >>> print(json_text(os.fsdecode("café".encode()) + os.fsdecode(b"caf\xe9")))
        "cafécaf\udce9"
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode(errors="backslashreplace").decode()


def short_path(path: Path) -> str:
    """A path as a user would type it: relative if it lies in the working directory."""
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)


def is_remote(folder: str) -> bool:
    """Whether a folder is given by its address, such as ``s3://bucket/runs``.

    Args:
        folder: path or address of the folder.

    Example:
        >>> is_remote("s3://bucket/runs"), is_remote("runs")
        (True, False)
    """
    return "://" in folder
