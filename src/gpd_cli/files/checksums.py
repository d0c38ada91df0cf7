"""Checksums by which a damaged file of weights is noticed when it is read."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpd_cli.errors import WeightsError

_CHECKSUM = "crc32"  # in the header of a safetensors file


def check_whole(path: str | Path) -> None:
    """Check that the content of a file agrees with its checksums.

    Archives of ``torch.save`` have a checksum for each entry, and safetensors files written by
    `save_tensors` have one for all tensors; torch and safetensors themselves check neither. Files
    without a checksum pass.

    Args:
        path: path of the file.

    Raises:
        WeightsError: when the file is damaged.
        OSError: when the file cannot be read.
    """
    path = Path(path)
    status = path.stat()
    _check_version(path.resolve(), status.st_size, status.st_mtime_ns)


def with_checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The header of a safetensors file, with the checksum of header and tensors added.

    Args:
        header: texts of the header, by name.
        tensors: the tensors of the file, contiguous and on the CPU, by name.
    """
    return {**header, _CHECKSUM: _checksum(iter(sorted(tensors.items())), header)}


@lru_cache(maxsize=16)
def _check_version(path: Path, size: int, modified: int) -> None:
    """Check a file, once for each size and time of modification."""
    if path.suffix.lower() == ".safetensors":
        reason = _damage_of_tensors(path)
    else:
        reason = _damage_of_archive(path)
    if reason:
        raise WeightsError(f"{path} is damaged ({reason}); copy it again, or give another file.")


def _damage_of_archive(path: Path) -> str | None:
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return None if path.stat().st_size else "it is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # zipfile raises many types
        return f"its archive is broken: {error}"
    return None if entry is None else f"the checksum of its entry {entry} differs"


def _damage_of_tensors(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _CHECKSUM not in metadata:
                return None
            tensors = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
            found = _checksum(tensors, metadata)
    except SafetensorError as error:
        return " ".join(str(error).split())
    return None if found == metadata[_CHECKSUM] else "its checksum differs"


def _checksum(tensors: Iterator[tuple[str, Tensor]], metadata: Mapping[str, str]) -> str:
    """The checksum of the metadata, and of names, types, shapes and bytes of tensors.

    Args:
        tensors: tensors with their names, sorted by name.
        metadata: header of the file, whose own checksum is left out.
    """
    others = {name: text for name, text in metadata.items() if name != _CHECKSUM}
    found = zlib.crc32(json.dumps(others, sort_keys=True).encode())
    for name, tensor in tensors:
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        content: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        found = zlib.crc32(content, found)
    return f"{found:08x}"
