"""Shards of WebDataset for tests."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

Files = dict[str, bytes]
"""The files of a sample, by their endings."""


def write_shard(path: Path, samples: Iterable[Files]) -> None:
    """Write a shard whose samples are named by their numbers, ``000``, ``001``, ..."""
    with tarfile.open(path, "w") as archive:
        for number, files in enumerate(samples):
            for ending, content in files.items():
                entry = tarfile.TarInfo(f"{number:03}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
