"""Subnormal numbers are zero within a run of the command, in all threads and processes."""

import os
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gpd_cli.__main__ import main
from gpd_cli.commands.trainer import GpdTrainer
from gpd_cli.data import ImageData
from gpd_cli.training.module import GapPreservingDistillation
from gpd_cli.training.subnormals import are_subnormals_flushed
from processes import importable

TINY = {"in_chans": 1, "layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
PAIRED = ["--model.branches", "2"]
ALONE = ["--model.ratio", "1", "--model.branches", "1"]
COMMAND = [
    *("fit", "--model.student", "resnet18", "--model.num_classes", "10"),
    *("--model.student_args", str(TINY), "--data.image_size", "16", "--data.batch_size", "16"),
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"),
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.callbacks+=test_subnormals.Witness",),
]
_LARGE = 2**20  # numbers, for the work to be spread over the threads


def flushed() -> float:
    """The share of results that are zero instead of subnormal, over all threads."""
    smallest = torch.full((_LARGE,), torch.finfo(torch.float32).tiny)
    return float((smallest / 2 == 0).float().mean())


def is_supported() -> bool:
    before = are_subnormals_flushed()
    supported = torch.set_flush_denormal(True)
    torch.set_flush_denormal(before)
    return supported


class Witness(Callback):
    """Writes what arithmetic does with subnormal numbers in a forward and in a backward pass."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        first = next(p for p in pl_module.parameters() if p.requires_grad)
        first.register_hook(lambda _: self.tell("backward", trainer.global_rank))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.tell("step", trainer.global_rank)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.tell("validation", trainer.global_rank)

    def tell(self, where: str, rank: int) -> None:
        Path(f"{where}-{rank}").write_text(str(flushed()))


@pytest.mark.slow
def test_subnormals_are_zero_in_all_threads_of_both_processes(tmp_path: Path) -> None:
    options = [*PAIRED, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    result = subprocess.run(
        [sys.executable, "-m", "gpd_cli", *COMMAND, *options],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": importable()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    names = [f"{where}-{k}" for where in ("backward", "step", "validation") for k in range(2)]
    told = {name: float((tmp_path / name).read_text()) for name in names}
    assert told == dict.fromkeys(names, 1.0 if is_supported() else 0.0)


def test_a_program_that_runs_the_command_has_its_own_setting_afterwards(tmp_path: Path) -> None:
    with chdir(tmp_path):
        assert main([*COMMAND, *ALONE]) == 0
        assert float(Path("step-0").read_text()) == (1.0 if is_supported() else 0.0)
    assert not are_subnormals_flushed()


def test_a_python_program_keeps_its_own_setting(tmp_path: Path) -> None:
    module = GapPreservingDistillation(
        "resnet18", student_args=TINY, num_classes=10, ratio=1, branches=1
    )
    trainer = GpdTrainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[Witness()],
        default_root_dir=tmp_path,
    )
    with chdir(tmp_path):
        trainer.fit(module, datamodule=ImageData(image_size=16, batch_size=16))
        assert float(Path("step-0").read_text()) == 0.0


def test_a_processor_that_cannot_flush_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_flush_denormal", lambda mode: False)
    with chdir(tmp_path):
        assert main([*COMMAND, *ALONE]) == 0
        assert float(Path("step-0").read_text()) == 0.0
