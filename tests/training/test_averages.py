"""Averages of the weights: how they warm up, what is scored, chosen and exported, what is said."""

import csv
import math
import sys
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from PIL import Image
from sklearn.datasets import load_digits
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gpd_cli import EMA
from gpd_cli.__main__ import main
from gpd_cli.data import ImageData
from gpd_cli.teacher.checkpoint import load_networks
from gpd_cli.training.averages import closing_remark, prepare_training, share_of_start
from gpd_cli.training.ema import warmed_up_decay
from processes import in_processes

ROOT = Path(__file__).parents[2]
LIGHTNING = "lightning.pytorch.callbacks.EMAWeightAveraging"
ALONE = ["--model.ratio", "1"]
STILL = ["--data.no_aug", "true"]  # augmentation draws from the global random state
SHORT = ["--trainer.limit_train_batches", "4"]


def averaged_by(callback: str, **settings: Any) -> list[str]:
    """Options for a callback with settings."""
    return [
        f"--trainer.callbacks+={callback}",
        *(f"--trainer.callbacks.{name}={value}" for name, value in settings.items()),
    ]


def arguments(*options: str, epochs: int = 3) -> list[str]:
    """`fit` of a small student on the digits: 16 updates in each epoch."""
    return [
        *("fit", "--model.student", "resnet18", "--model.num_classes", "10"),
        *("--model.student_args", "{in_chans: 1, layers: [1,1,1,1], channels: [4,8,16,16]}"),
        *("--model.branches", "1", "--model.optimizer.lr", "0.2"),
        *("--data.image_size", "16", "--data.batch_size", "64"),
        *("--trainer.accelerator", "cpu", "--trainer.max_epochs", str(epochs), *options),
    ]


def fit(folder: Path, *options: str, epochs: int = 3) -> int:
    """Train it."""
    folder.mkdir(exist_ok=True)
    with chdir(folder):
        return main(arguments(*options, epochs=epochs))


def run(folder: Path, version: int = 0) -> Path:
    return folder / "runs" / "gpd" / f"version_{version}"


def saved(folder: Path, version: int = 0) -> dict[str, Any]:
    """What a run saved at its end."""
    path = run(folder, version) / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def scores(folder: Path, name: str, version: int = 0) -> list[float]:
    """A column of the log, as far as it has values."""
    with (run(folder, version) / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def validated(path: Path, weights: str) -> tuple[float, float]:
    """Validation accuracy of student and teacher as a checkpoint has them, in percent."""
    network, _ = load_networks(path, weights)  # type: ignore[arg-type]
    data = ImageData(image_size=16, batch_size=64)
    data.setup("fit")
    right, count = torch.zeros(2), 0
    with torch.no_grad():
        for images, labels in data.val_dataloader():
            logits = network(images)
            right += torch.tensor([float((x.argmax(1) == labels).sum()) for x in logits])
            count += len(labels)
    student, teacher = (100 * right / count).tolist()
    return student, teacher


@pytest.mark.parametrize(("gamma", "power"), [(1.0, 2 / 3), (10.0, 1.0)])
def test_the_decay_warms_up_as_timms(gamma: float, power: float) -> None:
    theirs = ModelEmaV3(
        nn.Linear(1, 1), decay=0.99, use_warmup=True, warmup_gamma=gamma, warmup_power=power
    )
    for updates in (1, 5, 100, 10**6):
        expected = theirs.get_decay(updates + 1)  # theirs counts the update that copies
        assert warmed_up_decay(updates, 0.99, gamma, power) == pytest.approx(expected)


class Little(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def trainer(step: int = 0) -> Any:
    """What an average sees of a trainer after so many steps."""
    return SimpleNamespace(global_step=step)


def average_of(average: WeightAveraging) -> dict[str, Tensor]:
    """The averaged weights, as they are saved."""
    content: dict[str, Any] = {"state_dict": {}}
    average.on_save_checkpoint(trainer(), Little(), content)
    return content["state_dict"]


@pytest.mark.parametrize("settings", [{}, {"decay": 0.6}, {"decay": 0.9, "power": 1.0}])
def test_weights_and_running_statistics_are_averaged_as_by_timm(settings: dict[str, Any]) -> None:
    module, average = Little(), EMA(**settings)
    average.setup(trainer(), module, "fit")
    power = settings.get("power", 2 / 3)
    decay = settings.get("decay", 0.9999)
    theirs = ModelEmaV3(module, decay=decay, use_warmup=True, warmup_power=power)
    for step in range(1, 7):
        with torch.no_grad():
            for tensor in module.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor))
        average.on_train_batch_end(trainer(step), module, None, None, step)
        theirs.update(module, step)
    ours = average_of(average)
    for name, tensor in theirs.module.state_dict().items():
        torch.testing.assert_close(ours[name], tensor)


def test_the_average_is_kept_on_the_device_that_trains() -> None:
    """Where Lightning moves the module only after it has set up the callbacks."""
    module = Little()
    unplaced, placed = EMAWeightAveraging(), EMAWeightAveraging(device="cpu")
    for average in (unplaced, placed):
        average.setup(trainer(), module, "fit")
    module.to("meta")
    for average in (unplaced, placed):
        prepare_training(average, module)
    assert {tensor.device.type for tensor in average_of(unplaced).values()} == {"meta"}
    assert {tensor.device.type for tensor in average_of(placed).values()} == {"cpu"}


def test_an_ema_is_kept_on_the_device_that_was_chosen() -> None:
    module, average = Little(), EMA(device="cpu")
    average.setup(trainer(), module, "fit")
    module.to("meta")
    prepare_training(average, module)
    assert {tensor.device.type for tensor in average_of(average).values()} == {"cpu"}


def test_running_statistics_are_copied_where_they_are_not_to_be_averaged() -> None:
    module, average = Little(), EMA(use_buffers=False)
    average.setup(trainer(), module, "fit")
    for step in (1, 2, 3):
        with torch.no_grad():
            module.layers[1].running_mean.add_(1)
        average.on_train_batch_end(trainer(step), module, None, None, step)
    assert torch.equal(average_of(average)["layers.1.running_mean"], torch.full((4,), 3.0))


class WithIndices(nn.Module):
    """Looks up a table by numbers in a buffer, as position tables of Swin Transformers do."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64))
        self.classifier = nn.Linear(64, num_classes)
        self.register_buffer("index", torch.arange(64).flip(0))
        self.register_buffer("mask", torch.arange(64) % 2 > 0, persistent=False)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(()))
        self.pretrained_cfg = {"input_size": (1, 8, 8)}

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.steps.add_(1)
        return self.classifier(images.flatten(1) * self.table[self.index] * self.mask)


def average_of_indices(average: WeightAveraging, *, settled: bool) -> tuple[nn.Module, nn.Module]:
    """A network after some updates, and the average of it."""
    module = LightningModule()
    module.network = WithIndices()
    average.setup(trainer(), module, "fit")
    if settled:
        prepare_training(average, module)
    for step in range(1, 30):
        with torch.no_grad():
            module.network.table.add_(1)
            module.network.steps.add_(1)
            module.network.mean.add_(1)
        average.on_train_batch_end(trainer(step), module, None, None, step)
    return module.network, average._average_model.module.network


@pytest.mark.parametrize(
    ("average", "settled"),
    [
        (EMA(), False),  # as in programs of one's own
        (EMA(), True),
        (EMAWeightAveraging(decay=0.9), True),
        (WeightAveraging(), True),
        (WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9)), True),
    ],
    ids=["EMA alone", "EMA", "EMAWeightAveraging", "WeightAveraging", "multi_avg_fn"],
)
def test_integers_and_truth_values_are_copied_and_not_averaged(
    average: WeightAveraging, settled: bool
) -> None:
    network, averaged = average_of_indices(average, settled=settled)
    for name in ("index", "mask", "steps"):
        assert torch.equal(averaged.get_buffer(name), network.get_buffer(name)), name
    assert network.steps == 29
    # All else is averaged, and lags behind.
    assert 0 < network.mean - averaged.mean < 29
    assert (averaged.table < network.table).all()


@pytest.mark.parametrize("callback", ["gpd_cli.EMA", LIGHTNING])
def test_a_run_exports_indices_as_they_are(tmp_path: Path, callback: str) -> None:
    own = ["--model.student", "test_averages.WithIndices", "--model.student_args", "{}"]
    small = ["--data.image_size", "8"]
    assert fit(tmp_path, *ALONE, *SHORT, *own, *small, *averaged_by(callback), epochs=1) == 0
    content = saved(tmp_path)
    average, trained = content["state_dict"], content["current_model_state"]
    assert torch.equal(average["network.network.index"], torch.arange(64).flip(0))
    assert average["network.network.steps"] == trained["network.network.steps"] > 1
    assert not torch.equal(average["network.network.table"], trained["network.network.table"])


def with_updates(average: WeightAveraging, updates: int) -> WeightAveraging:
    """An average as it is after so many updates."""
    average._average_model = AveragedModel(nn.Linear(1, 1), **average._kwargs)
    average._average_model.n_averaged += updates
    return average


@pytest.mark.parametrize("updates", [1, 2, 12])
def test_the_share_of_the_start_is_what_the_decays_leave(updates: int) -> None:
    plain = with_updates(EMAWeightAveraging(decay=0.9), updates)
    assert share_of_start(plain) == pytest.approx(0.9 ** (updates - 1))
    warm = with_updates(EMA(decay=0.9), updates)
    decays = [warmed_up_decay(k, 0.9) for k in range(1, updates)]
    assert share_of_start(warm) == pytest.approx(math.prod(decays))


def test_only_an_average_that_holds_its_start_is_pointed_out() -> None:
    long = closing_remark(with_updates(EMAWeightAveraging(decay=0.99996), 264))
    assert long is not None and "99% of the averaged weights" in long and "gpd_cli.EMA" in long
    assert closing_remark(with_updates(EMA(decay=0.99996), 264)) is None
    assert closing_remark(with_updates(EMAWeightAveraging(decay=0.9), 264)) is None
    assert closing_remark(with_updates(EMA(power=1.0), 10)) is None  # a plain mean


def test_a_short_run_exports_what_it_learnt_and_scores_both_kinds_of_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert fit(tmp_path, *averaged_by("gpd_cli.EMA", decay=0.99996), epochs=5) == 0
    assert "initial weights" not in caplog.text
    capsys.readouterr()
    averaged, raw = scores(tmp_path, "val/student_top1"), scores(tmp_path, "val/raw_student_top1")
    assert len(averaged) == len(raw) == 5 and averaged != raw
    assert averaged[-1] > 50  # a tenth by chance
    last = run(tmp_path) / "checkpoints" / "last.ckpt"
    teacher = scores(tmp_path, "val/teacher_top1"), scores(tmp_path, "val/raw_teacher_top1")
    assert validated(last, "ema") == pytest.approx((averaged[-1], teacher[0][-1]), abs=1e-3)
    assert validated(last, "raw") == pytest.approx((raw[-1], teacher[1][-1]), abs=1e-3)
    # The best checkpoint is the one of the best averaged student.
    best = run(tmp_path) / "checkpoints" / "best.ckpt"
    assert validated(best, "ema")[0] == pytest.approx(max(averaged), abs=1e-3)
    with chdir(tmp_path):
        for weights, title in (("ema", "averaged"), ("raw", "raw")):
            output = f"{weights}.pth"
            options = ("--ckpt_path", str(last), "--output", output, "--weights", weights)
            assert main(["extract", *options]) == 0
            assert f"weights {title}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_without_warm_up_a_short_run_says_that_its_average_is_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert fit(tmp_path, *averaged_by(LIGHTNING, decay=0.99996), epochs=2) == 0
    assert "100% of the averaged weights" in caplog.text


def test_an_average_that_has_not_begun_is_neither_scored_nor_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    late = averaged_by(LIGHTNING, decay=0.9, update_starting_at_step=1000)
    assert fit(tmp_path, *late) == 0
    assert "did not begin before the end of training" in caplog.text
    capsys.readouterr()
    student = scores(tmp_path, "val/student_top1")
    assert student[-1] > 20 and len(set(student)) > 1  # it is the trained one
    assert scores(tmp_path, "val/raw_student_top1") == []
    last = run(tmp_path) / "checkpoints" / "last.ckpt"
    assert validated(last, "ema") == validated(last, "raw")
    assert validated(last, "ema")[0] == pytest.approx(student[-1], abs=1e-3)
    with chdir(tmp_path):
        assert main(["extract", "--ckpt_path", str(last), "--output", "student.pth"]) == 0
    assert "raw, since the average had not begun" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_an_average_begins_within_a_run_and_goes_on_after_it_was_resumed(tmp_path: Path) -> None:
    average = averaged_by("gpd_cli.EMA", decay=0.9, update_starting_at_step=20)  # in epoch 2
    assert fit(tmp_path, *average, *STILL, epochs=4) == 0
    assert len(scores(tmp_path, "val/raw_student_top1")) == 3
    stopped = (*average, *STILL, "--trainer.callbacks+=runs.StopAfterTwoEpochs")
    assert fit(tmp_path, *stopped, epochs=4) == 0
    last = run(tmp_path, 1) / "checkpoints" / "last.ckpt"
    assert fit(tmp_path, *average, *STILL, "--ckpt_path", str(last), epochs=4) == 0
    for name in ("val/student_top1", "val/raw_student_top1", "val/raw_teacher_top1"):
        assert scores(tmp_path, name, 2) == scores(tmp_path, name)[-2:]


@pytest.mark.slow
def test_an_average_leaves_training_as_it_is(tmp_path: Path) -> None:
    """Validation takes the averaged weights; the trained ones are back, in train mode, after it."""
    average, options = averaged_by(LIGHTNING, decay=0.9), [*STILL, *SHORT]
    assert fit(tmp_path / "averaged", *average, *options, epochs=2) == 0
    assert fit(tmp_path / "plain", *options, epochs=2) == 0
    averaged, plain = saved(tmp_path / "averaged"), saved(tmp_path / "plain")
    assert_same(averaged["current_model_state"], plain["state_dict"])
    raw = scores(tmp_path / "averaged", "val/raw_student_top1")
    assert raw == scores(tmp_path / "plain", "val/student_top1")


class StopWithin(Callback):
    """Ends the second epoch within it, after which the run is validated."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.should_stop = True


@pytest.mark.slow
@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("callback", ["gpd_cli.EMA", LIGHTNING])
def test_an_average_of_epochs_is_saved_as_it_was_scored(
    tmp_path: Path, callback: str, stops: bool
) -> None:
    per_epoch = averaged_by(callback, decay=0.5, update_every_n_steps=0, update_starting_at_epoch=0)
    stop = ["--trainer.callbacks+=test_averages.StopWithin"] if stops else []
    assert fit(tmp_path, *SHORT, *per_epoch, *stop, epochs=3) == 0
    scored = scores(tmp_path, "val/student_top1")
    assert len(scored) == 3 - stops
    for name, accuracy in (("last", scored[-1]), ("best", max(scored))):
        path = run(tmp_path) / "checkpoints" / f"{name}.ckpt"
        assert validated(path, "ema")[0] == pytest.approx(accuracy, abs=1e-3)
    assert saved(tmp_path)["averaging_state"]["n_averaged"] == len(scored)
    assert scores(tmp_path, "val/raw_student_top1")[0] == scored[0]  # a copy of the weights


class Keep(Callback):
    """Stands for a program that goes on with the network after `fit`."""

    state: dict[str, Tensor]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Keep.state = {name: t.clone() for name, t in pl_module.network.state_dict().items()}


def test_the_network_in_memory_is_the_trained_one_where_no_average_began(tmp_path: Path) -> None:
    late = averaged_by(LIGHTNING, update_starting_at_step=1000)
    keep = "--trainer.callbacks+=test_averages.Keep"
    assert fit(tmp_path, *ALONE, *late, keep, epochs=1) == 0
    trained = saved(tmp_path)["current_model_state"]
    assert_same(Keep.state, {name: trained[f"network.{name}"] for name in Keep.state})


def test_a_checkpoint_without_a_begun_average_is_scored_by_its_trained_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = averaged_by(LIGHTNING, update_starting_at_step=1000)
    assert fit(tmp_path, *ALONE, *late, epochs=2) == 0
    capsys.readouterr()
    with chdir(tmp_path):
        last = str(run(tmp_path) / "checkpoints" / "last.ckpt")
        assert main(["validate", "--ckpt_path", last, "--trainer.accelerator", "cpu"]) == 0
    assert f"{scores(tmp_path, 'val/student_top1')[-1]:.4f}"[:6] in capsys.readouterr().out


@pytest.mark.parametrize("start", [3, 10], ids=["begun", "not begun"])
def test_a_resumed_average_is_that_of_an_uninterrupted_run(tmp_path: Path, start: int) -> None:
    average = averaged_by("gpd_cli.EMA", update_starting_at_step=start)
    options = [*ALONE, *average, *STILL, *SHORT]
    assert fit(tmp_path / "whole", *options) == 0
    stopped = "--trainer.callbacks+=runs.StopAfterTwoEpochs"
    assert fit(tmp_path / "parts", *options, stopped) == 0
    last = run(tmp_path / "parts") / "checkpoints" / "last.ckpt"
    assert fit(tmp_path / "parts", *options, "--ckpt_path", str(last)) == 0
    resumed, expected = saved(tmp_path / "parts", 1), saved(tmp_path / "whole")
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert_same(resumed[key], expected[key])


def test_an_epoch_is_averaged_once_where_a_run_goes_on_from_its_best_checkpoint(
    tmp_path: Path,
) -> None:
    """It is written between the update of the average and the end of the epoch."""
    per_epoch = averaged_by("gpd_cli.EMA", update_every_n_steps=0, update_starting_at_epoch=0)
    options = [*ALONE, *SHORT, *per_epoch, "--trainer.val_check_interval", "4"]
    assert fit(tmp_path, *options, epochs=1) == 0
    best = str(run(tmp_path) / "checkpoints" / "best.ckpt")
    assert fit(tmp_path, *options, "--ckpt_path", best, epochs=2) == 0
    assert saved(tmp_path, 1)["averaging_state"]["n_averaged"] == 2


def test_what_is_said_at_the_end_counts_the_updates_before_a_resumption(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = [*ALONE, *SHORT, *averaged_by(LIGHTNING, decay=0.99996)]
    assert fit(tmp_path, *options, epochs=1) == 0
    assert "After 4 updates" in caplog.text
    last = run(tmp_path) / "checkpoints" / "last.ckpt"
    assert fit(tmp_path, *options, "--ckpt_path", str(last), epochs=2) == 0
    assert "After 8 updates" in caplog.text


def test_a_run_that_goes_on_without_its_average_goes_on_from_the_trained_weights(
    tmp_path: Path,
) -> None:
    options = [*ALONE, *STILL, *SHORT]
    stopped = "--trainer.callbacks+=runs.StopAfterTwoEpochs"
    assert fit(tmp_path / "whole", *options) == 0
    average = averaged_by("gpd_cli.EMA")
    assert fit(tmp_path / "parts", *options, *average, stopped) == 0
    last = run(tmp_path / "parts") / "checkpoints" / "last.ckpt"
    assert fit(tmp_path / "parts", *options, "--ckpt_path", str(last)) == 0
    assert_same(saved(tmp_path / "parts", 1)["state_dict"], saved(tmp_path / "whole")["state_dict"])


def test_weights_trained_in_half_precision_are_averaged_in_full(tmp_path: Path) -> None:
    options = [*ALONE, "--trainer.precision", "bf16-true", "--data.image_size", "32"]
    assert fit(tmp_path, *options, *averaged_by("gpd_cli.EMA"), epochs=1) == 0
    content, name = saved(tmp_path), "network.network.fc.weight"
    average, raw = content["state_dict"][name], content["current_model_state"][name]
    assert (average.dtype, raw.dtype) == (torch.float32, torch.bfloat16)
    assert not torch.equal(average, raw.float())


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_an_average_and_its_validation_change_no_number(tmp_path: Path, precision: str) -> None:
    """Neither the trained weights, which are the same without average, nor the average itself."""
    options = [*ALONE, "--trainer.precision", precision, "--data.image_size", "32"]
    average = averaged_by("gpd_cli.EMA")
    assert fit(tmp_path, *options, epochs=2) == 0
    assert fit(tmp_path, *options, *average, epochs=2) == 0
    assert fit(tmp_path, *options, *average, "--trainer.limit_val_batches", "0", epochs=2) == 0
    alone, averaged, unvalidated = (saved(tmp_path, number) for number in range(3))
    assert_same(alone["state_dict"], averaged["current_model_state"])
    assert_same(averaged["state_dict"], unvalidated["state_dict"])
    fc = averaged["state_dict"]["network.network.fc.weight"]
    assert fc.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    last = str(run(tmp_path, 1) / "checkpoints" / "last.ckpt")
    assert fit(tmp_path, *options, *average, "--ckpt_path", last, epochs=3) == 0
    resumed = saved(tmp_path, 3)["state_dict"]["network.network.fc.weight"]
    assert resumed.dtype == fc.dtype


@pytest.mark.slow
def test_two_processes_score_both_weights_as_they_are_exported(tmp_path: Path) -> None:
    options = [*averaged_by("gpd_cli.EMA"), "--trainer.devices", "2", "--data.batch_size", "32"]
    command = arguments(*options, "--trainer.sync_batchnorm", "true", epochs=2)
    (result,) = in_processes(tmp_path, [sys.executable, "-m", "gpd_cli", *command])
    assert result.returncode == 0, result.stderr
    last = run(tmp_path) / "checkpoints" / "last.ckpt"
    for weights, prefix in (("ema", "val/"), ("raw", "val/raw_")):
        logged = [scores(tmp_path, f"{prefix}{name}_top1")[-1] for name in ("student", "teacher")]
        # An image more or less, for rounding.
        assert validated(last, weights) == pytest.approx(logged, abs=0.3)


def test_two_averages_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path, *averaged_by("gpd_cli.EMA"), *averaged_by(LIGHTNING)) == 1
    error = capsys.readouterr().err
    assert "EMA and EMAWeightAveraging" in error and "--trainer.callbacks" in error


@pytest.mark.parametrize("setting", ["gamma", "power"])
def test_a_warm_up_without_length_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    assert fit(tmp_path, *averaged_by("gpd_cli.EMA", **{setting: 0})) == 1
    assert "gamma and power above 0" in capsys.readouterr().err


def write_digits(folder: Path, images: int, classes: Sequence[int]) -> None:
    """An image folder of digits, a quarter of it for validation."""
    digits = load_digits()
    chosen = [k for k, label in enumerate(digits.target) if label in classes][:images]
    for number, k in enumerate(chosen):
        split = "val" if number % 4 == 0 else "train"
        place = folder / split / f"digit{digits.target[k]}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray((digits.images[k] * 15.9).astype(np.uint8))
        pixels.resize((32, 32)).save(place / f"{number}.png")


@pytest.mark.slow
def test_the_configuration_for_images_of_ones_own_learns_from_few_of_them(
    tmp_path: Path,
) -> None:
    small = {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 32]}
    write_digits(tmp_path / "data", 200, classes=(0, 1, 4, 7))
    with chdir(tmp_path):
        options = [
            *("-c", str(ROOT / "configs" / "folder.yaml"), "--data.root", "data"),
            *("--model.num_classes", "4", "--trainer.accelerator", "cpu"),
            # Digits are no photographs, and small.
            *("--data.image_size", "32", "--data.hflip", "0", "--data.scale", "[0.6, 1.0]"),
            *("--data.num_workers", "0", "--trainer.max_epochs", "40", "--model.branches", "2"),
            *("--model.student_args", str(small)),
        ]
        assert main(["fit", *options]) == 0
        best = "runs/folder/version_0/checkpoints/best.ckpt"
        assert main(["extract", "--ckpt_path", best, "--output", "student.pth"]) == 0
        with Path("runs/folder/version_0/metrics.csv").open() as file:
            column = [row["val/student_top1"] for row in csv.DictReader(file)]
        logged = max(float(value) for value in column if value)
        assert logged > 80
        data = ImageData(dataset="folder", root="data", image_size=32, num_workers=0)
        data.setup("fit")
        network = timm.create_model("resnet18", num_classes=4, **small).eval()
        network.load_state_dict(torch.load("student.pth", weights_only=True))
        with torch.no_grad():
            hits = [network(x).argmax(1) == labels for x, labels in data.val_dataloader()]
    assert 100 * torch.cat(hits).float().mean() == pytest.approx(logged, abs=1e-3)
