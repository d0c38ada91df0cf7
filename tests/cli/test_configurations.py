"""Configurations that build on others, or write their settings in several forms."""

import os
import sys
import threading
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpd_cli.__main__ import main
from gpd_cli.cli.configurations import (
    chosen_checkpoint,
    chosen_image_size,
    chosen_weights,
    load_configuration,
    load_yaml,
    with_pipes_read,
)

BASE = """
model: {student: cifar_resnet8, num_classes: 10, ratio: 3, optimizer: {lr: 0.7, momentum: 0.5}}
data: {image_size: 24, batch_size: 5}
trainer: {max_epochs: 7, accelerator: cpu}
"""
OWN = """
from lightning.pytorch import LightningDataModule


class Data(LightningDataModule):
    def __init__(self, size: int = 3) -> None:
        super().__init__()
"""


@pytest.fixture
def settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that returns the settings that a configuration leads to."""

    def read(text: str, base: str = BASE) -> Any:
        (tmp_path / "base.yaml").write_text(base)
        (tmp_path / "c.yaml").write_text(text)
        with chdir(tmp_path):
            assert main(["fit", "-c", "c.yaml", "--print_config"]) == 0
        return yaml.safe_load(capsys.readouterr().out)

    return read


def test_a_group_changes_only_its_own_settings_of_the_base(settings: Any) -> None:
    found = settings("""
data: {batch_size: 8}
config: base.yaml
model: {branches: 2, optimizer: {momentum: 0.6}}
trainer: {max_epochs: 9}
""")
    model, data, trainer = found["model"], found["data"]["init_args"], found["trainer"]
    assert (model["student"], model["ratio"], model["branches"]) == ("cifar_resnet8", 3, 2)
    assert (model["optimizer"]["lr"], model["optimizer"]["momentum"]) == (0.7, 0.6)
    assert (data["image_size"], data["batch_size"]) == (24, 8)
    assert (trainer["max_epochs"], trainer["accelerator"]) == (9, "cpu")


def test_groups_and_names_with_dots_may_be_mixed(settings: Any) -> None:
    found = settings("""
data.batch_size: 8
model.optimizer.lr: 0.2
model: {student: cifar_resnet8, ratio: 3}
trainer.max_epochs: 9
data: {image_size: 24}
trainer: {accelerator: cpu}
""")
    model, data, trainer = found["model"], found["data"]["init_args"], found["trainer"]
    assert (model["student"], model["ratio"], model["optimizer"]["lr"]) == ("cifar_resnet8", 3, 0.2)
    assert (data["image_size"], data["batch_size"]) == (24, 8)
    assert (trainer["max_epochs"], trainer["accelerator"]) == (9, "cpu")


@pytest.mark.parametrize("form", ["group", "dots"])
def test_data_of_another_class_replaces_that_of_the_base(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    (tmp_path / "other_data.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    own = "data: {class_path: other_data.Data, init_args: {size: 4}}"
    if form == "dots":
        own = "data.init_args.size: 4\ndata.class_path: other_data.Data"
    found = settings(f"config: base.yaml\n{own}")["data"]
    assert found == {"class_path": "other_data.Data", "init_args": {"size": 4}}
    base = f"model: {{student: cifar_resnet8}}\n{own}"
    found = settings("config: base.yaml\ndata: {batch_size: 8}", base)["data"]
    assert found["class_path"] == "gpd_cli.data.ImageData"
    assert found["init_args"]["batch_size"] == 8
    monkeypatch.delitem(sys.modules, "other_data")


def test_settings_of_a_method_are_merged_with_those_of_the_base(settings: Any) -> None:
    base = BASE + "model.method: {class_path: DKD, init_args: {alpha: 3, beta: 4}}"
    for own in ("{init_args: {beta: 2}}", "{class_path: DKD, init_args: {beta: 2}}"):
        found = settings(f"config: base.yaml\nmodel: {{method: {own}}}", base)["model"]["method"]
        assert (found["init_args"]["alpha"], found["init_args"]["beta"]) == (3, 2)


@pytest.mark.parametrize("empty", ["", "{}", "{optimizer: }", "{optimizer: {}}"])
def test_groups_without_settings_change_nothing(settings: Any, empty: str) -> None:
    found = settings(f"config: base.yaml\nmodel: {empty}\ntrainer: {{}}\ndata: {{}}")
    assert (found["model"]["ratio"], found["model"]["optimizer"]["lr"]) == (3, 0.7)
    assert found["data"]["init_args"]["batch_size"] == 5
    assert found["trainer"]["max_epochs"] == 7


def test_arguments_of_a_network_may_have_the_names_of_groups(settings: Any) -> None:
    arguments = {"model": {"a": 1}, "trainer": "x", "data": {"c": None}}
    text = yaml.safe_dump({"config": "base.yaml", "model": {"student_args": arguments}})
    assert settings(text)["model"]["student_args"] == arguments
    assert load_yaml("{model: {a: 1}, data: {c: 1}}") == {"model": {"a": 1}, "data": {"c": 1}}


def test_a_configuration_may_come_through_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "base.yaml").write_text(BASE)
    threading.Thread(target=lambda: pipe.write_text("model.student_weights: w.pth")).start()
    arguments = with_pipes_read(["test", "-c", str(pipe)])
    assert chosen_weights(arguments) == "w.pth"


def test_an_option_in_two_forms_is_no_choice() -> None:
    with pytest.raises(yaml.YAMLError, match=r"option model\.ratio is set a second time"):
        load_configuration("model: {ratio: 3}\nmodel.ratio: 2")


@pytest.mark.parametrize(
    "text",
    [
        "data: {image_size: 24}\nmodel: {student_weights: w.pth}",
        "data.image_size: 24\nmodel.student_weights: w.pth",
        "data.init_args.image_size: 24\nmodel: {student_weights: w.pth}",
        "data: {class_path: ImageData, init_args: {image_size: 24}}\nmodel.student_weights: w.pth",
    ],
)
def test_values_are_known_before_parsing_in_every_form(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    arguments = ["expand", "-c", str(tmp_path / "c.yaml")]
    assert chosen_image_size(arguments) == 24
    assert chosen_weights(arguments) == "w.pth"
    for option in ("--data.image_size", "--data.init_args.image_size"):
        assert chosen_image_size([*arguments, option, "16"]) == 16
        assert chosen_image_size([*arguments, f"{option}=16"]) == 16
    assert chosen_image_size([*arguments, "--data", "{image_size: 16}"]) == 16
    assert chosen_image_size([*arguments, "--data.init_args", "{image_size: 16}"]) == 16
    assert chosen_weights([*arguments, "--model", "{student_weights: v.pth}"]) == "v.pth"


def test_a_checkpoint_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("ckpt_path: 5")
    assert chosen_checkpoint(["test", "-c", str(tmp_path / "c.yaml")]) is None


def test_an_option_and_its_file_may_be_one_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(BASE)
    assert main(["fit", f"-c{tmp_path / 'c.yaml'}", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["ratio"] == 3
    assert main(["fit", "-crecipe:digits", "--print_config"]) == 0


def test_an_expansion_takes_no_checkpoint_and_replaces_no_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("model: {student: cifar_resnet8}")
    command = ["expand", "-c", str(path), "--dry_run"]
    assert main([*command, "--ckpt_path", "last.ckpt"]) == 2
    assert "--model.student_weights FILE" in capsys.readouterr().err
    assert main([*command, "--plan", str(path)]) == 1
    assert "would replace" in capsys.readouterr().err
    assert path.read_text() == "model: {student: cifar_resnet8}"
