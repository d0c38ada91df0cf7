"""Evaluation of a run: from its checkpoint alone, and by several processes."""

import csv
import os
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch import Trainer

from gpd_cli.__main__ import main
from gpd_cli.cli.configurations import chosen_checkpoint
from gpd_cli.commands.predictions import PredictionTable
from gpd_cli.data.streams import Stream
from gpd_cli.errors import DataError

TINY = {"in_chans": 1, "layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
STUDENT = [
    *("--model.student", "resnet18", "--model.num_classes", "10"),
    *("--model.student_args", str(TINY), "--model.branches", "1"),
    *("--data.image_size", "16", "--data.batch_size", "32", "--trainer.accelerator", "cpu"),
]
FAST = [
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"),
    *("--trainer.limit_val_batches", "1"),
]
CPU = ["--trainer.accelerator", "cpu"]
EVALUATIONS = ["validate", "test", "predict"]


def fit(folder: Path, *options: str) -> Path:
    """Train, and return the last checkpoint."""
    with chdir(folder):
        assert main(["fit", *STUDENT, *FAST, *options]) == 0
    return folder / "runs" / "gpd" / "version_0" / "checkpoints" / "last.ckpt"


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt from an assistant and no labels; the files of weights are gone."""
    folder = tmp_path_factory.mktemp("distilled")
    file = folder / "static.pth"
    torch.save(timm.create_model("resnet18", num_classes=10, **TINY).state_dict(), file)
    network = f"args: {TINY}, weights: {file}"
    static = [
        *("--model.static_teacher.name", "resnet18", "--model.static_teacher.args", str(TINY)),
        *("--model.static_teacher.weights", str(file), "--model.ce_weight", "0"),
        *("--model.assistants", f"[{{name: resnet18, {network}}}]"),
        *("--model.method", "DKD", "--model.method.temperature", "2.0"),
        *("--model.static_warmup_epochs", "2", "--model.stages", "[layer1]"),
        *("--model.static_teacher.stages", "[layer1]"),
    ]
    last = fit(folder, *static)
    file.unlink()
    return last


@pytest.mark.parametrize("command", EVALUATIONS)
@pytest.mark.parametrize("configured", [False, True], ids=["checkpoint", "configuration"])
def test_static_teachers_are_not_needed_for_evaluation(
    command: str,
    configured: bool,
    distilled: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    saved = str(distilled.parents[1] / "config.yaml")
    output = ["--output", "table.csv"] if command == "predict" else []
    limit = f"--trainer.limit_{'val' if command == 'validate' else command}_batches"
    options = [*CPU, *output, limit, "1", "--trainer.logger", "false"]
    with chdir(tmp_path):
        before = ["-c", saved] if configured else []
        code = main([command, *before, "--ckpt_path", str(distilled), *options])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert ("teacher_top1" in out) or len(table(tmp_path / "table.csv")) == 32


# Several processes


def predict(folder: Path, last: Path, *options: str) -> list[dict[str, str]]:
    """The table that a process of its own, or several, write."""
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "gpd_cli", "predict", f"--ckpt_path={last}", *CPU, *options],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Predictions written to") == 1
    return table(folder / "predictions.csv")


@pytest.mark.slow
def test_processes_write_the_table_of_one(last: Path, tmp_path: Path) -> None:
    one = predict(tmp_path / "one", last)
    two = predict(tmp_path / "two", last, "--trainer.devices", "2")
    assert [row["file"] for row in one] == [str(number) for number in range(360)]
    assert len({tuple(row.values())[1:] for row in one}) > 100  # rows can be told apart
    for row, expected in zip(two, one, strict=True):
        for name, value in expected.items():
            if name.endswith("probability"):
                assert float(row[name]) == pytest.approx(float(value), abs=2e-6)
            else:
                assert row[name] == value


class Spread(Trainer):
    """One of two processes."""

    world_size = 2

    def __init__(self, loader: object) -> None:
        super().__init__(accelerator="cpu", logger=False, enable_progress_bar=False)
        self.predict_loop._combined_loader = loader


def test_streams_are_predicted_by_one_process() -> None:
    class Combined:
        flattened = (torch.utils.data.DataLoader(Stream([], training=False)),)

    with pytest.raises(DataError, match=r"--trainer\.devices 1"):
        PredictionTable(Path("p.csv")).on_predict_start(Spread(Combined()), None)


# Which checkpoint


TWO, THREE = "--ckpt_path=two.ckpt", "--ckpt_path=three.ckpt"
WAYS = [
    [TWO, THREE],
    ["--ckpt_path", "two.ckpt", "--ckpt_path", "three.ckpt"],
    ["-c", "two.yaml", "-c", "three.yaml"],
    ["-c", "two.yaml", THREE],
    ["-c", "other.yaml", "--config=three.yaml"],
    [TWO, "--config", "three.yaml"],
    [THREE, "-c", "none.yaml"],
    ["-c", "{ckpt_path: two.ckpt}", "-c", "{ckpt_path: three.ckpt}"],
    ["-c", "built.yaml"],
    ["-c", "two.yaml", "-c", "{config: three.yaml}"],
]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A folder with configurations that name checkpoints."""
    for name in ("two", "three"):
        (tmp_path / f"{name}.yaml").write_text(f"ckpt_path: {name}.ckpt\n")
    (tmp_path / "none.yaml").write_text("ckpt_path: null\n")
    (tmp_path / "other.yaml").write_text("seed_everything: 0\n")
    (tmp_path / "built.yaml").write_text("config: three.yaml\nckpt_path: null\n")
    return tmp_path


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_last_checkpoint_named_is_read(way: list[str], checkpoints: Path) -> None:
    with chdir(checkpoints):
        assert chosen_checkpoint(["validate", *way, "--trainer.devices", "1"]) == "three.ckpt"


@pytest.mark.slow
def test_evaluation_with_the_last_of_several_checkpoints(
    last: Path, checkpoints: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (checkpoints / "two.ckpt").symlink_to(last)
    (checkpoints / "three.ckpt").symlink_to(fit(checkpoints, "--model.ratio", "3"))
    found = []
    with chdir(checkpoints):
        for way in [[THREE], *WAYS]:
            capfd.readouterr()
            code = main(["validate", *way, *CPU, "--trainer.limit_val_batches", "1"])
            out, err = capfd.readouterr()
            assert code == 0, (way, err)
            found.append([line for line in out.splitlines() if "_ce" in line])
    assert found[0]
    assert all(other == found[0] for other in found)
