"""Each command and configuration in the documentation is one that the program understands."""

from typing import Any

import pytest
import yaml

from documentation import ROOT, blocks, commands, recipe_commands
from gpd_cli.cli.arguments import with_recipes, with_values
from gpd_cli.cli.command_line import COMMANDS, GpdCLI
from gpd_cli.cli.configurations import expanded
from gpd_cli.cli.old_forms import current_arguments
from gpd_cli.cli.standalone import extract_parser, report_parser
from gpd_cli.recipes.names import recipe_names

FOUND = [*commands(), *recipe_commands()]


class ParsersError(Exception):
    """What ends the command line as soon as it has its parsers."""


class Parsing(GpdCLI):
    def parse_arguments(self, parser: Any, args: Any) -> None:
        raise ParsersError(parser)


@pytest.fixture(scope="module")
def parsers() -> dict[str, Any]:
    with pytest.raises(ParsersError) as caught:
        Parsing(["completion"])  # which needs the parsers of all commands
    (trainer,) = caught.value.args
    own = {"extract": extract_parser(), "report": report_parser()}
    return {name: own.get(name, trainer) for name in COMMANDS}


def test_there_are_many() -> None:
    assert len(FOUND) > 40
    assert {arguments[0] for _, arguments in FOUND} == set(COMMANDS)
    recipes = {page for page, _ in FOUND if page.startswith("configs/")}
    others = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    without = {path for path in others - recipes if "/methods/" not in path}
    built_on = ("cifar100/base", "imagenet/cnn", "imagenet/rvt")
    assert without == {f"configs/{name}.yaml" for name in built_on}


@pytest.mark.parametrize(
    ("page", "arguments"), FOUND, ids=[f"{page}-{number}" for number, (page, _) in enumerate(FOUND)]
)
def test_command(page: str, arguments: list[str], parsers: dict[str, Any], tmp_path: Any) -> None:
    name, *rest = arguments
    if name == "recipes":
        assert not rest or rest[0] in recipe_names()
        return
    if name == "completion":
        assert rest in (["bash"], ["zsh"])
        return
    if "--model.method.help" in rest or "--resume" in rest or "mine.Net" in rest:
        return  # what these do is tested beside their code
    rest = [word for word in rest if word != "--print_config"]
    (tmp_path / "any.yaml").write_text("model: {student: resnet18}")
    stands_for = {"CONFIG": str(tmp_path / "any.yaml"), "C.yaml": str(tmp_path / "any.yaml")}
    arguments = with_recipes([name, *(stands_for.get(word, word) for word in rest)])
    # Files need not be there to be parsed; what a checkpoint says of the student is said here.
    if name in ("validate", "test", "predict"):
        arguments += ["--model.student", "resnet18"]
    parser = parsers[name]
    line = arguments[1:] if name in ("extract", "report") else current_arguments(arguments)
    parser.parse_args(expanded(with_values(line)))


def test_configurations(parsers: dict[str, Any], tmp_path: Any) -> None:
    for number, block in enumerate(blocks("yaml")):
        path = tmp_path / f"{number}.yaml"
        content = {"model": {"student": "resnet18"}} | yaml.safe_load(block.text)
        content["model"].setdefault("student", "resnet18")
        path.write_text(yaml.safe_dump(content))
        parsers["fit"].parse_args(["fit", "-c", str(path)])
