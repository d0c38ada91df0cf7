"""What a run logs about itself, and where."""

import csv
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
import yaml

from gpd_cli.__main__ import main

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


def test_gradient_norm_is_that_before_clipping(folder: Path) -> None:
    one = ["--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
    assert fit(*one) == 0
    assert fit(*one, "--trainer.gradient_clip_val", "1e-9") == 0
    first = [steps(folder / f"runs/tiny/version_{k}/metrics.csv")[0] for k in (0, 1)]
    assert first[0]["step"] == 0
    assert first[1]["grad_norm"] == first[0]["grad_norm"] > 0.1


def test_resolved_configuration_is_saved_whole(folder: Path) -> None:
    assert fit("--trainer.max_epochs", "1", "--data.hflip", "0.25") == 0
    saved = yaml.safe_load((folder / "runs/tiny/version_0/config.yaml").read_text())
    assert saved["data"]["hflip"] == 0.25
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


def test_missing_package_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpd_cli.loggers.find_spec", lambda name: None)
    assert fit("--trainer.logger", "WandbLogger") == 1
    error = capsys.readouterr().err
    assert "gpd-cli[wandb]" in error
    assert "Traceback" not in error
    assert not Path("runs").exists()


def test_no_logger_at_all(folder: Path) -> None:
    assert fit("--trainer.max_epochs", "1", "--trainer.logger", "false") == 0
    assert not Path("runs").exists()
