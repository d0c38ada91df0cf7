"""The table of methods says which of them differ from their recipes when they are named alone."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpd_cli.distill import methods

ROOT = Path(__file__).parents[2]
ROWS = dict(
    re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", (ROOT / "docs/distilling.md").read_text(), re.M)
)


def without_its_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a recipe sets otherwise than the method's class."""
    method = recipe.pop("model.method")
    defaults = inspect.signature(getattr(methods, method["class_path"].split(".")[-1])).parameters
    settings = method.get("init_args", {})
    return recipe | {k: v for k, v in settings.items() if v != defaults[k].default}


def test_every_method_of_a_recipe_is_in_the_table() -> None:
    assert {name.lower() for name in ROWS} == {
        path.stem for path in ROOT.glob("configs/methods/*.yaml") if "standardized" not in path.stem
    }


@pytest.mark.parametrize("name", ROWS)
def test_methods_that_are_the_same_alone_and_in_their_recipe_are_said_to_be(name: str) -> None:
    recipe = yaml.safe_load((ROOT / f"configs/methods/{name.lower()}.yaml").read_text())
    differs = without_its_defaults(recipe)
    assert (ROWS[name] == "the same") == (differs == {})
    for setting in differs:
        if setting.startswith("model."):
            continue  # said in words: cross-entropy, warm-up
        assert f"`{setting}`" in ROWS[name]
