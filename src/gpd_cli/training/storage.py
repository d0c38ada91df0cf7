"""Where checkpoints are written and read: whole or not at all."""

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
    """Lightning's checkpoint files, of whatever callback, each whole or the one before.

    A file is written beside its destination, synced and renamed, and compared with its checksums
    when it is read. (Lightning writes to ``TMPDIR``, on most clusters another file system, and
    copies from there.) Remote places, ``s3://`` and the like, are left to Lightning.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            GpdError: when the disk refuses; what was there before is then still there.
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
            WeightsError: when it is damaged.
            FileNotFoundError: when there is none.
        """
        local = _local(path)
        if local is not None and os.path.isfile(local):  # noqa: PTH113 - or a URL
            check_whole(local)
        return super().load_checkpoint(path, map_location, weights_only)


def _local(path: str | Path) -> str | None:
    """The path on this machine; None of a remote place."""
    system, local = url_to_fs(os.fspath(path))
    return local if isinstance(system, LocalFileSystem) else None
