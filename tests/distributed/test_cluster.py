import csv
import json
import os
import random
import signal
import stat
import sys
from contextlib import chdir
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bench.chaos.compare import rows
from gpd_cli.__main__ import main
from gpd_cli.data.cached import CachedLoader, HeldImages
from gpd_cli.data.loaders import LoaderSettings
from gpd_cli.data.samplers import Share, training_sampler
from gpd_cli.data.skipping import skip_once
from gpd_cli.data.transforms import Preprocessing
from gpd_cli.distill.methods import Batch, ReviewKD
from gpd_cli.distill.methods.crd import CRD
from gpd_cli.distill.static_teacher import StaticTeacherSettings
from gpd_cli.distributed.sync_norm import SyncedNorms
from gpd_cli.errors import ModelError
from gpd_cli.files import save_tensors
from gpd_cli.report.run import read_run
from gpd_cli.teacher.expansion import expand
from gpd_cli.teacher.pair import Pair
from gpd_cli.training.module import GapPreservingDistillation
from gpd_cli.training.speed import Speed
from gpd_cli.training.table import RunCSVLogger
from processes import JOB, SLURM, free_port, in_processes, slurm_tasks

ALONE = ["--model.ratio", "1", "--model.branches", "1"]
RESNET = {"in_chans": 1, "layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
VIT = {"in_chans": 1, "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
SIZE = 16
BATCHES = 6


def arguments(*options: str, student: str = "resnet18", batch: int = 32) -> list[str]:
    """`fit` of a tiny student, on the CPU, without random augmentation."""
    student_args = RESNET if student == "resnet18" else VIT
    return [
        *("fit", "--model.student", student, "--model.num_classes", "10"),
        *("--model.student_args", str(student_args), "--model.branches", "2"),
        *("--data.image_size", str(SIZE), "--data.batch_size", str(batch)),
        *("--data.no_aug", "true", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"),
        *("--trainer.limit_train_batches", str(BATCHES), "--trainer.limit_val_batches", "1"),
        *options,
    ]


def fit(folder: Path, *options: str, **settings: Any) -> int:
    folder.mkdir(exist_ok=True)
    with chdir(folder):
        return main(arguments(*options, **settings))


def run_folder(folder: Path, version: int = 0) -> Path:
    return folder / "runs" / "gpd" / f"version_{version}"


def checkpoint(folder: Path, version: int = 0) -> dict[str, Any]:
    path = run_folder(folder, version) / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)


def losses(folder: Path) -> dict[str, float]:
    """The losses of training, of the last epoch."""
    with (run_folder(folder) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss_total"]]
    return {name: float(value) for name, value in rows[-1].items() if "train/loss" in name}


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[n].double() - second[n].double()).abs().max()) for n in first)


def trained(content: dict[str, Any]) -> dict[str, Tensor]:
    """What a checkpoint has of the networks, without counters of metrics."""
    return {n: tensor for n, tensor in content["state_dict"].items() if n.startswith("network.")}


@pytest.fixture(scope="module")
def static_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("static") / "static.safetensors"
    network = timm.create_model("resnet18", num_classes=10, **RESNET)
    save_tensors(path, network.state_dict())
    return path


def static_options(weights: Path, method: str = "reviewkd") -> list[str]:
    return [
        *("--model.static_teacher.name", "resnet18", "--model.static_teacher.args", str(RESNET)),
        *("--model.static_teacher.weights", str(weights), "--model.method", method),
    ]


def distiller(weights: Path, **options: Any) -> GapPreservingDistillation:
    torch.manual_seed(0)
    return GapPreservingDistillation(
        "resnet18",
        student_args=RESNET,
        num_classes=10,
        branches=2,
        static_teacher=StaticTeacherSettings("resnet18", str(weights), RESNET),
        method=ReviewKD,
        **options,
    )


# Several processes


EXACT = ["--trainer.precision", "64-true", "--trainer.max_epochs", "1"]
SYNCED = [*EXACT, "--trainer.sync_batchnorm", "true"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, static_weights: Path) -> Path:
    folder = tmp_path_factory.mktemp("one")
    assert fit(folder, *SYNCED, *static_options(static_weights), batch=32) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun", "slurm"])
def test_two_processes_are_one_with_twice_the_batch(
    one_process: Path, static_weights: Path, tmp_path: Path, launcher: str
) -> None:
    options = arguments(*SYNCED, *static_options(static_weights), batch=16)
    module = ["-m", "gpd_cli", *options]
    if launcher == "lightning":
        results = in_processes(tmp_path, [sys.executable, *module, "--trainer.devices", "2"])
    elif launcher == "torchrun":
        run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        results = in_processes(tmp_path, [*run, "--master_port", free_port(), *module])
    else:
        results = in_processes(tmp_path, [sys.executable, *module], slurm_tasks(2))
    for result in results:
        assert result.returncode == 0, result.stderr
        assert "unused" not in result.stderr
    spread, alone = checkpoint(tmp_path), checkpoint(one_process)
    assert spread["global_step"] == alone["global_step"] == BATCHES
    weights = [
        {name: t for name, t in content["state_dict"].items() if "scores" not in name}
        for content in (spread, alone)
    ]
    assert any(name.startswith("distillation.") for name in weights[0])
    assert difference(*weights) < 1e-10
    expected = losses(one_process)
    assert {"train/loss_gap", "train/loss_teacher_static"} <= expected.keys()
    assert losses(tmp_path) == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_gradients_of_a_wrapped_network_reach_their_weights_in_every_memory_format(
    tmp_path: Path,
) -> None:
    """DistributedDataParallel keeps the format that the weights have when it wraps them."""
    options = [*EXACT, *ALONE, "--trainer.limit_train_batches", "2", "--model.channels_last"]
    assert fit(tmp_path / "plain", *options, "false") == 0
    wrapped = arguments(*options, "true", "--trainer.strategy", "ddp_find_unused_parameters_true")
    command = [sys.executable, "-m", "gpd_cli", *wrapped]
    (result,) = in_processes(tmp_path / "wrapped", command)
    assert result.returncode == 0, result.stderr
    assert "strides do not match" not in result.stderr
    plain, other = (trained(checkpoint(tmp_path / name)) for name in ("plain", "wrapped"))
    assert difference(plain, other) < 1e-10


class Ranks(Callback):
    """Writes what each process has drawn and remembers into a file of its own."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.drawn = [random.random(), np.random.rand(), torch.rand(()).item()]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found: dict[str, Any] = {n: b for n, b in pl_module.named_buffers() if "_memory" in n}
        sent = dict(pl_module.named_buffers()).keys() - trainer.model.parameters_to_ignore
        found["sent"] = sorted(sent)
        torch.save(found | {"drawn": self.drawn}, f"rank{trainer.global_rank}.pth")


@pytest.mark.slow
def test_processes_draw_their_own_numbers_and_remember_the_same(
    static_weights: Path, tmp_path: Path
) -> None:
    crd = ["--model.method.init_args", "{num_images: 1077, nce_k: 64, feat_dim: 8}"]
    options = arguments(*static_options(static_weights, "crd"), *crd, batch=16)
    extra = ["--trainer.callbacks", "test_cluster.Ranks", "--trainer.devices", "2"]
    command = [sys.executable, "-m", "gpd_cli", *options, *extra]
    (result,) = in_processes(tmp_path, command)
    assert result.returncode == 0, result.stderr
    one, other = (torch.load(tmp_path / f"rank{k}.pth", weights_only=True) for k in (0, 1))
    assert all(a != b for a, b in zip(one.pop("drawn"), other.pop("drawn"), strict=True))
    sent = one.pop("sent")
    assert sent == other.pop("sent") and not any("_memory" in name for name in sent)
    assert len(one) == 4
    before = CRD(num_images=1077, feat_dim=8)
    for name, memory in one.items():
        assert torch.equal(memory, other[name])
        assert not torch.equal(memory, before.get_buffer(name.rpartition(".")[2]))


@pytest.mark.slow
def test_two_nodes_of_torchrun_train_together(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"),
        *("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:29672", "--rdzv_id", "7"),
        *("--local_addr", "localhost", "-m", "gpd_cli"),
    ]
    options = arguments(*EXACT, student="vit_tiny_patch16_224", batch=16)
    for result in in_processes(tmp_path / "two", [*command, *options], [{}, {}]):
        assert result.returncode == 0, result.stderr
    assert fit(tmp_path / "one", *EXACT, student="vit_tiny_patch16_224", batch=32) == 0
    spread, alone = checkpoint(tmp_path / "two"), checkpoint(tmp_path / "one")
    names = [name for name in alone["state_dict"] if name.startswith("network.")]
    pair = [{name: content["state_dict"][name] for name in names} for content in (spread, alone)]
    assert difference(*pair) < 1e-6


def test_every_parameter_has_a_gradient_in_every_step(static_weights: Path) -> None:
    module = distiller(static_weights).train()
    assert module.distillation is not None
    for step in range(2):
        images, labels = torch.randn(4, 1, SIZE, SIZE), torch.arange(4) + step
        student, teacher = module(images)
        terms = module.objective.terms(student, teacher, labels)
        logits = {"student": student, "teacher": teacher}
        terms |= module.distillation(logits, images, Batch(labels))
        module.zero_grad()
        sum(terms.values()).backward()
        assert not [name for name, p in module.named_parameters() if p.grad is None]


# Synchronized batch normalization


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_synchronizing_changes_neither_keys_nor_eval_mode(name: str) -> None:
    options = RESNET if name == "resnet18" else {"in_chans": 1}
    student = timm.create_model(name, num_classes=10, **options)
    pair = expand(student, sample=torch.zeros(2, 1, 64, 64), ratio=2, branches=3)
    pair(torch.randn(4, 1, 64, 64))  # running statistics of its own
    images = torch.randn(2, 1, 64, 64)
    pair.eval()
    before, keys = pair(images), list(pair.state_dict())
    sync = SyncedNorms()
    assert sync.apply(pair) is pair
    assert list(pair.state_dict()) == keys
    for one, other in zip(pair(images), before, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(pair.extract().eval()(images), before[0])
    sync.revert(pair)
    assert torch.equal(pair(images)[0], before[0])
    plain = type(student.get_submodule("bn1"))
    assert plain is (nn.BatchNorm2d if name == "resnet18" else BatchNormAct2d)
    assert type(pair.extract().get_submodule("bn1")) is plain


def test_synchronized_activation_is_kept_in_train_mode() -> None:
    images = torch.randn(4, 3, 2, 2)
    layer, same = BatchNormAct2d(3), BatchNormAct2d(3)
    SyncedNorms().apply(layer)
    assert torch.equal(layer(images), same(images))
    assert float(layer(images).detach().min()) == 0


# Told to stop


class Signal(Callback):
    """Stands for SLURM: a signal in the middle of a step, to one process only."""

    signum = signal.SIGTERM
    step = 3

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero and is_new(trainer):
            os.kill(os.getpid(), self.signum)


def is_new(trainer: Trainer) -> bool:
    """Whether a run is not one that goes on, which is left alone."""
    table = trainer.loggers[0]
    return isinstance(table, RunCSVLogger) and not table.continues


class Requeue(Signal):
    signum = signal.SIGUSR1
    step = BATCHES + 2


class Killed(Requeue):
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        if trainer.global_step == self.step and is_new(trainer):
            raise RuntimeError("the node is gone")


class Worse(Callback):
    """Makes the network blind when it has been trained for so many steps."""

    after = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > self.after:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.zero_()


STOPPED = ["--trainer.callbacks+=test_cluster.Signal"]
REQUEUED = ["--trainer.callbacks+=test_cluster.Requeue"]


def fake_scontrol(folder: Path, code: int = 0) -> Path:
    """A folder with a scontrol that writes down what it was asked for."""
    folder.mkdir(exist_ok=True)
    path = folder / "scontrol"
    path.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/asked\necho queue is full >&2\nexit {code}\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return folder


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a job of one task, and a scontrol."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", free_port())
    folder = fake_scontrol(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_requeued_job_goes_on_where_it_stopped(
    tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fit(whole) == 0
    handler = signal.getsignal(signal.SIGTERM)
    assert fit(parts, *REQUEUED) == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (slurm / "asked").read_text() == f"requeue {JOB}\n"
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gpd:")]
    assert len(told) == 1
    assert f"job {JOB} is requeued" in told[0]
    (saved,) = parts.glob("requeue_*.ckpt")
    assert saved.resolve() == run_folder(parts, 0).resolve() / "checkpoints" / "stopped.ckpt"
    content = torch.load(saved, weights_only=True)
    assert content["global_step"] == Requeue.step + 1
    assert content["epoch"] == 1
    assert fit(parts, *REQUEUED) == 0  # the same command
    told = capsys.readouterr().err
    assert "gpd: going on from runs/gpd/version_0/checkpoints/stopped.ckpt" in told
    resumed, expected = checkpoint(parts), checkpoint(whole)
    assert resumed["global_step"] == expected["global_step"] == 2 * BATCHES
    assert difference(trained(resumed), trained(expected)) == 0
    assert not list(parts.rglob("requeue_*"))
    assert not list(parts.rglob("stopped.ckpt"))
    assert_one_run(parts, whole)


class Late(Callback):
    """Lets the time of a run be up at its fourth step."""

    hours = 0.0

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        Late.hours = 2.0 * (trainer.global_step == 3)


def test_requeued_job_whose_time_is_up_keeps_what_it_has_saved(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Timer, "time_elapsed", lambda *_: 3600 * Late.hours)
    monkeypatch.setattr(Requeue, "step", 1)
    late = [*REQUEUED, "--trainer.callbacks+=test_cluster.Late", "--trainer.max_time"]
    assert fit(tmp_path, *ALONE, *late, "00:01:00:00") == 0
    assert fit(tmp_path, *ALONE, *late, "00:01:00:00") == 0
    assert "--trainer.max_time is up; saved as" in capsys.readouterr().err
    assert not list(tmp_path.glob("requeue_*"))
    saved = run_folder(tmp_path, 0) / "checkpoints" / "stopped.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 4


def assert_one_run(parts: Path, whole: Path) -> None:
    """A run of several starts has one folder, with all epochs and the best of all."""
    assert not run_folder(parts, 1).exists()
    assert rows(run_folder(parts, 0)) == rows(run_folder(whole, 0))
    found, expected = (read_run(run_folder(folder, 0)) for folder in (parts, whole))
    assert (found.best_epoch, found.lacking) == (expected.best_epoch, "")
    best, other = (
        torch.load(run_folder(folder, 0) / "checkpoints" / "best.ckpt", weights_only=True)
        for folder in (parts, whole)
    )
    assert best["global_step"] == other["global_step"]
    assert len(json.loads((run_folder(parts, 0) / "environment.json").read_text())) == 2


@pytest.mark.parametrize("workers", [0, 1, None], ids=["no worker", "worker", "cached"])
def test_skipping_leaves_out_batches_of_the_next_pass_only(workers: int | None) -> None:
    images, numbers = torch.zeros(12, 1, 4, 4, dtype=torch.uint8), torch.arange(12)
    sampler = training_sampler(numbers, Share(), seed=3)
    loader: Any
    if workers is None:
        plain = Preprocessing(image_size=4, in_chans=1, no_aug=True)
        loader = CachedLoader(
            HeldImages(images, numbers), plain, sampler, batch_size=2, training=True
        )
    else:
        settings = LoaderSettings(batch_size=2, num_workers=workers)
        loader = settings.loader(TensorDataset(images, numbers), Share(), workers, sampler=sampler)
    sampler.set_epoch(1)
    whole = [labels.tolist() for _, labels in loader]
    skip_once(loader, 2)
    assert [labels.tolist() for _, labels in islice(loader, 4)] == whole[2:]
    assert [labels.tolist() for _, labels in loader] == whole


def test_job_that_was_killed_goes_on_from_its_last_epoch(tmp_path: Path, slurm: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fit(whole, *ALONE) == 0
    killed = [*ALONE, "--trainer.callbacks+=test_cluster.Killed"]
    assert fit(parts, *killed) == 1
    before = checkpoint(parts)
    assert before["global_step"] == BATCHES
    assert fit(parts, *killed) == 0
    resumed, expected = checkpoint(parts), checkpoint(whole)
    assert resumed["global_step"] == expected["global_step"] == 2 * BATCHES
    assert difference(resumed["state_dict"], expected["state_dict"]) == 0
    assert not list(parts.glob("requeue_*"))
    assert_one_run(parts, whole)


def test_requeued_job_keeps_a_best_epoch_of_before(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights break down after the first epoch, which stays the best; config.yaml its start."""
    network = timm.create_model("resnet18", num_classes=10, **RESNET)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    steps = 30
    worse = ["--trainer.callbacks+=test_cluster.Worse", "--trainer.limit_train_batches", str(steps)]
    worse += ["--model.optimizer.lr", "0.1", "--model.optimizer.sched", "none"]
    start = ["--model.student_weights", str(tmp_path / "w.pth")]
    monkeypatch.setattr(Worse, "after", steps)
    monkeypatch.setattr(Killed, "step", steps + 2)
    killed = [*ALONE, *start, *worse, "--trainer.callbacks+=test_cluster.Killed"]
    assert fit(tmp_path, *killed) == 1
    assert fit(tmp_path, *killed) == 0
    run = run_folder(tmp_path, 0)
    assert torch.load(run / "checkpoints/best.ckpt", weights_only=True)["global_step"] == steps
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["ckpt_path"] is None
    assert config["model"]["student_weights"] == start[1]


def test_job_whose_checkpoint_lies_in_no_run_goes_on_in_a_folder_of_its_own(
    tmp_path: Path, slurm: Path
) -> None:
    """As one of an earlier version, which saved it where the job was submitted."""
    assert fit(tmp_path, *ALONE, *REQUEUED) == 0
    (saved,) = tmp_path.glob("requeue_*.ckpt")
    content = saved.read_bytes()
    saved.unlink()
    saved.write_bytes(content)
    assert fit(tmp_path, *ALONE) == 0
    assert checkpoint(tmp_path, version=1)["global_step"] == 2 * BATCHES
    assert not saved.exists()


def test_job_that_cannot_be_requeued_says_how_to_go_on(
    tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_scontrol(slurm, code=1)
    assert fit(tmp_path, *ALONE, *REQUEUED) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gpd:")]
    assert "queue is full" in error
    assert error.endswith("go on with: gpd fit --resume runs/gpd/version_0")


def test_tasks_without_a_number_per_node_are_refused_in_one_sentence(
    tmp_path: Path,
    slurm: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    assert fit(tmp_path, *ALONE) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "--ntasks-per-node" in error


def test_terminated_run_says_in_one_sentence_how_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path / "parts", *ALONE, *STOPPED) == 128 + signal.SIGTERM
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    (told,) = [line for line in errors.splitlines() if line.startswith("gpd:")]
    assert f"stopped at step {Signal.step + 1}" in told
    option, run = told.split()[-2:]
    assert option == "--resume"
    assert (tmp_path / "parts" / run / "checkpoints" / "stopped.ckpt").is_file()

    with chdir(tmp_path / "parts"):
        assert main(["fit", option, run]) == 0
    assert fit(tmp_path / "whole", *ALONE) == 0
    resumed = checkpoint(tmp_path / "parts")
    assert difference(trained(resumed), trained(checkpoint(tmp_path / "whole"))) == 0


@pytest.mark.slow
def test_tasks_of_a_requeued_job_stop_and_go_on_together(tmp_path: Path) -> None:
    folder = fake_scontrol(tmp_path / "bin")
    path = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    tasks = [environment | path for environment in slurm_tasks(2)]
    longer = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "20"]
    vit = "vit_tiny_patch16_224"
    options = arguments(*ALONE, *longer, student=vit, batch=16)
    command = [sys.executable, "-m", "gpd_cli", *options]
    parts = tmp_path / "parts"
    for number in range(2):
        for result in in_processes(parts, [*command, *STOPPED], tasks):
            assert result.returncode == (0 if number else 128 + signal.SIGTERM), result.stderr
        assert len(list(parts.glob("requeue_*"))) == (number == 0)
    assert fit(tmp_path / "whole", *ALONE, *longer, student=vit, batch=32) == 0
    resumed, expected = checkpoint(parts), checkpoint(tmp_path / "whole")
    assert resumed["global_step"] == expected["global_step"] == 20
    assert difference(trained(resumed), trained(expected)) < 1e-5


# Accumulation, precision, layout, compilation, determinism


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path: Path) -> None:
    options = [*EXACT, "--model.optimizer.warmup_epochs", "0.5"]
    small = ["--trainer.accumulate_grad_batches", "2", "--trainer.limit_train_batches", "12"]
    vit = "vit_tiny_patch16_224"
    assert fit(tmp_path / "large", *options, student=vit, batch=32) == 0
    assert fit(tmp_path / "small", *options, *small, student=vit, batch=16) == 0
    large, accumulated = checkpoint(tmp_path / "large"), checkpoint(tmp_path / "small")
    assert large["global_step"] == accumulated["global_step"] == BATCHES
    assert difference(trained(large), trained(accumulated)) < 1e-6
    rates = [c["optimizer_states"][0]["param_groups"][0]["lr"] for c in (large, accumulated)]
    assert rates[0] == pytest.approx(rates[1])


@pytest.mark.filterwarnings("ignore:You passed .Trainer:UserWarning")  # about 16-mixed on a CPU
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "16-mixed"])
def test_other_precisions_train(tmp_path: Path, static_weights: Path, precision: str) -> None:
    options = ["--trainer.precision", precision, "--data.image_size", "64"]
    assert fit(tmp_path, *options, *static_options(static_weights)) == 0
    state = checkpoint(tmp_path)["state_dict"]
    assert all(bool(t.isfinite().all()) for t in state.values() if t.is_floating_point())


def joint_steps(module: GapPreservingDistillation) -> list[float]:
    """The losses of three steps of training."""
    speed: Speed = module._speed
    assert module.distillation is not None
    speed.set_memory_format(module.train().network, module.distillation)
    speed.prepare(module.network, module.distillation)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    found = []
    for step in range(3):
        torch.manual_seed(step)
        images, labels = speed.arrange(torch.randn(8, 1, SIZE, SIZE)), torch.arange(8)
        student, teacher = module(images)
        terms = module.objective.terms(student, teacher, labels)
        logits = {"student": student, "teacher": teacher}
        terms |= module.distillation(logits, images, Batch(labels))
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"channels_last": True}, id="channels_last"),
        pytest.param({"compile": "aot_eager"}, id="compiled", marks=pytest.mark.slow),
    ],
)
def test_fast_steps_compute_what_plain_steps_do(
    static_weights: Path, options: dict[str, Any]
) -> None:
    plain, fast = distiller(static_weights), distiller(static_weights, **options)
    assert joint_steps(fast) == pytest.approx(joint_steps(plain), rel=1e-5)
    assert difference(fast.state_dict(), plain.state_dict()) < 1e-4
    assert isinstance(fast.network, Pair)
    images = torch.randn(2, 1, SIZE, SIZE)
    with torch.no_grad():
        expected = fast.network.eval().extract().eval()(images)
        assert torch.equal(fast.network.student(images), expected)


@pytest.mark.slow
def test_compiled_run_is_averaged_and_extracted(tmp_path: Path, static_weights: Path) -> None:
    average = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging",
        "--trainer.callbacks.decay=0.5",
    ]
    options = [*average, *static_options(static_weights), "--model.compile", "aot_eager"]
    assert fit(tmp_path, *options, "--trainer.max_epochs", "1") == 0
    content = checkpoint(tmp_path)
    plain = distiller(static_weights)
    assert content["state_dict"].keys() == content["current_model_state"].keys()
    assert content["state_dict"].keys() == plain.state_dict().keys()
    last, output = run_folder(tmp_path) / "checkpoints" / "last.ckpt", tmp_path / "student.pth"
    assert main(["extract", "--ckpt_path", str(last), "--output", str(output)]) == 0
    network = timm.create_model("resnet18", num_classes=10, **RESNET)
    network.load_state_dict(torch.load(output, weights_only=True))


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ModelError, match="no backend 'fast'"):
        Speed(compile="fast")


@pytest.mark.slow
def test_deterministic_runs_are_equal(tmp_path: Path, static_weights: Path) -> None:
    options = ["--trainer.deterministic", "true", "--trainer.max_epochs", "1"]
    states = []
    for name in ("first", "second"):
        assert fit(tmp_path / name, *options, *static_options(static_weights)) == 0
        states.append(checkpoint(tmp_path / name)["state_dict"])
    torch.use_deterministic_algorithms(False)
    assert difference(*states) == 0
