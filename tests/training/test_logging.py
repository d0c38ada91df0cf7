"""What a run logs about itself, and where."""

import csv
import math
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch.utils._python_dispatch import TorchDispatchMode

from gpd_cli.__main__ import main
from gpd_cli.cli.loggers import csv_logger, run_name
from gpd_cli.training.table import RunCSVLogger
from gpd_cli.training.telemetry import Telemetry

CONFIG = """
model:
  student: resnet18
  student_args: {in_chans: 1, layers: [1, 1, 1, 1], channels: [4, 4, 8, 8]}
  num_classes: 10
  ratio: 1
  branches: 1
  optimizer: {lr: 0.05, sched: none}
data: {image_size: 16, batch_size: 32}
trainer: {accelerator: cpu, max_epochs: 2, limit_train_batches: 6, limit_val_batches: 1,
  log_every_n_steps: 2}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    with chdir(tmp_path):
        yield tmp_path


def fit(*options: str) -> int:
    return main(["fit", "-c", "tiny.yaml", *options])


def steps(path: Path) -> list[dict[str, float]]:
    """The rows of single steps, without their empty cells."""
    with path.open() as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row for row in rows if "lr" in row]


def test_run_is_named_by_its_configuration_and_logs_itself(folder: Path) -> None:
    assert fit() == 0
    rows = steps(folder / "runs/tiny/version_0/metrics.csv")
    assert [row["step"] for row in rows] == [1, 3, 5, 7, 9, 11]
    for row in rows:
        assert row["lr"] == pytest.approx(0.05)
        assert row["grad_norm"] > 0
        assert row["images_per_second"] > 1
        assert 0.01 < row["memory_gib"] < 1000


def test_rerun_makes_a_new_version(folder: Path) -> None:
    assert fit("--trainer.max_epochs", "1") == 0
    before = (folder / "runs/tiny/version_0/metrics.csv").read_bytes()
    assert fit("--trainer.max_epochs", "1") == 0
    assert (folder / "runs/tiny/version_0/metrics.csv").read_bytes() == before
    for name in ("metrics.csv", "config.yaml", "hparams.yaml", "checkpoints/last.ckpt"):
        assert (folder / "runs/tiny/version_1" / name).is_file()


@pytest.mark.parametrize("version", ["mine", "0"], ids=["name", "number"])
def test_rerun_under_the_version_of_another_run_leaves_it(
    version: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["--trainer.max_epochs", "1", "--trainer.logger.init_args.version", version]
    assert fit(*options) == 0
    (first,) = (path.parent for path in folder.rglob("config.yaml"))
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert fit(*options, "--model.optimizer.lr", "0.01") == 0
    assert f"There is a run in {first.relative_to(folder)} already" in caplog.text
    # What its own configuration says is the version as well.
    assert main(["fit", "-c", str(first / "config.yaml")]) == 0
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    runs = {path.parent.parent for path in folder.rglob("best.ckpt")}
    assert len(runs) == 3
    assert all(path.name.startswith("version_") for path in runs - {first})


def test_gradient_norm_is_that_before_clipping(folder: Path) -> None:
    one = ["--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
    assert fit(*one) == 0
    assert fit(*one, "--trainer.gradient_clip_val", "1e-9") == 0
    first = [steps(folder / f"runs/tiny/version_{k}/metrics.csv")[0] for k in (0, 1)]
    assert first[0]["step"] == 0
    assert first[1]["grad_norm"] == first[0]["grad_norm"] > 0.1


class Timed:
    """Throughputs that are logged of batches of four images, by a clock of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **trainer: Any) -> None:
        self.now, self.logged = 0.0, list[float]()
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr("gpd_cli.training.telemetry.time", clock)
        self.trainer: Any = SimpleNamespace(global_step=0, **trainer)
        self.module: Any = SimpleNamespace(device=torch.device("cpu"), log_dict=self.log)
        self.telemetry = Telemetry()
        self.telemetry.on_train_start(self.trainer, self.module)
        self.telemetry.on_train_epoch_start(self.trainer, self.module)

    def log(self, values: dict[str, float], **_: bool) -> None:
        self.logged.append(values["images_per_second"])

    def step(self, seconds: float) -> None:
        self.now += seconds
        self.trainer.global_step += 1
        batch = (torch.zeros(4, 1),)
        self.telemetry.on_train_batch_end(self.trainer, self.module, None, batch, 0)


def test_throughput_is_that_of_all_processes_since_it_was_last_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = Timed(monkeypatch, world_size=2, log_every_n_steps=2)
    for _ in range(6):
        timed.step(seconds=1)
    assert timed.logged == [8.0, 8.0, 8.0]


def test_validation_is_no_part_of_a_steps_time(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(monkeypatch, world_size=1, log_every_n_steps=1)
    timed.now += 100
    timed.telemetry.on_validation_end(timed.trainer, timed.module)
    timed.step(seconds=1)
    assert timed.logged == [4.0]


def test_resolved_configuration_is_saved_whole(folder: Path) -> None:
    assert fit("--trainer.max_epochs", "1", "--data.hflip", "0.25") == 0
    saved = yaml.safe_load((folder / "runs/tiny/version_0/config.yaml").read_text())
    assert saved["data"]["init_args"]["hflip"] == 0.25
    assert saved["model"]["gap_weight"] == 3.0


@pytest.mark.parametrize(
    ("logger", "package", "option"),
    [
        ("TensorBoardLogger", "tensorboard", ["--trainer.logger.save_dir", "boards"]),
        ("WandbLogger", "wandb", ["--trainer.logger.offline", "true"]),
        ("MLFlowLogger", "mlflow", ["--trainer.logger.tracking_uri", "sqlite:///mlflow.db"]),
    ],
)
def test_other_loggers_come_beside_the_csv_file(
    folder: Path, logger: str, package: str, option: list[str]
) -> None:
    pytest.importorskip(package)
    assert fit("--trainer.max_epochs", "1", "--trainer.logger", logger, *option) == 0
    assert steps(folder / "runs/tiny/version_0/metrics.csv")
    written = {str(path) for path in folder.rglob("*") if path.is_file()}
    kinds = {"tensorboard": "tfevents", "wandb": ".wandb", "mlflow": "mlflow.db"}
    assert any(kinds[package] in name for name in written)


def test_the_csv_file_names_the_folder_wherever_it_stands(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    loggers = "[{class_path: TensorBoardLogger, init_args: {save_dir: boards}}, "
    loggers += "{class_path: CSVLogger, init_args: {save_dir: own, name: run}}]"
    (folder / "loggers.yaml").write_text(f"trainer: {{max_epochs: 1, logger: {loggers}}}")
    assert fit("-c", "loggers.yaml") == 0
    files = {path.name for path in (folder / "own/run/version_0").rglob("*")}
    assert {"metrics.csv", "config.yaml", "gap.png", "last.ckpt"} <= files
    assert any("tfevents" in path.name for path in (folder / "boards").rglob("*"))
    assert not (folder / "runs").exists()


def test_missing_package_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpd_cli.cli.loggers.find_spec", lambda name: None)
    assert fit("--trainer.logger", "WandbLogger") == 1
    error = capsys.readouterr().err
    assert "gpd-cli[wandb]" in error
    assert "Traceback" not in error
    assert not Path("runs").exists()


def test_run_without_logger_has_a_folder_of_its_own(folder: Path) -> None:
    options = ["--trainer.max_epochs", "1", "--trainer.logger", "false"]
    assert fit(*options) == 0
    first = folder / "runs/tiny/version_0"
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert first / "checkpoints/best.ckpt" in before
    assert fit(*options, "--model.optimizer.lr", "0.01") == 0
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert (folder / "runs/tiny/version_1/checkpoints/best.ckpt").is_file()
    assert {path.name for path in folder.iterdir()} == {"tiny.yaml", "runs"}


@pytest.mark.parametrize("others", [[], ["--trainer.logger", "TensorBoardLogger"]])
def test_root_folder_moves_the_run(folder: Path, others: list[str]) -> None:
    if others:
        pytest.importorskip("tensorboard")
        others = [*others, "--trainer.logger.save_dir", "far/boards"]
    options = ["--trainer.max_epochs", "1", "--trainer.default_root_dir", "far/away"]
    assert fit(*options, *others) == 0
    for name in ("metrics.csv", "config.yaml", "gap.png", "checkpoints/last.ckpt"):
        assert (folder / "far/away/runs/tiny/version_0" / name).is_file()
    assert {path.name for path in folder.iterdir()} == {"tiny.yaml", "far"}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("configs/digits.yaml", "digits"),
        ("configs/cifar100/alone.yaml", "alone"),
        ("configs/imagenet/scratch/resnet18.yaml", "scratch_resnet18"),
        ("configs/imagenet/finetune/resnet18.yaml", "finetune_resnet18"),
        ("experiments/monday/mine.yaml", "mine"),
    ],
)
def test_name_of_a_run(file: str, name: str, folder: Path) -> None:
    for path in (file, folder / file):
        logger = csv_logger(["fit", "-c", str(path)])
        assert logger["init_args"]["name"] == name


def test_a_configuration_on_the_command_line_gives_no_name(folder: Path) -> None:
    inline = ["-c", "{model: {ratio: 3}, data: {root: /photos/cats}}"]
    for options, name in ((inline, "gpd"), (["-c", "mine.yaml", *inline], "mine")):
        assert csv_logger(["fit", *options])["init_args"]["name"] == name


def test_recipes_have_names_of_their_own() -> None:
    folder = Path(__file__).parents[2] / "configs"
    names = [run_name(path) for path in folder.rglob("*.yaml")]
    recipes = [run_name(path) for path in (folder / "imagenet").glob("*/*.yaml")]
    assert len(recipes) == len(set(recipes)) > 10
    assert all(names.count(name) == 1 for name in recipes)


CHANGED = [
    *("--trainer.max_epochs", "1", "--model.optimizer.lr", "0.0125"),
    *("--data.batch_size", "24", "--trainer.gradient_clip_val", "7.5"),
]


def test_settings_of_a_run_are_beside_its_metrics(folder: Path) -> None:
    assert fit(*CHANGED) == 0
    logged = yaml.safe_load((folder / "runs/tiny/version_0/hparams.yaml").read_text())
    assert logged["model"]["optimizer"]["lr"] == 0.0125
    assert logged["model"]["optimizer"]["momentum"] == 0.9  # a default
    assert logged["model"]["student"] == "resnet18"
    assert logged["data"]["batch_size"] == 24
    assert logged["trainer"]["gradient_clip_val"] == 7.5
    assert logged["seed_everything"] == 0


def test_settings_of_a_run_are_on_its_board(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    board = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "boards"]
    assert fit(*CHANGED, *board) == 0
    (file,) = folder.glob("boards/**/*tfevents*")
    events = EventAccumulator(str(file.parent)).Reload()
    # As the board reads them: what is said first counts.
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    logged = HParamsPluginData.FromString(content).session_start_info.hparams
    assert logged["model/optimizer/lr"].number_value == 0.0125
    assert logged["data/batch_size"].number_value == 24
    assert logged["model/student"].string_value == "resnet18"
    assert "student" not in logged


# What the terminal shows, and checkpoints


def test_run_without_checkpoints(folder: Path) -> None:
    options = ["--trainer.max_epochs", "1", "--trainer.enable_checkpointing", "false"]
    assert fit(*options) == 0
    assert steps(folder / "runs/tiny/version_0/metrics.csv")
    assert not list(folder.rglob("*.ckpt"))


def test_run_without_bar_on_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    options = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    assert fit(*options) == 0
    assert "epoch 1/1" in capsys.readouterr().out


class Looks(TorchDispatchMode):
    """Counts looks at the number in a tensor, each of which waits for an accelerator."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # torch's one_hot, which torchmetrics calls, looks at classes on the CPU alone.
            files = [frame.filename for frame in traceback.extract_stack()]
            self.count += not any("torchmetrics" in file for file in files)
        return func(*args, **(kwargs or {}))


class CountLooks(Callback):
    """Looks from the start of a batch to that of the next one."""

    counts: ClassVar[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.end()
        self.mode = Looks()
        self.mode.__enter__()

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.end()

    def end(self) -> None:
        if hasattr(self, "mode"):
            self.mode.__exit__(None, None, None)
            CountLooks.counts.append(self.mode.count)
            del self.mode


@pytest.mark.slow
@pytest.mark.parametrize("watched", [False, True])
def test_a_step_waits_for_the_accelerator_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, watched: bool
) -> None:
    """That is for whether its gradients are finite, unless the bar is drawn anew."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: watched)
    monkeypatch.setattr("gpd_cli.training.progress._EVERY", math.inf)
    monkeypatch.setattr(CountLooks, "counts", [])
    options = ["--trainer.callbacks+=test_logging.CountLooks", "--model.ratio", "2"]
    quiet = ["--trainer.log_every_n_steps", "100", "--trainer.max_epochs", "1"]
    assert fit(*options, *quiet) == 0
    counts = sys.modules["test_logging"].CountLooks.counts
    assert len(counts) == 6
    assert counts[1:-1] == [1] * 4  # the last batch has the epoch's scores


class Bar(ProgressBar):
    shown = 0
    values: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Bar.shown += self.enabled
        Bar.values = dict(self.get_metrics(trainer, pl_module))


@pytest.mark.parametrize("watched", [False, True])
def test_bar_of_the_users_own_replaces_ours(
    folder: Path,
    watched: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: watched)
    monkeypatch.setattr(Bar, "shown", 0)
    assert fit("--trainer.max_epochs", "1", "--trainer.callbacks+=test_logging.Bar") == 0
    assert sys.modules["test_logging"].Bar.shown == 1
    assert 0 <= sys.modules["test_logging"].Bar.values["student"] <= 100
    assert "epoch 1/1" not in capsys.readouterr().out
    saved = yaml.safe_load((folder / "runs/tiny/version_0/config.yaml").read_text())
    assert saved["trainer"]["enable_progress_bar"] is None  # another terminal may be watched


def test_live_bar_on_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert fit("--trainer.max_epochs", "1") == 0
    output = capsys.readouterr().out
    assert "epoch     time  student" in output  # the table above the bar
    assert re.search(r"\d/6 student \d+\.\d ", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output))
    assert not re.search(r"^\d\d:\d\d:\d\d epoch 1/1", output, re.MULTILINE)


def test_runs_that_start_at_the_same_moment_have_folders_of_their_own(tmp_path: Path) -> None:
    """A cluster may start several jobs with one configuration at once."""
    loggers = [RunCSVLogger(tmp_path, "runs") for _ in range(3)]
    assert [logger.version for logger in loggers] == [0, 0, 0]  # none has a folder yet
    for number, logger in enumerate(loggers):
        logger.experiment.log_metrics({"epoch": number}, number)
        logger.save()
    assert [logger.version for logger in loggers] == [0, 1, 2]
    refused = RunCSVLogger(tmp_path, "runs")
    assert refused.version == 3
    (tmp_path / "runs" / "version_3").mkdir()  # that of another run, which has no files yet
    refused.finalize("failed")
    assert (tmp_path / "runs" / "version_3").is_dir()
    addressed = RunCSVLogger(f"file://{tmp_path}", "runs")
    addressed.experiment.log_metrics({"epoch": 0}, 0)
    assert addressed.version == 4
    for number in range(3):
        table = tmp_path / "runs" / f"version_{number}" / "metrics.csv"
        assert table.read_text().splitlines()[1:] == [f"{number},{number}"]


def test_a_remote_folder_has_the_configuration(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no local namesake, in which nobody would look for files."""
    remote = ["--trainer.default_root_dir", "memory://place"]
    assert main(["fit", "-c", "tiny.yaml", *remote, "--trainer.max_epochs", "1"]) == 0
    files = fsspec.filesystem("memory").find("/place")
    names = {Path(name).name for name in files}
    assert {"config.yaml", "metrics.csv", "last.ckpt", "best.ckpt"} <= names
    assert not any(folder.glob("memory*"))
    capsys.readouterr()
    assert main(["fit", "-c", "tiny.yaml", *remote, "--ckpt_path", "last"]) == 1
    assert "--ckpt_path last does not look into memory://place" in capsys.readouterr().err
    fsspec.filesystem("memory").rm("/place", recursive=True)
