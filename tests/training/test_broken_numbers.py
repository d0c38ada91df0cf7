"""Losses and gradients that are NaN: the step is left out, the images are named, the run stops."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn

from bench.chaos.compare import differences
from blocks.centred import Centred
from gpd_cli.cli.failures import DIVERGED
from gpd_cli.training.broken_numbers import are_lost
from gpd_cli.training.ema import EMA
from gpd_cli.training.gap_remarks import GapRemarks, remark_on_gap
from gpd_cli.training.watch import BatchCheck, StepWatch, overflowing
from runs import (
    ALONE,
    BATCHES,
    PAIRED,
    TINY,
    checkpoint,
    exploding,
    fit,
    logged,
    noise_images,
    run_folder,
)


class Break(Callback):
    """Puts NaN into images of some batches; set by the tests."""

    steps: tuple[int, ...] = ()
    weights = False
    images: Tensor  # those of the latest batch, as they were

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step not in self.steps:
            return
        if self.weights:
            with torch.no_grad():
                next(pl_module.parameters()).fill_(math.nan)
        else:
            Break.images = batch[0][[1, 4]]
            batch[0][[1, 4]] = math.nan


class BreakGradient(Callback):
    """One infinite gradient, as the loss scale of float16 makes some."""

    steps: tuple[int, ...] = ()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step in self.steps:
            gradients = (p.grad for p in pl_module.parameters() if p.grad is not None)
            next(gradients).fill_(math.inf)


COUNTERS = ("step", "lookahead_step")  # of updates, in the groups of some optimizers
BROKEN = ["--trainer.callbacks+=test_broken_numbers.Break"]


def taught(folder: Path) -> list[str]:
    """Options for a static teacher, whose file is written into the folder."""
    network = timm.create_model("resnet18", num_classes=10, **TINY)
    torch.save(network.state_dict(), folder / "static.pth")
    return [
        *("--model.static_teacher.name", "resnet18", "--model.static_teacher.args", str(TINY)),
        *("--model.static_teacher.weights", str(folder / "static.pth")),
    ]


def told(errors: str, start: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith(start)]


@pytest.mark.parametrize("opt", ["sgd", "lookahead_lamb"])
def test_a_batch_of_nan_is_as_if_it_had_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, opt: str
) -> None:
    """All steps after the first are broken: weights and statistics are those after the first."""
    options = [*PAIRED, *BROKEN, "--model.optimizer.opt", opt]
    monkeypatch.setattr(Break, "steps", (1, 2))
    assert fit(tmp_path, *options) == 0
    left_out = [text for text in caplog.messages if "is left out" in text]
    assert len(left_out) == 2
    assert left_out[0].startswith(
        "step 2 is left out: the loss (student_ce, teacher_ce, gap) is NaN or infinite in batch 2 "
        "of epoch 1, as are pixels of image number "
    )
    other = tmp_path / "short"
    other.mkdir()
    monkeypatch.setattr(Break, "steps", ())
    assert fit(other, *options, "--trainer.limit_train_batches", "1") == 0
    states = [checkpoint(folder) for folder in (tmp_path, other)]
    first, second = (state["state_dict"] for state in states)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    (kept,), (expected,) = (state["optimizer_states"] for state in states)
    for number, state in expected["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(kept["state"][number][name]), torch.as_tensor(value))
    counters = [
        [group[name] for group in found["param_groups"] for name in COUNTERS if name in group]
        for found in (kept, expected)
    ]
    assert counters[0] == counters[1] == [1] * len(counters[1])
    assert bool(counters[0]) == (opt != "sgd")


def test_a_batch_of_nan_is_not_validated_before_its_update_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second update has two batches, after the first of which the networks are validated."""
    options = ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "3"]
    monkeypatch.setattr(Break, "steps", (1,))
    assert fit(tmp_path, *PAIRED, *BROKEN, *options, "--trainer.limit_train_batches", "6") == 0
    losses = [row["val/loss_student_ce"] for row in logged(tmp_path)]
    assert len(found := [float(loss) for loss in losses if loss]) == 2
    assert all(map(math.isfinite, found))
    assert all(
        value.isfinite().all() for value in checkpoint(tmp_path, "best")["state_dict"].values()
    )


class Student(nn.Module):
    """Its stem keeps running means of its own, one changed in place and one replaced."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = Centred(1, 8, rate=0.1, stride=2, padding=1)
        self.classifier = nn.Linear(8, num_classes)
        self.pretrained_cfg = {"input_size": (1, 16, 16)}

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.stem(images).mean((2, 3)))


def test_buffers_of_every_kind_are_as_if_the_batch_had_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a method, which has norms of its own here."""
    options = [
        *("--model.student", "test_broken_numbers.Student", "--model.student_args", "{}"),
        *(*taught(tmp_path), "--model.method", "SRRL", *BROKEN),
    ]
    kept = []
    for name, steps, batches in (("broken", (1, 2), 3), ("short", (), 1)):
        monkeypatch.setattr(Break, "steps", steps)
        folder = tmp_path / name
        folder.mkdir()
        few = ["--trainer.limit_train_batches", str(batches)]
        assert fit(folder, *PAIRED, *options, *few) == 0
        kept.append(checkpoint(folder)["state_dict"])
    assert kept[0].keys() == kept[1].keys()
    assert any("distillation" in key and "running_mean" in key for key in kept[0])
    assert not [key for key, tensor in kept[0].items() if not torch.equal(tensor, kept[1][key])]


@pytest.mark.parametrize("on_nan", ["stop", "reduce_lr"])
def test_a_step_left_out_before_validation_and_checkpoints_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_nan: str
) -> None:
    """The last one of the first epoch, of which every step is saved."""
    monkeypatch.setattr(BreakGradient, "steps", (BATCHES - 2, BATCHES - 1))
    options = ["--trainer.callbacks+=test_broken_numbers.BreakGradient", "--model.on_nan", on_nan]
    saved = ["--trainer.save_every_n_steps", "1"]
    assert fit(tmp_path, *PAIRED, *options, *saved, "--model.nan_steps", "2", epochs=2) == 0
    state = checkpoint(tmp_path)
    assert state["global_step"] == 2 * BATCHES
    assert state["schedule"]["rate_factor"] == 1
    assert [row["epoch"] for row in logged(tmp_path) if row.get("val/student_top1")] == ["0", "1"]


class Explode(Callback):
    """Huge weights before the last step of an epoch: finite, as what they give is not."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 2 * BATCHES - 1:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.fill_(1e36)


@pytest.mark.parametrize("ratio", [ALONE, PAIRED])
def test_lost_weights_are_taken_back_before_they_are_saved(
    tmp_path: Path, ratio: list[str]
) -> None:
    """However many steps may be left out: that mends no weights."""
    options = ["--trainer.callbacks+=test_broken_numbers.Explode", "--model.on_nan", "reduce_lr"]
    assert fit(tmp_path, *ratio, *options, epochs=2) == 0
    state = checkpoint(tmp_path)
    assert state["schedule"]["rate_factor"] == 0.5
    weights = [t for t in state["state_dict"].values() if t.is_floating_point()]
    assert max(float(t.abs().max()) for t in weights) < 1e6


class Centring(nn.Module):
    """Takes the mean of the batch away, in training."""

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        rows = images.flatten(1)
        return (rows - rows.mean(0) if self.training else rows), None


def test_an_image_that_spoils_those_beside_it_means_no_lost_weights() -> None:
    images = torch.zeros(3, 1, 2, 2)
    images[1] = math.inf
    network = Centring()
    assert not network(images)[0].isfinite().any()
    assert not are_lost(network, images)
    assert network.training
    assert are_lost(network, torch.full((3, 1, 2, 2), math.inf))
    assert not are_lost(network, images[1:2])  # it may be the image


def test_too_many_broken_steps_stop_the_run_and_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    noise_images(tmp_path, "ab", 100, 16)
    monkeypatch.setattr(Break, "steps", (BATCHES, BATCHES + 1))
    options = ["--data.dataset", "folder", "--data.root", "images", "--data.in_chans", "1"]
    options += ["--data.val_split", "null", "--data.num_workers", "0", "--model.nan_steps", "1"]
    options += ["--model.num_classes", "2", "--data.val_fraction", "0.2", "--data.no_aug", "true"]
    assert fit(tmp_path, *ALONE, *BROKEN, *options, "--data.batch_size", "16", epochs=2) == 1
    (error,) = told(capfd.readouterr().err, "gpd: error:")
    assert (
        "the loss (student_ce) is NaN or infinite in batch 2 of epoch 2, as are pixels of" in error
    )
    files = [tmp_path / name for name in re.findall(r"images/\S+\.png", error)]
    pixels = ((Break.images[:, 0] / 2 + 0.5) * 255).round().byte().tolist()
    assert [np.asarray(Image.open(file)).tolist() for file in files] == pixels
    assert "repair or remove these images" in error
    assert "diverged" not in error
    assert "lr" not in error
    assert "2 steps in a row" in error
    assert "gpd fit --resume runs/gpd/version_0" in error
    assert checkpoint(tmp_path)["epoch"] == 0


def test_a_run_that_diverges_ends_with_an_exit_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Break, "steps", (BATCHES,))
    monkeypatch.setattr(Break, "weights", True)
    assert fit(tmp_path, *ALONE, *BROKEN, "--model.nan_steps", "0", epochs=2) == 3
    assert told(capfd.readouterr().err, "gpd: error: Training diverged")


def test_reduce_lr_goes_on_from_the_last_good_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights that explode in the second epoch are those of the first one again."""
    monkeypatch.setattr(Break, "steps", (BATCHES,))
    monkeypatch.setattr(Break, "weights", True)
    options = ["--model.on_nan", "reduce_lr", "--model.nan_steps", "0"]
    options += ["--model.optimizer.sched", "none", "--model.optimizer.lr", "0.08"]
    options += ["--trainer.log_every_n_steps", "1"]
    assert fit(tmp_path, *PAIRED, *BROKEN, *options, epochs=2) == 0
    assert "The weights were restored from runs/gpd/version_0/checkpoints/last.ckpt." in (
        caplog.messages
    )
    state = checkpoint(tmp_path)
    assert all(torch.isfinite(t).all() for t in state["state_dict"].values())
    assert state["schedule"]["rate_factor"] == 0.5
    assert {group["lr"] for group in state["optimizer_states"][0]["param_groups"]} == {0.04}
    assert fit(
        tmp_path, "--ckpt_path", "runs/gpd/version_0/checkpoints/last.ckpt",
        *PAIRED, *options, epochs=3,
    ) == 0  # fmt: skip
    rates = {float(row["lr"]) for row in logged(tmp_path, 1) if row.get("lr")}
    assert sorted(rates) == [pytest.approx(0.04)]


def test_a_reduced_rate_stays_reduced_under_a_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Break, "steps", (0,))
    monkeypatch.setattr(Break, "weights", True)
    options = ["--model.on_nan", "reduce_lr", "--model.nan_steps", "0"]
    options += ["--model.optimizer.sched", "constant", "--model.optimizer.lr", "0.08"]
    options += ["--trainer.log_every_n_steps", "1"]
    assert fit(tmp_path, *PAIRED, *BROKEN, *options) == 0
    rates = [float(row["lr"]) for row in logged(tmp_path) if row.get("lr")]
    assert rates[1:] == pytest.approx([0.04] * (BATCHES - 1))


def test_in_the_first_epoch_reduce_lr_returns_to_the_initial_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Break, "steps", (1,))
    monkeypatch.setattr(Break, "weights", True)
    options = [*PAIRED, *BROKEN, "--model.on_nan", "reduce_lr", "--model.nan_steps", "0"]
    assert fit(tmp_path, *options) == 0
    assert "The weights were restored from" in caplog.text
    state = checkpoint(tmp_path)
    assert state["schedule"]["rate_factor"] == 0.5
    assert all(torch.isfinite(t).all() for t in state["state_dict"].values())


def test_a_run_that_reduced_its_rate_too_often_is_not_advised_to_reduce_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Break, "steps", tuple(range(99)))
    monkeypatch.setattr(Break, "weights", True)
    options = [*PAIRED, *BROKEN, "--model.on_nan", "reduce_lr", "--model.nan_steps", "0"]
    assert fit(tmp_path, *options, epochs=4) == DIVERGED
    (error,) = told(capfd.readouterr().err, "gpd: error: Training diverged again at 0.00390625")
    assert "on_nan" not in error
    assert "the last good checkpoint is runs/gpd/version_0/checkpoints/last.ckpt" in error


def test_what_is_not_there_yet_is_not_called_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Break, "steps", (1,))
    monkeypatch.setattr(Break, "weights", True)
    assert fit(tmp_path, *PAIRED, *BROKEN, "--model.nan_steps", "0") == DIVERGED
    (error,) = told(capfd.readouterr().err, "gpd: error: Training diverged")
    assert error.endswith("or set --model.on_nan reduce_lr.")


def test_images_of_nan_do_not_reduce_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Break, "steps", (0, 1))
    options = [*PAIRED, *BROKEN, "--model.on_nan", "reduce_lr", "--model.nan_steps", "1"]
    assert fit(tmp_path, *options) == 1
    assert told(capfd.readouterr().err, "gpd: error: Training stopped")


def test_reduce_lr_keeps_the_settings_and_takes_back_the_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes on by other settings, and returns to a checkpoint of the settings before."""
    options = [*PAIRED, *BROKEN, "--trainer.callbacks+=gpd_cli.EMA", "--model.nan_steps", "0"]
    options += ["--model.on_nan", "reduce_lr"]
    assert fit(tmp_path, *options) == 0
    monkeypatch.setattr(Break, "steps", (BATCHES + 1,))
    monkeypatch.setattr(Break, "weights", True)
    resume = ["--ckpt_path", "runs/gpd/version_0/checkpoints/last.ckpt"]
    others = ["--model.optimizer.weight_decay", "0.25", "--model.optimizer.momentum", "0.5"]
    assert fit(tmp_path, *options, *resume, *others, epochs=2) == 0
    state = checkpoint(tmp_path, version=1)
    assert state["schedule"]["rate_factor"] == 0.5
    groups = state["optimizer_states"][0]["param_groups"]
    assert {group["momentum"] for group in groups} == {0.5}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.25}
    # Those of the first epoch, and of the one step after the return; one step was left out.
    assert int(state["averaging_state"]["n_averaged"]) == BATCHES + 1


class Spoil(Callback):
    """Breaks weights before the second step of the second epoch, and spoils their average."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == BATCHES + 1:
            (averager,) = [c for c in trainer.callbacks if isinstance(c, EMA)]
            with torch.no_grad():
                next(pl_module.parameters()).fill_(math.nan)
                for average in averager._average_model.parameters():
                    average.fill_(1e6)


def test_reduce_lr_takes_back_averaged_weights_and_what_the_optimizer_remembers(
    tmp_path: Path,
) -> None:
    options = ["--trainer.callbacks+=gpd_cli.EMA", "--trainer.callbacks+=test_broken_numbers.Spoil"]
    options += ["--model.on_nan", "reduce_lr", "--model.nan_steps", "0"]
    assert fit(tmp_path, *PAIRED, *options, "--model.optimizer.opt", "adamw", epochs=2) == 0
    state = checkpoint(tmp_path)
    averages = [t for t in state["state_dict"].values() if t.is_floating_point()]
    assert max(float(average.abs().max()) for average in averages) < 1e4
    # The steps of the first epoch, and the one after the return.
    steps = {float(entry["step"]) for entry in state["optimizer_states"][0]["state"].values()}
    assert steps == {BATCHES + 1}


def test_a_static_teacher_is_not_blamed_for_a_step_that_was_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its logits are NaN where images are, and finite where the loss explodes later on."""
    monkeypatch.setattr(Break, "steps", (1,))
    options = [*ALONE, *BROKEN, *taught(tmp_path), *exploding()]
    assert fit(tmp_path, *options, epochs=4) == DIVERGED
    (error,) = told(capfd.readouterr().err, "gpd: error:")
    assert "--model.optimizer.lr" in error
    assert "static teacher" not in error


def test_a_step_that_is_left_out_does_not_update_the_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Break, "steps", (1,))
    assert fit(tmp_path, *PAIRED, *BROKEN, "--trainer.callbacks+=gpd_cli.EMA") == 0
    assert int(checkpoint(tmp_path)["averaging_state"]["n_averaged"]) == BATCHES - 1


def test_a_gradient_that_breaks_under_a_finite_loss_is_seen() -> None:
    network = nn.BatchNorm1d(2)
    watch = StepWatch(network, 1)
    watch.remember()
    network(torch.ones(3, 2))
    logits = torch.zeros(3, 2)
    watch.begin(BatchCheck.of({"ce": torch.tensor(1.0)}, torch.zeros(3, 1, 2, 2), [logits], 0, 4))
    what = watch.judge([torch.tensor([1.0, math.inf])], lambda batch, places: [])
    assert what == "a gradient is NaN or infinite in batch 5 of epoch 1"
    watch.undo()
    assert network.num_batches_tracked == 0
    assert torch.equal(network.running_mean, torch.zeros(2))
    assert watch.judge([torch.ones(2)], lambda batch, places: []) is None


def test_images_with_broken_pixels_are_named_rather_than_a_batch_without() -> None:
    watch = StepWatch(nn.Linear(1, 1), 1)
    nan, finite, images = torch.tensor(math.nan), torch.zeros(2, 3), torch.zeros(2, 1, 2, 2)
    broken = images.clone()
    broken[1, 0, 0, 0] = math.inf
    watch.begin(BatchCheck.of({"ce": nan}, images, [finite], 0, 4))
    watch.begin(BatchCheck.of({"ce": nan}, broken, [finite], 0, 5))
    what = watch.judge([nan], lambda _, places: ["ab"[place] + ".png" for place in places])
    assert what == "the loss (ce) is NaN or infinite in batch 6 of epoch 1, as are pixels of b.png"
    assert not watch.is_suspicious


def test_kernels_too_large_for_float16_are_named() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        network[1].weight.fill_(7e4)
    assert overflowing(network, 65504.0) == ["1"]


def test_remarks_on_a_gap_are_rare() -> None:
    assert remark_on_gap([0, 0, 0, 0, 0, 0], 99.5) is None  # both have learned it all
    assert remark_on_gap([-1, -1, -1, -1], 50.0) is None  # too early
    assert remark_on_gap([1, 2, 1, 3, 2, 1, 2], 50.0) is None
    assert remark_on_gap([30] * 10, 50.0) is None  # wide, and no wider


def test_a_remark_on_a_gap_is_made_once_in_a_run_however_often_it_is_resumed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    remarks, module = GapRemarks(), LightningModule()
    values = {"train/gap": torch.tensor(-1.0), "train/student_top1": torch.tensor(50.0)}
    trainer: Any = SimpleNamespace(callback_metrics=values)
    for _ in range(8):
        remarks.on_train_epoch_end(trainer, module)
        resumed = GapRemarks()
        resumed.load_state_dict(remarks.state_dict())
        remarks = resumed
    (remark,) = [text for text in caplog.messages if "learns nothing new" in text]
    assert "raise --model.ratio or --model.branches" in remark


def test_the_start_of_a_resumed_run_is_saved_as_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that may return to its start writes last.ckpt, from which it may be resumed itself."""
    assert fit(tmp_path, *ALONE) == 0
    path = run_folder(tmp_path) / "checkpoints" / "last.ckpt"
    content = checkpoint(tmp_path)
    content["schedule"]["rate_factor"] = 0.25
    torch.save(content, path)
    monkeypatch.setattr(Break, "steps", (BATCHES,))
    monkeypatch.setattr(Break, "weights", True)
    options = ["--ckpt_path", str(path), "--model.on_nan", "reduce_lr", "--model.nan_steps", "0"]
    monkeypatch.setattr("gpd_cli.training.broken_numbers._MOST_REDUCTIONS", 2)
    assert fit(tmp_path, *ALONE, *BROKEN, *options, epochs=2) == DIVERGED
    kept = checkpoint(tmp_path, version=1)
    assert kept["schedule"]["rate_factor"] == 0.25
    assert differences(kept["random_states"], content["random_states"]) == []
