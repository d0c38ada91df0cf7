"""Writing files so that a path holds either the whole new file or the old one."""

from __future__ import annotations

import os
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gpd_cli.errors import GpdError, WeightsError

TENSOR_SUFFIXES = (".safetensors", ".pth", ".pt")
"""Suffixes of the files that `save_tensors` can write."""

_LONGEST_TAIL = 100  # characters of the target's name to keep, as file systems allow 255 bytes


def check_writable(path: str | Path, suffixes: Collection[str] | None = None) -> None:
    """Check, before long work, that a file can be written; creates nothing.

    Args:
        path: the file to write later; missing folders above it are fine.
        suffixes: allowed suffixes, such as `TENSOR_SUFFIXES`; by default any.

    Raises:
        GpdError: when the path is a folder or a device, lies below a file, is write-protected or in
            a write-protected folder, or has a suffix that is not allowed.
    """
    path = Path(path)
    if suffixes is not None and path.suffix.lower() not in suffixes:
        raise WeightsError(
            f"Cannot write '{path}': its suffix '{path.suffix}' is none of {', '.join(suffixes)}."
        )
    try:
        target = path.resolve()
        if target.is_dir():
            raise GpdError(f"Cannot write '{path}': it is a folder; add a file name.")
        if target.exists() and not target.is_file():
            raise GpdError(f"Cannot write '{path}': it is not a regular file; choose another path.")
        # A write-protected file could be replaced, but was protected on purpose.
        if target.exists() and not os.access(target, os.W_OK):
            raise GpdError(
                f"Cannot write '{path}': the file is write-protected; choose another path."
            )
        folder = next(parent for parent in target.parents if parent.exists())
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
        raise _refusal(path, error) from error
    if not folder.is_dir():
        raise GpdError(
            f"Cannot write '{path}': '{folder}' is a file, not a folder; choose another path."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise GpdError(
            f"Cannot write '{path}': no permission to write in '{folder}'; choose another path."
        )


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """A temporary path beside `target`, which replaces the target when the context ends well.

    Readers of the target see the old file or the whole new one. When the context raises, the
    temporary file is removed and the old file stays. Missing folders are created; a symbolic link
    is followed and kept. The temporary name ends like the target's, for writers that check the
    suffix::

        with atomic_path("out/student.pth") as path, path.open("wb") as file:
            torch.save(tensors, file)

    Permissions are those of any new file, whatever the writer made of them. Writers of archives
    that name what is inside after the file (``torch.save``) are to be given an open file.

    Args:
        target: the file to write.

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
        temporary.touch()  # the way to learn the umask that changes nothing
        mode = temporary.stat().st_mode
        temporary.unlink()
    except OSError as error:
        raise _refusal(target, error) from error
    try:
        yield temporary
        temporary.chmod(mode)
        with temporary.open("r+b") as written:
            os.fsync(written.fileno())  # a power cut could otherwise leave an empty new file
        temporary.replace(final)
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise  # the error concerns another file, which the context reads
        raise _refusal(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(path: str | Path, belongs: Collection[str]) -> None:
    """Find out before long work whether a folder could be written; creates nothing.

    Args:
        path: the folder to be; missing folders above it are fine.
        belongs: names of the files that such a folder holds; one with no others may be replaced.

    Raises:
        GpdError: when the path is a file, holds something else, or cannot be written.
    """
    path = Path(path)
    try:
        target = path.resolve()
        found = {file.name for file in target.iterdir()} if target.is_dir() else set()
    except (OSError, RuntimeError) as error:
        raise _refusal(path, error) from error
    if others := sorted(found - set(belongs)):
        raise GpdError(
            f"Cannot write the folder '{path}': it holds other things, such as '{others[0]}'; "
            "choose a new one."
        )
    if target.exists() and not target.is_dir():
        raise GpdError(f"Cannot write the folder '{path}': it is a file; choose another path.")
    check_writable(target / "file" if not target.exists() else target.parent / "file")


@contextmanager
def atomic_folder(target: str | Path, belongs: Collection[str]) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well.

    Args:
        target: the folder to write.
        belongs: see `check_folder`.

    Yields:
        The folder to write into.

    Raises:
        GpdError: when the folder cannot be written, as `check_folder` tells, or the disk refuses.
    """
    check_folder(target, belongs)
    final = Path(target).resolve()
    temporary, old = _temporary(final), _temporary(final)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise _refusal(target, error) from error
    try:
        yield temporary
        if final.exists():
            final.replace(old)  # a folder with files in it cannot be replaced in one step
        try:
            temporary.replace(final)
        except OSError:
            if old.exists():
                old.replace(final)
            raise
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(temporary)):
            raise  # about another file, which the block reads
        raise _refusal(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state dict, atomically.

    Tensors are stored on the CPU, contiguous, each with memory of its own.

    Args:
        path: ``.safetensors``, or ``.pth`` or ``.pt`` for a plain state dict by ``torch.save``,
            which any user of timm or torchvision can load.
        tensors: the state dict.
        metadata: strings for the header of a ``.safetensors`` file; other files have no header.

    Raises:
        WeightsError: when the suffix is none of these.
        GpdError: when the path cannot be written.
    """
    path = Path(path)
    check_writable(path, TENSOR_SUFFIXES)
    owned = _with_own_memory(tensors)
    with atomic_path(path) as temporary:
        try:
            if path.suffix.lower() == ".safetensors":
                save_file(owned, temporary, {"format": "pt", **(metadata or {})})
            else:
                with temporary.open("wb") as file:
                    torch.save(owned, file)
        except (RuntimeError, SafetensorError) as error:  # such as a full disk
            raise _refusal(path, error) from error


def _temporary(final: Path) -> Path:
    """A name beside a target that nobody else takes."""
    return final.with_name(f".tmp-{secrets.token_hex(4)}-{final.name[-_LONGEST_TAIL:]}")


def _refusal(path: str | Path, error: Exception) -> GpdError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")
    return GpdError(f"Cannot write '{path}': {reason}; make room or choose another path.")


def _with_own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, each with a storage of its own and of its size.

    A view would put its whole base into a ``.pth`` file, and safetensors refuses shared memory.
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
