"""Recipes by name: `gpd recipes` and ``-c recipe:NAME``, also from an installed wheel."""

import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpd_cli.__main__ import main
from gpd_cli.cli.arguments import with_recipes
from gpd_cli.errors import RecipeError
from gpd_cli.recipes.names import recipe_names, recipe_path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


def said(*arguments: str) -> str:
    output = StringIO()
    with redirect_stdout(output):
        assert main(list(arguments)) == 0
    return output.getvalue()


def printed(*arguments: str) -> dict[str, Any]:
    return yaml.safe_load(said("fit", *arguments, "--print_config"))


def test_names_are_paths_in_configs() -> None:
    assert len(FILES) > 30
    assert {recipe_path(name).resolve() for name in recipe_names()} == set(FILES)


def test_list_has_a_line_for_each_within_80_columns() -> None:
    listed, folder = {}, ""
    for line in said("recipes").splitlines():
        assert len(line) <= 80, line
        if line.startswith("recipe:"):
            folder = line.removeprefix("recipe:")
        elif line.startswith("  "):
            name, description = line.split(maxsplit=1)
            listed[folder + name] = description
    assert sorted(listed) == recipe_names()
    assert listed["imagenet/distill/resnet18_dkd"] == "ResNet-34 -> ResNet-18 by DKD + GPD"


def test_list_answers_without_torch() -> None:
    code = (
        "import sys; from gpd_cli.__main__ import main; code = main(['recipes']); "
        "heavy = {'torch', 'lightning', 'numpy', 'yaml'} & set(sys.modules); "
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_one_is_printed_as_it_is() -> None:
    assert said("recipes", "methods/dist") == (CONFIGS / "methods" / "dist.yaml").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "recipe:methods/dkd"],
        ["-c", "recipe:methods/dkd.yaml"],
        ["-c=recipe:methods/dkd"],
        ["--config", "recipe:methods/dkd"],
        ["--config=recipe:methods/dkd.yaml"],
    ],
)
def test_every_form_of_the_option_takes_a_name(arguments: list[str]) -> None:
    *_, path = with_recipes(["fit", *arguments])[-1].split("=")
    assert Path(path).resolve() == CONFIGS / "methods" / "dkd.yaml"


def test_name_is_as_good_as_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = CONFIGS / "imagenet" / "distill" / "resnet18_dkd.yaml"
    assert printed("-c", "recipe:imagenet/distill/resnet18_dkd") == printed("-c", str(path))


def test_several_are_read_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = printed("-c", "recipe:cifar100/resnet20", "-c", "recipe:methods/at")
    assert config["model"]["student"] == "cifar_resnet20"
    assert config["model"]["method"]["class_path"].endswith(".AT")


def test_configuration_of_ones_own_builds_on_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("config: recipe:imagenet/scratch/resnet18\nmodel.ratio: 3\n")
    model = printed("-c", "mine.yaml")["model"]
    assert (model["student"], model["ratio"], model["storage"]) == ("resnet18", 3, "teacher")


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("imagenet/distil/resnet18_dkd", "imagenet/distill/resnet18_dkd"),
        ("resnet8x4", "cifar100/resnet8x4"),
        ("mothods/kd", "methods/kd"),
        ("../configs/digits", "digits"),
    ],
)
def test_unknown_recipe_is_refused_with_the_nearest(
    wrong: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", f"recipe:{wrong}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"gpd: error: Unknown recipe '{wrong}'; the nearest names are ")
    assert f" {nearest}," in error
    assert error.count("\n") == 1
    assert main(["recipes", wrong]) == 1
    assert capsys.readouterr().err == error


def test_unknown_base_of_ones_own_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("config: recipe:digit\n")
    assert main(["fit", "-c", str(tmp_path / "mine.yaml")]) == 1
    assert "gpd: error: Unknown recipe 'digit'" in capsys.readouterr().err


def test_only_configurations_are_taken_for_recipes() -> None:
    others = ["fit", "--model.student_weights", "recipe:digits", "-c", "recipes.yaml"]
    assert with_recipes(others) == others
    with pytest.raises(RecipeError):
        with_recipes(["fit", "-c", "recipe:"])


@pytest.mark.slow
def test_wheel_has_them(installed: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    gpd = str(installed / "gpd")
    listed = subprocess.run([gpd, "recipes"], cwd=empty, capture_output=True, text=True)
    assert listed.stdout == said("recipes")
    name = "imagenet/distill/rvt_tiny_dkd"
    command = [gpd, "fit", "-c", f"recipe:{name}", "--print_config"]
    result = subprocess.run(command, cwd=empty, capture_output=True, text=True)
    assert yaml.safe_load(result.stdout) == printed("-c", str(CONFIGS / f"{name}.yaml"))
