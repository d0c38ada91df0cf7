"""Static teachers are scored when a run begins; those that teach nonsense are told."""

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import LightningModule
from torch import nn

from gpd_cli.cli.failures import DIVERGED
from gpd_cli.data import ImageData
from gpd_cli.files import save_tensors
from gpd_cli.training.history import GapHistory
from gpd_cli.training.plot import plot_gap
from gpd_cli.training.static_scores import is_chance
from runs import ALONE, PAIRED, TINY, UNVALIDATED, exploding, fit, logged, run_folder

LARGER = TINY | {"channels": [16, 32, 64, 128]}
BATCHES = ["--trainer.limit_val_batches", "5"]


@pytest.fixture(scope="module")
def capable() -> nn.Module:
    """A random network whose classifier was fitted by least squares: right most of the time."""
    torch.manual_seed(1)
    network = timm.create_model("resnet18", num_classes=10, **LARGER).eval()
    data = ImageData(image_size=16, batch_size=2000, no_aug=True)
    images, labels = next(iter(data.train_dataloader()))
    with torch.no_grad():
        features = network.forward_head(network.forward_features(images), pre_logits=True)
        mean, deviation = features.mean(0), features.std(0) + 1e-6
        features = torch.cat([(features - mean) / deviation, torch.ones(len(features), 1)], 1)
        fitted = torch.linalg.lstsq(features, torch.eye(10)[labels]).solution.T
        network.fc.weight.copy_(fitted[:, :-1] / deviation)
        network.fc.bias.copy_(fitted[:, -1] - network.fc.weight @ mean)
    return network


def saved(network: nn.Module, path: Path, change: Callable[[nn.Module], None] | None = None) -> str:
    """A file of the network's weights, after a change to its classifier."""
    copy = timm.create_model("resnet18", num_classes=10, **LARGER)
    copy.load_state_dict(network.state_dict())
    if change is not None:
        with torch.no_grad():
            change(copy.fc)
    save_tensors(path, copy.state_dict())
    return str(path)


def turn(classifier: nn.Module) -> None:
    """Another order of the classes."""
    for parameter in classifier.parameters():
        parameter.copy_(parameter.roll(1, 0))


def spoil(classifier: nn.Module) -> None:
    next(classifier.parameters()).fill_(float("nan"))


def overflow(classifier: nn.Module) -> None:
    list(classifier.parameters())[1].fill_(float("inf"))


def taught(path: str, *assistants: str) -> list[str]:
    options = [
        "--model.static_teacher.name",
        "resnet18",
        "--model.static_teacher.args",
        str(LARGER),
    ]
    options += ["--model.static_teacher.weights", path]
    if assistants:
        more = [f"{{name: resnet18, weights: {a}, args: {LARGER}}}" for a in assistants]
        options += ["--model.assistants", f"[{', '.join(more)}]"]
    return options


def accuracy(network: nn.Module, batches: int = 5) -> float:
    data = ImageData(image_size=16, batch_size=32)
    loader = zip(data.val_dataloader(), range(batches), strict=False)
    with torch.no_grad():
        hits = [(network(x).argmax(1) == y).float() for (x, y), _ in loader]
    return 100 * float(torch.cat(hits).mean())


def column(folder: Path, name: str, version: int = 0) -> list[float]:
    return [float(row[name]) for row in logged(folder, version) if row.get(name)]


def said(text: str | pytest.LogCaptureFixture, start: str) -> list[str]:
    lines = text.splitlines() if isinstance(text, str) else text.messages
    return [line for line in lines if line.startswith(start)]


@pytest.mark.parametrize("more", [[], ["--data.mixup", "0.8"]], ids=["plain", "mixed"])
def test_static_teachers_are_logged_beside_student_and_teacher(
    tmp_path: Path, capable: nn.Module, caplog: pytest.LogCaptureFixture, more: list[str]
) -> None:
    good = saved(capable, tmp_path / "good.safetensors")
    other = saved(capable, tmp_path / "turned.safetensors", turn)
    assert fit(tmp_path, *PAIRED, *BATCHES, *more, *taught(good, other), epochs=2) == 0
    expected = accuracy(capable)
    assert expected > 50
    assert column(tmp_path, "val/static_top1") == pytest.approx([expected] * 2, abs=1e-3)
    assert len(column(tmp_path, "val/student_top1")) == 2
    (worse, _) = column(tmp_path, "val/assistant_1_top1")
    assert worse < 20
    (line,) = said(caplog, "static teacher resnet18 (good.safetensors)")
    assert f"{expected:.2f}%" in line
    (warning,) = said(caplog, "Warning: ")
    assert "assistant resnet18 (turned.safetensors)" in warning
    assert "order of the classes" in warning
    renumbered = re.search(r"about (\d+)% with (\d+) of its 10 classes renumbered", warning)
    assert renumbered is not None
    assert float(renumbered[1]) == pytest.approx(expected, abs=5) and int(renumbered[2]) >= 8


def test_static_teacher_is_a_line_in_the_picture(tmp_path: Path) -> None:
    epochs = {k: {"val/student_top1": 10.0 + k, "val/teacher_top1": 12.0} for k in range(3)}
    pictures = []
    for frozen in ({}, {"val/static_top1": 11.0}, {"val/static_top1": 12.0}):
        path = tmp_path / "gap.png"
        plot_gap({k: values | frozen for k, values in epochs.items()}, path)
        pictures.append(path.read_bytes())
    assert len(set(pictures)) == 3


def test_static_teacher_and_assistants_are_in_the_history_of_a_run() -> None:
    frozen = {"val/static_top1": 80.0, "val/assistant_1_top1": 70.0}
    trainer: Any = SimpleNamespace(
        **{"current_epoch": 2, "global_step": 6, "max_steps": -1, "is_last_batch": True},
        callback_metrics={name: torch.tensor(score) for name, score in frozen.items()},
    )
    history = GapHistory()
    history.on_train_epoch_end(trainer, LightningModule())
    assert history.epochs == {2: frozen}


@pytest.mark.parametrize("change", [spoil, overflow])
@pytest.mark.parametrize("options", [[], UNVALIDATED], ids=["at the start", "in training"])
def test_logits_that_are_not_finite_are_blamed_on_the_static_teacher(
    tmp_path: Path,
    capable: nn.Module,
    capfd: pytest.CaptureFixture[str],
    change: Callable[[nn.Module], None],
    options: list[str],
) -> None:
    good = saved(capable, tmp_path / "good.safetensors")
    broken = saved(capable, tmp_path / "broken.safetensors", change)
    assert fit(tmp_path, *ALONE, *options, *taught(good, broken)) == 1
    (error,) = said(capfd.readouterr().err, "gpd: error:")
    assert "assistant resnet18 (broken.safetensors)" in error
    assert "good.safetensors" not in error
    assert "optimizer.lr" not in error
    assert not list(tmp_path.rglob("*.ckpt"))
    assert (run_folder(tmp_path) / "config.yaml").exists() == bool(options)


def test_a_loss_that_explodes_is_not_blamed_on_the_static_teacher(
    tmp_path: Path, capable: nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    good = saved(capable, tmp_path / "good.safetensors")
    assert fit(tmp_path, *ALONE, *exploding(), *taught(good), epochs=4) == DIVERGED
    (error,) = said(capfd.readouterr().err, "gpd: error:")
    assert "--model.optimizer.lr" in error


def test_a_run_that_goes_on_does_not_score_the_same_static_teacher_again(
    tmp_path: Path, capable: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    good = saved(capable, tmp_path / "good.safetensors")
    assert fit(tmp_path, *ALONE, *BATCHES, *taught(good), epochs=1) == 0
    before = column(tmp_path, "val/static_top1")
    last = ["--ckpt_path", str(run_folder(tmp_path) / "checkpoints" / "last.ckpt")]
    caplog.clear()
    assert fit(tmp_path, *ALONE, *BATCHES, *taught(good), *last, epochs=2) == 0
    assert not said(caplog, "static teacher")
    assert column(tmp_path, "val/static_top1", 1) == before
    other = saved(capable, tmp_path / "other.safetensors", turn)
    assert fit(tmp_path, *ALONE, *BATCHES, *taught(other), *last, epochs=2) == 0
    assert len(said(caplog, "Warning: static teacher")) == 1
    assert column(tmp_path, "val/static_top1", 2) != before


@pytest.mark.slow
def test_processes_score_a_static_teacher_together(tmp_path: Path, capable: nn.Module) -> None:
    good = saved(capable, tmp_path / "good.safetensors")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "gpd_cli", "fit", "--model.student", "resnet18"),
            *("--model.num_classes", "10", "--model.student_args", str(TINY), *ALONE),
            *("--data.image_size", "16", "--data.batch_size", "32", *taught(good)),
            *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"),
            *("--trainer.limit_train_batches", "2", "--trainer.devices", "2"),
        ],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert len(said(result.stderr, "static teacher")) == 1
    with (run_folder(tmp_path) / "metrics.csv").open() as file:
        (value,) = [v for row in csv.DictReader(file) if (v := row["val/static_top1"])]
    assert float(value) == pytest.approx(accuracy(capable, batches=100), abs=1e-3)


def test_few_classes_among_the_validation_images_do_not_make_a_teacher_a_guesser() -> None:
    counts = torch.zeros(100, dtype=torch.long)
    counts[0] = 128  # a first batch of images that are sorted by class
    assert not is_chance(100.0, counts)
    assert is_chance(1.0, counts)
