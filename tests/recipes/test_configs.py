from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpd_cli.__main__ import main

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def printed(*arguments: str) -> dict[str, Any]:
    output = StringIO()
    with redirect_stdout(output):
        assert main([*arguments, "--print_config"]) == 0
    return yaml.safe_load(output.getvalue())


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, (*path, key))
        else:
            found[(*path, key)] = value
    return found


def written(path: Path) -> dict[tuple[str, ...], Any]:
    """What a file says, with what the file that it builds on says."""
    tree = yaml.safe_load(path.read_text())
    base = tree.pop("config", None)
    own = {tuple(".".join(key).split(".")): value for key, value in leaves(tree).items()}
    return ({} if base is None else written(path.parent / base)) | own


def test_there_is_a_configuration_for_the_demo() -> None:
    assert "digits.yaml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_is_one_of_fit(path: Path) -> None:
    config = printed("fit", "-c", str(path))
    for key, value in written(path).items():
        if "callbacks" in key:
            continue
        found: Any = config
        for part in key:
            # Settings of a class are written with and without init_args.
            found = found[part] if part in found else found["init_args"][part]
        assert found == value, ".".join(key)


PAPER = [path for path in CONFIGS if path.parents[1].name == "imagenet"]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_papers_recipes_have_the_settings_of_its_authors(path: Path) -> None:
    said = {".".join(key): value for key, value in written(path).items()}
    expected = {
        "model.ratio": 2,
        "model.storage": "teacher",
        "model.noise": 1e-4,
        "model.gap_weight": 3.0,
        "model.gap_smoothing": 0.1,
        "trainer.precision": "32-true",
    }
    scratch = path.parent.name != "finetune"
    network = path.stem.partition("_")[0]
    if network == "rvt":
        expected |= {"model.student": "rvt_tiny", "model.branches": 1}
    else:
        expected |= {
            "model.branches": "gpd",
            "model.branch_layers": "3x3_stride1",
            "model.branch_init": "gpd" if scratch else "zero",
            "model.optimizer.decay_all": True,
            "model.student": {"mobilenetv1": "mobilenetv1_relu", "resnet18": "resnet18"}[network],
        }
    if network == "resnet18" and scratch:  # its norms then start as torchvision's
        expected["model.student_args.zero_init_last"] = False
    assert {key: said.get(key) for key in expected} == expected


def test_command_line_goes_before_the_configuration() -> None:
    digits = next(path for path in CONFIGS if path.name == "digits.yaml")
    options = ["--model.ratio", "1", "--model.branches", "1", "--data.batch_size", "7"]
    config = printed("fit", "-c", str(digits), *options)
    assert config["model"]["ratio"] == 1
    assert config["model"]["branches"] == 1
    assert config["data"]["init_args"]["batch_size"] == 7
    assert config["model"]["student"] == "resnet18"


def test_printed_configuration_is_one_of_fit(tmp_path: Path) -> None:
    digits = next(path for path in CONFIGS if path.name == "digits.yaml")
    config = printed("fit", "-c", str(digits))
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(config))
    again = printed("fit", "-c", str(tmp_path / "whole.yaml"))
    assert again["model"] == config["model"]
    assert again["data"] == config["data"]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "expand", "extract"])
def test_every_command_prints_its_configuration_or_help(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    assert "--" in capsys.readouterr().out


def test_unknown_setting_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("model:\n  student: resnet18\n  widen: 2\n")
    assert main(["fit", "-c", str(path)]) != 0
    captured = capsys.readouterr()
    assert "widen" in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "runs").exists()
