"""The pages of reference/ show what there is: names that mkdocs does not find it leaves out."""

import re
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import pytest
import yaml

from documentation import ROOT
from gpd_cli.distill import methods

PAGES = sorted((ROOT / "docs/reference").glob("*.md"))
BLOCK = re.compile(r"^::: (\S+)\n((?: {4}.*\n)*)", re.MULTILINE)
SHOWN = [
    (page.name, path, (yaml.safe_load(options) or {}).get("options", {}).get("members"))
    for page in PAGES
    for path, options in BLOCK.findall(page.read_text() + "\n")
]


def found(path: str) -> Any:
    """The module, class or function of a path."""
    owner, _, name = path.rpartition(".")
    try:
        return import_module(path)
    except ModuleNotFoundError:
        return getattr(import_module(owner), name)


@pytest.mark.parametrize(("page", "path", "members"), SHOWN, ids=[path for _, path, _ in SHOWN])
def test_what_a_page_shows_is_there(page: str, path: str, members: list[str] | bool) -> None:
    shown = found(path)
    for name in members or ():
        assert getattr(shown, name).__doc__


def test_the_page_of_losses_has_those_of_all_methods() -> None:
    rooms = [f"{methods.__name__}.{room.name}" for room in iter_modules(methods.__path__)]
    losses = {loss for room in [*rooms, "gpd_cli.distill.gap"] for loss in of(import_module(room))}
    shown = {path.rpartition(".")[2] for page, path, _ in SHOWN if page == "losses.md"}
    assert losses - shown == set()


def of(room: ModuleType) -> list[str]:
    """The losses of a module, without those that it imports."""
    return [
        name
        for name, loss in vars(room).items()
        if name.endswith("_loss") and loss.__module__ == room.__name__
    ]
