"""Evaluations score networks that were trained: which checkpoint they take, and that they do."""

from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
import timm
import torch
import yaml

from gpd_cli.__main__ import main
from runs import ALONE, TINY

Say = Callable[..., tuple[int, str]]
CONFIG = f"""
model: {{student: resnet18, student_args: {TINY}, num_classes: 10, ratio: 1, branches: 1}}
data: {{image_size: 16, batch_size: 32}}
trainer: {{accelerator: cpu, max_epochs: 1, limit_train_batches: 2, limit_val_batches: 1,
  limit_test_batches: 1}}
"""
EVALUATIONS = ["validate", "test", "predict"]
LAST = ["--ckpt_path", "last"]
CPU = ["--trainer.accelerator", "cpu"]
IN_L = [
    *("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "l"),
    *("--trainer.logger.name", "n"),
]


def configuration(name: str, **trainer: object) -> None:
    content = yaml.safe_load(CONFIG)
    content["trainer"] |= trainer
    Path(name).write_text(yaml.safe_dump(content))


LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of configurations that say where runs are."""
    folder = tmp_path_factory.mktemp("trained")
    with chdir(folder):
        configuration("root.yaml", default_root_dir="elsewhere")
        configuration("logger.yaml", logger=LOGGER | {"init_args": {"save_dir": "l", "name": "n"}})
        Path("base.yaml").write_text("config: root.yaml\nmodel.ratio: 1\n")
        Path("third.yaml").write_text("default_root_dir: third\n")
        assert main(["fit", "-c", "root.yaml"]) == 0
        assert main(["fit", "-c", "logger.yaml"]) == 0
        assert main(["fit", "-c", "base.yaml"]) == 0
        assert main(["fit", "-c", "root.yaml", "--trainer.default_root_dir", "third"]) == 0
    return folder


@pytest.fixture
def say(trained: Path, capfd: pytest.CaptureFixture[str]) -> Say:
    """Run a command in this folder; gives its exit code and what it says to standard error."""

    def run(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        with chdir(trained):
            code = main(list(arguments))
        return code, capfd.readouterr().err

    return run


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (["-c", "root.yaml"], "elsewhere/runs/root/version_0"),
        (["-c", "logger.yaml"], "l/n/version_0"),
        (["-c", "base.yaml"], "elsewhere/runs/base/version_0"),
        (["-c", "elsewhere/runs/root/version_0/config.yaml"], "elsewhere/runs/root/version_0"),
        (["-c", "root.yaml", "--trainer.default_root_dir=third"], "third/runs/root/version_0"),
        (
            ["--trainer.default_root_dir", "third", "-c", "root.yaml"],
            "elsewhere/runs/root/version_0",
        ),
        (
            [*IN_L, "-c", "root.yaml"],
            "l/n/version_0",
        ),
        (["-c", "root.yaml", "--trainer", "third.yaml"], "third/runs/root/version_0"),
        (["-c", "root.yaml", "-c", "{seed_everything: 1}"], "elsewhere/runs/root/version_0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_last_checkpoint_is_that_of_the_runs_that_fit_makes(
    where: list[str], found: str, say: Say
) -> None:
    code, errors = say("test", *where, *LAST)
    assert code == 0, errors
    assert f"{found}/" in errors
    assert "there is no checkpoint" not in errors


def test_the_last_checkpoint_brings_the_network_and_its_data(say: Say) -> None:
    code, errors = say("validate", *IN_L, *LAST, *CPU, "--data.batch_size", "9")
    assert code == 0, errors
    assert "l/n/version_0/checkpoints/" in errors


@pytest.mark.parametrize("command", EVALUATIONS)
def test_evaluations_are_refused_where_there_is_no_last_checkpoint(command: str, say: Say) -> None:
    for where in (["-c", "root.yaml", "--trainer.default_root_dir", "nowhere"], []):
        code, errors = say(command, *where, *LAST)
        assert code == 1
        (error,) = errors.splitlines()
        assert error.startswith("gpd: error: There is no checkpoint in ")
        assert "--ckpt_path FILE" in error


@pytest.mark.parametrize("command", EVALUATIONS)
def test_evaluations_of_a_network_that_nobody_has_trained_are_refused(
    command: str, say: Say
) -> None:
    for options in (["-c", "root.yaml"], ["--model.student", "resnet18", *ALONE]):
        code, errors = say(command, *options)
        assert code == 2
        (error,) = errors.splitlines()
        assert "--ckpt_path FILE" in error
        assert "--model.student_weights" in error


def test_weights_of_ones_own_are_scored_without_a_checkpoint(trained: Path, say: Say) -> None:
    network = timm.create_model("resnet18", num_classes=10, **TINY)
    torch.save(network.state_dict(), trained / "own.pth")
    code, errors = say("test", "-c", "root.yaml", "--model.student_weights", "own.pth")
    assert code == 0, errors
