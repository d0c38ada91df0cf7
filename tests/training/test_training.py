import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import chdir
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from gpd_cli.__main__ import main
from gpd_cli.cli.failures import DIVERGED
from gpd_cli.commands.trainer import GpdTrainer
from gpd_cli.data import ImageData
from gpd_cli.distill.methods import DKD, KD, Batch, FitNets, Method
from gpd_cli.distill.methods.dkd import dkd_loss
from gpd_cli.distill.methods.kd import kd_loss
from gpd_cli.distill.static_teacher import StaticTeacherSettings
from gpd_cli.errors import GpdError
from gpd_cli.files import save_tensors
from gpd_cli.report.run import read_run
from gpd_cli.teacher.checkpoint import load_networks
from gpd_cli.teacher.expansion import expand
from gpd_cli.teacher.networks import Alone, with_teacher
from gpd_cli.teacher.pair import Pair
from gpd_cli.training.callbacks import Best, Last, default_callbacks
from gpd_cli.training.checkpoint_io import WholeCheckpoints
from gpd_cli.training.module import GapPreservingDistillation
from gpd_cli.training.optimization import configure
from gpd_cli.training.optimizers import OptimizerSettings, make_optimizer, suitable_storage
from gpd_cli.training.schedules import make_scheduler, parts_in_vain
from gpd_cli.widening.tensors import Storage
from runs import (
    ALONE,
    BATCHES,
    PAIRED,
    STOP,
    TINY,
    UNVALIDATED,
    checkpoint,
    exploding,
    fit,
    last_logged,
    logged,
    run_folder,
)

EMA = [
    "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging",
    "--trainer.callbacks.decay=0.5",
]


def student() -> nn.Module:
    return timm.create_model("resnet18", num_classes=10, **TINY)


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


# Plain training


def by_hand(data: ImageData, settings: OptimizerSettings, epochs: int) -> nn.Module:
    """What a PyTorch user without Lightning or gpd writes."""
    seed = 3
    torch.manual_seed(seed)
    network = student()
    images = data.train_dataloader().dataset
    optimizer = create_optimizer_v2(
        network,
        opt=settings.opt,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        fused=True,
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=settings.sched,
        num_epochs=epochs,
        warmup_epochs=1,
        warmup_lr=settings.warmup_lr,
        min_lr=settings.min_lr,
        step_on_epochs=False,
        updates_per_epoch=BATCHES,
    )
    network.train()
    updates = 0
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed + epoch))
        for batch in order.split(32)[:BATCHES]:
            pairs = [images[int(index)] for index in batch]
            loss = F.cross_entropy(
                network(torch.stack([image for image, _ in pairs])),
                torch.stack([label for _, label in pairs]),
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            scheduler.step_update(updates)
    return network


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_ratio_one_with_one_branch_is_plain_training_to_the_last_bit(
    tmp_path: Path, opt: str
) -> None:
    settings = OptimizerSettings(opt=opt, lr=0.05, weight_decay=0.01, warmup_epochs=1)
    options: dict[str, Any] = {"image_size": 16, "batch_size": 32, "no_aug": True}
    seed_everything(3, verbose=False)
    module = GapPreservingDistillation(
        "resnet18", student_args=TINY, num_classes=10, ratio=1, branches=1, optimizer=settings
    )
    trainer = GpdTrainer(
        accelerator="cpu",
        max_epochs=3,
        limit_train_batches=BATCHES,
        limit_val_batches=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=default_callbacks(watched=False),
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=ImageData(**options))
    assert trainer.global_step == 3 * BATCHES
    expected = by_hand(ImageData(**options), settings, epochs=3)
    assert_same(module.network.extract().state_dict(), expected.state_dict())


# A joint run


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    assert fit(folder, *PAIRED, epochs=2) == 0
    return folder


def test_joint_training_writes_what_a_run_leaves_behind(joint: Path) -> None:
    run = run_folder(joint)
    for name in ("metrics.csv", "config.yaml", "gap.png"):
        assert (run / name).stat().st_size > 0
    assert (run / "gap.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert not list(joint.rglob(".tmp-*"))


def test_joint_training_logs_both_networks_and_the_gap_each_epoch(joint: Path) -> None:
    for stage in ("train", "val"):
        rows = [row for row in logged(joint) if row[f"{stage}/gap"]]
        assert [row["epoch"] for row in rows] == ["0", "1"]
        for row in rows:
            teacher, alone = (float(row[f"{stage}/{n}_top1"]) for n in ("teacher", "student"))
            assert float(row[f"{stage}/gap"]) == pytest.approx(teacher - alone, abs=1e-3)
            assert 0 <= alone <= 100
            assert float(row[f"{stage}/student_top5"]) >= alone
            assert float(row[f"{stage}/loss_student_ce"]) > 0


def test_logged_loss_is_the_sum_of_its_terms(joint: Path) -> None:
    rows = [row for row in logged(joint) if row["train/loss_total"]]
    assert [row["epoch"] for row in rows] == ["0", "1"]
    for row in rows:
        terms = [row[f"train/loss_{name}"] for name in ("student_ce", "teacher_ce", "gap")]
        assert float(row["train/loss_total"]) == pytest.approx(sum(map(float, terms)), rel=1e-5)


def test_joint_training_changes_student_and_teacher(joint: Path) -> None:
    trained, description = load_networks(run_folder(joint) / "checkpoints" / "last.ckpt")
    assert isinstance(trained, Pair)
    torch.manual_seed(0)
    start = description.spec.build()  # the run was seeded with 0 and built its student first
    widened = expand(start, sample=torch.zeros(2, 1, 16, 16), ratio=2.0, branches=3)
    start_student = dict(start.named_parameters())
    for name, parameter in trained.extract().named_parameters():
        assert not torch.equal(parameter, start_student[name]), name
    start_teacher = dict(widened.named_parameters())
    unchanged = [n for n, p in trained.named_parameters() if torch.equal(p, start_teacher[n])]
    assert not unchanged


def test_checkpoint_names_an_architecture_that_rebuilds_the_run(joint: Path) -> None:
    content = checkpoint(joint)
    _, description = load_networks(run_folder(joint) / "checkpoints" / "last.ckpt")
    assert description.spec.name == "resnet18"
    assert description.spec.num_classes == 10
    assert description.shape == (1, 16, 16)
    assert description.branches == ("1x1", "1x1_kxk")
    assert content["global_step"] == 2 * BATCHES


def test_same_seed_gives_the_same_run(joint: Path, tmp_path: Path) -> None:
    assert fit(tmp_path, *PAIRED, epochs=2) == 0
    same, expected = checkpoint(tmp_path), checkpoint(joint)
    assert_same(same["state_dict"], expected["state_dict"])
    assert last_logged(tmp_path, "train/loss_total") == last_logged(joint, "train/loss_total")


@pytest.mark.slow
def test_another_seed_gives_another_run(joint: Path, tmp_path: Path) -> None:
    assert fit(tmp_path, *PAIRED, "--seed_everything", "1") == 0
    first = next(row["train/loss_total"] for row in logged(joint) if row["train/loss_total"])
    assert last_logged(tmp_path, "train/loss_total") != float(first)


# Resuming


def test_checkpoints_are_those_of_the_last_and_of_the_best_epoch(tmp_path: Path) -> None:
    # With a learning rate of 0 epochs differ by their running statistics alone.
    assert fit(tmp_path, *ALONE, "--model.optimizer.lr", "0", epochs=3) == 0
    scores = [float(row["val/student_top1"]) for row in logged(tmp_path) if row["val/student_top1"]]
    best = scores.index(max(scores)) + 1
    assert checkpoint(tmp_path, "last")["global_step"] == 3 * BATCHES
    assert checkpoint(tmp_path, "best")["global_step"] == best * BATCHES


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Name and step of each checkpoint that is written in a test."""
    found, write = list[tuple[str, int]](), WholeCheckpoints.save_checkpoint

    def save(self: Any, content: dict[str, Any], path: Any, **options: Any) -> None:
        found.append((Path(path).name, content["global_step"]))
        write(self, content, path, **options)

    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", save)
    return found


class Minutes(Callback):
    """Lets 20 seconds pass before each batch."""

    now = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        Minutes.now += 20


def test_checkpoints_within_an_epoch_are_as_many_minutes_apart_as_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[tuple[str, int]]
) -> None:
    monkeypatch.setattr(Minutes, "now", 0.0)
    clock = SimpleNamespace(monotonic=lambda: Minutes.now)
    monkeypatch.setattr("gpd_cli.training.callbacks.time", clock)
    minutes = ["--trainer.save_every_n_minutes", "1", "--trainer.limit_train_batches", "8"]
    assert fit(tmp_path, *ALONE, *minutes, "--trainer.callbacks+=test_training.Minutes") == 0
    assert [step for name, step in written if name == "last.ckpt"] == [3, 6, 8]


@pytest.mark.parametrize(
    "options",
    [
        PAIRED,
        pytest.param([*PAIRED, *EMA], marks=pytest.mark.slow),
        pytest.param(ALONE, marks=pytest.mark.slow),
    ],
    ids=["pair", "averaged", "alone"],
)
def test_resumed_training_is_uninterrupted_training(tmp_path: Path, options: list[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    options = [*options, "--data.no_aug", "true"]  # which draws from the global random state
    assert fit(whole, *options, epochs=4) == 0
    assert fit(parts, *options, *STOP, epochs=4) == 0
    interrupted = checkpoint(parts)
    assert interrupted["global_step"] == 2 * BATCHES
    last = str(run_folder(parts) / "checkpoints" / "last.ckpt")
    assert fit(parts, *options, "--ckpt_path", last, epochs=4) == 0
    resumed, expected = checkpoint(parts, version=1), checkpoint(whole)
    assert resumed["global_step"] == expected["global_step"] == 4 * BATCHES
    for key in ("state_dict", "current_model_state"):
        assert (key in resumed) == (key in expected)
        assert_same(resumed.get(key, {}), expected.get(key, {}))
    assert last_logged(parts, "train/loss_total", version=1) == last_logged(
        whole, "train/loss_total"
    )
    assert last_logged(parts, "val/student_top1", 1) == last_logged(whole, "val/student_top1")


def test_resumed_run_draws_the_gap_of_all_epochs(tmp_path: Path) -> None:
    assert fit(tmp_path, *ALONE, *STOP, epochs=3) == 0
    last = run_folder(tmp_path) / "checkpoints" / "last.ckpt"
    assert fit(tmp_path, *ALONE, "--ckpt_path", str(last), epochs=3) == 0
    (history,) = [
        state["epochs"]
        for state in checkpoint(tmp_path, version=1)["callbacks"].values()
        if "epochs" in state
    ]
    assert sorted(history)[:2] == [0, 1]
    assert (run_folder(tmp_path, 1) / "gap.png").exists()


# The static teacher


@pytest.fixture(scope="module")
def static_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    network = student()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)  # opinions strong enough to matter
    path = tmp_path_factory.mktemp("static") / "static.safetensors"
    save_tensors(path, network.state_dict())
    return path


def static_options(weights: Path, method: str) -> list[str]:
    return [
        *("--model.static_teacher.name", "resnet18", "--model.static_teacher.args", str(TINY)),
        *("--model.static_teacher.weights", str(weights), "--model.method", method),
    ]


def distiller(
    weights: Path, method: Callable[[], Method], **options: Any
) -> GapPreservingDistillation:
    return GapPreservingDistillation(
        "resnet18",
        student_args=TINY,
        num_classes=10,
        static_teacher=StaticTeacherSettings("resnet18", str(weights), TINY),
        method=method,
        **options,
    )


@pytest.mark.parametrize("method", ["kd", pytest.param("dkd", marks=pytest.mark.slow)])
def test_static_teacher_takes_part_in_training_and_leaves_no_trace(
    joint: Path, static_weights: Path, tmp_path: Path, method: str
) -> None:
    options = static_options(static_weights, method)
    assert fit(tmp_path, *PAIRED, *EMA, *options, epochs=2) == 0
    with_static, without = checkpoint(tmp_path), checkpoint(joint)
    for key in ("state_dict", "current_model_state"):
        assert with_static[key].keys() == without["state_dict"].keys()
    assert not any("static" in name for name in with_static["state_dict"])
    trained, plain = (
        sum(len(group["params"]) for group in content["optimizer_states"][0]["param_groups"])
        for content in (with_static, without)
    )
    assert trained == plain
    assert last_logged(tmp_path, "train/loss_student_static") > 0
    assert last_logged(tmp_path, "train/loss_teacher_static") > 0
    current, plain_state = with_static["current_model_state"], without["state_dict"]
    trainable = [n for n, tensor in plain_state.items() if n.endswith(("weight", "bias"))]
    assert not any(torch.equal(current[name], plain_state[name]) for name in trainable)


@pytest.mark.parametrize("method", [KD, DKD])
def test_static_teacher_stays_frozen_in_eval_mode(
    static_weights: Path, tmp_path: Path, method: type[Method]
) -> None:
    module = distiller(static_weights, method, ratio=1, branches=1)
    assert module.distillation is not None
    frozen = module.distillation.teachers[0].network
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    module.train()
    assert not any(part.training for part in frozen.modules())
    images, labels = torch.randn(4, 1, 16, 16), torch.arange(4)
    teacher = module.distillation.teachers[0](images)
    logits, _ = module(images)
    terms = module.distillation({"student": logits}, images, Batch(labels))
    sum(terms.values()).backward()
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert_same(frozen.state_dict(), before)  # running statistics included
    expected = (
        kd_loss(logits, teacher, 4.0)
        if method is KD
        else dkd_loss(logits, teacher, labels, 1.0, 0.5, 1.0)
    )
    assert torch.equal(terms["student_static"], expected)
    reference = student().eval()
    reference.load_state_dict(before)
    assert torch.equal(teacher, reference(images))


def test_method_settings_reach_the_loss(static_weights: Path) -> None:
    module = distiller(
        static_weights,
        partial(KD, temperature=2.0),
        ratio=1,
        branches=1,
        static_weight=0.5,
    )
    assert module.distillation is not None
    images, labels = torch.randn(4, 1, 16, 16), torch.arange(4)
    logits, _ = module(images)
    terms = module.distillation({"student": logits}, images, Batch(labels))
    teacher = module.distillation.teachers[0](images)
    assert torch.equal(terms["student_static"], 0.5 * kd_loss(logits, teacher, 2.0))


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_weights_of_losses_rise_from_epoch_to_epoch(static_weights: Path, tmp_path: Path) -> None:
    """With a rate of 0 and the same images, the losses themselves stay the same."""
    warm_up = ["--model.gap_warmup_epochs", "4", "--model.static_warmup_epochs", "2"]
    still = ["--model.optimizer.lr", "0", "--model.optimizer.warmup_lr", "0"]
    still += ["--data.no_aug", "true", "--trainer.overfit_batches", "1"]
    options = [*PAIRED, *static_options(static_weights, "kd"), *warm_up, *still]
    assert fit(tmp_path, *options, epochs=2) == 0
    for name, factor in (("gap", 2), ("student_static", 2), ("student_ce", 1)):
        column = f"train/loss_{name}"
        first, second = (float(row[column]) for row in logged(tmp_path) if row[column])
        assert second == pytest.approx(factor * first, rel=1e-3), name


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_noise_of_the_teacher_is_that_of_the_seed(static_weights: Path, noise: float) -> None:
    grown = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = GapPreservingDistillation(
            "resnet18", str(static_weights), TINY, num_classes=10, branches=1, noise=noise
        )
        assert isinstance(module.network, Pair)
        grown.append(next(module.network.teacher.layer1.parameters()).detach())
    assert torch.equal(*grown) == (noise == 0)


def test_a_student_that_is_run_twice_refuses_what_reads_its_features(static_weights: Path) -> None:
    options = {"ratio": 2, "branches": 1, "recompute_student": True}
    assert distiller(static_weights, KD, **options).network.recompute_student
    with pytest.raises(GpdError, match=r"recompute_student .* compares logits only"):
        distiller(static_weights, FitNets, **options)
    with pytest.raises(GpdError, match="without a dynamic teacher"):
        distiller(static_weights, KD, ratio=1, branches=1, recompute_student=True)


def test_networks_that_run_their_blocks_again_train_as_others_do(tmp_path: Path) -> None:
    weights = []
    for place, options in (("once", []), ("again", ["--model.grad_checkpointing", "true"])):
        (tmp_path / place).mkdir()
        assert fit(tmp_path / place, *PAIRED, *options) == 0
        weights.append(checkpoint(tmp_path / place)["state_dict"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"student": "cifar_resnet8", "student_args": {}},
            r"cifar_resnet8 cannot run its blocks again .*lower --data.batch_size",
        ),
        ({"recompute_student": True}, r"recompute_student runs .* twice already"),
        ({"compile": True}, r"grad_checkpointing does not work with --model.compile"),
    ],
)
def test_networks_that_cannot_run_their_blocks_again_are_refused(
    options: dict[str, Any], said: str
) -> None:
    student = {"student": "resnet18", "student_args": dict(TINY), "num_classes": 10, "branches": 1}
    with pytest.raises(GpdError, match=said):
        GapPreservingDistillation(**student | {"grad_checkpointing": True} | options)


def test_features_are_not_read_of_blocks_that_run_again(static_weights: Path) -> None:
    with pytest.raises(GpdError, match=r"grad_checkpointing .* compares logits only"):
        distiller(static_weights, FitNets, ratio=1, branches=1, grad_checkpointing=True)


def test_run_with_a_static_teacher_is_scored_without_its_file(
    static_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(static_weights.read_bytes())
    assert fit(tmp_path, *ALONE, *static_options(copy, "kd")) == 0
    copy.unlink()
    last = str(run_folder(tmp_path) / "checkpoints" / "last.ckpt")
    with chdir(tmp_path):
        assert main(["validate", "--ckpt_path", last, "--trainer.accelerator", "cpu"]) == 0
    assert "student_top1" in capsys.readouterr().out


# Weight averaging


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaged")
    options = ["--trainer.limit_val_batches", "1.0", "--model.optimizer.lr", "0.05"]
    assert fit(folder, *PAIRED, *EMA, *options, epochs=2) == 0
    return folder


def extracted(run: Path, folder: Path, *options: str) -> nn.Module:
    output = folder / "student.pth"
    last = str(run_folder(run) / "checkpoints" / "last.ckpt")
    assert main(["extract", "--ckpt_path", last, "--output", str(output), *options]) == 0
    network = student()
    network.load_state_dict(torch.load(output, weights_only=True))
    return network.eval()


def accuracy(network: nn.Module) -> float:
    data = ImageData(image_size=16, batch_size=32)
    right = total = 0
    with torch.no_grad():
        for images, labels in data.val_dataloader():
            right += int((network(images).argmax(dim=1) == labels).sum())
            total += len(labels)
    return 100 * right / total


def test_averaged_run_keeps_both_weights(averaged: Path) -> None:
    content = checkpoint(averaged)
    average, current = content["state_dict"], content["current_model_state"]
    assert average.keys() == current.keys()
    trained = [n for n in average if n.endswith(("weight", "bias", "original"))]
    assert any(not torch.equal(average[name], current[name]) for name in trained)


def test_extraction_takes_the_average_that_validation_scored(
    averaged: Path, tmp_path: Path
) -> None:
    network = extracted(averaged, tmp_path)
    assert accuracy(network) == pytest.approx(last_logged(averaged, "val/student_top1"), abs=1e-3)
    raw = extracted(averaged, tmp_path, "--weights", "raw")
    same = [torch.equal(a, b) for a, b in zip(network.parameters(), raw.parameters(), strict=True)]
    assert not any(same)


@pytest.mark.slow
def test_raw_weights_are_the_trained_ones(averaged: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    assert fit(plain, *PAIRED, "--model.optimizer.lr", "0.05", epochs=2) == 0
    raw = extracted(averaged, tmp_path, "--weights", "raw")
    trained = extracted(plain, tmp_path)
    weights = dict(trained.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in raw.named_parameters())


# Precision, and losses that are not finite


@pytest.mark.parametrize(
    "options", [PAIRED, pytest.param(ALONE, marks=pytest.mark.slow)], ids=["pair", "alone"]
)
def test_mixed_precision_trains(tmp_path: Path, static_weights: Path, options: list[str]) -> None:
    # At 16 pixels the last stage sees one, for which torch's bfloat16 gradients on the CPU are not
    # always finite.
    precision = ["--trainer.precision", "bf16-mixed", "--data.image_size", "64"]
    assert fit(tmp_path, *options, *precision, *static_options(static_weights, "dkd")) == 0
    state = checkpoint(tmp_path)["state_dict"]
    floating = [tensor for tensor in state.values() if tensor.is_floating_point()]
    assert all(tensor.dtype == torch.float32 for tensor in floating)
    assert all(torch.isfinite(tensor).all() for tensor in floating)


def one_step(folder: Path, settings: OptimizerSettings, **options: Any) -> dict[str, Tensor]:
    """How a step of a small student changes its weights."""
    network = GapPreservingDistillation(
        "cifar_resnet8", num_classes=10, ratio=1, branches=1, optimizer=settings
    )
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    data = ImageData(dataset="digits", image_size=16, in_chans=3, batch_size=32)
    trainer.fit(network, data)
    return {name: weight.detach() - before[name] for name, weight in network.named_parameters()}


def test_gradients_are_clipped_in_mixed_precision(tmp_path: Path) -> None:
    settings = OptimizerSettings(lr=1.0, weight_decay=0.0, momentum=0.5, sched="none")
    changes = one_step(tmp_path, settings, precision="bf16-mixed", gradient_clip_val=1e-3)
    first_step = 1 + settings.momentum  # Nesterov's
    norm = get_total_norm(list(changes.values())).item()
    assert norm == pytest.approx(first_step * 1e-3, rel=1e-2)


def test_no_gradient_outlives_its_update(tmp_path: Path) -> None:
    held: list[bool] = []

    class Look(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, *_: object
        ) -> None:
            held.extend(weight.grad is not None for weight in pl_module.parameters())

    changes = one_step(tmp_path, OptimizerSettings(), callbacks=[Look()])
    assert any(change.any() for change in changes.values())
    assert held
    assert not any(held)


def test_a_module_trains_anew_whatever_it_did_before(tmp_path: Path) -> None:
    """It may have been evaluated, or have gone on with another run."""
    module = GapPreservingDistillation("cifar_resnet8", num_classes=10, ratio=1, branches=1)

    def rates(epochs: int, **resume: Any) -> list[float]:
        found: list[float] = []

        class Look(Callback):
            def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
                assert all(part.training for part in module.network.modules())
                found.append(trainer.optimizers[0].param_groups[0]["lr"])

        trainer = Trainer(
            max_epochs=epochs,
            limit_train_batches=2,
            limit_val_batches=0,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Look()],
            default_root_dir=tmp_path,
        )
        trainer.fit(module, ImageData(image_size=16, in_chans=3, batch_size=32), **resume)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        return found

    module.eval()
    first = rates(epochs=2)
    assert len(rates(epochs=4, ckpt_path=tmp_path / "run.ckpt")) == 4
    assert rates(epochs=2) == first


def assert_last_good_checkpoint(folder: Path, captured: str) -> None:
    errors = [line for line in captured.splitlines() if line.startswith("gpd: error:")]
    assert len(errors) == 1
    assert "lr" in errors[0]
    assert "Traceback" not in captured
    for path in (run_folder(folder) / "checkpoints").iterdir():
        content = torch.load(path, weights_only=True)
        assert content["epoch"] == 0
        assert all(
            torch.isfinite(tensor).all()
            for tensor in content["state_dict"].values()
            if tensor.is_floating_point()
        )


def test_loss_that_explodes_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, *PAIRED, *exploding(), epochs=4) == DIVERGED
    assert_last_good_checkpoint(tmp_path, capfd.readouterr().err)
    assert (run_folder(tmp_path) / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("epochs", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [UNVALIDATED, ["--trainer.check_val_every_n_epoch", "4"]])
def test_loss_that_explodes_between_validations_reaches_no_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], epochs: int
) -> None:
    """The last epoch has no step after it that would notice."""
    code = fit(tmp_path, *ALONE, *exploding(), *options, epochs=epochs)
    captured = capfd.readouterr().err
    for path in tmp_path.rglob("*.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.isfinite(t).all() for t in state.values() if t.is_floating_point())
    assert code == DIVERGED
    assert len([line for line in captured.splitlines() if line.startswith("gpd: error:")]) == 1


def test_run_without_validation_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    assert fit(tmp_path, *ALONE, *UNVALIDATED) == 0
    assert checkpoint(tmp_path)["global_step"] == BATCHES


def test_averaged_run_without_validation_keeps_both_weights(tmp_path: Path) -> None:
    assert fit(tmp_path, *ALONE, *EMA, *UNVALIDATED) == 0
    content = checkpoint(tmp_path)
    average, current = content["state_dict"], content["current_model_state"]
    assert not torch.equal(
        average["network.network.fc.weight"], current["network.network.fc.weight"]
    )


class Interruption(Callback):
    """Stands for Ctrl-C in the second epoch."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


def test_interrupted_run_says_how_to_go_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    try:
        option = "--trainer.callbacks+=test_training.Interruption"
        assert fit(tmp_path, *ALONE, option, epochs=2) == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores the signal from then on
    assert "gpd fit --resume runs/gpd/version_0" in capfd.readouterr().err
    assert checkpoint(tmp_path)["global_step"] == BATCHES


def test_length_in_steps_keeps_the_schedule(tmp_path: Path) -> None:
    options = ["--trainer.max_steps", "4", "--model.optimizer.lr", "0.1"]
    assert fit(tmp_path, *ALONE, *options, epochs=-1) == 0
    (optimizer,) = checkpoint(tmp_path)["optimizer_states"]
    assert optimizer["param_groups"][0]["lr"] < 0.1  # cosine, by default


def test_a_warm_up_in_epochs_is_as_long_in_a_run_of_fewer_steps(tmp_path: Path) -> None:
    steps = ["--trainer.limit_train_batches", "8", "--trainer.max_steps", "4"]
    options = ["--model.optimizer.lr", "0.4", "--model.optimizer.warmup_lr", "0"]
    each_step = ["--trainer.log_every_n_steps", "1", "--model.optimizer.warmup_epochs", "0.5"]
    assert fit(tmp_path, *ALONE, *steps, *options, *each_step, epochs=-1) == 0
    rates = [float(row["lr"]) for row in logged(tmp_path) if row.get("lr")]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_the_last_epochs_have_the_lowest_rate() -> None:
    settings = OptimizerSettings(lr=0.5, min_lr=0.1, cooldown_epochs=1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=settings.lr)
    scheduler = make_scheduler(optimizer, settings, epochs=3, updates_per_epoch=2)
    assert scheduler is not None
    rates = []
    for update in range(6):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    cosine = [0.1 + 0.2 * (1 + math.cos(math.pi * update / 4)) for update in range(4)]
    assert rates == pytest.approx([*cosine, 0.1, 0.1])


@pytest.mark.parametrize(
    ("schedule", "arguments"),
    [
        ("step", {"decay_epochs": 0}),
        ("step", {"decay_epochs": "ten"}),
        ("multistep", {"decay_milestones": 150}),
        ("cosine", {"k_decay": None}),
        ("cosine", {"decay": 0.1}),
    ],
)
def test_arguments_that_a_schedule_cannot_use_are_refused_before_training(
    schedule: str, arguments: dict[str, Any]
) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    settings = OptimizerSettings(sched=schedule, sched_args=arguments)
    with pytest.raises(GpdError, match=rf"'{schedule}' cannot .* {re.escape(str(arguments))}: "):
        make_scheduler(optimizer, settings, epochs=3, updates_per_epoch=2)


def test_a_constant_rate_does_not_decay() -> None:
    settings = OptimizerSettings(sched="constant", sched_args={"decay_rate": 0.5, "noise_pct": 0.1})
    remark = "--model.optimizer.sched_args.decay_rate has no effect with the schedule constant."
    assert parts_in_vain(settings) == remark


# Optimizer


def configured(network: Pair | Alone, precision: str = "32-true") -> torch.optim.Optimizer:
    """The optimizer of a run in a certain precision."""
    trainer: Any = SimpleNamespace(
        **{"precision": precision, "estimated_stepping_batches": 4, "num_training_batches": 4},
        **{"accumulate_grad_batches": 1, "max_epochs": 1, "fast_dev_run": False},
        fit_loop=SimpleNamespace(setup_data=lambda: None),
    )
    found = configure(network, None, OptimizerSettings(weight_decay=0.01), trainer)
    return found["optimizer"]


def groups_of(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Weight decay by parameter name."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb"])
def test_norms_biases_and_gates_are_not_decayed(opt: str) -> None:
    pair = expand(student(), sample=torch.zeros(2, 1, 16, 16), ratio=2.0, branches=6)
    settings = OptimizerSettings(opt=opt, weight_decay=0.01)
    decay = groups_of(pair, make_optimizer(pair, settings, set()))
    assert decay.keys() == {name for name, _ in pair.named_parameters()}
    for name, parameter in pair.named_parameters():
        free = parameter.ndim < 2 or ".gates." in name
        assert decay[name] == (0.0 if free else 0.01), name
    assert any(".gates." in name for name in decay)
    assert any("bn" in name for name in decay)


def test_decay_all_decays_everything() -> None:
    pair = expand(student(), sample=torch.zeros(2, 1, 16, 16), ratio=2.0, branches=6)
    settings = OptimizerSettings(weight_decay=0.01, decay_all=True)
    decay = groups_of(pair, make_optimizer(pair, settings, set()))
    assert decay.keys() == {name for name, _ in pair.named_parameters()}
    assert set(decay.values()) == {0.01}


def test_parameters_a_model_exempts_are_not_decayed() -> None:
    network = Alone(nn.Linear(4, 2))
    decay = groups_of(
        network, make_optimizer(network, OptimizerSettings(weight_decay=0.01), {"network.weight"})
    )
    assert decay == {"network.weight": 0.0, "network.bias": 0.0}


@pytest.mark.parametrize(("ratio", "shared"), [(1, True), (2, True), (2, False)])
def test_a_run_does_not_decay_what_a_model_exempts(ratio: int, shared: bool) -> None:
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, **size)
    network = with_teacher(vit, (3, 16, 16), ratio=ratio, branches=1, shared=shared)
    decay = groups_of(network, configured(network))
    exempt = {name: d for name, d in decay.items() if name.endswith((".pos_embed", ".cls_token"))}
    assert len(exempt) == (2 if shared else 4)
    assert set(exempt.values()) == {0.0}
    assert set(decay.values()) == {0.0, 0.01}


@pytest.mark.parametrize(
    ("precision", "is_fused"), [("32-true", True), ("bf16-mixed", True), ("16-mixed", False)]
)
def test_gradients_of_float16_can_be_clipped(precision: str, is_fused: bool) -> None:
    """A fused optimizer would unscale them itself, after the clipping."""
    optimizer = configured(Alone(nn.Linear(4, 2)), precision)
    assert bool(optimizer.defaults.get("fused")) == is_fused


@pytest.mark.parametrize(
    ("opt", "arguments", "is_fused"),
    [
        ("sgd", {}, True),
        ("adamw", {}, True),
        ("sgd", {"foreach": True}, False),
        ("adamw", {"fused": False}, False),
        ("lamb", {}, False),
    ],
)
def test_optimizers_of_torch_are_fused_unless_told_otherwise(
    opt: str, arguments: dict[str, Any], is_fused: bool
) -> None:
    network = nn.Linear(4, 2)
    settings = OptimizerSettings(opt=opt, opt_args=arguments)
    optimizer = make_optimizer(network, settings, set(), fused=True)
    assert bool(optimizer.defaults.get("fused")) == is_fused
    network(torch.ones(1, 4)).sum().backward()
    before = network.weight.clone()
    optimizer.step()
    assert not torch.equal(network.weight, before)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (OptimizerSettings(opt="sgdd"), "sgdd"),
        (OptimizerSettings(opt="adamw", opt_args={"speed": 3}), "adamw"),
        (OptimizerSettings(opt_args={"layer_decay": 0.7}), "'layer_decay' has no effect"),
        (OptimizerSettings(opt_args={"filter_bias_and_bn": False}), "decay_all"),
        (OptimizerSettings(opt_args={"weight_decay": 0.1}), "--model.optimizer.weight_decay"),
    ],
)
def test_unknown_optimizers_and_arguments_are_named(
    settings: OptimizerSettings, named: str
) -> None:
    network = nn.Linear(4, 2)
    with pytest.raises(GpdError, match=named):
        make_optimizer(network, settings, set())


@pytest.mark.parametrize(
    ("opt", "storage"),
    [
        *((opt, "mixed") for opt in ("sgd", "SGD", "sgdp", "momentum", "nesterovw")),
        *((opt, "mixed") for opt in ("csgdw", "fusedsgd", "bnbsgd8bit", "lookahead_sgd")),
        *((opt, "student") for opt in ("adamw", "lamb", "lookahead_adamw", "nadam", "lars")),
    ],
)
def test_every_kind_of_sgd_is_stored_as_suits_sgd(opt: str, storage: Storage) -> None:
    assert suitable_storage(opt) == storage


# Two processes


def in_process_of_its_own(folder: Path, options: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "gpd_cli", "fit", "--model.student", "resnet18"),
            *("--model.num_classes", "10", "--model.student_args", str(TINY)),
            *("--data.image_size", "16", "--data.batch_size", "16"),
            *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"),
            *("--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"),
            *options,
        ],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [PAIRED, ALONE], ids=["pair", "alone"])
def test_two_processes_train_together(tmp_path: Path, options: list[str]) -> None:
    spread = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    result = in_process_of_its_own(tmp_path, [*options, *spread])
    assert result.returncode == 0, result.stderr
    assert "unused" not in result.stderr
    assert checkpoint(tmp_path)["global_step"] == 3
    assert (run_folder(tmp_path) / "gap.png").exists()
    load_networks(run_folder(tmp_path) / "checkpoints" / "last.ckpt")


def test_without_validation_no_score_of_before_chooses_the_best(tmp_path: Path) -> None:
    """A run on all images often goes on from one that was validated."""
    assert fit(tmp_path, *ALONE) == 0
    last = str(run_folder(tmp_path) / "checkpoints" / "last.ckpt")
    options = ["--ckpt_path", last, "--trainer.limit_val_batches", "0"]
    assert fit(tmp_path, *ALONE, *options, epochs=2) == 0
    found = {path.name for path in (run_folder(tmp_path, 1) / "checkpoints").iterdir()}
    assert found == {"last.ckpt"}


def test_the_best_checkpoint_is_one_of_the_training_that_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that is put back has a best.ckpt of what was given up."""
    slow = ["--model.optimizer.lr", "0.001", "--model.optimizer.sched", "none"]
    assert fit(tmp_path, *ALONE, *slow) == 0
    folder = run_folder(tmp_path) / "checkpoints"
    shutil.copy(folder / "last.ckpt", folder.parent / "first.ckpt")
    resume = ["--resume", str(folder.parent), "--trainer.max_epochs"]
    with chdir(tmp_path):
        assert main(["fit", *resume, "2"]) == 0
        content = torch.load(folder / "best.ckpt", weights_only=True)
        content["global_step"] = 2 * BATCHES  # whichever of the two was the best
        torch.save(content, folder / "best.ckpt")
        first = ["--ckpt_path", str(folder.parent / "first.ckpt")]
        assert main(["fit", *resume, "2", *first, "--model.optimizer.lr", "0.002"]) == 0
    assert "is now called best_given_up.ckpt" in caplog.text
    assert (folder / "best_given_up.ckpt").is_file()
    best, last = (torch.load(folder / f"{n}.ckpt", weights_only=True) for n in ("best", "last"))
    assert best["hyper_parameters"]["optimizer"]["lr"] == 0.002
    assert read_run(folder.parent).best_epoch == 2
    assert best["global_step"] == last["global_step"] == 2 * BATCHES


def test_own_checkpoints_are_written_after_those_of_the_run() -> None:
    """They then know which epoch best.ckpt is of."""
    own = ModelCheckpoint(monitor="val/gap")
    trainer = GpdTrainer(
        callbacks=[own, Best(), Last()], plugins=[], accelerator="cpu", logger=False
    )
    kinds = [type(callback) for callback in trainer.checkpoint_callbacks]
    assert kinds == [Best, Last, ModelCheckpoint]


def test_a_checkpoint_that_is_due_at_a_validation_is_written_after_the_next_step(
    tmp_path: Path, written: list[tuple[str, int]]
) -> None:
    options = ["--trainer.limit_train_batches", "6", "--trainer.val_check_interval", "2"]
    assert fit(tmp_path, *ALONE, *options, "--trainer.save_every_n_steps", "2") == 0
    assert [step for name, step in written if name == "last.ckpt"] == [3, 5, 6]
