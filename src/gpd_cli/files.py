"""Files that are written whole or not at all, and whose damage shows when they are read."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpd_cli.errors import GpdError, WeightsError

TENSOR_SUFFIXES = (".safetensors", ".pth", ".pt")
"""Suffixes of the files that `save_tensors` can write."""

_LONGEST_TAIL = 100  # characters of the target's name to keep, as file systems allow 255 bytes
_TEMPORARY = ".tmp-"
_CHECKSUM = "crc32"  # in the header of a safetensors file
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_ROOM = 1 << 16  # bytes: with fewer left, whatever failed did so for want of room


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
            f"Cannot write '{path}': its suffix must be one of {', '.join(suffixes)}."
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
        _sync_folder(final.parent)
    except GpdError:
        raise
    except Exception as error:
        # Libraries that write archives put an error of their own above the system's, or lose it.
        reason = _system_error(error)
        if reason is not None and reason.filename not in (None, str(temporary)):
            raise  # the error concerns another file, which the context reads
        if reason is None and _free(final.parent) >= _NO_ROOM:
            raise
        raise _refusal(target, reason or error) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(path: str | Path, belongs: Collection[str]) -> None:
    """Find out before long work whether a folder could be written; creates nothing.

    Args:
        path: the folder to be; missing folders above it are fine.
        belongs: names of the files that such a folder holds; one with no others may be replaced.

    Raises:
        GpdError: when the path is a file or the working directory, holds something else, or cannot
            be written.
    """
    path = Path(path)
    try:
        target = path.resolve()
        found = {file.name for file in target.iterdir()} if target.is_dir() else set()
    except (OSError, RuntimeError) as error:
        raise _refusal(path, error) from error
    if others := sorted(found - set(belongs)):
        raise GpdError(
            f"Cannot write the folder '{path}': it contains other files, such as '{others[0]}'; "
            "choose a new folder."
        )
    if target.exists() and not target.is_dir():
        raise GpdError(f"Cannot write the folder '{path}': it is a file; choose another path.")
    if target == Path.cwd():  # whoever works in it would stay in the old folder, which is removed
        raise GpdError(
            f"Cannot write the folder '{path}': it is the working directory; give a folder inside "
            "it."
        )
    check_writable(target / "file" if not target.exists() else target.parent / "file")


@contextmanager
def atomic_folder(target: str | Path, belongs: Collection[str]) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well.

    Args:
        target: the folder to write.
        belongs: names of the files that such a folder holds; one with no others may be replaced.

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


def remove_leftovers(target: str | Path) -> None:
    """Remove what processes that were killed while they wrote a file have left beside it.

    Args:
        target: the file, which no other process may be writing now.
    """
    final = Path(target).resolve()
    pattern = f"{_TEMPORARY}{'[0-9a-f]' * 8}-"
    with suppress(OSError):
        for path in final.parent.glob(f"{pattern}*"):
            if path.name[len(_TEMPORARY) + 9 :] == final.name[-_LONGEST_TAIL:]:
                path.unlink(missing_ok=True)


def save_archive(path: str | Path, content: Any) -> None:
    """Write what ``torch.save`` writes, atomically.

    Args:
        path: the file to write.
        content: what to write.

    Raises:
        GpdError: when the path cannot be written, in the words of the system.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        # Through a file of Python's: torch by itself loses the reason of a failure.
        torch.save(content, file)


def check_whole(path: str | Path) -> None:
    """Compare the content of a file with its checksums.

    Archives of ``torch.save`` have one per entry, and safetensors written by `save_tensors` one for
    all; torch and safetensors look at neither. Of other files nothing is known.

    Args:
        path: the file.

    Raises:
        WeightsError: when the file is damaged.
        OSError: when it cannot be read.
    """
    path = Path(path)
    status = path.stat()
    _check_version(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)
def _check_version(path: Path, size: int, modified: int) -> None:
    """Check a file as it is now, once."""
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
            found = _checksum(((n, file.get_tensor(n)) for n in sorted(file.keys())), metadata)
    except SafetensorError as error:
        return " ".join(str(error).split())
    return None if found == metadata[_CHECKSUM] else "its checksum differs"


def _checksum(tensors: Iterator[tuple[str, Tensor]], metadata: Mapping[str, str]) -> str:
    """The checksum of names, shapes, types and bytes of tensors, in this order, and of metadata."""
    others = {name: text for name, text in metadata.items() if name != _CHECKSUM}
    found = zlib.crc32(json.dumps(others, sort_keys=True).encode())
    for name, tensor in tensors:
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        content: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        found = zlib.crc32(content, found)
    return f"{found:08x}"


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state dict, atomically.

    Tensors are stored on the CPU, contiguous, each with memory of its own. A ``.safetensors`` file
    has a checksum in its header, which `check_whole` looks at; a ``.pth`` file has those of its
    archive.

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
                header = {"format": "pt", **(metadata or {})}
                header[_CHECKSUM] = _checksum(iter(sorted(owned.items())), header)
                save_file(owned, temporary, header)
            else:
                with temporary.open("wb") as file:
                    torch.save(owned, file)
        except (RuntimeError, SafetensorError) as error:  # such as a full disk
            raise _refusal(path, _system_error(error) or error) from error


def _temporary(final: Path) -> Path:
    """A name beside a target that nobody else takes."""
    return final.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{final.name[-_LONGEST_TAIL:]}")


def _refusal(path: str | Path, error: Exception) -> GpdError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")
    folder = next((f for f in Path(path).absolute().parents if f.is_dir()), Path())
    if _is_full(folder, error):
        return GpdError(
            f"Cannot write '{path}': the disk that holds '{folder}' is full, or its quota is used "
            "up; make room or choose another path."
        )
    return GpdError(f"Cannot write '{path}': {reason}; choose another path.")


def _is_full(folder: Path, error: Exception) -> bool:
    """Whether an error is for want of room, which the system says, or else the disk."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    # A library's own error, which may have lost the system's.
    return any(os.strerror(code) in str(error) for code in _FULL) or _free(folder) < _NO_ROOM


def _system_error(error: BaseException | None) -> OSError | None:
    """The error of the system that led to another one, if it is known."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _free(folder: Path) -> int:
    """Bytes that may still be written; many where that cannot be told."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 2**63


def _sync_folder(folder: Path) -> None:
    """Let a new name outlast a power cut, where folders can be synced."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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


def json_text(value: Any, indent: int | None = None) -> str:
    r"""JSON in which letters of all languages stand as they are.

    Names of files are bytes. Where these are no UTF-8, Python has half a surrogate pair for each
    byte, which no file in UTF-8 can hold; it is escaped, and comes back when the JSON is read.

    Args:
        value: plain values.
        indent: spaces by which each level is indented; None for a single line.

    Example:
        >>> print(json_text(os.fsdecode("café".encode()) + os.fsdecode(b"caf\xe9")))
        "cafécaf\udce9"
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode(errors="backslashreplace").decode()


def short_path(path: Path) -> str:
    """A path as one would type it: seen from the working directory, if it lies in there."""
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)
