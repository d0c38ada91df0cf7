import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gpd_cli.errors import GpdError, WeightsError
from gpd_cli.files import (
    TENSOR_SUFFIXES,
    atomic_path,
    check_whole,
    check_writable,
    remove_leftovers,
    save_archive,
    save_tensors,
)

needs_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


def load(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def test_atomic_path_writes_the_target_and_its_folders(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folders" / "note.txt"
    with atomic_path(target) as path:
        assert path.parent == target.parent
        assert path.suffix == ".txt"
        path.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    target = tmp_path / "note.txt"
    target.write_text("old")
    with pytest.raises(failure), atomic_path(target) as path:
        path.write_text("hal")
        raise failure
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_process_killed_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "weights.pth"
    save_tensors(target, {"a": torch.arange(3)})
    code = (
        "import os, signal, sys\n"
        "from gpd_cli.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as path:\n"
        "    path.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert load(target)["a"].tolist() == [0, 1, 2]


def test_files_get_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with atomic_path(tmp_path / "atomic") as path:
        path.touch()
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_symbolic_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "real" / "note.txt")
    with atomic_path(link) as path:
        path.write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "real" / "note.txt").read_text() == "new"


def test_names_as_long_as_a_file_system_allows(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 251 + ".txt")
    with atomic_path(target) as path:
        path.write_text("whole")
    assert target.read_text() == "whole"


def test_an_error_about_another_file_is_not_blamed_on_the_target(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="other"), atomic_path(tmp_path / "target"):
        (tmp_path / "other").read_text()


def test_check_writable_accepts_what_can_be_written_and_creates_nothing(tmp_path: Path) -> None:
    (tmp_path / "old.pth").touch()
    for path in ("old.pth", "new.pth", "new/folders/new.pth"):
        check_writable(tmp_path / path)
    check_writable(str(tmp_path / "NEW.PTH"), TENSOR_SUFFIXES)
    assert [path.name for path in tmp_path.iterdir()] == ["old.pth"]


def test_check_writable_takes_relative_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_writable("new.pth")
    (tmp_path / "folder").mkdir()
    with pytest.raises(GpdError, match="'folder': it is a folder"):
        check_writable("folder")


def test_outputs_that_cannot_be_written_are_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path, message in {
        tmp_path: f"Cannot write '{tmp_path}': it is a folder; add a file name.",
        tmp_path / "file" / "x.pth": f"'{tmp_path}/file' is a file, not a folder; choose another",
        tmp_path / "file" / "y" / "x.pth": f"'{tmp_path}/file' is a file, not a folder; choose",
        tmp_path / "pipe": "pipe': it is not a regular file; choose another path.",
        tmp_path / "circle": "circle': ",
    }.items():
        with pytest.raises(GpdError) as early:
            check_writable(path)
        assert message in str(early.value)
        with pytest.raises(GpdError) as late, atomic_path(path):
            pytest.fail("the block must not run")
        assert str(late.value) == str(early.value)


@needs_user
def test_missing_permissions_are_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(GpdError, match=r"no permission to write in '.*closed'; choose another"):
        check_writable(tmp_path / "closed" / "deep" / "x.pth")
    (tmp_path / "blind").mkdir(mode=0o000)
    with pytest.raises(GpdError, match=r"Cannot write '.*blind/deep/x.pth': .*choose another"):
        check_writable(tmp_path / "blind" / "deep" / "x.pth")
    (tmp_path / "kept.pth").touch(mode=0o400)
    with pytest.raises(GpdError, match="the file is write-protected; choose another path"):
        save_tensors(tmp_path / "kept.pth", {})


@pytest.mark.parametrize("suffix", TENSOR_SUFFIXES)
def test_saved_tensors_are_read_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"student{suffix}"
    shared = torch.nn.Parameter(torch.randn(4, 6))
    tensors = {
        "parameter": shared,
        "tied": shared,
        "transposed": shared.t(),
        "column": shared[:, 1],
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3).to(torch.bfloat16),
    }
    save_tensors(path, tensors)
    read = load(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor), name
        assert read[name].dtype == tensor.dtype
        assert read[name].is_contiguous()
        assert not read[name].requires_grad
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("suffix", TENSOR_SUFFIXES)
def test_a_slice_is_saved_without_its_base(tmp_path: Path, suffix: str) -> None:
    save_tensors(tmp_path / f"slice{suffix}", {"row": torch.zeros(1000, 1000)[3]})
    assert (tmp_path / f"slice{suffix}").stat().st_size < 20_000


def test_saving_changes_no_tensor_of_the_model(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    memory = model.weight.data_ptr()
    save_tensors(tmp_path / "x.safetensors", model.state_dict())
    assert model.weight.requires_grad
    assert model.weight.data_ptr() == memory


def test_metadata_goes_into_the_header_of_safetensors(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {"gpd": "{}"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata()
    assert len(metadata.pop("crc32")) == 8
    assert metadata == {"format": "pt", "gpd": "{}"}


def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    sentence = "its suffix must be one of .safetensors, .pth, .pt."
    with pytest.raises(WeightsError) as error:
        save_tensors(tmp_path / "x.npz", {})
    assert sentence in str(error.value)
    with pytest.raises(WeightsError) as error:
        check_writable(tmp_path / "x.npz", TENSOR_SUFFIXES)
    assert sentence in str(error.value)


@pytest.mark.parametrize("suffix", TENSOR_SUFFIXES)
def test_a_disk_that_refuses_leaves_the_old_file_and_one_sentence(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"x{suffix}"
    save_tensors(path, {"a": torch.ones(2)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            GpdError, match=r"Cannot write '.*x\.\w+': .*[Ff]ile too large.*; choose another path"
        ) as e:
            save_tensors(path, {"a": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(e.value)
    assert load(path)["a"].tolist() == [1, 1]
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.ckpt"
    save_archive(target, {"a": torch.ones(2)})

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(GpdError, match=r"x\.ckpt': the disk that holds '.*' is full, or its quota"):
        save_archive(target, {"a": torch.zeros(2)})
    assert load(target)["a"].tolist() == [1, 1]
    assert list(tmp_path.iterdir()) == [target]


def test_only_the_system_or_a_silent_library_makes_a_disk_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems without room of their own (/proc, read-only mounts) have no free bytes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    for error, said in (
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "': Read-only file system; choose an"),
        (RuntimeError("unexpected pos 64"), "is full, or its quota is used up; make room"),
    ):
        with pytest.raises(GpdError, match=said), atomic_path(tmp_path / "x.pth"):
            raise error


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in ("x.ckpt", ".tmp-0123abcd-other.ckpt", ".tmp-x.ckpt")]
    for path in (*kept, tmp_path / ".tmp-0123abcd-x.ckpt"):
        path.touch()
    remove_leftovers(tmp_path / "x.ckpt")
    assert sorted(tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt"])
def test_a_single_flipped_bit_is_seen(tmp_path: Path, suffix: str) -> None:
    path, tensors = tmp_path / f"x{suffix}", {"a": torch.randn(999), "b": torch.tensor(2.5)}
    if suffix == ".ckpt":
        save_archive(path, tensors)
    else:
        save_tensors(path, tensors)
    check_whole(path)
    content = bytearray(path.read_bytes())
    position = bytes(content).find(tensors["a"].numpy().tobytes())
    content[position + 1000] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"x\{suffix} is damaged \(.*checksum"):
        check_whole(path)


def test_types_and_metadata_are_in_the_checksum_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"half": torch.ones(3).bfloat16(), "none": torch.zeros(0, 2), "one": torch.ones(())}
    save_tensors(path, tensors, {"plan": "layer 12"})
    check_whole(path)
    path.write_bytes(path.read_bytes().replace(b"layer 12", b"layer 13"))
    with pytest.raises(WeightsError, match="damaged"):
        check_whole(path)


def test_half_an_archive_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    save_archive(path, {"a": torch.randn(999)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(WeightsError, match="damaged"):
        check_whole(path)
