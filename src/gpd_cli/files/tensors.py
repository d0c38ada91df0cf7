"""Files of tensors, written atomically and with checksums."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gpd_cli.files.atomic import atomic_path
from gpd_cli.files.checksums import with_checksum
from gpd_cli.files.failures import refusal, system_error
from gpd_cli.files.writable import check_writable

TENSOR_SUFFIXES = (".safetensors", ".pth", ".pt")
"""Suffixes of the files that `save_tensors` can write."""


def save_archive(path: str | Path, content: Any) -> None:
    """Write an object with ``torch.save``, atomically.

    Args:
        path: path of the file to write.
        content: the object.

    Raises:
        GpdError: when the file cannot be written; the message has the reason that the system gives.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)  # into an open file, since with a path torch loses the reason


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state dict, atomically.

    The tensors in the file are on the CPU and contiguous, and none shares memory with another. A
    ``.safetensors`` file has a checksum in its header, and a ``.pth`` file has the checksums of its
    archive; `check_whole` compares them.

    Args:
        path: path of the file. The suffix is ``.safetensors``, or ``.pth`` or ``.pt`` for a plain
            state dict by ``torch.save``, which any user of timm or torchvision can load.
        tensors: the state dict.
        metadata: texts for the header of a ``.safetensors`` file; other files have no header.

    Raises:
        WeightsError: when the file has another suffix.
        GpdError: when the file cannot be written.
    """
    path = Path(path)
    check_writable(path, TENSOR_SUFFIXES)
    owned = _with_own_memory(tensors)
    with atomic_path(path) as temporary:
        try:
            if path.suffix.lower() == ".safetensors":
                header = {"format": "pt", **(metadata or {})}
                save_file(owned, temporary, with_checksum(header, owned))
            else:
                with temporary.open("wb") as file:
                    torch.save(owned, file)
        except (RuntimeError, SafetensorError) as error:  # such as a full disk
            raise refusal(path, system_error(error) or error) from error


def _with_own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU where needed, so that each is contiguous and has its own storage.

    The storage has the size of the tensor. ``torch.save`` would write the whole storage of a view,
    and safetensors refuses tensors that share memory.
    """
    owned: OrderedDict[str, Tensor] = OrderedDict()
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        owned[name] = tensor
    # Some modules of torchvision (MNASNet) load only state dicts that have a version.
    versions = getattr(tensors, "_metadata", None)
    if versions is not None:
        owned._metadata = versions  # type: ignore[attr-defined]
    return owned
