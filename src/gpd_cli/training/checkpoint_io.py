"""Writing and reading of checkpoint files: a file is written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins import TorchCheckpointIO

from gpd_cli.files import check_whole, remove_leftovers, save_archive


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint I/O, with atomic writes and a checksum test before reading.

    A checkpoint is written to a temporary file beside its destination, synced and renamed, so that
    an interruption leaves the previous file in place. (Lightning writes to ``TMPDIR``, which is
    another file system on most clusters, and copies from there.) The checkpoints of all callbacks
    go through this class. Remote paths, such as ``s3://``, are left to Lightning.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            GpdError: when the file cannot be written; a previous file at the path is kept.
        """
        local = _local(path)
        if local is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        remove_leftovers(local)
        save_archive(local, checkpoint)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            WeightsError: when the checkpoint is damaged.
            FileNotFoundError: when there is no checkpoint at this path.
        """
        local = _local(path)
        if local is not None and os.path.isfile(local):  # noqa: PTH113 - or a URL
            check_whole(local)
        return super().load_checkpoint(path, map_location, weights_only)


def _local(path: str | Path) -> str | None:
    """The path in the local file system; None for a remote path such as ``s3://...``."""
    system, local = url_to_fs(os.fspath(path))
    return local if isinstance(system, LocalFileSystem) else None
