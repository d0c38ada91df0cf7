"""A run that was killed and goes on is the run that was not, bit for bit."""

import io
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from bench.chaos.compare import differences, rows
from gpd_cli.__main__ import main
from gpd_cli.training.logged_sums import LoggedSums
from processes import in_processes
from runs import noise_images

STEPS = 4  # in an epoch
EPOCHS = 3
CONFIG = """
model:
  student: resnet18
  student_args: {in_chans: 1, layers: [1, 1, 1, 1], channels: [4, 4, 8, 8], drop_path_rate: 0.4}
  num_classes: 10
  ratio: 2
  branches: 3
  optimizer: {lr: 0.05, warmup_epochs: 1}
data: {image_size: 16, batch_size: 16, mixup: 0.4, cutmix: 1.0}
trainer: {accelerator: cpu, max_epochs: 3, limit_train_batches: 4, limit_val_batches: 1,
  log_every_n_steps: 2,
  callbacks: [{class_path: gpd_cli.EMA}, {class_path: test_exact_resume.Kill}]}
"""
FOLDER = """
model: {num_classes: 3}
data: {dataset: folder, root: images, in_chans: 1, auto_augment: rand-m9-mstd0.5, re_prob: 0.5,
  val_split: null, val_fraction: 0.2}
"""


class Kill(Callback):
    """Stands for a node that is gone, before a step or in validation."""

    step: int | None = None
    validating = False

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if not self.validating and trainer.global_step == self.step:
            raise RuntimeError("the node is gone")

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.validating and trainer.global_step == self.step:
            raise RuntimeError("the node is gone")


class Clock:
    """A second per batch, for Lightning's timer."""

    seconds = 0


def elapsed(timer: Timer, stage: str = "train") -> float:
    return timer._offset + Clock.seconds if stage == "train" else 0.0


class Tick(Callback):
    """Lets a second pass; saves nothing."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        Clock.seconds += 1


def fit(folder: Path, *options: str) -> int:
    with chdir(folder):
        return main(["fit", *options])


def killed(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: Sequence[str],
    step: int,
    validating: bool = False,
) -> None:
    monkeypatch.setattr(Kill, "step", step)
    monkeypatch.setattr(Kill, "validating", validating)
    assert fit(folder, *options) == 1
    monkeypatch.setattr(Kill, "step", None)


def prepared(folder: Path, more: str = "") -> list[str]:
    """Options of a run in a folder, its configurations written there."""
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(CONFIG)
    options = ["-c", "run.yaml"]
    if more:
        (folder / "more.yaml").write_text(more)
        options += ["-c", "more.yaml"]
        noise_images(folder, "abc", 90, 20)
    return options


def run_of(folder: Path, version: int = 0) -> Path:
    (run,) = (folder / "runs").glob(f"*/version_{version}")
    return run


def assert_same(one: Path, other: Path, names: Sequence[str] = ("last", "best")) -> None:
    """Two runs in folders of the same name below others have the same checkpoints and metrics."""
    for name in names:
        first, second = (
            torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
            for run in (one, other)
        )
        assert first["epoch_state"]["rows"]
        assert first["random_states"]
        assert differences(first, second) == []
    assert len(rows(one)) > EPOCHS
    assert rows(one) == rows(other)


EVERY = "--trainer.save_every_n_steps"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert fit(folder, *prepared(folder)) == 0
    return run_of(folder)


@pytest.mark.parametrize(
    ("step", "validating", "every"),
    [
        pytest.param(2, False, 1, id="first epoch", marks=pytest.mark.slow),
        pytest.param(7, False, 2, id="one step lost"),
        pytest.param(8, False, 3, id="between epochs", marks=pytest.mark.slow),
        pytest.param(8, True, 1, id="validation"),
        pytest.param(9, False, 100, id="from the epoch's end", marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_it_goes_on_bit_for_bit(
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    validating: bool,
    every: int,
) -> None:
    killed(tmp_path, monkeypatch, [*prepared(tmp_path), EVERY, str(every)], step, validating)
    assert fit(tmp_path, "--resume", "runs/run/version_0") == 0
    assert_same(whole, run_of(tmp_path))


@pytest.mark.parametrize(
    ("reduction", "together"), [("max", 5.0), ("min", 1.0), ("sum", 9.0), ("mean", 3.0)]
)
def test_logged_values_of_an_interrupted_epoch_are_reduced_as_a_whole(
    reduction: Any, together: float
) -> None:
    def logged_by(*values: float) -> tuple[Any, _ResultCollection]:
        results = _ResultCollection(training=True)
        how: dict[str, Any] = {"on_step": False, "on_epoch": True, "reduce_fx": reduction}
        for value in values:
            results.log("training_step", "own", torch.tensor(value), batch_size=1, **how)
        loop = SimpleNamespace(_results=results)
        return SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=loop)), results

    before, _ = logged_by(1.0, 5.0)
    rest, results = logged_by(3.0)
    sums = LoggedSums()
    sums.resume(LoggedSums().state(before))
    sums.add(rest)
    assert results["training_step.own"].compute() == together


@pytest.mark.slow
def test_the_best_checkpoint_does_as_well_where_the_last_is_damaged(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is written after validation, before the epoch's end."""
    killed(tmp_path, monkeypatch, prepared(tmp_path), STEPS + 1)
    folder = run_of(tmp_path) / "checkpoints"
    content = (folder / "last.ckpt").read_bytes()
    (folder / "last.ckpt").write_bytes(content[:-1000])
    capfd.readouterr()
    assert fit(tmp_path, "--resume", "runs/run/version_0") == 0
    assert "last.ckpt is damaged" in capfd.readouterr().err
    assert_same(whole, run_of(tmp_path))


@pytest.mark.slow
def test_killed_twice_and_moved_in_between(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tmp_path, monkeypatch, [*prepared(tmp_path), EVERY, "1"], 3)
    killed(tmp_path, monkeypatch, ["--resume", "runs/run/version_0", EVERY, "1"], 10)
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert fit(tmp_path, "--resume", str(tmp_path / "elsewhere" / "run")) == 0
    (tmp_path / "elsewhere").rename(tmp_path / "runs")
    first, second = (
        torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
        for run in (whole, run_of(tmp_path))
    )
    assert differences(first["state_dict"], second["state_dict"]) == []
    assert rows(whole) == rows(run_of(tmp_path))


def test_the_newest_checkpoint_of_the_name_is_found(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [*prepared(tmp_path), "--ckpt_path", "last"]
    killed(tmp_path, monkeypatch, [*options, EVERY, "1"], 3)
    assert "there is no checkpoint in runs/run yet" in capfd.readouterr().err
    assert fit(tmp_path, *options) == 0
    assert "runs/run is runs/run/version_0/checkpoints/last.ckpt" in capfd.readouterr().err
    first, second = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        for run in (whole, run_of(tmp_path, 1))
    )
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert differences(first[part], second[part]) == []


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("repeats", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_augmentation_of_files_goes_on_with_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, repeats: int
) -> None:
    one, other = tmp_path / "whole", tmp_path / "parts"
    repeated = ["--data.aug_repeats", str(repeats)]
    assert fit(one, *prepared(one, FOLDER), *repeated, "--data.num_workers", "0") == 0
    options = [*prepared(other, FOLDER), *repeated, "--data.num_workers", str(workers)]
    killed(other, monkeypatch, [*options, EVERY, "1"], STEPS + 2)
    assert fit(other, "--resume", "runs/run_more/version_0", "--data.num_workers", "2") == 0
    first, second = (
        torch.load(run_of(folder) / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (one, other)
    )
    for part in ("state_dict", "current_model_state", "optimizer_states", "random_states"):
        assert differences(first[part], second[part]) == []
    assert rows(run_of(one)) == rows(run_of(other))


@pytest.mark.slow
@pytest.mark.parametrize("step", [STEPS + 1, 2 * STEPS])
def test_a_run_with_its_length_in_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    one, other = tmp_path / "whole", tmp_path / "parts"
    length = ["--trainer.max_epochs", "-1", "--trainer.max_steps", "11"]
    assert fit(one, *prepared(one), *length) == 0
    killed(other, monkeypatch, [*prepared(other), *length, EVERY, "3"], step)
    assert fit(other, "--resume", "runs/run") == 0
    assert_same(run_of(one), run_of(other))


@pytest.mark.slow
def test_accumulated_gradients_and_validation_within_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "whole", tmp_path / "parts"
    often = ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "0.5"]
    assert fit(one, *prepared(one), *often) == 0
    killed(other, monkeypatch, [*prepared(other), *often, EVERY, "1"], 3)
    assert fit(other, "--resume", "runs/run") == 0
    assert_same(run_of(one), run_of(other))


@pytest.mark.parametrize(
    ("seconds", "batches", "often"),
    [
        pytest.param(6, 6, [], id="within"),
        pytest.param(
            *(5, 6, ["--trainer.accumulate_grad_batches", "2"]),
            id="not while gradients are accumulated",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(6, 7, ["--trainer.val_check_interval", "0.5"]),
            id="behind a validation",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_whose_time_is_up_within_an_epoch_goes_on_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    seconds: int,
    batches: int,
    often: list[str],
) -> None:
    monkeypatch.setattr(Timer, "time_elapsed", elapsed)
    one, other = tmp_path / "whole", tmp_path / "parts"
    options = [*often, "--trainer.callbacks+=test_exact_resume.Tick", "--trainer.max_time"]
    monkeypatch.setattr(Clock, "seconds", 0)
    assert fit(one, *prepared(one), *options, "00:00:10:00") == 0
    monkeypatch.setattr(Clock, "seconds", 0)
    capfd.readouterr()
    assert fit(other, *prepared(other), *options, f"00:00:00:0{seconds}") == 0
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("gpd: stopped")]
    (line,) = told
    assert "--trainer.max_time is up; saved as runs/run/version_0/checkpoints/stopped.ckpt" in line
    assert "gpd fit --resume runs/run/version_0 --trainer.max_time" in line
    assert Clock.seconds == batches

    monkeypatch.setattr(Clock, "seconds", 0)
    assert fit(other, "--resume", "runs/run") == 1
    (error,) = (x for x in capfd.readouterr().err.splitlines() if "is finished" in x)
    assert f"trained for 0:00:0{batches}, and --trainer.max_time is 0:00:0{seconds}" in error
    assert fit(other, "--resume", "runs/run", "--trainer.max_time", "00:00:10:00") == 0
    assert_same(run_of(one), run_of(other))


def test_a_run_whose_time_is_up_at_an_epochs_end_ends_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Timer, "time_elapsed", elapsed)
    monkeypatch.setattr(Clock, "seconds", 0)
    options = ["--trainer.callbacks+=test_exact_resume.Tick", "--trainer.max_time", "00:00:00:08"]
    assert fit(tmp_path, *prepared(tmp_path), *options) == 0
    assert "best epoch" in capfd.readouterr().out
    checkpoints = run_of(tmp_path) / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 8


@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit(tmp_path: Path) -> None:
    one, other = tmp_path / "whole", tmp_path / "parts"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node", "2", "-m", "gpd_cli", "fit"]
    for folder in (one, other):
        options = prepared(folder, FOLDER.replace("0.2}", "0.2, num_workers: 1, batch_size: 8}"))
    (result,) = in_processes(one, [*command, *options])
    assert result.returncode == 0, result.stderr
    stop = ["--trainer.callbacks+=test_exact_resume.KillSecond", EVERY, "1"]
    (result,) = in_processes(other, [*command, *options, *stop])
    assert result.returncode != 0
    (result,) = in_processes(other, [*command, "--resume", "runs/run_more"])
    assert result.returncode == 0, result.stderr
    assert_same(run_of(one), run_of(other))


class KillSecond(Callback):
    """Kills the second of two processes, in the first run only."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        first_run = not trainer.loggers or not getattr(trainer.loggers[0], "continues", False)
        if trainer.global_step == STEPS + 2 and trainer.global_rank == 1 and first_run:
            raise RuntimeError("the node is gone")


@pytest.mark.slow
def test_a_stream_goes_on_within_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are shuffled and augmented by seed, epoch and worker; they are read up to there."""
    pytest.importorskip("webdataset")
    one, other = tmp_path / "whole", tmp_path / "parts"
    more = (
        "model: {num_classes: 3}\n"
        "data: {dataset: wds/images, root: ., train_split: 'train-{0000..0003}.tar|72',\n"
        "  classes: 3, val_split: null, val_fraction: 0, in_chans: 1, re_prob: 0.5,\n"
        "  num_workers: 2, batch_size: 8}\n"
    )
    for folder in (one, other):
        prepared(folder, more)
        shards(folder)
    options = ["-c", "run.yaml", "-c", "more.yaml"]
    assert fit(one, *options) == 0
    killed(other, monkeypatch, [*options, EVERY, "1"], STEPS + 2)
    assert fit(other, "--resume", "runs/run_more") == 0
    assert_same(run_of(one), run_of(other), ["last"])


def shards(folder: Path) -> None:
    """Put the images of a folder into shards."""
    paths = sorted((folder / "images" / "train").rglob("*.png"))[:72]
    for number in range(4):
        with tarfile.open(folder / f"train-{number:04}.tar", "w") as archive:
            for path in paths[number::4]:
                archive.add(path, f"{path.stem}.png")
                label = tarfile.TarInfo(f"{path.stem}.cls")
                label.size = 1
                archive.addfile(label, io.BytesIO(b"%d" % "abc".index(path.parent.name)))


# From a checkpoint that a validation has written


def test_a_run_goes_on_from_the_validation_that_ends_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All batches of the epoch are done, and the next epoch has all of its own."""
    options = ["--trainer.check_val_every_n_epoch", "2", "--trainer.max_epochs", "4"]
    assert fit(tmp_path / "whole", *prepared(tmp_path / "whole"), *options) == 0
    options = [*prepared(tmp_path / "killed"), *options]
    killed(tmp_path / "killed", monkeypatch, options, step=2 * STEPS)
    best = run_of(tmp_path / "killed") / "checkpoints" / "best.ckpt"
    (best.parent / "last.ckpt").unlink()
    assert fit(tmp_path / "killed", "--resume", "runs/run/version_0") == 0
    assert_same(run_of(tmp_path / "whole"), run_of(tmp_path / "killed"))


def test_gradients_of_an_unfinished_update_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation after the third batch has written best.ckpt between two updates."""
    options = ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "3"]
    options += ["--trainer.limit_train_batches", "6"]
    for name in ("whole", "killed"):
        prepared(tmp_path / name)
    assert fit(tmp_path / "whole", "-c", "run.yaml", *options) == 0
    killed(tmp_path / "killed", monkeypatch, ["-c", "run.yaml", *options], step=2)
    (best,) = run_of(tmp_path / "killed").rglob("*.ckpt")
    gradients = torch.load(best, weights_only=True)["epoch_state"]["gradients"]
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    assert fit(tmp_path / "killed", "--resume", "runs/run/version_0") == 0
    assert_same(run_of(tmp_path / "whole"), run_of(tmp_path / "killed"))


# Data of one's own


class Numbered(Dataset[tuple[Tensor, int]]):
    """Images that are told apart by their brightness."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= len(self):
            raise IndexError
        return torch.full((1, 16, 16), float(index)), index % 10


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        yield from Numbered()


class MeasuredStream(Stream):
    def __len__(self) -> int:
        return 48


class Batches:
    """Batches of a user's own making, without a sampler."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(range(k, k + 8)) for k in range(0, 48, 8)])

    def __len__(self) -> int:
        return 6


class Own(LightningDataModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def train_dataloader(self) -> Any:
        if self.kind == "shuffled":
            sampler = DistributedSampler(Numbered(), 1, 0, shuffle=True)
            return DataLoader(Numbered(), 8, sampler=sampler, num_workers=1)
        if self.kind == "batches":
            return DataLoader(Numbered(), batch_sampler=Batches())  # type: ignore[arg-type]
        data = {"stream": Stream, "measured": MeasuredStream}.get(self.kind, Numbered)()
        return DataLoader(data, 8, num_workers=1 if self.kind == "worker" else 0)

    def val_dataloader(self) -> Any:
        return DataLoader(Numbered(), 8)


class Seen(Callback):
    """Records the first image of every batch."""

    images: ClassVar[list[int]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.images.append(int(batch[0][0, 0, 0, 0]))


@pytest.mark.parametrize(
    "kind", ["in order", "worker", "shuffled", "stream", "measured", "batches"]
)
def test_loaders_of_any_kind_go_on_at_their_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(Seen, "images", [])
    (tmp_path / "own.yaml").write_text(f"""
model:
  student: resnet18
  student_args: {{in_chans: 1, layers: [1, 1, 1, 1], channels: [4, 4, 4, 4]}}
  num_classes: 10
  ratio: 1
  optimizer: {{lr: 0.001, sched: none}}
data: {{class_path: test_exact_resume.Own, init_args: {{kind: {kind}}}}}
trainer: {{accelerator: cpu, max_epochs: 3, limit_val_batches: 1, callbacks: [
  {{class_path: test_exact_resume.Seen}}, {{class_path: test_exact_resume.Kill}}]}}
""")
    assert fit(tmp_path, "-c", "own.yaml") == 0
    expected = Seen.images.copy()
    assert len(expected) == 3 * 6
    Seen.images.clear()
    killed(tmp_path, monkeypatch, ["-c", "own.yaml", EVERY, "2"], step=9)
    assert Seen.images == expected[:10]
    Seen.images.clear()
    assert fit(tmp_path, "--resume", "runs/own/version_1") == 0
    assert Seen.images == expected[8:]


def test_scores_stay_known_in_an_epoch_without_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callbacks may read them at the end of any epoch."""
    options = ["--trainer.check_val_every_n_epoch", "2", EVERY, "1"]
    assert fit(tmp_path / "whole", *prepared(tmp_path / "whole"), *options) == 0
    options = [*prepared(tmp_path / "killed"), *options]
    killed(tmp_path / "killed", monkeypatch, options, step=2 * STEPS + 2)
    assert fit(tmp_path / "killed", "--resume", "runs/run/version_0") == 0
    assert_same(run_of(tmp_path / "whole"), run_of(tmp_path / "killed"))
