"""Runs that go on within an epoch with batches of another size, or on other devices."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from test_exact_resume import shards

from gpd_cli.training.epoch_length import EpochLength, batches_done
from processes import in_processes
from runs import ALONE, arguments, checkpoint, fit, logged, noise_images, run_folder

IMAGES = 96
EPOCHS = 3
FOLDER = [
    *("--data.dataset", "folder", "--data.root", "images", "--data.in_chans", "1"),
    *("--data.val_split", "null", "--data.val_fraction", "0", "--data.no_aug", "true"),
    *("--data.num_workers", "0", "--model.num_classes", "2"),
    *("--trainer.limit_train_batches", "1.0", "--trainer.log_every_n_steps", "1"),
    *("--model.optimizer.warmup_epochs", "1"),
]
RECORDED = ["--trainer.callbacks+=test_other_batches.Recorded"]


class Recorded(Callback):
    """Notes the images of each batch, and stands for a node that is gone."""

    step: int | None = None
    seen: list[tuple[int, list[float]]] = []  # noqa: RUF012 - emptied by the tests

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("the node is gone")
        pixels = batch[0].double().flatten(1)
        names = pixels @ torch.linspace(1, 2, pixels.shape[1], dtype=torch.float64)
        self.seen.append((trainer.current_epoch, [round(name, 6) for name in names.tolist()]))


class KilledAtTwo(Recorded):
    """One of several processes that end before their third step."""

    step = 2


def killed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: Sequence[str], step: int
) -> None:
    """Train up to a step, of which every one is saved."""
    monkeypatch.setattr(Recorded, "step", step)
    monkeypatch.setattr(Recorded, "seen", [])
    saved = ["--trainer.save_every_n_steps", "1"]
    assert fit(folder, *ALONE, *FOLDER, *RECORDED, *saved, *options, epochs=EPOCHS) == 1
    monkeypatch.setattr(Recorded, "step", None)


def last(folder: Path) -> list[str]:
    return ["--ckpt_path", str(run_folder(folder) / "checkpoints" / "last.ckpt")]


def in_epoch(epoch: int) -> list[float]:
    return [image for of, images in Recorded.seen if of == epoch for image in images]


def rates(folder: Path, version: int = 0) -> list[float]:
    return [float(row["lr"]) for row in logged(folder, version) if row.get("lr")]


@pytest.mark.parametrize(
    ("before", "now", "twice", "left"),
    [
        (["16"], ["8"], 0, 6),
        pytest.param(["8"], ["16"], 8, 5, marks=pytest.mark.slow),
        pytest.param(["16"], ["32"], 16, 2, marks=pytest.mark.slow),
        pytest.param(["16"], ["96"], 48, 1, marks=pytest.mark.slow),
        (["8", "--trainer.accumulate_grad_batches", "2"], ["16"], 0, 3),
        (["16"], ["8", "--trainer.accumulate_grad_batches", "4"], 16, 2),
    ],
    ids=["half", "double", "the rest of a batch", "an epoch", "accumulated", "accumulating"],
)
def test_the_epoch_s_rest_is_what_was_not_seen(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: list[str],
    now: list[str],
    twice: int,
    left: int,
) -> None:
    """After three updates of the second epoch; `left` updates of it are left."""
    noise_images(tmp_path, "ab", IMAGES, 16)
    updates = 12 if before == ["8"] else 6
    killed(tmp_path, monkeypatch, ["--data.batch_size", *before], updates + 3)
    first = in_epoch(1)
    monkeypatch.setattr(Recorded, "seen", [])
    options = [*ALONE, *FOLDER, *RECORDED, "--data.batch_size", *now]
    assert fit(tmp_path, *options, *last(tmp_path), epochs=EPOCHS) == 0
    rest = in_epoch(1)
    assert len(rest) == IMAGES - len(first) + twice
    assert len({*first, *rest}) == IMAGES
    assert rest[:twice] == first[len(first) - twice :]
    assert len(set(in_epoch(2))) == len(in_epoch(2)) == IMAGES

    whole = tmp_path / "whole"
    whole.mkdir()
    noise_images(whole, "ab", IMAGES, 16)
    assert fit(whole, *options, epochs=EPOCHS) == 0
    expected = rates(whole)
    per_epoch = len(expected) // EPOCHS
    assert rates(tmp_path, 1) == pytest.approx(expected[-per_epoch - left :])


def test_an_epoch_that_is_over_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """best.ckpt is written between the last batch and the epoch's end."""
    noise_images(tmp_path, "ab", IMAGES, 16)
    held_out = ["--data.val_fraction", "0.5"]
    killed(tmp_path, monkeypatch, ["--data.batch_size", "16", *held_out], 3)
    monkeypatch.setattr(Recorded, "seen", [])
    best = ["--ckpt_path", str(run_folder(tmp_path) / "checkpoints" / "best.ckpt")]
    options = [*ALONE, *FOLDER, *RECORDED, "--data.batch_size", "8", *held_out]
    assert fit(tmp_path, *options, *best, epochs=2) == 0
    assert [epoch for epoch, _ in Recorded.seen] == [1] * 6
    assert checkpoint(tmp_path, version=1)["epoch"] == 1


def test_a_shorter_epoch_comes_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise_images(tmp_path, "ab", IMAGES, 16)
    killed(tmp_path, monkeypatch, ["--data.batch_size", "16"], 4)
    monkeypatch.setattr(Recorded, "seen", [])
    options = [*ALONE, *FOLDER, *RECORDED, "--data.batch_size", "16"]
    shorter = ["--trainer.limit_train_batches", "3"]
    assert fit(tmp_path, *options, *shorter, *last(tmp_path), epochs=EPOCHS) == 0
    assert [epoch for epoch, _ in Recorded.seen] == [0, 1, 1, 1, 2, 2, 2]


def test_checkpoints_of_earlier_versions_go_on_at_their_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise_images(tmp_path, "ab", IMAGES, 16)
    killed(tmp_path, monkeypatch, ["--data.batch_size", "16"], 3)
    content = checkpoint(tmp_path)
    del content["epoch_length"], content["schedule"]["updates_in_epoch"]
    torch.save(content, tmp_path / "earlier.ckpt")
    monkeypatch.setattr(Recorded, "seen", [])
    options = [*ALONE, *FOLDER, *RECORDED, "--data.batch_size", "8"]
    assert fit(tmp_path, *options, "--ckpt_path", "earlier.ckpt", epochs=1) == 0
    assert len(Recorded.seen) == 9


def test_a_stream_is_gone_on_with_in_its_own_batches_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("webdataset")
    noise_images(tmp_path, "abc", IMAGES, 16)
    shards(tmp_path)
    stream = [
        *("--data.dataset", "wds/images", "--data.root", ".", "--data.classes", "3"),
        *("--data.train_split", "train-{0000..0003}.tar|72", "--model.num_classes", "3"),
    ]
    killed(tmp_path, monkeypatch, [*stream, "--data.batch_size", "8"], 3)
    capfd.readouterr()
    options = [*ALONE, *FOLDER, *stream, *last(tmp_path)]
    assert fit(tmp_path, *options, "--data.batch_size", "4", epochs=EPOCHS) == 1
    (error,) = capfd.readouterr().err.splitlines()[-1:]
    assert error.startswith("gpd: error: The checkpoint was written within an epoch of a stream")
    assert "--data.batch_size 8 and 1 devices" in error
    assert fit(tmp_path, *options, "--data.batch_size", "8", epochs=1) == 0


@pytest.mark.slow
def test_one_device_goes_on_with_what_two_have_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node", "2", "-m", "gpd_cli"]
    noise_images(tmp_path, "ab", IMAGES, 16)
    size = ["--data.batch_size", "16", "--trainer.save_every_n_steps", "1"]
    kill = ["--trainer.callbacks+=test_other_batches.KilledAtTwo"]
    options = arguments(*ALONE, *FOLDER, *size, *kill)
    (result,) = in_processes(tmp_path, [*command, *options])
    assert (run_folder(tmp_path) / "checkpoints" / "last.ckpt").is_file(), result.stderr
    assert checkpoint(tmp_path)["global_step"] == 2
    monkeypatch.setattr(Recorded, "seen", [])
    options = [*ALONE, *FOLDER, *RECORDED, "--data.batch_size", "8"]
    assert fit(tmp_path, *options, *last(tmp_path), epochs=1) == 0
    rest = in_epoch(0)
    assert len(rest) == IMAGES - 2 * 2 * 16
    monkeypatch.setattr(Recorded, "seen", [])
    assert fit(tmp_path, *options, epochs=1) == 0
    assert in_epoch(0)[-len(rest) :] == rest


@pytest.mark.parametrize("done", [0, 1, 19, 39])
def test_batches_that_are_done_end_at_an_update_and_leave_one(done: int) -> None:
    before = EpochLength(40, 16, 1, 1)
    for now in (EpochLength(7, 48, 2, 3), EpochLength(1, 640, 1, 4), EpochLength(None, 32, 1, 2)):
        found = batches_done(done, before, now)
        assert found % now.accumulated == 0
        assert found < (now.batches or 40)
        assert now.batch_size is not None
        assert found * now.batch_size * now.processes <= done * 16
    unknown = EpochLength(20, None, 1, 1)
    assert batches_done(done, EpochLength(40, None, 1, 1), unknown) == done // 2
    assert batches_done(done, before, before) == done


def test_the_last_update_of_an_epoch_is_a_mean_of_the_batches_that_are_left(
    tmp_path: Path,
) -> None:
    """Three batches, two per update: the second update is that of the third batch alone."""
    still = ["--model.optimizer.lr", "1e-30", "--model.optimizer.sched", "none"]
    still += ["--model.optimizer.warmup_epochs", "0", "--trainer.log_every_n_steps", "1"]
    norms = []
    for version, batches in enumerate(("1", "2")):
        options = [*ALONE, *still, "--trainer.accumulate_grad_batches", batches]
        assert fit(tmp_path, *options) == 0
        rows = logged(tmp_path, version)
        norms.append([float(row["grad_norm"]) for row in rows if row.get("grad_norm")])
    assert (len(norms[0]), len(norms[1])) == (3, 2)
    assert norms[1][1] == pytest.approx(norms[0][2], rel=1e-4)
