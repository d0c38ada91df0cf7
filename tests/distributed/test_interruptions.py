"""Signals to a whole process group, and runs whose epochs are of one step."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cluster import ALONE, STOPPED, fit
from torch import nn
from torch.utils.data import TensorDataset

from gpd_cli.data.cached import CachedLoader, HeldImages
from gpd_cli.data.loaders import LoaderSettings
from gpd_cli.data.samplers import Share, training_sampler
from gpd_cli.data.skipping import skip_once
from gpd_cli.data.transforms import Preprocessing
from gpd_cli.training.optimizers import OptimizerSettings
from gpd_cli.training.schedules import make_scheduler


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_workers_outlive_a_signal_to_the_group_and_end_with_their_loader(start: str) -> None:
    images = TensorDataset(torch.zeros(64, 1), torch.arange(64))
    settings = LoaderSettings(batch_size=4, num_workers=1)
    loader = settings.loader(images, Share(), 1)
    loader.multiprocessing_context = start
    batches = iter(loader)
    next(batches)
    assert loader._iterator is not None
    (worker,) = loader._iterator._workers  # type: ignore[attr-defined]
    other = "import os, signal, sys; os.kill(int(sys.argv[1]), signal.SIGTERM)"
    subprocess.run([sys.executable, "-c", other, str(worker.pid)], check=True)
    os.kill(worker.pid, signal.SIGUSR1)
    assert len(list(batches)) == 15
    assert worker.is_alive()
    worker.terminate()  # as multiprocessing does when the parent exits
    worker.join(timeout=10)
    assert not worker.is_alive()


def test_run_of_one_step_per_epoch_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--trainer.limit_train_batches", "1", "--trainer.max_epochs", "6"]
    assert fit(tmp_path, *ALONE, *STOPPED, *short) == 128 + signal.SIGTERM
    assert "stopped at step 4" in capsys.readouterr().err
    saved = tmp_path / "runs" / "gpd" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("interval", [0, 1])
def test_logging_may_be_off(tmp_path: Path, interval: int) -> None:
    options = ["--trainer.log_every_n_steps", str(interval), "--trainer.max_epochs", "1"]
    assert fit(tmp_path, *ALONE, *options) == 0


def test_a_schedule_is_as_long_as_the_run() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = make_scheduler(
        optimizer, OptimizerSettings(lr=1.0), epochs=1.5, updates_per_epoch=6
    )
    assert scheduler is not None
    scheduler.step_update(9)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-6)


def test_an_endless_run_has_no_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:05"]
    assert fit(tmp_path, *ALONE, *options) == 1
    assert "--trainer.max_steps" in capsys.readouterr().err.splitlines()[-1]


def test_cached_crops_are_the_same_after_a_resumption() -> None:
    images = torch.randint(0, 255, (12, 1, 4, 4), dtype=torch.uint8)
    sampler = training_sampler(range(12), Share(), seed=3)
    augmented = Preprocessing(image_size=4, in_chans=1, crop_padding=2)
    held = HeldImages(images, torch.arange(12))
    loader = CachedLoader(held, augmented, sampler, batch_size=2, training=True)
    whole = [batch for batch, _ in loader]
    skip_once(loader, 2)
    assert torch.equal(torch.stack([batch for batch, _ in loader]), torch.stack(whole[2:]))
    assert len(list(loader)) == 6
