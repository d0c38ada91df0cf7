"""Checkpoints are whole, or are the ones before; damage is seen by whoever reads them."""

import resource
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gpd_cli.__main__ import main
from gpd_cli.files import check_whole
from gpd_cli.training.checkpoint_io import WholeCheckpoints
from runs import ALONE, BATCHES, checkpoint, fit, run_folder


class DiskFillsUp(Callback):
    """No file may grow from the second epoch on."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))


def flip(path: Path) -> None:
    """Change one bit of a weight."""
    content = bytearray(path.read_bytes())
    state = torch.load(path, weights_only=True)["state_dict"]
    weight = next(v for v in state.values() if v.is_floating_point() and v.numel() > 100)
    content[bytes(content).find(weight.numpy().tobytes()) + 3] ^= 0x40
    path.write_bytes(content)


def test_a_disk_that_fills_costs_the_new_checkpoint_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = [
        "--trainer.callbacks+=test_checkpoint_io.DiskFillsUp",
        "--trainer.limit_val_batches",
        "0",
    ]
    try:
        assert fit(tmp_path, *ALONE, *full, epochs=3) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = run_folder(tmp_path) / "checkpoints"
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"gpd: error: Cannot write '{folder / 'last.ckpt'}': ")
    assert checkpoint(tmp_path)["global_step"] == BATCHES
    check_whole(folder / "last.ckpt")
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]


def test_a_damaged_checkpoint_is_refused_by_all_commands(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, *ALONE) == 0
    path = run_folder(tmp_path) / "checkpoints" / "last.ckpt"
    flip(path)
    output = tmp_path / "student.pth"
    commands = [
        lambda: fit(tmp_path, *ALONE, "--ckpt_path", str(path), epochs=2),
        lambda: main(["test", "--ckpt_path", str(path)]),
        lambda: main(["extract", "--ckpt_path", str(path), "--output", str(output)]),
    ]
    for command in commands:
        capfd.readouterr()
        assert command() == 1
        (error,) = capfd.readouterr().err.splitlines()
        assert f"{path} is damaged" in error
    assert not output.exists()


def test_damage_since_the_command_began_is_seen_as_well(tmp_path: Path) -> None:
    storage = WholeCheckpoints()
    path = tmp_path / "new" / "x.ckpt"
    storage.save_checkpoint({"state_dict": {"a": torch.randn(200)}}, path)
    assert list(storage.load_checkpoint(path, weights_only=True)) == ["state_dict"]
    flip(path)
    with pytest.raises(Exception, match="damaged"):
        storage.load_checkpoint(path, weights_only=True)
    with pytest.raises(FileNotFoundError):
        storage.load_checkpoint(tmp_path / "missing.ckpt")
