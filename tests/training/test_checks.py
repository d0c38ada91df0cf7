"""Settings that each make sense and together do not, as the command says it."""

import json
import re
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    StochasticWeightAveraging,
)

from gpd_cli.__main__ import main
from gpd_cli.errors import GpdError, TrainingError
from gpd_cli.files import save_tensors
from gpd_cli.teacher.networks import Alone
from gpd_cli.training.checks import check_callbacks, check_start
from gpd_cli.training.optimization import configure
from gpd_cli.training.optimizers import OptimizerSettings, make_optimizer

SMALL = {"in_chans": 1, "layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
CONFIG = f"""
model:
  student: resnet18
  student_args: {SMALL}
  num_classes: 10
  branches: 1
  optimizer: {{lr: 0.05, sched: none}}
data: {{image_size: 16, batch_size: 32}}
trainer: {{accelerator: cpu, max_epochs: 1, limit_train_batches: 2, limit_val_batches: 1}}
"""
TAUGHT = ["--model.static_teacher.name", "resnet18", "--model.static_teacher.args", str(SMALL)]
TAUGHT += ["--model.static_teacher.weights", "static.safetensors"]
LAST = ["--ckpt_path", "runs/tiny/version_0/checkpoints/last.ckpt"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=10, **SMALL)
    save_tensors(tmp_path / "static.safetensors", network.state_dict())
    with chdir(tmp_path):
        yield tmp_path


def fit(*options: str) -> int:
    return main(["fit", "-c", "tiny.yaml", *options])


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_is_refused_leaves_no_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes are counted after Lightning has made the run's folder."""
    assert fit("--model.num_classes", "7") == 1
    assert "--model.num_classes 10" in refusal(capsys)
    assert list((folder / "runs").glob("*/*")) == []
    assert fit() == 0
    assert (folder / "runs" / "tiny" / "version_0" / "metrics.csv").is_file()


@pytest.mark.parametrize("ratio", ["1", "2"])
def test_a_run_without_anything_to_learn_from_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], ratio: str
) -> None:
    # With a dynamic teacher the student has one to learn from, which itself learns nothing.
    nothing = ["--model.ce_weight", "0", "--model.ratio", ratio]
    assert fit(*nothing) == 1
    assert "--model.static_teacher" in refusal(capsys)
    assert fit(*nothing, *TAUGHT, "--model.static_weight", "0") == 1
    assert "--model.static_weight" in refusal(capsys)
    assert fit(*nothing, *TAUGHT) == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gap_weight", "-1"),
        ("ce_weight", "-0.5"),
        ("gap_smoothing", "1"),
        ("gap_temperature", "0"),
        ("gap_warmup_epochs", "-1"),
        ("label_smoothing", "2"),
        ("static_weight", "-1"),
        ("static_weight", ".nan"),
    ],
)
def test_weights_out_of_range_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    assert fit(f"--model.{option}", value) == 1
    assert f"--model.{option}" in refusal(capsys)


def test_stages_are_pointed_out_that_no_method_compares(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages = ["--model.stages", "[layer1]", "--model.static_teacher.stages", "[layer1]"]
    assert fit(*TAUGHT, *stages, "--model.method", "dkd") == 0
    told = "--model.stages, --model.static_teacher.stages have no effect with the method DKD"
    assert f"{told}, which compares no stages." in caplog.text
    caplog.clear()
    assert fit(*TAUGHT, *stages, "--model.method", "at") == 0
    assert "no effect" not in caplog.text


@pytest.mark.slow
def test_settings_of_a_method_without_static_teacher_are_pointed_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ["--model.method", "dkd", "--model.static_warmup_epochs", "2"]
    assert fit(*settings) == 0
    remedy = "no effect without a static teacher; add --model.static_teacher.name."
    assert f"--model.method, --model.static_warmup_epochs have {remedy}" in caplog.text
    caplog.clear()
    assert fit("--model.method", "dkd") == 0
    assert f"--model.method has {remedy}" in caplog.text
    caplog.clear()
    assert fit("--model.static_teacher.args", "{pretrained: true}") == 0
    assert f"--model.static_teacher.args has {remedy}" in caplog.text
    caplog.clear()
    assert fit(*settings, *TAUGHT) == 0
    assert fit() == 0
    assert "no effect" not in caplog.text


def test_settings_of_branches_without_branches_are_pointed_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ["--model.branch_init", "orepa", "--model.branch_width", "0.5"]
    assert fit(*settings, "--model.branches", "1") == 0
    remedy = "no effect without branches; add --model.branches 6."
    assert f"--model.branch_init, --model.branch_width have {remedy}" in caplog.text
    caplog.clear()
    assert fit(*settings, "--model.branches", "2") == 0
    assert "--model.branch_width has no effect without the branch 1x1_kxk." in caplog.text
    assert "branch_init" not in caplog.text
    caplog.clear()
    assert fit(*settings, "--model.branches", "3") == 0
    assert fit(*settings, "--model.ratio", "1", "--model.branches", "1") == 0
    assert "no effect" not in caplog.text


def test_parts_that_the_schedule_does_not_have_are_pointed_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = ["--model.ratio", "1", "--model.optimizer.warmup_epochs", "1"]
    assert fit(*alone) == 0
    remark = "--model.optimizer.warmup_epochs has no effect with the schedule none; take constant"
    assert remark in caplog.text
    caplog.clear()
    assert fit(*alone, "--model.optimizer.sched", "constant") == 0
    assert "no effect" not in caplog.text


VIT = {"in_chans": 1, "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.mark.slow
def test_sets_of_layers_that_the_student_does_not_have_are_pointed_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A transformer has no 3 x 3 convolution; its checkpoints can be resumed and extracted."""
    student = ["--model.student", "vit_tiny_patch16_224", "--model.student_args", str(VIT)]
    layers = ["--model.branches", "2", "--model.branch_layers", "3x3_stride1"]
    remark = "--model.branch_layers 3x3_stride1 stands for no layer of the student"
    assert fit(*student, *layers) == 0
    assert remark in caplog.text
    assert "'patch_embed.proj'" in caplog.text
    assert fit(*student, *layers, *LAST, "--trainer.max_epochs", "2") == 0
    extracted = ["--ckpt_path", LAST[1].replace("version_0", "version_1"), "--output", "s.pth"]
    assert main(["extract", *extracted]) == 0
    caplog.clear()
    assert main(["expand", *student, *layers, "--output", "wide.safetensors"]) == 0
    assert remark in caplog.text
    caplog.clear()
    assert fit(*student, "--model.branches", "2") == 0
    assert fit(*layers) == 0
    assert remark not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", [["--model.static_teacher.name", "null"], ["--model.method", "kd"]]
)
def test_a_run_goes_on_with_the_parts_it_was_started_with(
    folder: Path, capsys: pytest.CaptureFixture[str], other: list[str]
) -> None:
    start = [*TAUGHT, "--model.method", "fitnets"]
    assert fit(*start) == 0
    capsys.readouterr()
    if "null" in other:
        other = [*other, "--model.static_teacher.weights", "null"]
    assert fit(*start, *LAST, "--trainer.max_epochs", "2", *other) == 1
    assert re.search(r"\(FitNets\).*configuration and the version", refusal(capsys))
    assert fit(*start, *LAST, "--trainer.max_epochs", "2") == 0
    assert main(["test", *LAST]) == 0


def test_a_trained_student_is_not_replaced_by_random_branches(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model.student_weights", "student.pth", "--model.branch_init", "gpd")
    assert fit(*options) == 1
    assert "--model.branch_init zero" in refusal(capsys)
    assert main(["expand", "--model.student", "resnet18", *options, "--dry_run"]) == 1
    assert "--model.branch_init zero" in refusal(capsys)


def test_updates_of_changing_size_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The schedule would never come to its end."""
    callback = "lightning.pytorch.callbacks.GradientAccumulationScheduler"
    options = [f"--trainer.callbacks+={callback}", "--trainer.callbacks.scheduling", "{0: 2}"]
    assert fit(*options) == 1
    assert "--trainer.accumulate_grad_batches" in refusal(capsys)
    assert fit("--trainer.accumulate_grad_batches", "2") == 0


@pytest.mark.parametrize(
    ("callback", "remedy"),
    [
        (StochasticWeightAveraging(swa_lrs=0.1), "gpd_cli.EMA"),
        (BatchSizeFinder(), "--data.batch"),
        (LearningRateFinder(), "--model.optimizer.lr"),
    ],
)
def test_callbacks_that_a_run_does_not_follow_are_refused(callback: Callback, remedy: str) -> None:
    """One failed at its first epoch, the other changed nothing."""
    with pytest.raises(TrainingError, match=re.escape(remedy)) as error:
        check_callbacks([Callback(), callback])
    assert type(callback).__name__ in str(error.value)


@pytest.mark.slow
def test_a_cooldown_as_long_as_the_run_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The learning rate would be 0 after the first update."""
    options = ["--model.optimizer.sched", "cosine", "--model.optimizer.cooldown_epochs", "2"]
    assert fit(*options, "--trainer.max_epochs", "2") == 1
    assert "cooldown_epochs is 2 and the run has 2 epochs" in refusal(capsys)
    assert fit(*options, "--trainer.max_epochs", "-1", "--trainer.max_steps", "3") == 1
    assert "the run has 1.5 epochs" in refusal(capsys)
    assert fit(*options, "--trainer.max_epochs", "3") == 0
    assert fit(*options, "--trainer.fast_dev_run", "1") == 0
    assert fit(*options, "--model.optimizer.sched", "constant") == 0


@pytest.mark.parametrize(
    ("epochs", "cooldown", "said"),
    [("2", "0", True), ("3", "0", False), ("3", "1", True), ("4", "1", False)],
)
def test_a_warm_up_that_is_too_long_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture, epochs: str, cooldown: str, said: bool
) -> None:
    options = ["--model.optimizer.sched", "cosine", "--model.optimizer.warmup_epochs", "2.5"]
    options += ["--model.optimizer.cooldown_epochs", cooldown, "--trainer.max_epochs", epochs]
    assert fit(*options) == 0
    told = [text for text in caplog.messages if "ends within its warm-up" in text]
    assert len(told) == said
    assert all("the learning rate 0.05" in text for text in told)


def test_images_normalized_otherwise_than_for_published_weights_are_pointed_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """For a student and a static teacher."""
    weights = folder / "published.pth"
    torch.save(timm.create_model("resnet18", num_classes=10, **SMALL).state_dict(), weights)
    overlay = {"file": str(weights), "mean": [0.25], "std": [0.5], "num_classes": 10}
    asked = json.dumps({**SMALL, "pretrained": True, "pretrained_cfg_overlay": overlay})
    taught = ["--model.static_teacher.name", "resnet18", "--model.static_teacher.args", asked]
    added = ["--data.mean", "[0.25]", "--data.std", "[0.5]"]
    said = "were trained on images with mean [0.25] and standard deviation [0.5], but those of this"
    assert fit("--model.student_args", asked) == 0
    assert f"The published weights of the student resnet18 {said}" in caplog.text
    assert "add --data.mean '[0.25]' --data.std '[0.5]'." in caplog.text
    caplog.clear()
    assert fit(*taught) == 0
    assert f"The published weights of static teacher resnet18 (pretrained) {said}" in caplog.text
    caplog.clear()
    assert fit("--model.student_args", asked, *taught, *added) == 0
    assert fit() == 0
    assert "published weights" not in caplog.text


def test_images_normalized_otherwise_than_for_weights_of_a_file_are_pointed_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A .safetensors file of gpd extract says how its images were normalized, a .pth does not."""
    assert fit() == 0
    checkpoint = LAST[1]
    for output in ("own.safetensors", "own.pth"):
        assert main(["extract", "--ckpt_path", checkpoint, "--output", output]) == 0
    other = ["--data.mean", "[0.25]"]
    said = "trained on images with mean [0.5] and standard deviation [0.5], but those of this run"
    told = f"The weights of the student resnet18 were {said} have [0.25] and [0.5]"
    caplog.clear()
    scored = ["--model.student_weights", "own.safetensors"]
    assert fit(*scored) == 0
    assert "trained on images" not in caplog.text
    assert fit(*scored, *other) == 0
    assert told in caplog.text
    caplog.clear()
    assert fit(*TAUGHT, "--model.static_teacher.weights", "own.safetensors", *other) == 0
    assert "The weights of static teacher resnet18" in caplog.text
    caplog.clear()
    assert main(["test", "-c", "tiny.yaml", *scored, *other]) == 0
    assert told in caplog.text
    caplog.clear()
    assert main(["test", "-c", "tiny.yaml", "--ckpt_path", checkpoint, *other]) == 0
    assert fit("--model.student_weights", "own.pth", *other) == 0
    assert "trained on images" not in caplog.text  # timm states statistics of three channels only


def test_a_start_of_branches_concerns_no_student_without_branches() -> None:
    """As in the recipes for ImageNet, with --model.ratio 1 --model.branches 1."""
    check_start("w.pth", (), "gpd")
    with pytest.raises(TrainingError, match="branch_init zero"):
        check_start("w.pth", ("1x1",), "gpd")


def test_optimizers_that_cannot_work_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--model.optimizer.opt", "adahessian") == 1
    assert "'adahessian' needs second derivatives" in refusal(capsys)
    trainer: Any = SimpleNamespace(precision="16-mixed")
    settings = OptimizerSettings(opt_args={"fused": True})
    with pytest.raises(GpdError, match=r"leave fused out of --model\.optimizer\.opt_args"):
        configure(Alone(torch.nn.Linear(2, 2)), None, settings, trainer)


@pytest.mark.parametrize("opt", ["sgd", "csgdw", "lookahead_sgd"])
def test_sgd_needs_no_momentum(opt: str) -> None:
    """timm's SGD is Nesterov's, which needs one."""
    optimizer = make_optimizer(torch.nn.Linear(2, 2), OptimizerSettings(opt=opt, momentum=0), set())
    assert {group["momentum"] for group in optimizer.param_groups} == {0}
    assert not any(group["nesterov"] for group in optimizer.param_groups)
